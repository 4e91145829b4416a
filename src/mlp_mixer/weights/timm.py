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
from typing import Any, Literal

from torch import Tensor

from mlp_mixer.preprocessing import Preprocessing

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
) -> Preprocessing | None:
    """Returns the preprocessing that timm's config.json describes, None where it does not.

    Args:
        config: of a model on the hub: "pretrained_cfg" with mean, std, crop_pct, interpolation.
        image_size: (H, W) of the model.
        channels: of the model's input.

    Raises:
        ValueError, TypeError: a value is out of range.
    """
    found = config.get("pretrained_cfg", config)
    if not isinstance(found, dict) or "mean" not in found or "std" not in found:
        return None
    interpolation: Literal["bilinear", "bicubic"]
    interpolation = "bicubic" if found.get("interpolation") == "bicubic" else "bilinear"
    return Preprocessing(
        image_size=image_size,
        resize="squash" if found.get("crop_mode") == "squash" else "resmall-crop",
        channels=channels,
        mean=_one_or_all(found["mean"]),
        std=_one_or_all(found["std"]),
        crop=float(found.get("crop_pct", 0.875)),
        interpolation=interpolation,
    )


def _one_or_all(values: Any) -> float | tuple[float, ...]:
    numbers = tuple(float(each) for each in (values if isinstance(values, list) else [values]))
    return numbers[0] if len(set(numbers)) == 1 else numbers
