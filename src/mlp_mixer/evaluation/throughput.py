"""What a model costs: parameters and floating-point operations."""

from __future__ import annotations

from torch import nn


def count_parameters(model: nn.Module) -> int:
    """Returns the number of trained values in the model."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_text(flops: int) -> str:
    """Returns "25.2 GFLOPs" or, for small numbers, "2.77 MFLOPs"."""
    return f"{flops / 1e9:.3g} GFLOPs" if flops >= 1e8 else f"{flops / 1e6:.3g} MFLOPs"
