"""What the machine can do at best: large products of matrices, in the precision of the models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# (rows, inputs, outputs) of a dense layer: those of the channel mixing of Mixer-B/16 and L/16 with
# 8 and 16 images, and square ones. A GPU takes larger ones to be busy.
_SHAPES = {
    "cpu": ((1568, 768, 3072), (3136, 1024, 4096), (2048, 2048, 2048), (1024, 4096, 4096)),
    "cuda": ((25088, 768, 3072), (50176, 1024, 4096), (8192, 8192, 8192), (16384, 4096, 4096)),
}


@dataclass(frozen=True)
class Peak:
    """The highest rate of products that was seen.

    Attributes:
        gflops: 1e9 operations a second, a multiply-add counted as two.
        shape: (rows, inputs, outputs) of the product that reached it.
        precision: "float32" or "bfloat16".
    """

    gflops: float
    shape: tuple[int, int, int]
    precision: str


def measure_peak(
    device: torch.device,
    precision: str,
    seconds: float,
    clock: Callable[[], float],
    shapes: tuple[tuple[int, int, int], ...] | None = None,
) -> Peak:
    """Returns the rate of the fastest of several large products, through `F.linear`.

    Args:
        device: that computes, with the threads and settings of the models.
        precision: "float32" or "bfloat16".
        seconds: for all of them together; each runs twice at least.
        clock: seconds that only rise.
        shapes: (rows, inputs, outputs) to try; None takes those for the device.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    random = torch.Generator(device).manual_seed(0)
    tried = _SHAPES[device.type] if shapes is None else shapes
    best = Peak(0.0, tried[0], precision)
    for shape in tried:
        rows, inputs, outputs = shape
        x = torch.randn(rows, inputs, generator=random, device=device).to(dtype)
        w = torch.randn(outputs, inputs, generator=random, device=device).to(dtype)
        timed = [_time(x, w, clock) for _ in range(2)][1:]  # the first one warms up
        while sum(timed) < seconds / len(tried):
            timed.append(_time(x, w, clock))
        gflops = 2 * rows * inputs * outputs / min(timed) / 1e9
        if gflops > best.gflops:
            best = Peak(gflops, shape, precision)
    return best


@torch.no_grad()
def _time(x: torch.Tensor, w: torch.Tensor, clock: Callable[[], float]) -> float:
    _wait(x.device)
    started = clock()
    F.linear(x, w)
    _wait(x.device)
    return max(clock() - started, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
