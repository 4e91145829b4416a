"""The skeleton that CycleMLP and the Vision Permutator share: stages of blocks, ever coarser grids.

    stem      a convolution                                              (N, H_0, W_0, C_0)
    stage     blocks: x + token mixing(LayerNorm(x)), then x + MLP(LayerNorm(x))
    between   a strided convolution to the next stage's grid and width   (N, H_i, W_i, C_i)
    end       LayerNorm, mean over positions, head

The token mixing of a block has three branches, along the height, along the width and over the
channels, and a softmax for each channel weights them by the whole image (`Fusion`). The two
families differ in how a branch mixes.

Names and shapes of the tensors are those of the authors' codes, so that their files load unchanged
(ShoufaChen/CycleMLP, Andrew-Qibin/VisionPermutator): `patch_embed.proj`, `network.N.B...`, `norm`,
`head`. LayerNorm has torch's epsilon of 1e-5, the GELU is exact.

Shapes: N batch, (H, W) a stage's grid, C its channels; channels come last between stem and head.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from allmlp.models.layers import (
    ImageClassifier,
    StochasticDepth,
    check_config,
    count_blocks,
    is_integer,
    shape_of,
)
from allmlp.preprocessing import Preprocessing

EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class StagedConfig:
    """The fields of both families; a list may be given for a tuple.

    Args:
        image_size: (H, W) in pixels, one number for a square.
        depths: blocks of each stage.
        dims: C, channels of each stage; at least 4, as a quarter of them weights the branches.
        mlp_ratios: hidden units of a block's MLP over its channels, for each stage.
        num_classes: outputs of the head; 0 leaves the head out: the model returns its features.
        in_channels: channels of the input images.
        stochastic_depth: probability of dropping each of the two branches of the last block; it
            rises linearly from 0 at the first.

    Raises:
        ValueError: a value is out of range, or a field has another number of stages.
    """

    image_size: tuple[int, int] = (224, 224)
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    mlp_ratios: tuple[int, ...]
    num_classes: int = 1000
    in_channels: int = 3
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        check_config(self)
        self.check_stages("depths", "dims", "mlp_ratios")
        if min(self.dims) < 4:
            raise ValueError(f"dims must be at least 4, got {self.dims}")

    def check_stages(self, *names: str) -> None:
        """Makes these fields tuples of one whole number of at least 1 for each stage."""
        for name in names:
            values = getattr(self, name)
            values = tuple(values) if isinstance(values, list | tuple) else ()
            if not values or not all(map(is_integer, values)):
                what = f"{name} must be whole numbers of at least 1"
                raise ValueError(f"{what}, got {getattr(self, name)!r}")
            object.__setattr__(self, name, values)
            if len(values) != len(self.depths):
                what = f"{name} has {len(values)} values for {len(self.depths)} stages"
                raise ValueError(f"{what} (of depths)")

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
    def tokens(self) -> tuple[int, ...]:
        """Positions of each stage's grid, the finest first."""
        return tuple(height * width for height, width in self.grids)

    @property
    def num_tokens(self) -> int:
        """Positions of the first stage's grid, the finest."""
        return self.tokens[0]

    @property
    def least_parameters(self) -> int:
        """Trained values of the blocks' MLPs alone."""
        stages = zip(self.depths, self.dims, self.mlp_ratios, strict=True)
        return sum(2 * depth * ratio * dim**2 for depth, dim, ratio in stages)

    @property
    def widest(self) -> int:
        """Values of one image's largest activation, a hidden layer of a block's MLP."""
        stages = zip(self.grids, self.dims, self.mlp_ratios, strict=True)
        return max(height * width * dim * ratio for (height, width), dim, ratio in stages)

    def summary(self) -> str:
        """Returns the shape in a few words: "stages of 2, 2, 4, 2 blocks, 64 to 512 channels"."""
        blocks = ", ".join(map(str, self.depths))
        return f"stages of {blocks} blocks, {self.dims[0]} to {self.dims[-1]} channels"


class Mlp(nn.Module):
    """Two dense layers with an exact GELU between them, over the channels."""

    before_gelu: ClassVar[str] = "fc1"  # for inference with packed weights

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., out)
        return self.fc2(self.gelu(self.fc1(x)))


class Fusion(nn.Module):
    """Token mixing: three branches, weighted for each channel of each image, and a dense layer.

    The weights come from the mean, over the image, of the sum of the branches (not of their mean)
    and sum to one over the branches.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp_c = nn.Linear(dim, dim, bias=False)
        self.reweight = Mlp(dim, dim // 4, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the branches of height and width, each of the shape of x, (N, H, W, C)."""
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
    """Token mixing, then an MLP over the channels, each with a LayerNorm and a skip around it."""

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
    """A strided convolution with a bias: the stem, and what joins two stages."""

    def __init__(
        self, channels: int, dim: int, *, kernel: int, stride: int, padding: int = 0
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:  # (N, H, W, C) -> (N, H', W', C')
        # Under autocast it returns bfloat16; the residual stream stays in the weights' float32.
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
        """Draws the dense weights, also of the head: truncated normal, 0.02, zero biases.

        Convolutions keep torch's own initial weights, as in the authors' codes.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> list[Block]:
        """The blocks of all stages, in their order."""
        inside = (child for part in self.network for child in part.children())
        return [child for child in inside if isinstance(child, Block)]

    def features(self, images: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, C)
        """Returns the mean over positions of the normalised last stage, which the head reads.

        Raises:
            ValueError: the images have another size or number of channels than the model.
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
    """Returns the multiply-adds of one image in all blocks and the head; `mixing` are those of the
    branches of height and width in a block of each stage."""
    macs = config.dims[-1] * config.num_classes
    stages = zip(config.grids, config.depths, config.dims, config.mlp_ratios, mixing, strict=True)
    for (height, width), depth, dim, ratio, branches in stages:
        dense = (2 + 2 * ratio) * dim * dim  # mlp_c and proj; fc1 and fc2
        macs += depth * (branches + height * width * dense + 4 * dim * (dim // 4))
    return macs


def infer_stages(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], list[int]]:
    """Returns the fields that the tensors of both families imply, and each stage's place in
    `network`; see `Family.infer`."""
    blocks = (re.match(r"network\.(\d{1,6})\.\d{1,6}\.", name) for name in shapes)
    stages = sorted({int(match[1]) for match in blocks if match})
    if not stages:
        raise ValueError("the file has no blocks (network.0.0.*)")
    depths, dims, ratios = [], [], []
    for stage in stages:
        depths.append(count_blocks(shapes, rf"network\.{stage}\.(\d{{1,6}})\."))
        hidden, dim = shape_of(shapes, f"network.{stage}.0.mlp.fc1.weight", 2)
        if hidden % dim:
            raise ValueError(f"{hidden} hidden units are not a multiple of {dim} channels")
        dims.append(dim)
        ratios.append(hidden // dim)
    has_head = "head.weight" in shapes or "head.bias" in shapes
    fields = {
        "depths": tuple(depths),
        "dims": tuple(dims),
        "mlp_ratios": tuple(ratios),
        "in_channels": shape_of(shapes, "patch_embed.proj.weight", 4)[1],
        "num_classes": shape_of(shapes, "head.weight", 2)[0] if has_head else 0,
    }
    return fields, stages


def imagenet_preprocessing(config: Any, crop: float) -> Preprocessing:
    """Returns what both families were published with: ImageNet's mean and deviation, bicubic."""
    mean, std, channels = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), config.in_channels
    return Preprocessing(
        image_size=config.image_size,
        channels=channels,
        mean=mean if channels == 3 else sum(mean) / 3,
        std=std if channels == 3 else sum(std) / 3,
        crop=crop,
        interpolation="bicubic",
    )
