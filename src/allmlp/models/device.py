"""Where a model computes."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from allmlp.errors import UserError

Net = TypeVar("Net", bound=nn.Module)


def put(model: Net, device: str | None) -> Net:
    """Returns the model on a device; None leaves it where it is.

    Args:
        model: any; one that has `on_processor_only` stays on the processor, also of "auto".
        device: a name, as of `choose_device`.

    Raises:
        UserError: no such device, or another than the processor for a model that stays there.
    """
    if not getattr(model, "on_processor_only", False):
        return model if device is None else model.to(choose_device(device))
    refuse_other_devices(device)
    return model


def refuse_other_devices(device: str | None) -> None:
    """Refuses a device that an exported file cannot be brought to.

    Raises:
        UserError: it is named, and not the processor.
    """
    if device not in (None, "auto", "cpu"):
        what = f"device {device!r}: an exported file runs on the processor"
        raise UserError(what, where="--device", fix="Leave it out")


def choose_device(name: str) -> torch.device:
    """Returns the device of a name: "auto" is the GPU where there is one.

    Raises:
        UserError: no such device, or it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}", fix="Known: auto, cpu, cuda, cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}", fix="Known: auto, cpu, cuda, cuda:0")
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= there:
        what = f"device {name!r}: PyTorch finds {there} CUDA GPUs here"
        raise UserError(what, fix="--device cpu" if there == 0 else "--device cuda:0")
    return device


def refuse_exported(model: nn.Module) -> None:
    """Refuses a model that is an exported file, for what needs the weights.

    Raises:
        UserError: it is one.
    """
    if getattr(model, "on_processor_only", False):
        raise no_weights(getattr(model, "source", None))


def no_weights(source: object) -> UserError:
    """Returns the error of an exported file where weights are needed; `source` names it."""
    what = "an exported file has no weights to work on: it only computes logits"
    return UserError(what, where=source, fix="Give the run or the weights it was made from")
