"""The skeleton that CycleMLP and the Vision Permutator share: stages of blocks, ever coarser grids.

    stem      a convolution                                              (N, H_0, W_0, C_0)
    stage     blocks: x + token mixing(LayerNorm(x)), then x + MLP(LayerNorm(x))
    between   a strided convolution to the next stage's grid and width   (N, H_i, W_i, C_i)
    end       LayerNorm, mean over positions, head

The token mixing of a block has three branches, along the height, along the width and over the
channels, and a softmax for each channel weighs them by what the whole picture looks like
(`Fusion`). What differs between the two families is how a branch mixes.

Names and shapes of the tensors are those of the authors' codes, so that their files load as they
are (ShoufaChen/CycleMLP, Andrew-Qibin/VisionPermutator): `patch_embed.proj`, `network.N.B...`,
`norm`, `head`. LayerNorm has torch's epsilon of 1e-5, the GELU is exact.

Shapes: N batch, (H, W) a stage's grid, C its channels; channels come last between stem and head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from allmlp.models.layers import ImageClassifier, StochasticDepth, is_number, is_share

EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class StagedConfig:
    """What the architectures of both families have; a list may be given for a tuple.

    Args:
        image_size: (H, W) in pixels, one number for a square.
        depths: blocks of each stage.
        dims: C, channels of each stage; at least 4, for a quarter of them weighs the branches.
        mlp_ratios: hidden units of a block's MLP over its channels, for each stage.
        num_classes: outputs of the head; 0 leaves the head out: the model returns its features.
        in_channels: channels of the input images.
        stochastic_depth: probability of dropping each of the two branches of the last block; it
            rises linearly from 0 at the first.

    Raises:
        ValueError: a value is out of range, or the stages are not equally many everywhere.
    """

    image_size: tuple[int, int] = (224, 224)
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    mlp_ratios: tuple[int, ...]
    num_classes: int = 1000
    in_channels: int = 3
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        size = self.image_size
        size = (size, size) if isinstance(size, int) else checked("image_size", size)
        object.__setattr__(self, "image_size", size)
        if len(size) != 2:
            raise ValueError(f"image_size is a number or (height, width), got {size}")
        for name in ("depths", "dims", "mlp_ratios"):
            object.__setattr__(self, name, checked(name, getattr(self, name)))
        self.check_stages("depths", "dims", "mlp_ratios")
        if min(self.dims) < 4:
            raise ValueError(f"dims must be at least 4, got {self.dims}")
        if not is_number(self.in_channels):
            what = "in_channels must be a whole number of at least 1"
            raise ValueError(f"{what}, got {self.in_channels!r}")
        if not is_number(self.num_classes, 0):
            raise ValueError(f"num_classes must be at least 0, got {self.num_classes}")
        if not is_share(self.stochastic_depth):
            raise ValueError(f"stochastic_depth must be in [0, 1), got {self.stochastic_depth!r}")

    def check_stages(self, *names: str) -> None:
        """Raises ValueError unless these fields have one value for each stage."""
        counts = {name: len(getattr(self, name)) for name in names}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise ValueError(f"each stage has its own value: {said}")

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each stage."""
        raise NotImplementedError

    @property
    def hidden_dim(self) -> int:
        """Channels of the last stage, which the head reads."""
        return self.dims[-1]

    @property
    def num_blocks(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def num_tokens(self) -> int:
        """Positions of the first stage's grid, the finest."""
        return self.grids[0][0] * self.grids[0][1]

    @property
    def widest(self) -> int:
        """Values of one image's largest activation, a hidden layer of a block's MLP."""
        stages = zip(self.grids, self.dims, self.mlp_ratios, strict=True)
        return max(height * width * dim * ratio for (height, width), dim, ratio in stages)

    def summary(self) -> str:
        """Returns the shape in a few words: "stages of 2, 2, 4, 2 blocks, 64 to 512 channels"."""
        blocks = ", ".join(map(str, self.depths))
        return f"stages of {blocks} blocks, {self.dims[0]} to {self.dims[-1]} channels"


def checked(name: str, values: Any) -> tuple[int, ...]:
    """Returns a field's values as a tuple.

    Raises:
        ValueError: they are not whole numbers of at least 1.
    """
    values = tuple(values) if isinstance(values, list | tuple) else values
    if not isinstance(values, tuple) or not values or not all(map(is_number, values)):
        raise ValueError(f"{name} must be whole numbers of at least 1, got {values!r}")
    return values


class Mlp(nn.Module):
    """Two dense layers with an exact GELU between them, over the channels."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., out)
        return self.fc2(self.gelu(self.fc1(x)))


class Fusion(nn.Module):
    """Token mixing: three branches, weighed for each channel of each picture, and a dense layer.

    The weights come from the mean, over the picture, of the sum of the branches (not of their mean)
    and sum to one over the branches.

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp_c = nn.Linear(dim, dim, bias=False)
        self.reweight = Mlp(dim, dim // 4, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the branches of height and width of x, (N, H, W, C), each of its shape."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:  # (N, H, W, C) -> (N, H, W, C)
        first, second = self.branches(x)
        third = self.mlp_c(x)
        pooled = (first + second + third).mean(dim=(1, 2))  # (N, C)
        logits = self.reweight(pooled).unflatten(1, (-1, 3))  # (N, C, 3): channels before branches
        share = logits.softmax(dim=2).to(first.dtype)[:, None, None]  # (N, 1, 1, C, 3)
        fused = first * share[..., 0] + second * share[..., 1] + third * share[..., 2]
        return self.proj(fused)


class Block(nn.Module):
    """Token mixing, then an MLP over the channels, each with a LayerNorm before and a skip around.

    Args:
        fusion: the token mixing.
        dim: C.
        hidden: units of the MLP.
        drop: probability of stochastic depth, of each of the two branches.
    """

    def __init__(self, fusion: Fusion, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPSILON)
        self.attn = fusion
        self.drop_0 = StochasticDepth(drop)
        self.norm2 = nn.LayerNorm(dim, eps=EPSILON)
        self.mlp = Mlp(dim, hidden, dim)
        self.drop_1 = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:  # (N, H, W, C) -> (N, H, W, C)
        x = x + self.drop_0(self.attn(self.norm1(x)))
        return x + self.drop_1(self.mlp(self.norm2(x)))


class Convolution(nn.Module):
    """A strided convolution with a bias, and nothing else: the stem, and what joins two stages."""

    def __init__(
        self, channels: int, dim: int, *, kernel: int, stride: int, padding: int = 0
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:  # (N, H, W, C) -> (N, H', W', C')
        # Under autocast it gives bfloat16; the residual stream keeps the weights' float32.
        y = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y.to(self.proj.weight.dtype).contiguous()


class StagedClassifier(ImageClassifier):
    """Stem, stages with convolutions between them, LayerNorm, mean over positions, head.

    Args:
        config: the architecture.
        patch_embed: the stem.
        parts: stages (`nn.Sequential` of blocks) and convolutions, in their order.
    """

    config: Any  # the family's own

    def __init__(
        self, config: StagedConfig, patch_embed: Convolution, parts: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = patch_embed
        self.network = nn.ModuleList(parts)
        self.norm = nn.LayerNorm(config.dims[-1], eps=EPSILON)
        self.head = nn.Linear(config.dims[-1], config.num_classes) if config.num_classes else None
        self.initialize()

    def initialize(self) -> None:
        """Draws the dense weights anew: truncated normal, 0.02, zero biases; also of the head.

        Convolutions keep torch's own start, as in the authors' codes.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> list[Block]:
        """The blocks of all stages, in their order."""
        return [
            each for part in self.network for each in part.children() if isinstance(each, Block)
        ]

    def features(self, images: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, C)
        """Returns the mean over positions of the normalised last stage, which the head reads.

        Raises:
            ValueError: the images have another size or other channels than the model.
        """
        self.check_images(images)
        x = self.patch_embed(images.permute(0, 2, 3, 1))
        for part in self.network:
            x = part(x)
        return self.norm(x).mean(dim=(1, 2))


def drop_rates(config: StagedConfig) -> list[list[float]]:
    """Returns the probability of stochastic depth of each block of each stage."""
    last = max(config.num_blocks - 1, 1)
    rates = iter([config.stochastic_depth * block / last for block in range(config.num_blocks)])
    return [list(itertools.islice(rates, depth)) for depth in config.depths]


def blocks_and_head_macs(config: StagedConfig, mixing: Sequence[int]) -> int:
    """Returns the multiply-adds of one image in all blocks and the head.

    Args:
        config: the architecture.
        mixing: of the two branches of height and width, for a block of each stage.
    """
    macs = config.dims[-1] * config.num_classes
    stages = zip(config.grids, config.depths, config.dims, config.mlp_ratios, mixing, strict=True)
    for (height, width), depth, dim, ratio, branches in stages:
        dense = (2 + 2 * ratio) * dim * dim  # mlp_c and proj; fc1 and fc2
        macs += depth * (branches + height * width * dense + 4 * dim * (dim // 4))
    return macs
