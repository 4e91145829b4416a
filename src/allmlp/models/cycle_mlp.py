"""CycleMLP: A MLP-like Architecture for Dense Prediction (Chen et al. 2022, arXiv 2107.10224).

Token mixing does not depend on the image size. A dense layer over the channels reads every channel
from a shifted position: the offsets cycle through
    0, +1, -1, 0, +1, -1, ...
along the width in one branch and along the height in the other, with zero padding.

Matches the authors' code (ShoufaChen/CycleMLP), which uses a deformable convolution with the
offsets as a buffer in the state dict. Figure 4 of the paper shows the shifts in a different order;
the published weights were trained with the order of the code.

Shapes: N batch, (H, W) grid of a stage, C its channels; channels-last between stem and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allmlp.errors import UserError
from allmlp.models.family import Family, Shapes, Size, named, shape_of, size_text
from allmlp.models.staged import Fusion, StagedClassifier, StagedConfig, Window, infer_stages

CYCLE = (0, 1, -1)


class CycleFC(nn.Module):
    """A dense layer that reads every channel from a shifted position.

        out[n, i, j] = bias + sum over c of weight[:, c] x[n, i + dy_c, j + dx_c, c]

    with zero padding, and shifts along axis 1, the height, or 2, the width. The buffer `offset`,
    (1, 2C, 1, 1), holds dy and dx of every channel, interleaved as in the published files; loading
    different offsets is an error.
    """

    offset: Tensor
    half_products: ClassVar[bool] = True  # an export may compute the matmuls in bfloat16

    def __init__(self, dim: int, along: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim, 1, 1))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.along = along
        shifts = [CYCLE[channel % 3] for channel in range(dim)]
        self.pairs = [(shift, 0) if along == 1 else (0, shift) for shift in shifts]
        # From a list: arithmetic on the meta device would import the compiler (a second).
        offset = torch.tensor(self.pairs, dtype=torch.float32).reshape(1, -1, 1, 1)
        self.register_buffer("offset", offset)
        self.register_load_state_dict_post_hook(_check_offset)

    def forward(self, x: Tensor) -> Tensor:  # (N, H, W, C) -> (N, H, W, C)
        is_high, side = self.along == 1, x.shape[self.along]
        padded = F.pad(x, (0, 0, 0, 0, 1, 1) if is_high else (0, 0, 1, 1))
        # The channels are now sorted by shift, so the columns of the weight must be, too.
        parts = [padded.narrow(self.along, 1 + at, side)[..., n::3] for n, at in enumerate(CYCLE)]
        shifted = torch.cat(parts, dim=3)
        weight = self.weight[:, :, 0, 0]
        columns = torch.cat([weight[:, first::3] for first in range(3)], dim=1)
        return F.linear(shifted, columns, self.bias)


def _check_offset(module: Any, _: Any) -> None:
    known = [number for pair in module.pairs for number in pair]
    if not module.offset.is_meta and module.offset.flatten().tolist() != known:
        what = "an offset buffer of CycleMLP has other shifts than the published 0, +1, -1"
        raise UserError(what, fix="Only the published shifts are computed here")


class CycleFusion(Fusion):
    """Token mixing of a block. The published names are `sfc_h` for the branch along the width and
    `sfc_w` for the one along the height."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.sfc_h = CycleFC(dim, along=2)
        self.sfc_w = CycleFC(dim, along=1)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.sfc_h(x), self.sfc_w(x)


class CycleMLP(StagedClassifier):
    """CycleMLP B1 to B5, and custom widths and depths."""

    config: CycleMLPConfig
    why_one_size: ClassVar[str] = "load it with another image_size, the weights are the same"

    def fusion(self, stage: int) -> Fusion:
        return CycleFusion(self.config.dims[stage])


@dataclass(frozen=True, kw_only=True)
class CycleMLPConfig(StagedConfig):
    """The architecture of a CycleMLP; the grid is halved from stage to stage, rounding up.

    Args:
        stem_kernel: kernel size of the stem in pixels.
        stem_stride: stride of the stem in pixels; the image must be at least this large and can
            otherwise have any size.

    The other fields are those of `StagedConfig`.
    """

    stem_kernel: int = 7
    stem_stride: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.image_size) < self.stem_stride:
            what = f"image size {size_text(self.image_size)} is below the stem's stride"
            raise ValueError(f"{what} of {self.stem_stride} pixels")

    @property
    def windows(self) -> list[Window | None]:
        padding = (self.stem_kernel - self.stem_stride + 1) // 2
        return [(self.stem_kernel, self.stem_stride, padding), *[(3, 2, 1)] * len(self.dims[1:])]

    def mixing_macs(self, stage: int) -> int:
        return 2 * self.tokens[stage] * self.dims[stage] ** 2


def _resize(tensors: Any, old: Any, new: CycleMLPConfig, method: str) -> tuple[Any, str]:
    if method != "auto":
        what = f"resize_weights={method!r} has no effect: no weight of CycleMLP depends on the size"
        raise UserError(what, fix="Leave it out")
    return new, "the weights do not depend on it"


def _infer(shapes: Shapes, written: Size | None, asked: Size | None) -> CycleMLPConfig:
    kernel = shape_of(shapes, "patch_embed.proj.weight", 4)[2]
    if kernel != CycleMLPConfig.stem_kernel:
        what = f"the stem's window is {kernel} pixels wide, and the file does not say its stride"
        raise ValueError(f"{what}: it needs the config.json that we write")
    return CycleMLPConfig(image_size=written or (224, 224), **infer_stages(shapes)[0])


_NARROW, _WIDE = (64, 128, 320, 512), (96, 192, 384, 768)
_SHAPES = {  # from the authors' code: depths, dims, hidden units of the channel MLP
    "cycle_mlp_b1": ((2, 2, 4, 2), _NARROW, (4, 4, 4, 4)),
    "cycle_mlp_b2": ((2, 3, 10, 3), _NARROW, (4, 4, 4, 4)),
    "cycle_mlp_b3": ((3, 4, 18, 3), _NARROW, (8, 8, 4, 4)),
    "cycle_mlp_b4": ((3, 8, 27, 3), _NARROW, (8, 8, 4, 4)),
    "cycle_mlp_b5": ((3, 4, 24, 3), _WIDE, (4, 4, 4, 4)),
}
FAMILY = Family(
    name="cycle_mlp",
    title="CycleMLP",
    paper="Chen et al. 2022, arXiv 2107.10224",
    config=CycleMLPConfig,
    build=CycleMLP,
    architectures=named(CycleMLPConfig, "depths dims mlp_ratios", _SHAPES),
    resize=_resize,
    marker=r"network\.\d+\.\d+\.attn\.sfc_",
    infer=_infer,
    crops=dict.fromkeys(("cycle_mlp_b1", "cycle_mlp_b2", "cycle_mlp_b3"), 0.9),  # `default_cfgs`
)
