"""Trained weights at another image size: the paper's block-diagonal growth, and resampling.

Of a Mixer only the token-mixing MLPs depend on the number of patches. Their weights are images on
the grid of patches: a hidden unit reads an image of incoming weights and writes one of outgoing
weights.

block-diagonal  (section 3 and appendix C of the paper; both sides grow by whole numbers)
    The image is cut into K_h x K_w tiles of the old size, and every tile has its own copy of the
    old token-mixing MLP: S and D_S grow by K_h * K_w. Right after it
        logits(large image) = mean over its tiles of the old logits(tile).
    Tokens are row-major over the whole grid and not tile after tile, so the blocks are permuted.

resample  (any size, larger or smaller; D_S stays)
    The tokens of the new grid are resized to the old one, mixed there, and what the MLP adds is
    resized back. Both resizings are linear maps A (new to old) and B (old to new) whose rows sum
    to one, so they become part of the weights: W_0 A, B W_1, B b_1. Right after it
        token mixing(x) = B . old token mixing(A . x)
    and constant images excite the hidden units exactly as before. With "nearest" and a whole
    factor, the logits of a grid in which every token is repeated are those of the old grid.

Shapes: D hidden units of the token-mixing MLP, (h, w) the old grid, (H, W) the new one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from allmlp.errors import UserError
from allmlp.models.family import Size, Tensors
from allmlp.runtime.device import check_fits_memory

Interpolation = Literal["nearest", "bilinear", "bicubic"]


def whole_factors(old: Size, new: Size, method: str) -> Any:
    """Returns (K_h, K_w) of block-diagonal growth between two grids; None to resample."""
    factors = (new[0] // old[0], new[1] // old[1])
    is_whole = new[0] % old[0] == new[1] % old[1] == 0
    if method == "block-diagonal" and not is_whole:
        raise UserError(
            f"block-diagonal growth multiplies each side by a whole number; {old[0]}x{old[1]} "
            f"patches do not become {new[0]}x{new[1]} this way",
            where="resize_weights",
            fix="resample (or auto) takes any size",
        )
    return factors if is_whole and method != "resample" else None


def how_resized(factors: Size | None) -> str:
    """Returns the method in words."""
    return f"block-diagonal, {factors[0]}x{factors[1]} tiles" if factors else "resampled (nearest)"


def resize_tokens(
    tensors: Tensors,
    old: Any,
    new: Any,
    method: str = "auto",
    interpolation: Interpolation = "nearest",
) -> tuple[Any, str]:
    """Brings a Mixer's token-mixing MLPs to the image size of `new`, see `Family.resize`."""
    if not old.is_plain:
        what = f"this variant ({old.summary()}) cannot be brought to another image size"
        fix = "Only the paper's own token mixing has a rule for that; train it at that size"
        raise UserError(what, fix=fix)
    factors = whole_factors(old.grid, new.grid, method)
    units = math.prod(factors or (1,)) * old.tokens_mlp_dim
    size = "x".join(map(str, new.image_size))
    check_fits_memory(2 * old.num_blocks * new.num_tokens * units, f"token mixing at {size} pixels")
    if factors is None:
        resample(tensors, old, new.grid, interpolation)
        return new, f"resampled ({interpolation})"
    grow_block_diagonal(tensors, old, factors)
    return dataclasses.replace(new, tokens_mlp_dim=units), how_resized(factors)


def grow_block_diagonal(tensors: Tensors, config: Any, factors: Size) -> None:
    """Gives each of K_h x K_w tiles its own copy of the token-mixing MLPs, in place."""
    (high, wide), (h, w), units = factors, config.grid, config.tokens_mlp_dim
    num_tiles, num_tokens = high * wide, high * h * wide * w
    for block in range(config.num_blocks):
        name = f"blocks.{block}.token_mixing"
        incoming = tensors.pop(f"{name}.dense_0.weight").view(units, h, w)
        outgoing = tensors.pop(f"{name}.dense_1.weight").view(h, w, units)
        # The new grid's rows are (tile row, row in the tile), its columns likewise: written into
        # this view, the blocks land where row-major order over the whole grid wants them.
        grown_in = incoming.new_zeros(num_tiles, units, high, h, wide, w)
        grown_out = outgoing.new_zeros(high, h, wide, w, num_tiles, units)
        for row in range(high):
            for column in range(wide):
                tile = row * wide + column
                grown_in[tile, :, row, :, column, :] = incoming
                grown_out[row, :, column, :, tile, :] = outgoing
        bias = tensors[f"{name}.dense_1.bias"].view(h, w)
        tensors[f"{name}.dense_0.weight"] = grown_in.view(num_tiles * units, num_tokens)
        tensors[f"{name}.dense_0.bias"] = tensors[f"{name}.dense_0.bias"].repeat(num_tiles)
        tensors[f"{name}.dense_1.weight"] = grown_out.view(num_tokens, num_tiles * units)
        tensors[f"{name}.dense_1.bias"] = bias.repeat(high, wide).view(num_tokens)


def resample(tensors: Tensors, config: Any, grid: Size, interpolation: Interpolation) -> None:
    """Resizes the weight images of the token-mixing MLPs to another grid of patches, in place;
    "bilinear" and "bicubic" with antialiasing."""
    (h, w), units, num_tokens = config.grid, config.tokens_mlp_dim, grid[0] * grid[1]
    rows_in, columns_in = (
        resizing(new, old, interpolation) for new, old in zip(grid, (h, w), strict=True)
    )
    rows_out, columns_out = (
        resizing(old, new, interpolation) for new, old in zip(grid, (h, w), strict=True)
    )
    for block in range(config.num_blocks):
        name = f"blocks.{block}.token_mixing"
        incoming = tensors.pop(f"{name}.dense_0.weight").view(units, h, w)
        outgoing = tensors.pop(f"{name}.dense_1.weight").view(h, w, units)
        bias = tensors.pop(f"{name}.dense_1.bias").view(h, w)
        # In float64, so that the rounding of the maps does not add to that of the model.
        read = rows_in.T @ (incoming.double() @ columns_in)  # (D, H, W)
        written = rows_out @ (outgoing.double().permute(2, 0, 1) @ columns_out.T)
        added = rows_out @ bias.double() @ columns_out.T
        dtype = incoming.dtype
        tensors[f"{name}.dense_0.weight"] = read.reshape(units, num_tokens).to(dtype)
        tensors[f"{name}.dense_1.weight"] = (
            written.permute(1, 2, 0).reshape(num_tokens, units).to(dtype)
        )
        tensors[f"{name}.dense_1.bias"] = added.reshape(num_tokens).to(dtype)


def resizing(old: int, new: int, interpolation: Interpolation) -> Tensor:
    """Returns the linear map (new, old) that resizes a line of `old` cells; its rows sum to one.

    "nearest" repeats cells where the line grows and averages them where it shrinks.
    """
    identity = torch.eye(old, dtype=torch.float64)
    if interpolation != "nearest":
        # One image, a line in each column. (torch resizes images of width one wrongly.)
        image = identity[None, None]
        matrix = interpolate(image, size=(new, old), mode=interpolation, antialias=True)[0, 0]
    elif new >= old:
        matrix = identity[(torch.arange(new) * 2 + 1) * old // (2 * new)]
    else:
        matrix = resizing(new, old, "nearest").T
    return (matrix / matrix.sum(dim=1, keepdim=True)).contiguous()
