"""timm's names of a Mixer's tensors, and the preprocessing that stands beside its weights.

    stem.proj.{weight,bias}
    blocks.{i}.norm{1,2}.{weight,bias}
    blocks.{i}.{mlp_tokens,mlp_channels}.fc{1,2}.{weight,bias}
    norm.{weight,bias}   head.{weight,bias}

Shapes are torch's, as ours. timm computes the exact GELU, also for weights that Google trained with
the tanh form; loaded from timm's files a model does what timm's does.
Source: timm 1.0, models/mlp_mixer.py.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from allmlp.preprocessing import INTERPOLATIONS, Preprocessing

Tensors = dict[str, Tensor]

_NAMES = re.compile(
    r"(?:stem\.proj|norm|head|blocks\.\d+\.(?:norm[12]|mlp_(?:tokens|channels)\.fc[12]))"
    r"\.(?:weight|bias)"
)
_PAIRS = (  # timm's, ours
    ("stem.proj.", "stem."),
    (".norm1.", ".layer_norm_0."),
    (".norm2.", ".layer_norm_1."),
    (".mlp_tokens.", ".token_mixing."),
    (".mlp_channels.", ".channel_mixing."),
    (".fc1.", ".dense_0."),
    (".fc2.", ".dense_1."),
)


def is_timm(name: str) -> bool:
    """Says whether a name is one of timm's (head.weight is ours as well)."""
    return bool(_NAMES.fullmatch(name))


def to_ours(tensors: Tensors) -> Tensors:
    """Returns the tensors by our names; names that are not timm's stay as they are."""
    return {_renamed(name, 0, 1): value for name, value in tensors.items()}


def from_ours(tensors: Tensors) -> Tensors:
    """Returns the tensors by timm's names."""
    return {_renamed(name, 1, 0): value for name, value in tensors.items()}


def _renamed(name: str, old: int, new: int) -> str:
    for pair in _PAIRS:
        name = name.replace(pair[old], pair[new])
    ends = ("norm.", "pre_head_layer_norm.")
    return ends[new] + name.removeprefix(ends[old]) if name.startswith(ends[old]) else name


def preprocessing_of(
    config: dict[str, Any], image_size: tuple[int, int], channels: int
) -> tuple[Preprocessing | None, list[str]]:
    """Returns the preprocessing that timm's config.json describes, and what could not be kept.

    Args:
        config: of a model on the hub: "pretrained_cfg" with mean, std, crop_pct, interpolation,
            crop_mode. What is missing has timm's defaults: bicubic, 0.875, the centre.
        image_size: (H, W) of the model.
        channels: of the model's input.

    Returns:
        None where nothing is described; and notes for the user.

    Raises:
        ValueError, TypeError: a value is out of range.
    """
    found = config.get("pretrained_cfg", config)
    if not isinstance(found, dict) or found.get("mean") is None or found.get("std") is None:
        return None, []
    notes = []
    interpolation = found.get("interpolation") or "bicubic"
    if interpolation not in INTERPOLATIONS:
        notes.append(f"interpolation {interpolation!r} is not offered here; bicubic is used")
        interpolation = "bicubic"
    mode = found.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        notes.append(f"crop mode {mode!r} is not offered here; the centre is cut")
    preprocessing = Preprocessing(
        image_size=image_size,
        # timm's "squash" scales each side and then cuts: the paper's resize-crop.
        resize="resize-crop" if mode == "squash" else "resmall-crop",
        channels=channels,
        mean=_per_channel(found["mean"], channels),
        std=_per_channel(found["std"], channels),
        crop=float(found.get("crop_pct") or 0.875),
        interpolation=interpolation,
    )
    return preprocessing, notes


def image_size_of(config: dict[str, Any]) -> tuple[int, int] | None:
    """Returns (H, W) of the "input_size" in timm's config.json; None where it is not there."""
    found = config.get("pretrained_cfg", config)
    size = found.get("input_size") if isinstance(found, dict) else None
    if not isinstance(size, list) or len(size) != 3 or not all(type(n) is int for n in size):
        return None
    return size[1], size[2]


def _per_channel(values: Any, channels: int) -> float | tuple[float, ...]:
    """One number where all are alike, and their mean for a grey model."""
    numbers = tuple(float(each) for each in (values if isinstance(values, list) else [values]))
    if channels == 1 and len(numbers) == 3:
        return sum(numbers) / 3
    return numbers[0] if len(set(numbers)) == 1 else numbers
