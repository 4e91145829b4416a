"""Process settings: OpenMP spinning, memory allocation, standard streams."""

from __future__ import annotations

import ctypes
import os
import sys

from allmlp.errors import UserError

# How long waiting OpenMP threads spin before they sleep: loop iterations in libgomp (default
# 300,000, some 3 ms) and ms for Intel and LLVM (default 200). A spinning thread may block the core
# that the thread it waits for needs (benchmarks/shared_machine.md).
SPIN_COUNT, BLOCK_TIME = 10_000, 1

# mallopt parameters from glibc's <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NEVER = -1


def sleep_soon() -> None:
    """Makes waiting OpenMP threads sleep soon, unless the user has set this; call it before
    torch is imported."""
    if "torch" in sys.modules or "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    os.environ.setdefault("KMP_BLOCKTIME", str(BLOCK_TIME))


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory, unless the user has set this; returns whether it does. Paging
    the next layer's activations in again takes 8% of a training step of Mixer-S/16
    (benchmarks/training.md)."""
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return False
    # Older glibc accepts at most 32 MiB; setting a threshold also stops glibc from adjusting it.
    taken = mallopt(_MMAP_THRESHOLD, 2**30) or mallopt(_MMAP_THRESHOLD, 2**25)
    return bool(taken and mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_TOP_PAD, 2**26))


def open_standard_streams() -> None:
    """Opens /dev/null for closed standard streams, whose descriptors other files would get."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))


def is_main_process() -> bool:
    """Returns whether this is the only process, or the one that prints under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def refuse_removed_folder() -> None:
    """Raises UserError if the working directory was removed; torch would fail to load."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        what = "the working directory has been removed"
        raise UserError(what, fix="Change into a folder that exists: cd") from error
