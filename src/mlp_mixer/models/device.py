"""Where a model computes."""

from __future__ import annotations

import torch

from mlp_mixer.errors import UserError


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
