"""What a device computes well: the precision of products, compiling, threads, memory."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F

from allmlp.errors import UserError

SMALL_STEP = 2e9  # floating-point operations
_threads_are_chosen: ContextVar[bool] = ContextVar("_threads_are_chosen", default=False)


def fast_precision(device: torch.device, operations: int) -> tuple[str, str]:
    """Returns the precision of the products that a device is fast at, and why.

    Args:
        device: that computes.
        operations: of one step; casting costs a small one more than it gains.

    Returns:
        "float32" or "bfloat16", and the rule in words.
    """
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return "bfloat16", "this GPU is fast at it"
        return "float32", "this GPU has no fast bfloat16"
    if operations < SMALL_STEP:
        return "float32", "a small model"
    if has_fast_bfloat16():
        return "bfloat16", "this processor is fast at it"
    return "float32", "this processor has no fast bfloat16"


def check_bfloat16(device: torch.device) -> None:
    """Refuses bfloat16 on a GPU that has none.

    Raises:
        UserError: its compute capability is below 8.0.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            what = f"this GPU has compute capability {major}.{minor}, and bfloat16 needs 8.0"
            raise UserError(what, where="precision", fix="--precision float32")


def has_fast_bfloat16() -> bool:
    """Returns whether the processor multiplies bfloat16 in hardware (AVX512_BF16 or AMX)."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("amx_tile"))


def can_compile(device: torch.device) -> bool:
    """Returns whether torch.compile finds the compiler that it needs."""
    named = os.environ.get("CXX") or os.environ.get("CC")
    if named:
        return shutil.which(named.split()[0]) is not None
    names = ("g++", "clang++", "c++") if device.type == "cpu" else ("gcc", "cc", "clang")
    return any(shutil.which(name) for name in names)


def threads_for(operations: float) -> int:
    """Returns how many processor threads a step of so many operations takes: one, or all there are.

    A small one takes a single thread: it is hundreds of tiny operations, and torch's threads meet
    after each. Where another process takes one of the cores, every meeting waits for the scheduler:
    such a step was 130 times slower on two threads than on one (docs/decisions.md, 9).
    """
    is_small = operations < SMALL_STEP and not _threads_are_chosen.get()
    return 1 if is_small else torch.get_num_threads()


@contextlib.contextmanager
def few_threads(device: torch.device, operations: float) -> Iterator[None]:
    """Takes `threads_for` a step on a processor for the block; the caller's number comes back."""
    before, threads = torch.get_num_threads(), threads_for(operations)
    if device.type != "cpu" or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def torch_set_to(
    device: torch.device, precision: str, num_threads: int | None = None, *, fixed: bool = False
) -> Iterator[None]:
    """Sets torch's threads and products for the block; the caller's own come back after it.

    Args:
        device: that computes.
        precision: of the products; float32 ones on a processor go to oneDNN where they stay so.
        num_threads: of the processor, for small steps too; None leaves them.
        fixed: leave them for small steps too.
    """
    threads = torch.get_num_threads()
    if num_threads is not None:
        check_threads(num_threads)
        torch.set_num_threads(num_threads)
    is_chosen = fixed or num_threads is not None or _threads_are_chosen.get()
    chosen = _threads_are_chosen.set(is_chosen)
    products: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = products.fp32_precision
    try:
        if device.type == "cpu" and precision == "float32":
            _prefer_onednn(products)
        yield
    finally:
        products.fp32_precision = before
        torch.set_num_threads(threads)
        _threads_are_chosen.reset(chosen)


def _prefer_onednn(products: Any) -> None:
    """Lets oneDNN multiply float32 matrices, where that stays float32.

    MKL, torch's own choice, is about half as fast on processors that are not Intel's. By its name
    the setting permits bfloat16; what this processor really does with it is measured here.
    """
    before = products.fp32_precision
    random = torch.Generator().manual_seed(0)
    x, w = (torch.randn(256, 256, generator=random) for _ in range(2))
    exact = x.double() @ w.double().T
    products.fp32_precision = "bf16"
    if (F.linear(x, w) - exact).abs().max() > 1e-5 * exact.abs().max():
        products.fp32_precision = before


def check_threads(num_threads: int) -> None:
    """Raises UserError for more threads than a machine can use: the system may give no more."""
    most = max(256, 8 * (os.cpu_count() or 1))
    if not 1 <= num_threads <= most:
        what = f"threads must be from 1 to {most} on this machine, got {num_threads}"
        raise UserError(what, where="num_threads", fix="Leave it out: torch takes the cores")


def free_memory(device: torch.device) -> int | None:
    """Returns how many bytes can still be had on the device; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _memory("MemAvailable")


def total_memory(device: torch.device) -> int | None:
    """Returns the bytes of the device, of a processor with what it can swap; None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return _memory("MemTotal", "SwapTotal")


def _memory(*names: str) -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return sum(int(lines[name].split()[0]) * 1024 for name in names)
    except (OSError, KeyError, ValueError):
        return None


def refuse_if_too_large(num_values: int, what: str, device: str | torch.device = "cpu") -> None:
    """Raises UserError where so many float32 values are more than all memory of the device."""
    there, needed = total_memory(torch.device(device)) or 2**40, 4 * num_values
    if needed > there:
        gibibytes = f"{needed / 2**30:,.0f} GiB, the machine has {there / 2**30:,.0f}"
        raise UserError(f"{what} needs {gibibytes}", fix="Take a smaller number")
