"""Trained weights at another image size: the paper's block-diagonal growth, and resampling.

block-diagonal  each of K_h x K_w tiles of the old size gets a copy of the old token-mixing MLP
                (section 3 and appendix C of the paper; both sides grow by integer factors)
resample        any size: the dense layers W_0 and W_1, b_1 become W_0 A and B W_1, B b_1, where A
                and B resize the tokens from the new grid to the old one and back, with rows that
                sum to one; D_S does not change

docs/weights.md says what each preserves.

Shapes: D hidden units of the token-mixing MLP, (h, w) the old grid, (H, W) the new one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from allmlp.errors import UserError
from allmlp.models.family import Size, Tensors, size_text
from allmlp.runtime.device import check_fits_memory

Interpolation = Literal["nearest", "bilinear", "bicubic"]
TOKENS = "tokens"
Axis = Literal["tokens"] | tuple[int, int]
Weight = tuple[str, tuple[Axis, ...]]


def whole_factors(old: Size, new: Size, method: str) -> Any:
    """Returns (K_h, K_w) for block-diagonal growth between two grids; None means resample."""
    is_whole = new[0] % old[0] == new[1] % old[1] == 0
    if method == "block-diagonal" and not is_whole:
        what = "block-diagonal growth multiplies each side by a whole number; "
        what += f"{size_text(old)} patches do not become {size_text(new)} this way"
        raise UserError(what, where="resize_weights", fix="resample (or auto) takes any size")
    return (new[0] // old[0], new[1] // old[1]) if is_whole and method != "resample" else None


def how_resized(factors: Size | None) -> str:
    return f"block-diagonal, {factors[0]}x{factors[1]} tiles" if factors else "resampled (nearest)"


def resize_tokens(
    tensors: Tensors,
    weights: Sequence[Weight],
    old: Any,
    new: Any,
    method: str = "auto",
    interpolation: Interpolation = "nearest",
) -> tuple[int, str]:
    """Resizes weights that depend on the tokens to the image size of `new`, in place; `old` and
    `new` are a `PatchConfig`. Returns the number of tiles (1 if resampled) and a description.

    `weights` are names inside of a block and what their axes are: `TOKENS`, or (g, D) for g * D
    hidden units, of which every tile gets D in each of the g groups. `interpolation` is for
    resampling; "bilinear" and "bicubic" are antialiased.
    """
    factors = whole_factors(old.grid, new.grid, method)
    tiles = math.prod(factors or (1,))
    blocks = range(old.num_blocks)
    weights = [(f"blocks.{index}.{name}", axes) for index in blocks for name, axes in weights]
    lengths = [
        [new.num_tokens if axis == TOKENS else tiles * math.prod(axis) for axis in axes]
        for _, axes in weights
    ]
    values = sum(map(math.prod, lengths))
    check_fits_memory(values, f"token mixing at {size_text(new.image_size)} pixels")
    if factors is None:
        pairs = list(zip(old.grid, new.grid, strict=True))
        read = tuple(resizing(after, before, interpolation) for before, after in pairs)
        written = tuple(resizing(before, after, interpolation) for before, after in pairs)
        for name, axes in weights:
            tensors[name] = _resampled(tensors.pop(name), axes, read, written)
        return 1, f"resampled ({interpolation})"
    for (name, axes), sizes in zip(weights, lengths, strict=True):
        tensors[name] = _grown(tensors.pop(name), axes, old.grid, factors).view(sizes)
    return tiles, how_resized(factors)


def resize_maps(name: str) -> Callable[[Tensors, Any, Any, str], tuple[Any, str]]:
    """Returns `Family.resize` for one dense layer per block, over the tokens, of this name."""
    weights: list[Weight] = [(f"{name}.weight", (TOKENS, TOKENS)), (f"{name}.bias", (TOKENS,))]

    def resize(tensors: Tensors, old: Any, new: Any, method: str) -> tuple[Any, str]:
        return new, resize_tokens(tensors, weights, old, new, method)[1]

    return resize


def _grown(value: Tensor, axes: tuple[Axis, ...], grid: Size, factors: Size) -> Tensor:
    """Returns a weight, its axes still split, with a copy of `value` for each of the tiles."""
    (h, w), (high, wide) = grid, factors
    small, large, tile_of = [], [], []
    for axis in axes:
        # Rows of the new grid are (tile row, row in the tile), and columns likewise: writing into
        # this view puts the blocks in row-major order over the whole grid.
        if axis == TOKENS:
            small += [h, w]
            large += [high, h, wide, w]
            tile_of.append(lambda row, column: (row, slice(None), column, slice(None)))
        else:
            small += axis
            large += [axis[0], high * wide, axis[1]]
            tile_of.append(lambda row, column: (slice(None), row * wide + column, slice(None)))
    grown, value = value.new_zeros(large), value.reshape(small)
    for row in range(high):
        for column in range(wide):
            grown[tuple(at for place in tile_of for at in place(row, column))] = value
    return grown


def _resampled(
    value: Tensor, axes: tuple[Axis, ...], read: tuple[Tensor, ...], written: tuple[Tensor, ...]
) -> Tensor:
    """Returns a weight on another grid: W A if it reads tokens, B W if it writes them."""
    dtype, old = value.dtype, [matrix.shape[1] for matrix in written]
    value = value.double()  # so that rounding in the maps does not add to that of the model
    if len(axes) == 2 and axes[1] == TOKENS:
        value = (read[0].T @ (value.view(-1, *old) @ read[1])).flatten(1)
    if axes[0] == TOKENS:
        columns = value.view(*old, -1).permute(2, 0, 1)  # (columns, h, w)
        value = (written[0] @ (columns @ written[1].T)).permute(1, 2, 0).flatten(0, 1)
    return (value if len(axes) == 2 else value.flatten()).contiguous().to(dtype)


def resizing(old: int, new: int, interpolation: Interpolation) -> Tensor:
    """Returns the linear map (new, old) that resizes `old` cells to `new`; its rows sum to one."""
    identity = torch.eye(old, dtype=torch.float64)
    if interpolation != "nearest":
        # One image with a line per column. (torch resizes images of width one wrongly.)
        image = identity[None, None]
        matrix = interpolate(image, size=(new, old), mode=interpolation, antialias=True)[0, 0]
    elif new >= old:
        matrix = identity[(torch.arange(new) * 2 + 1) * old // (2 * new)]
    else:
        matrix = resizing(new, old, "nearest").T
    return (matrix / matrix.sum(dim=1, keepdim=True)).contiguous()
