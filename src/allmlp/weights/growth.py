"""Trained weights at another image size, for every family that has a rule for it.

MLP-Mixer            `resolution.py`: the paper's block-diagonal growth, and any other size.
CycleMLP             no layer depends on the size: the weights stay as they are.
Vision Permutator    the maps along a column and along a row, each a picture (place, channel of the
                     segment) -> the same, grow along the places; the segments stay.

For the Vision Permutator, with mlp[i', s', i, s] from place i and channel s to place i' and s':

block-diagonal  (both sides grow by a whole number K)
    A column is cut into K parts of the old length, each with a copy of the old map. The parts still
    meet where the branches are weighed, by the mean over the whole picture; so a picture that is
    K x K copies of another has the logits of that other.
resample  (any size)
    B mlp A, with A that resizes the places from the new to the old number and B back, whose rows
    sum to one: the places are resized, mixed as before, and resized back.

Shapes: S channels of a segment, old and new places in a column or row.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from allmlp.errors import UserError
from allmlp.models.cycle_mlp import CycleMLPConfig
from allmlp.models.layers import ModelConfig
from allmlp.models.mixer import MixerConfig
from allmlp.models.vision_permutator import VisionPermutatorConfig
from allmlp.runtime.device import check_fits_memory
from allmlp.weights.resolution import (
    RESIZE_WEIGHTS,
    ResizeWeights,
    Tensors,
    resize_tokens,
    resizing,
)


def resize_model(
    tensors: Tensors,
    config: ModelConfig,
    image_size: tuple[int, int],
    resize_weights: ResizeWeights = "auto",
) -> tuple[ModelConfig, str]:
    """Changes a model's tensors, in place, to those of another image size.

    Args:
        tensors: by our names, as `model.state_dict()` has them.
        config: the architecture that they belong to.
        image_size: (H, W) in pixels of the new model.
        resize_weights: as `resize_tokens` takes it.

    Returns:
        The new architecture, and how it was reached in words.

    Raises:
        UserError: the architecture cannot have that size, or has no rule that leads to it.
    """
    if isinstance(config, MixerConfig):
        return resize_tokens(tensors, config, image_size, resize_weights)
    if resize_weights not in RESIZE_WEIGHTS:
        raise UserError(
            f"unknown resize_weights {resize_weights!r}", fix=f"Known: {', '.join(RESIZE_WEIGHTS)}"
        )
    if not isinstance(config, CycleMLPConfig | VisionPermutatorConfig):
        what = f"{config.summary()} cannot be brought to another image size"
        raise UserError(what, fix="Leave the image size out")
    try:
        resized = dataclasses.replace(config, image_size=image_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    if isinstance(resized, CycleMLPConfig):
        if resize_weights != "auto":
            what = f"resize_weights {resize_weights!r} has no effect: no weight depends on it"
            raise UserError(what, fix="Leave it out")
        return resized, "the weights stay as they are"
    assert isinstance(config, VisionPermutatorConfig)
    return resized, _resize_permutator(tensors, config, resized, resize_weights)


def _resize_permutator(
    tensors: Tensors,
    old: VisionPermutatorConfig,
    new: VisionPermutatorConfig,
    resize_weights: ResizeWeights,
) -> str:
    """Changes the maps of all blocks, in place; returns how, in words."""
    pixels = "x".join(map(str, new.image_size))
    stages = zip(new.grids, new.dims, new.segments, new.depths, strict=True)
    numbers = sum(
        depth * (height**2 + width**2) * (dim // segments) ** 2
        for (height, width), dim, segments, depth in stages
    )
    check_fits_memory(numbers, f"token mixing at {pixels} pixels")
    (h, w), (height, width) = old.grids[0], new.grids[0]
    is_whole = height % h == 0 and width % w == 0
    if resize_weights == "block-diagonal" and not is_whole:
        raise UserError(
            f"block-diagonal growth multiplies each side by a whole number; {h}x{w} patches do not "
            f"become {height}x{width} in this way",
            fix="resize_weights=resample (or auto) takes any size",
        )
    is_blocks = is_whole and resize_weights != "resample"
    change = grow_map if is_blocks else resample_map
    for stage, index in enumerate(old.stage_indices):
        size = old.dims[stage] // old.segments[stage]
        for block in range(old.depths[stage]):
            for axis, branch in enumerate(("mlp_h", "mlp_w")):
                name = f"network.{index}.{block}.attn.{branch}.weight"
                tensors[name] = change(
                    tensors[name], old.grids[stage][axis], new.grids[stage][axis], size
                )
    if is_blocks:
        return f"block-diagonal, {height // h}x{width // w} tiles"
    return "resampled (nearest)"


def grow_map(weight: Tensor, old: int, new: int, size: int) -> Tensor:
    """Returns the map (new S, new S) with new / old copies of (old S, old S) on its diagonal.

    Args:
        weight: (old S, old S), place by place.
        old, new: places; old divides new.
        size: S.
    """
    return torch.block_diag(*[weight.reshape(old * size, old * size)] * (new // old))


def resample_map(weight: Tensor, old: int, new: int, size: int) -> Tensor:
    """Returns the map (new S, new S): resize to the old places, mix, and resize back.

    Args:
        weight: (old S, old S), place by place.
        old, new: places.
        size: S.
    """
    read, written = resizing(new, old, "nearest"), resizing(old, new, "nearest")
    maps = weight.double().view(old, size, old, size)
    # In float64, so that the rounding of the maps does not add to that of the model.
    resampled = torch.einsum("Pp,psqt,qQ->PsQt", written, maps, read)
    return resampled.reshape(new * size, new * size).to(weight.dtype)
