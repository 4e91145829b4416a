"""CycleMLP: A MLP-like Architecture for Dense Prediction (Chen et al. 2022, arXiv 2107.10224).

Its token mixing does not depend on the image size. A dense layer over the channels reads
each channel from a neighbouring position: channel c from the one beside it by
    0, +1, -1, 0, +1, -1, ...
along the width in one branch and along the height in the other, zeros beyond the border. So a layer
sees three positions at the cost of one, and many layers see far.

Equal to its authors' code (ShoufaChen/CycleMLP), where it is a deformable convolution whose
offsets are a buffer of the state dict: here the shifts are read from that buffer. The paper's
figure 4 draws them in another order than the code; the code is what was trained.

Shapes: N batch, (H, W) a stage's grid, C its channels; channels come last between stem and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allmlp.errors import UserError
from allmlp.models.layers import Family, check_config, shape_of
from allmlp.models.staged import (
    Block,
    Convolution,
    Fusion,
    StagedClassifier,
    StagedConfig,
    blocks_and_head_macs,
    drop_rates,
    imagenet_preprocessing,
    infer_stages,
)

STEPS = 3  # the cycle of the published models: 0, +1, -1


@dataclass(frozen=True, kw_only=True)
class CycleMLPConfig(StagedConfig):
    """The architecture of a CycleMLP; the grid is halved, rounding up, from stage to stage.

    Args:
        stem_kernel: side of the stem's window in pixels.
        stem_stride: pixels from one window of the stem to the next; the image must be at least that
            large, and may otherwise be of any size.

    The other fields are those of `StagedConfig`.

    Raises:
        ValueError: a value is out of range, or the image is smaller than the stem's stride.
    """

    stem_kernel: int = 7
    stem_stride: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_config(self, "stem_kernel", "stem_stride")
        if self.stem_kernel < self.stem_stride:
            raise ValueError(
                f"a stem_kernel of {self.stem_kernel} pixels with a stem_stride of "
                f"{self.stem_stride} leaves pixels out"
            )
        if min(self.image_size) < self.stem_stride:
            raise ValueError(
                f"image size {self.image_size[0]}x{self.image_size[1]} is below the stem's stride "
                f"of {self.stem_stride} pixels"
            )

    @property
    def stem_padding(self) -> int:
        """Zeros around the image: 2 for the published stem."""
        return (self.stem_kernel - self.stem_stride + 1) // 2

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each stage: 56, 28, 14, 7 at 224 pixels."""
        beyond = 2 * self.stem_padding - self.stem_kernel
        height, width = ((side + beyond) // self.stem_stride + 1 for side in self.image_size)
        return tuple((-(-height // 2**i), -(-width // 2**i)) for i in range(len(self.dims)))

    @property
    def flops(self) -> int:
        """Operations of one image, a multiply-add counted as two.

        Of convolutions and dense layers; biases, GELU, LayerNorm and the weights of the branches
        are left out, as is usual.
        """
        areas = [height * width for height, width in self.grids]
        stem = areas[0] * self.stem_kernel**2 * self.in_channels * self.dims[0]
        joins = zip(areas[1:], self.dims, self.dims[1:], strict=False)
        between = sum(9 * area * old * new for area, old, new in joins)
        mixing = [2 * area * dim**2 for area, dim in zip(areas, self.dims, strict=True)]
        return 2 * (stem + between + blocks_and_head_macs(self, mixing))


Run = tuple[int, int, slice]  # shift down, shift right, the channels that have it


class CycleFC(nn.Module):
    """A dense layer over channels that are each read from a shifted position.

        out[n, i, j] = bias + sum over c of weight[:, c] x[n, i + dy_c, j + dx_c, c]

    with zeros beyond the border. The buffer `offset`, (1, 2C, 1, 1), has dy and dx of each channel
    in turn, the published layout; a state dict may not bring shifts beyond `most` positions.
    """

    offset: Tensor
    half_products: ClassVar[bool] = True  # an export may compute them in bfloat16

    def __init__(self, dim: int, along: str, most: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim, 1, 1))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.most = most
        half = STEPS // 2
        shifts = [(channel + half) % STEPS - half for channel in range(dim)]
        pairs = [(0, shift) if along == "width" else (shift, 0) for shift in shifts]
        # From a list: arithmetic on the meta device would import the compiler, a second's work.
        offset = torch.tensor(pairs, dtype=torch.float32).reshape(1, -1, 1, 1)
        self.register_buffer("offset", offset)
        steps = [(start + half) % STEPS - half for start in range(min(STEPS, dim))]
        is_wide = along == "width"
        self.runs: list[Run] = [
            (0 if is_wide else step, step if is_wide else 0, slice(start, None, STEPS))
            for start, step in enumerate(steps)
        ]
        self.register_load_state_dict_post_hook(_read_offset)

    def forward(self, x: Tensor) -> Tensor:  # (N, H, W, C) -> (N, H, W, C)
        height, width = x.shape[1:3]
        down = [_limited(dy, height) for dy, _, _ in self.runs]
        right = [_limited(dx, width) for _, dx, _ in self.runs]
        top, left = -min(0, *down), -min(0, *right)
        bottom, end = max(0, *down), max(0, *right)
        padded = F.pad(x, (0, 0, left, end, top, bottom))
        shifted = [
            padded[:, top + dy : top + dy + height, left + dx : left + dx + width, channels]
            for dy, dx, (_, _, channels) in zip(down, right, self.runs, strict=True)
        ]
        # The channels are ordered by their shifts now, and so must be the columns of the weight.
        weight = self.weight[:, :, 0, 0]
        columns = torch.cat([weight[:, channels] for _, _, channels in self.runs], dim=1)
        return F.linear(torch.cat(shifted, dim=3), columns, self.bias)


def _limited(shift: int, side: int) -> int:
    """A shift by a whole side or more reads zeros only."""
    return max(-side, min(side, shift))


def _read_offset(module: nn.Module, _: Any) -> None:
    """Reads the shifts from the buffer that has just been loaded."""
    assert isinstance(module, CycleFC)
    if module.offset.is_meta:
        return
    module.runs = runs_of(module.offset, module.most)


def runs_of(offset: Tensor, most: int) -> list[Run]:
    """Returns the shifts of a published `offset` buffer, and the channels of each; UserError if one
    is not whole or larger than `most`, the image."""
    values = offset.detach().reshape(-1, 2).double().cpu()
    wrong = ~(torch.isfinite(values) & (values == values.round()))
    if wrong.any():
        value = float(values[wrong][0])
        what = f"CycleMLP shifts by whole positions, and an offset is {value:g}"
        raise UserError(what, fix="Only weights with integer offsets are computed here")
    if (values.abs() > most).any():
        value = float(values.abs().max())
        what = f"an offset of CycleMLP shifts by {value:g} positions, beyond an image of {most}"
        raise UserError(what, fix="Is it the right file?")
    of_shift: dict[tuple[int, int], list[int]] = {}
    for channel, (dy, dx) in enumerate(values.long().tolist()):
        of_shift.setdefault((dy, dx), []).append(channel)
    return [(*shift, run) for shift, found in of_shift.items() for run in _slices(found)]


def _slices(channels: list[int]) -> list[slice]:
    """Returns rising numbers as slices with a step: one for the published patterns."""
    found, at = [], 0
    while at < len(channels):
        end = at + 1
        step = channels[end] - channels[at] if end < len(channels) else 1
        while end < len(channels) and channels[end] - channels[end - 1] == step:
            end += 1
        found.append(slice(channels[at], channels[end - 1] + 1, step))
        at = end
    return found


class CycleFusion(Fusion):
    """The token mixing of a block. The published names call the branch along the width `sfc_h` and
    the one along the height `sfc_w`."""

    def __init__(self, dim: int, most: int) -> None:
        super().__init__(dim)
        self.sfc_h = CycleFC(dim, "width", most)
        self.sfc_w = CycleFC(dim, "height", most)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.sfc_h(x), self.sfc_w(x)


class CycleMLP(StagedClassifier):
    """CycleMLP B1 to B5, and any other widths and depths."""

    config: CycleMLPConfig
    why_one_size: ClassVar[str] = "load it with another image_size, the weights are the same"

    def __init__(self, config: CycleMLPConfig) -> None:
        stem = Convolution(
            config.in_channels,
            config.dims[0],
            kernel=config.stem_kernel,
            stride=config.stem_stride,
            padding=config.stem_padding,
        )
        parts: list[nn.Module] = []
        most = max(config.image_size)
        stages = zip(config.dims, config.mlp_ratios, drop_rates(config), strict=True)
        for stage, (dim, ratio, drops) in enumerate(stages):
            if stage:
                before = config.dims[stage - 1]
                parts.append(Convolution(before, dim, kernel=3, stride=2, padding=1))
            blocks = (Block(CycleFusion(dim, most), dim, ratio * dim, drop) for drop in drops)
            parts.append(nn.Sequential(*blocks))
        super().__init__(config, stem, parts)


def _resize(tensors: Any, old: Any, new: CycleMLPConfig, method: str) -> tuple[Any, str]:
    if method != "auto":
        what = f"resize_weights={method!r} has no effect: no weight of CycleMLP depends on the size"
        raise UserError(what, fix="Leave it out")
    return new, "the weights do not depend on it"


def _infer(shapes: Any, written: Any, asked: Any) -> CycleMLPConfig:
    kernel = shape_of(shapes, "patch_embed.proj.weight", 4)[2]
    if kernel != CycleMLPConfig.stem_kernel:
        what = f"the stem's window is {kernel} pixels wide, and the file does not say its stride"
        raise ValueError(f"{what}: it needs the config.json that we write")
    return CycleMLPConfig(image_size=written or (224, 224), **infer_stages(shapes)[0])


_NARROW, _WIDE = (64, 128, 320, 512), (96, 192, 384, 768)
_SHAPES = {  # of its authors' code: depths, dims, hidden units of an MLP over its channels
    "cycle_mlp_b1": ((2, 2, 4, 2), _NARROW, (4, 4, 4, 4)),
    "cycle_mlp_b2": ((2, 3, 10, 3), _NARROW, (4, 4, 4, 4)),
    "cycle_mlp_b3": ((3, 4, 18, 3), _NARROW, (8, 8, 4, 4)),
    "cycle_mlp_b4": ((3, 8, 27, 3), _NARROW, (8, 8, 4, 4)),
    "cycle_mlp_b5": ((3, 4, 24, 3), _WIDE, (4, 4, 4, 4)),
}
# `crop_pct` of the authors' `default_cfgs` is 0.9 for these depths and widths, else 0.875.
_CUT_LESS = [_SHAPES[f"cycle_mlp_b{number}"] for number in (1, 2, 3)]
FAMILY = Family(
    name="cycle_mlp",
    title="CycleMLP",
    paper="Chen et al. 2022, arXiv 2107.10224",
    config=CycleMLPConfig,
    build=CycleMLP,
    architectures={
        name: CycleMLPConfig(depths=depths, dims=dims, mlp_ratios=ratios)
        for name, (depths, dims, ratios) in _SHAPES.items()
    },
    resize=_resize,
    infer=_infer,
    preprocessing=lambda config: imagenet_preprocessing(
        config, 0.9 if (config.depths, config.dims, config.mlp_ratios) in _CUT_LESS else 0.875
    ),
)
