"""Vision Permutator: A Permutable MLP-Like Architecture for Visual Recognition (Hou et al. 2022,
arXiv 2106.12368).

Token mixing runs along the height and the width separately. The channels are cut into G segments of
size S. For each segment, a column of the grid is then one vector of H x S numbers, which a dense
layer maps to another such vector, and a row likewise:

    height   h[i', j, g, s'] = sum over i, s of mlp_h[i' S + s', i S + s] x[i, j, g, s]
    width    w[i, j', g, s'] = sum over j, s of mlp_w[j' S + s', j S + s] x[i, j, g, s]

Matches the authors' code (Andrew-Qibin/VisionPermutator), where G is the side of the grid and
images have 224 x 224 pixels. Here G stays the same at other image sizes.

Shapes: N batch, (H, W) grid of a stage, C its channels, G segments of S channels, the segment index
being the slow one; channels-last between stem and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from allmlp.models.family import Family, Shapes, Size, Tensors, named, shape_of, size_text
from allmlp.models.resize import how_resized, resizing, whole_factors
from allmlp.models.staged import Fusion, StagedClassifier, StagedConfig, Window, infer_stages
from allmlp.runtime.device import check_fits_memory


class PermutatorFusion(Fusion):
    """Token mixing of a block: C channels in segments of S on a grid (H, W)."""

    def __init__(self, dim: int, size: int, grid: Size) -> None:
        super().__init__(dim)
        self.size = size
        self.mlp_h = nn.Linear(grid[0] * size, grid[0] * size, bias=False)
        self.mlp_w = nn.Linear(grid[1] * size, grid[1] * size, bias=False)

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
    """Vision Permutator s/14, s/7, m/7 and l/7, and custom widths and depths."""

    config: VisionPermutatorConfig
    why_one_size: ClassVar[str] = "its token mixing has a weight for each place in a row and column"

    def fusion(self, stage: int) -> Fusion:
        config = self.config
        return PermutatorFusion(config.dims[stage], config.sizes[stage], config.grids[stage])


@dataclass(frozen=True, kw_only=True)
class VisionPermutatorConfig(StagedConfig):
    """The architecture of a Vision Permutator.

    Args:
        patch_size: side of a patch in pixels.
        segments: G per stage, a divisor of its channels; in the published models, the side of the
            stage's grid at 224 pixels.
        downsamples: whether the grid is halved after a stage, for all but the last; the patch,
            times two per halving, must divide the image.

    The other fields are those of `StagedConfig`.
    """

    per_stage: ClassVar[tuple[str, ...]] = (*StagedConfig.per_stage, "segments")

    patch_size: int
    segments: tuple[int, ...]
    downsamples: tuple[bool, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        halves, joins = self.downsamples, len(self.dims) - 1
        is_right = isinstance(halves, tuple) and [type(half) for half in halves] == [bool] * joins
        if not is_right:
            raise ValueError(f"downsamples must be {joins} of true and false, got {halves!r}")
        for dim, segments in zip(self.dims, self.segments, strict=True):
            if dim % segments:
                raise ValueError(f"{dim} channels do not divide into {segments} segments")
        unit, words = self.patch_size * 2 ** sum(halves), f"the patch size {self.patch_size}"
        if any(halves):
            words = f"{unit} ({words}, and the grid is halved {sum(halves)}x)"
        self.check_divisible((unit, unit), words)

    @property
    def sizes(self) -> list[int]:
        """S per stage, channels of a segment."""
        return [dim // count for dim, count in zip(self.dims, self.segments, strict=True)]

    @property
    def windows(self) -> list[Window | None]:
        stem = (self.patch_size, self.patch_size, 0)
        return [stem, *((2, 2, 0) if halved else None for halved in self.downsamples)]

    def mixing_macs(self, stage: int) -> int:
        # In both branches, every value of a token meets side x S others.
        lengths = sum(self.grids[stage]) * self.sizes[stage]
        return self.tokens[stage] * self.dims[stage] * lengths

    def summary(self) -> str:
        return f"patch {self.patch_size}, {super().summary()}"


def _resize(
    tensors: Tensors, old: VisionPermutatorConfig, new: VisionPermutatorConfig, method: str
) -> tuple[VisionPermutatorConfig, str]:
    """Resizes the maps of all blocks to the image size of `new`, see `Family.resize`."""
    stages = zip(new.grids, new.sizes, new.depths, strict=True)
    numbers = sum(depth * (h**2 + w**2) * size**2 for (h, w), size, depth in stages)
    check_fits_memory(numbers, f"token mixing at {size_text(new.image_size)} pixels")
    factors = whole_factors(old.grids[0], new.grids[0], method)
    change = resample_map if factors is None else grow_map
    for stage, place in enumerate(old.places):
        for block in range(old.depths[stage]):
            for axis, branch in enumerate(("mlp_h", "mlp_w")):
                name = f"network.{place}.{block}.attn.{branch}.weight"
                sides = old.grids[stage][axis], new.grids[stage][axis]
                tensors[name] = change(tensors[name], *sides, old.sizes[stage])
    return new, how_resized(factors)


def grow_map(weight: Tensor, old: int, new: int, size: int) -> Tensor:
    """Returns (new S, new S) with new / old copies of the (old S, old S) map on its diagonal."""
    return torch.block_diag(*[weight.reshape(old * size, old * size)] * (new // old))


def resample_map(weight: Tensor, old: int, new: int, size: int) -> Tensor:
    """Returns the map (new S, new S): resize to the old places, mix, resize back."""
    read, written = resizing(new, old, "nearest"), resizing(old, new, "nearest")
    maps = weight.double().view(old, size, old, size)
    # In float64, so that rounding in the maps does not add to that of the model.
    resampled = torch.einsum("Pp,psqt,qQ->PsQt", written, maps, read)
    return resampled.reshape(new * size, new * size).to(weight.dtype)


def _infer(shapes: Shapes, written: Size | None, asked: Size | None) -> VisionPermutatorConfig:
    """The segments cannot be inferred; the authors' code has one per row of the grid."""
    fields, places = infer_stages(shapes)
    patch = shape_of(shapes, "patch_embed.proj.weight", 4)[2]
    downsamples = tuple(f"network.{place + 1}.proj.weight" in shapes for place in places[:-1])
    size = written or (224, 224)
    rows, segments = size[0] // patch, []
    for stage, dim in enumerate(fields["dims"]):
        rows = rows // 2 if stage and downsamples[stage - 1] else rows
        side = shape_of(shapes, f"network.{places[stage]}.0.attn.mlp_h.weight", 2)[0]
        if side != dim or rows < 1:
            raise ValueError(
                f"the height is mixed by {side}x{side} weights at {dim} channels, and the file "
                "does not say how many segments: it needs the config.json that we write"
            )
        segments.append(rows)
    own = {"patch_size": patch, "segments": tuple(segments), "downsamples": downsamples}
    return VisionPermutatorConfig(image_size=size, **own, **fields)


_FIRST, _SECOND, _NONE = (True, False, False), (False, True, False), (False, False, False)
_SHAPES = {  # P, depths, dims, segments, where the grid is halved; from the authors' code
    "vip_s14": (14, (4, 3, 8, 3), (384,) * 4, (16,) * 4, _NONE),
    "vip_s7": (7, (4, 3, 8, 3), (192, 384, 384, 384), (32, 16, 16, 16), _FIRST),
    "vip_m7": (7, (4, 3, 14, 3), (256, 256, 512, 512), (32, 32, 16, 16), _SECOND),
    "vip_l7": (7, (8, 8, 16, 4), (256, 512, 512, 512), (32, 16, 16, 16), _FIRST),
}
_FIELDS = "patch_size depths dims segments downsamples"
FAMILY = Family(
    name="vision_permutator",
    title="Vision Permutator",
    paper="Hou et al. 2022, arXiv 2106.12368",
    config=VisionPermutatorConfig,
    build=VisionPermutator,
    architectures=named(VisionPermutatorConfig, _FIELDS, _SHAPES, mlp_ratios=(3, 3, 3, 3)),
    resize=_resize,
    marker=r"network\.\d+\.\d+\.attn\.mlp_[hw]\.",
    infer=_infer,
    crops=dict.fromkeys(("vip_s14", "vip_s7", "vip_m7"), 0.9),  # from the authors' `default_cfgs`
)
