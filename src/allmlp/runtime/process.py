"""What this process asks of the system: threads that soon sleep, and memory that is kept."""

from __future__ import annotations

import ctypes
import os
import sys

from allmlp.errors import UserError

# How long threads of OpenMP that wait for the others look again and again before they sleep: turns
# of a loop (libgomp's default is 300,000, some 3 ms) and ms (Intel's and LLVM's, 200). Meanwhile
# they keep the core from whoever has the work that they wait for (benchmarks/shared_machine.md).
SPIN_COUNT, BLOCK_TIME = 10_000, 1

# glibc's <malloc.h>: what may be set, by number.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NEVER = -1


def sleep_soon() -> None:
    """Lets waiting threads of OpenMP sleep soon, unless the user has chosen.

    OpenMP reads it as torch is imported: after that nothing can be done. Child processes inherit.
    """
    if "torch" in sys.modules or "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    os.environ.setdefault("KMP_BLOCKTIME", str(BLOCK_TIME))


def keep_freed_memory() -> bool:
    """Lets the allocator keep what is freed for what is asked for next.

    glibc gives large blocks back to the system as soon as they are free, and the next layer's
    activations are paged in anew: of a training step of Mixer-S/16 that was 8 per cent
    (benchmarks/training.md). It is done where a model is created, since such a process is there to
    compute: what it frees is there for its next batch, but not for other processes until it ends.

    Returns:
        Whether it was done: not where the user has chosen (MALLOC_..., GLIBC_TUNABLES), nor with
        another C library.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return False
    # An older glibc takes no threshold above 32 MiB; setting one ends that it moves by itself.
    taken = mallopt(_MMAP_THRESHOLD, 2**30) or mallopt(_MMAP_THRESHOLD, 2**25)
    return bool(taken and mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_TOP_PAD, 2**26))


def open_standard_streams() -> None:
    """Opens /dev/null where standard input, output or error is closed, as in `mixer ... <&-`.

    The next file to be opened would take its number, and get what is meant for the stream.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            if null != number:
                os.close(null)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))


def is_main_process() -> bool:
    """Returns whether this is the only process, or of torchrun's the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def refuse_removed_folder() -> None:
    """Raises UserError where the working directory is no longer there; torch would not load."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        what = "the working directory has been removed"
        raise UserError(what, fix="Change into a folder that exists: cd") from error
