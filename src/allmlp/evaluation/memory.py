"""By how much memory rises while something runs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(act: Callable[[], object], device: torch.device) -> int | None:
    """Runs something and returns by how many bytes memory rose over what was there before.

    On a GPU: torch's allocations at their highest (`torch.cuda.max_memory_allocated`). On a
    processor: the resident set of the process at its highest, which Linux keeps and lets be reset.
    What the allocator has kept of earlier work is given back first, for it would be used again
    without a trace. What lies in the resident set is rounded to pages and may hold what other
    threads do meanwhile; tested against tensors of known size it is right to about a megabyte.

    Args:
        act: to be run once.
        device: whose memory is meant.

    Returns:
        None where the system does not tell (not Linux).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        act()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _RESET.write_text("5")  # the highest so far becomes what it is now
        resident = _of_status("VmRSS")
    except (OSError, KeyError):
        act()
        return None
    act()
    return max(0, _of_status("VmHWM") - resident)


def _of_status(name: str) -> int:
    """Returns a size that Linux tells of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024
