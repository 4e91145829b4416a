"""What training costs: operations, time and memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from allmlp.errors import plural
from allmlp.runtime.device import ComputePolicy
from allmlp.training.config import SGD, Optimizer, TrainConfig

_UNITS = (("day", 86_400), ("h", 3600), ("min", 60), ("s", 1))


def num_images_seen(config: TrainConfig, num_images: int) -> int:
    """Returns how many of `num_images` images a run processes, repetitions included."""
    if config.steps is not None:
        return config.steps * config.batch_size
    return (config.epochs or 0) * num_images


def planned(config: TrainConfig) -> str:
    """Returns the length of a run: "1 epoch" or "1,000 steps"."""
    if config.epochs is not None:
        return plural(config.epochs, "epoch")
    return plural(config.steps or 0, "step")


def operations(flops_per_image: int, images: int, optimizer: Optimizer | None = None) -> int:
    """Returns the floating-point operations of a run.

    A step takes three times the forward pass: itself, the gradient of each layer's input, and that
    of its weights. Sharpness-aware minimisation takes the gradient twice.
    """
    twice = 1.0 - optimizer.sam_start if optimizer is not None and optimizer.sam_rho else 0.0
    return round(3 * flops_per_image * images * (1.0 + twice))


def power(number: int) -> str:
    """Returns a large number as "1.1e16"."""
    digits, _, exponent = f"{number:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"


def duration(seconds: float) -> str:
    """Returns a length of time in its two largest units: "12 min 5 s", "4 days 11 h"."""
    for at, (name, size) in enumerate(_UNITS[:-1]):
        small_name, small = _UNITS[at + 1]
        whole, rest = divmod(round(seconds / small), size // small)
        if whole:
            plural = "s" if name == "day" and whole > 1 else ""
            detail = f" {rest} {small_name}" if rest and whole < 100 else ""
            return f"{whole:,} {name}{plural}{detail}"
    return f"{round(seconds)} s"


def state_copies(optimizer: Optimizer) -> int:
    """Returns how many float32 copies of the weights a run holds: gradient, moments and so on."""
    moments = bool(optimizer.momentum) if isinstance(optimizer, SGD) else 2
    return 2 + moments + bool(optimizer.ema_decay) + bool(optimizer.sam_rho)


def saved_bytes(model: nn.Module, image: Tensor, compute: ComputePolicy) -> int:
    """Returns the bytes that one image (1, channels, H, W) takes from the forward to the backward
    pass.

    They are counted in forward passes of one and of two images, so it holds for every architecture.
    Both are in evaluation mode: no random number is drawn and no running mean changes.
    """
    one, largest = _saved(model, image, compute)
    two, _ = _saved(model, image.repeat(2, 1, 1, 1), compute)
    return two - one + 2 * largest  # a backward pass holds the gradient of the largest as well


def _saved(model: nn.Module, images: Tensor, compute: ComputePolicy) -> tuple[int, int]:
    """Returns the bytes that autograd saves of some images, and those of the largest tensor."""
    sizes: dict[int, int] = {}
    own = {id(parameter) for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if id(tensor) not in own and not isinstance(tensor, DTensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = model.training
    model.eval()
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.enable_grad(), hooks, compute.autocast():
        logits = model(images)  # keeps the tensors, so that no storage has another's address
    model.train(was_training)
    del logits
    return sum(sizes.values()), max(sizes.values(), default=0)
