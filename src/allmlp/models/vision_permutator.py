"""Vision Permutator: A Permutable MLP-Like Architecture for Visual Recognition (Hou et al. 2022,
arXiv 2106.12368).

Token mixing goes along the height and along the width apart. The channels are cut into G segments
of S; a column of the grid is then, for each segment, one vector of H x S numbers, which a dense
layer maps to another such vector, and likewise a row:

    height   h[i', j, g, s'] = sum over i, s of mlp_h[i' S + s', i S + s] x[i, j, g, s]
    width    w[i, j', g, s'] = sum over j, s of mlp_w[j' S + s', j S + s] x[i, j, g, s]

Equal to its authors' code (Andrew-Qibin/VisionPermutator), in which G is the side of the grid and
H S = C, so that both maps are C x C and pictures have 224 x 224 pixels. Here G stays what it is
when the size of the picture is another one, also a rectangular one: the maps are then H S x H S
and W S x W S.

Shapes: N batch, (H, W) a stage's grid, C its channels, G segments of S channels, the segment being
the slow index; channels come last between stem and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from allmlp.models.layers import is_number
from allmlp.models.staged import (
    Block,
    Convolution,
    Fusion,
    StagedClassifier,
    StagedConfig,
    blocks_and_head_macs,
    checked,
    drop_rates,
)


@dataclass(frozen=True, kw_only=True)
class VisionPermutatorConfig(StagedConfig):
    """The architecture of a Vision Permutator.

    Args:
        patch_size: side of a patch in pixels.
        segments: G of each stage, which divides its channels; the published models have the side of
            the stage's grid at 224 pixels.
        downsamples: for each but the last stage, whether the grid is halved after it; the patch,
            times two for each, must divide the image.

    The other fields are those of `StagedConfig`.

    Raises:
        ValueError: a value is out of range, the image does not divide into such grids, or channels
            not into segments.
    """

    patch_size: int
    segments: tuple[int, ...]
    downsamples: tuple[bool, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "segments", checked("segments", self.segments))
        self.check_stages("depths", "segments")
        halves = self.downsamples
        halves = tuple(halves) if isinstance(halves, list | tuple) else halves
        is_right = isinstance(halves, tuple) and len(halves) == len(self.dims) - 1
        if not is_right or not all(isinstance(each, bool) for each in halves):
            what = f"downsamples must be {len(self.dims) - 1} of true and false"
            raise ValueError(f"{what}, got {halves!r}")
        object.__setattr__(self, "downsamples", halves)
        if not is_number(self.patch_size):
            what = "patch_size must be a whole number of at least 1"
            raise ValueError(f"{what}, got {self.patch_size!r}")
        for dim, segments in zip(self.dims, self.segments, strict=True):
            if dim % segments:
                raise ValueError(f"{dim} channels do not divide into {segments} segments")
        for old, new, halved in zip(self.dims, self.dims[1:], halves, strict=False):
            if old != new and not halved:
                what = f"the channels change from {old} to {new} where the grid is not halved"
                raise ValueError(f"{what}: no published model does")
        unit = self.patch_size * 2 ** sum(halves)
        height, width = self.image_size
        if height % unit or width % unit:
            near = [max(1, round(side / unit)) * unit for side in (height, width)]
            halved = {0: "", 1: ", as the grid is halved once"}
            why = halved.get(sum(halves), f", as the grid is halved {sum(halves)} times")
            patch = f"the patch size {self.patch_size}"
            raise ValueError(
                f"image size {height}x{width} is not divisible by "
                f"{patch if unit == self.patch_size else f'{unit} ({patch}{why})'}; "
                f"the nearest that is: {near[0]}x{near[1]}"
            )

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each stage."""
        height, width = (side // self.patch_size for side in self.image_size)
        grids = [(height, width)]
        for halved in self.downsamples:
            height, width = (height // 2, width // 2) if halved else (height, width)
            grids.append((height, width))
        return tuple(grids)

    @property
    def stage_indices(self) -> tuple[int, ...]:
        """The place of each stage in `network`, where convolutions stand between them."""
        found = [0]
        for halved in self.downsamples:
            found.append(found[-1] + 1 + halved)
        return tuple(found)

    @property
    def flops(self) -> int:
        """Operations of one image, a multiply-add counted as two.

        Of convolutions and dense layers; biases, GELU, LayerNorm and what weighs the branches are
        left out, as is usual.
        """
        areas = [height * width for height, width in self.grids]
        stem = areas[0] * self.patch_size**2 * self.in_channels * self.dims[0]
        joins = zip(areas[1:], self.dims, self.dims[1:], self.downsamples, strict=False)
        between = sum(4 * area * old * new for area, old, new, halved in joins if halved)
        mixing = []
        for (height, width), dim, segments in zip(
            self.grids, self.dims, self.segments, strict=True
        ):
            size = dim // segments  # of a segment; every token's dim numbers meet side x size each
            mixing.append(height * width * dim * size * (height + width))
        return 2 * (stem + between + blocks_and_head_macs(self, mixing))

    def summary(self) -> str:
        """Returns the shape in a few words."""
        return f"patch {self.patch_size}, {super().summary()}"


class PermutatorFusion(Fusion):
    """The token mixing of a Vision Permutator's block.

    Args:
        dim: C.
        segments: G.
        grid: (H, W).
    """

    def __init__(self, dim: int, segments: int, grid: tuple[int, int]) -> None:
        super().__init__(dim)
        self.size = dim // segments
        self.mlp_h = nn.Linear(grid[0] * self.size, grid[0] * self.size, bias=False)
        self.mlp_w = nn.Linear(grid[1] * self.size, grid[1] * self.size, bias=False)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = x.unflatten(3, (-1, self.size))  # (N, H, W, G, S)
        columns = parts.permute(0, 3, 2, 1, 4)  # (N, G, W, H, S)
        mixed = self.mlp_h(columns.flatten(3)).view(columns.shape)
        high = mixed.permute(0, 3, 2, 1, 4).reshape(x.shape)
        rows = parts.permute(0, 1, 3, 2, 4)  # (N, H, G, W, S)
        mixed = self.mlp_w(rows.flatten(3)).view(rows.shape)
        wide = mixed.permute(0, 1, 3, 2, 4).reshape(x.shape)
        return high, wide


class VisionPermutator(StagedClassifier):
    """Vision Permutator s/14, s/7, m/7 and l/7, and any other widths and depths."""

    config: VisionPermutatorConfig
    why_one_size: ClassVar[str] = "its token mixing has a weight for each place in a row and column"

    def __init__(self, config: VisionPermutatorConfig) -> None:
        patch = config.patch_size
        stem = Convolution(config.in_channels, config.dims[0], kernel=patch, stride=patch)
        parts: list[nn.Module] = []
        stages = zip(config.dims, config.mlp_ratios, config.segments, config.grids, strict=True)
        drops = drop_rates(config)
        for stage, (dim, ratio, segments, grid) in enumerate(stages):
            if stage and config.downsamples[stage - 1]:
                parts.append(Convolution(config.dims[stage - 1], dim, kernel=2, stride=2))
            blocks = (
                Block(PermutatorFusion(dim, segments, grid), dim, ratio * dim, drop)
                for drop in drops[stage]
            )
            parts.append(nn.Sequential(*blocks))
        super().__init__(config, stem, parts)
