"""How a run computes: precision of the products, compiling, threads; each choice said in words."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mlp_mixer.errors import UserError
from mlp_mixer.training.config import TrainConfig

SMALL_STEP = 2e9  # floating-point operations
LONG_RUN = 2_000  # steps after which compiling, about a minute, has paid for itself on a GPU


@dataclass(frozen=True)
class Compute:
    """How a run computes.

    Attributes:
        device: where.
        precision: of the products, "float32" or "bfloat16".
        compile: whether torch.compile is used.
        why: what was chosen and by which rule, in words.
    """

    device: torch.device
    precision: str
    compile: bool
    why: str

    def autocast(self) -> torch.autocast:
        """Returns the context in which the model computes."""
        is_half = self.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_half)


def choose_compute(
    config: TrainConfig, device: torch.device, flops: int, num_steps: int, world_size: int = 1
) -> Compute:
    """Returns how the run computes; what the user chose is never changed.

    Args:
        config: of the run.
        device: where it computes.
        flops: of one image's forward pass.
        num_steps: of the whole run.
        world_size: processes that share a step.

    Raises:
        UserError: bfloat16 was asked for on a GPU that has none.
    """
    operations = 3 * flops * config.batch_size // world_size
    reasons = []
    precision = config.precision
    if precision == "auto":
        precision, why = _fast_precision(device, operations)
        reasons.append(f"{precision} ({why})")
    else:
        if precision == "bfloat16" and device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            if major < 8:
                what = f"this GPU has compute capability {major}.{minor}, and bfloat16 needs 8.0"
                raise UserError(what, where="precision", fix="--precision float32")
        reasons.append(precision)
    compiles = config.compile == "on"
    if config.compile == "auto":
        compiles = device.type == "cuda" and num_steps >= LONG_RUN and can_compile(device)
    elif compiles and not can_compile(device):
        compiles = False
        reasons.append("not compiled: no C++ compiler here")
    if compiles:
        reasons.append("compiled")
    return Compute(device, precision, compiles, ", ".join(reasons))


def _fast_precision(device: torch.device, operations: int) -> tuple[str, str]:
    """The precision of the products that this device is fast at, and why."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return "bfloat16", "this GPU is fast at it"
        return "float32", "this GPU has no fast bfloat16"
    if operations < SMALL_STEP:
        return "float32", "a small model"
    if has_fast_bfloat16():
        return "bfloat16", "this processor is fast at it"
    return "float32", "this processor has no fast bfloat16"


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


@contextlib.contextmanager
def settings_of_torch(compute: Compute, config: TrainConfig, flops: int) -> Iterator[None]:
    """Sets torch's threads and products for the block; the caller's own come back after it.

    A step of a small model is hundreds of tiny operations, and torch's threads meet after each.
    Where another process takes one of the cores, every meeting waits for the scheduler: such a step
    was measured 130 times slower on two threads than on one (docs/decisions.md, 9).
    """
    threads = torch.get_num_threads()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif 3 * flops * config.batch_size < SMALL_STEP:
        torch.set_num_threads(1)
    products: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = products.fp32_precision
    try:
        if compute.device.type == "cpu" and compute.precision == "float32":
            _prefer_onednn(products)
        yield
    finally:
        products.fp32_precision = before
        torch.set_num_threads(threads)


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


def free_memory(device: torch.device) -> int | None:
    """Returns how many bytes can still be had on the device; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
