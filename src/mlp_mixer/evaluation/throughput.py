"""What a model costs: parameters and floating-point operations."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mlp_mixer.models.layers import ImageClassifier


def count_parameters(model: nn.Module) -> int:
    """Returns the number of trained values in the model."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_text(flops: int) -> str:
    """Returns "25.2 GFLOPs" or, for small numbers, "2.77 MFLOPs"."""
    return f"{flops / 1e9:.3g} GFLOPs" if flops >= 1e8 else f"{flops / 1e6:.3g} MFLOPs"


def count_flops(model: ImageClassifier) -> int:
    """Returns the floating-point operations of one image, a multiply-add counted as two.

    Counted on shapes alone (the meta device): matrix products and convolutions, as usual; biases,
    GELU and LayerNorm, below one per cent together, are left out.
    """
    shapes = copy.deepcopy(model).to("meta").eval()
    image = torch.empty(1, model.config.in_channels, *model.config.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes(image)
    return counter.get_total_flops()
