"""How a run computes: precision of the products, compiling, threads; each choice said in words."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from allmlp.models.compute import (
    can_compile,
    check_bfloat16,
    fast_precision,
    threads_for,
    torch_set_to,
)
from allmlp.training.config import TrainConfig
from allmlp.weights.download import cache_folder

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
        precision, why = fast_precision(device, operations)
        reasons.append(f"{precision} ({why})")
    else:
        if precision == "bfloat16":
            check_bfloat16(device)
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


def keep_compiled() -> None:
    """Lets a later process find what torch.compile makes in this one, unless the user says where.

    torch's own place for it is the folder for temporary files, which a restart may empty.
    """
    folder = cache_folder() / "compiled"
    with contextlib.suppress(OSError):  # torch's own place, then
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


@contextlib.contextmanager
def settings_of_torch(compute: Compute, config: TrainConfig, flops: int) -> Iterator[None]:
    """Sets torch's threads and products for the block; the caller's own come back after it.

    Evaluations of the run compute with as many threads as its steps.
    """
    threads = config.num_threads
    if threads is None and threads_for(3 * flops * config.batch_size) == 1:
        threads = 1
    with torch_set_to(compute.device, compute.precision, threads, fixed=True):
        yield
