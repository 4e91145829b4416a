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
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU that PyTorch can use", fix="--device cpu")
    return device
