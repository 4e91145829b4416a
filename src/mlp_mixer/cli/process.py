"""What the process of the command asks of the system, before any verb runs."""

from __future__ import annotations

import ctypes
import os

# glibc's <malloc.h>: what may be set, by number.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NEVER = -1


def keep_freed_memory() -> bool:
    """Lets the allocator keep what is freed for what is asked for next.

    glibc gives large blocks back to the system as soon as they are free, and the next layer's
    activations are paged in anew: of a training step of Mixer-S/16 that was 8 per cent
    (benchmarks/training.md). The process of a verb ends with its work, so that nothing is gained by
    giving memory back earlier; a program that imports the package decides this for itself.

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
