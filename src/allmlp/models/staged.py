"""The hierarchical design that CycleMLP and the Vision Permutator share.

    stem      a convolution                                              (N, H_0, W_0, C_0)
    stage     blocks: x + token mixing(LayerNorm(x)), then x + MLP(LayerNorm(x))
    between   a strided convolution to the next stage's grid and width   (N, H_i, W_i, C_i)
    end       LayerNorm, mean over positions, head

Token mixing has three branches (`Fusion`): along the height, along the width, and over the
channels. The two families differ in how the first two mix.

Tensor names and shapes are those of the authors' code, so that their files load unchanged
(ShoufaChen/CycleMLP, Andrew-Qibin/VisionPermutator): `patch_embed.proj`, `network.N.B...`, `norm`,
`head`. LayerNorm uses torch's epsilon of 1e-5; the GELU is exact.

Shapes: N batch, (H, W) grid of a stage, C its channels; channels-last between stem and head.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from allmlp.models.family import ModelConfig, Shapes, Size, count_blocks, count_classes, shape_of
from allmlp.models.layers import ImageClassifier, StochasticDepth

Window = tuple[int, int, int]  # kernel, stride and padding of a convolution


class Mlp(nn.Sequential):
    """An MLP over the channels: two dense layers with an exact GELU in between."""

    before_gelu: ClassVar[str] = "fc1"  # for inference with packed weights

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(hidden, out)


class Fusion(nn.Module):
    """Token mixing: three branches, weighted per channel and image, then a dense layer.

    The weights are computed from the image mean of the branches' sum (not of their mean), and sum
    to one over the branches.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp_c = nn.Linear(dim, dim, bias=False)
        self.reweight = Mlp(dim, dim // 4, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the branches along height and width, with the shape of x, (N, H, W, C)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:  # (N, H, W, C) -> (N, H, W, C)
        first, second = self.branches(x)
        third = self.mlp_c(x)
        pooled = (first + second + third).mean(dim=(1, 2))  # (N, C)
        logits = self.reweight(pooled).unflatten(1, (-1, 3))  # (N, C, 3): channels before branches
        weights = logits.softmax(dim=2).to(first.dtype)[:, None, None]  # (N, 1, 1, C, 3)
        fused = first * weights[..., 0] + second * weights[..., 1] + third * weights[..., 2]
        return self.proj(fused)


class Block(nn.Module):
    """Token mixing, then channel MLP, each with pre-LayerNorm and a skip connection."""

    def __init__(self, fusion: Fusion, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = fusion
        self.drop_0 = StochasticDepth(drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, dim)
        self.drop_1 = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:  # (N, H, W, C) -> (N, H, W, C)
        x = x + self.drop_0(self.attn(self.norm1(x)))
        return x + self.drop_1(self.mlp(self.norm2(x)))


class Convolution(nn.Module):
    """A strided convolution with bias: the stem, and the downsampling between stages."""

    def __init__(self, channels: int, dim: int, window: Window) -> None:
        super().__init__()
        kernel, stride, padding = window
        self.proj = nn.Conv2d(channels, dim, kernel, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:  # (N, H, W, C) -> (N, H', W', C')
        # Under autocast it returns bfloat16; the residual stream stays in the weights' float32.
        y = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y.to(self.proj.weight.dtype).contiguous()


class StagedClassifier(ImageClassifier):
    """Stem, stages with downsampling in between, LayerNorm, mean over positions, head."""

    config: Any  # of the family

    def __init__(self, config: StagedConfig) -> None:
        super().__init__()
        self.config = config
        last = max(config.num_blocks - 1, 1)
        drops = (config.stochastic_depth * before / last for before in range(config.num_blocks))
        channels, parts = config.in_channels, []
        for stage, (dim, window) in enumerate(zip(config.dims, config.windows, strict=True)):
            if window is not None:
                parts.append(Convolution(channels, dim, window))
            channels, hidden = dim, config.mlp_ratios[stage] * dim
            own = itertools.islice(drops, config.depths[stage])
            blocks = (Block(self.fusion(stage), dim, hidden, drop) for drop in own)
            parts.append(nn.Sequential(*blocks))
        self.patch_embed = parts[0]
        self.network = nn.ModuleList(parts[1:])
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, config.num_classes) if config.num_classes else None
        if not self.norm.weight.is_meta:
            self.initialize()

    def fusion(self, stage: int) -> Fusion:
        """Returns a new token mixing module for a block of this stage."""
        raise NotImplementedError

    def initialize(self) -> None:
        """Draws the dense weights, including the head: truncated normal with std 0.02, zero biases.

        Convolutions keep torch's default initialisation, as in the authors' code.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, images: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, C)
        """Returns the input of the head: the mean over positions of the normalised last stage."""
        self.check_images(images)
        x = self.patch_embed(images.permute(0, 2, 3, 1))
        for part in self.network:
            x = part(x)
        return self.norm(x).mean(dim=(1, 2))


@dataclass(frozen=True, kw_only=True)
class StagedConfig(ModelConfig):
    """Fields of both families, in addition to those of `ModelConfig`.

    Args:
        depths: blocks per stage.
        dims: C, channels per stage; at least 4, as the branch weights are computed from a quarter.
        mlp_ratios: hidden units of the channel MLP relative to C, per stage.
        stochastic_depth: drop probability of both branches of the last block; it rises linearly
            from 0 at the first.
    """

    per_stage: ClassVar[tuple[str, ...]] = ("dims", "mlp_ratios")

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    mlp_ratios: tuple[int, ...]
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.per_stage:
            if len(getattr(self, name)) != len(self.depths):
                what = f"{name} has {len(getattr(self, name))} values for {len(self.depths)} stages"
                raise ValueError(f"{what} (of depths)")
        if min(self.dims) < 4:
            raise ValueError(f"dims must be at least 4, got {self.dims}")

    @property
    def windows(self) -> list[Window | None]:
        """For the stem and the downsampling before every later stage; None where there is none."""
        raise NotImplementedError

    def mixing_macs(self, stage: int) -> int:
        """Returns the multiply-adds of the height and width branches in a block of this stage."""
        raise NotImplementedError

    @property
    def grids(self) -> tuple[Size, ...]:
        height, width = self.image_size
        grids = []
        for window in self.windows:
            if window is not None:
                kernel, stride, padding = window
                height = (height + 2 * padding - kernel) // stride + 1
                width = (width + 2 * padding - kernel) // stride + 1
            grids.append((height, width))
        return tuple(grids)

    @property
    def places(self) -> list[int]:
        """Index of every stage in `network`, which also holds the downsampling."""
        joins = [window is not None for window in self.windows[1:]]
        return [stage + sum(joins[:stage]) for stage in range(len(self.depths))]

    @property
    def hidden_dim(self) -> int:
        """Channels of the last stage, the input of the head."""
        return self.dims[-1]

    @property
    def num_blocks(self) -> int:
        return sum(self.depths)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Number of positions per stage, finest grid first."""
        return tuple(height * width for height, width in self.grids)

    @property
    def widest(self) -> int:
        stages = zip(self.tokens, self.dims, self.mlp_ratios, strict=True)
        return max(tokens * dim * ratio for tokens, dim, ratio in stages)

    @property
    def flops(self) -> int:
        macs, channels = self.hidden_dim * self.num_classes, self.in_channels
        for stage, (tokens, dim) in enumerate(zip(self.tokens, self.dims, strict=True)):
            window = self.windows[stage]
            if window is not None:
                macs += tokens * window[0] ** 2 * channels * dim
            dense = tokens * (2 + 2 * self.mlp_ratios[stage]) * dim**2  # mlp_c, proj; fc1, fc2
            macs += self.depths[stage] * (self.mixing_macs(stage) + dense + 4 * dim * (dim // 4))
            channels = dim
        return 2 * macs

    def summary(self) -> str:
        blocks = ", ".join(map(str, self.depths))
        return f"stages of {blocks} blocks, {self.dims[0]} to {self.dims[-1]} channels"


def infer_stages(shapes: Shapes) -> tuple[dict[str, Any], list[int]]:
    """Infers the fields that both families share, and the index of every stage in `network`; see
    `Family.infer`."""
    blocks = (re.match(r"network\.(\d{1,6})\.\d{1,6}\.", name) for name in shapes)
    places = sorted({int(match[1]) for match in blocks if match})
    if not places:
        raise ValueError("the file has no blocks (network.0.0.*)")
    mlps = [shape_of(shapes, f"network.{place}.0.mlp.fc1.weight", 2) for place in places]
    for hidden, dim in mlps:
        if hidden % dim:
            raise ValueError(f"{hidden} hidden units are not a multiple of {dim} channels")
    counts = [rf"network\.{place}\.(\d{{1,6}})\." for place in places]
    fields = {
        "depths": tuple(count_blocks(shapes, pattern) for pattern in counts),
        "dims": tuple(dim for _, dim in mlps),
        "mlp_ratios": tuple(hidden // dim for hidden, dim in mlps),
        "in_channels": shape_of(shapes, "patch_embed.proj.weight", 4)[1],
        "num_classes": count_classes(shapes),
    }
    return fields, places
