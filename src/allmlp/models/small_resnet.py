"""A small ResNet to compare a Mixer with when timm is not installed.

The paper's figure 4 uses BiT's ResNet50x1. This one has its traits, scaled to small images:
pre-activation (He et al. 2016), GroupNorm, ReLU, bias-free convolutions, global average pooling, a
zero head.

Shapes: N batch, C channels, H W pixels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from allmlp.models.family import Family, ModelConfig, size_text
from allmlp.models.layers import ImageClassifier


@dataclass(frozen=True, kw_only=True)
class SmallResNetConfig(ModelConfig):
    """The architecture of a `SmallResNet`, in addition to the fields of `ModelConfig`.

    Args:
        width: channels of the first stage, a multiple of 8; doubled in every further stage.
        num_stages: number of stages, with the grid halved in between.
        num_blocks: residual blocks per stage, each with two 3 x 3 convolutions.
    """

    image_size: tuple[int, int] = (32, 32)
    width: int = 32
    num_stages: int = 3
    num_blocks: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 8:
            raise ValueError(f"width must be a multiple of 8, got {self.width}")
        least = 2 ** (self.num_stages - 1)
        if min(self.image_size) < least:
            what = f"{self.num_stages} stages need at least {least} pixels a side"
            raise ValueError(f"{what}, got {size_text(self.image_size)}")

    @property
    def widths(self) -> list[int]:
        return [self.width * 2**stage for stage in range(self.num_stages)]

    @property
    def hidden_dim(self) -> int:
        """Channels of the last stage, the input of the head."""
        return self.widths[-1]

    @property
    def flops(self) -> int:
        height, width = self.image_size
        total = height * width * 9 * self.in_channels * self.width
        before = self.width
        for stage, dim in enumerate(self.widths):
            if stage:  # the first block halves the grid, rounding up
                height, width = -(-height // 2), -(-width // 2)
            area = height * width
            total += area * 9 * dim * (before + (2 * self.num_blocks - 1) * dim)
            total += area * before * dim if stage else 0
            before = dim
        return 2 * (total + before * self.num_classes)

    def summary(self) -> str:
        stages = f"{self.num_stages} stages of {self.num_blocks} blocks"
        return f"small ResNet, {stages}, {self.width} channels"


def _convolution(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """Two times norm, ReLU and convolution, with a skip connection."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm_0 = nn.GroupNorm(8, before)
        self.conv_0 = _convolution(before, after, stride)
        self.norm_1 = nn.GroupNorm(8, after)
        self.conv_1 = _convolution(after, after)
        is_same = before == after and stride == 1
        self.shortcut = None if is_same else nn.Conv2d(before, after, 1, stride, bias=False)
        for module in self.children():  # an export may compute the convolutions in bfloat16
            setattr(module, "half_products", isinstance(module, nn.Conv2d))  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C', H / stride, W / stride)
        y = F.relu(self.norm_0(x))
        if self.shortcut is not None:
            x = self.shortcut(y).to(x.dtype)  # under autocast the residual stream stays float32
        y = F.relu(self.norm_1(self.conv_0(y)))
        return x + self.conv_1(y)


class SmallResNet(ImageClassifier):
    """Stem, stages of residual blocks, GroupNorm and ReLU, global average pooling, head."""

    config: SmallResNetConfig

    def __init__(self, config: SmallResNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width, *config.widths]
        blocks = []
        for stage, (before, after) in enumerate(itertools.pairwise(widths)):
            blocks.append(ResidualBlock(before, after, 2 if stage else 1))
            blocks += [ResidualBlock(after, after, 1) for _ in range(config.num_blocks - 1)]
        self.stem = _convolution(config.in_channels, config.width)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(8, widths[-1])
        self.head = nn.Linear(widths[-1], config.num_classes) if config.num_classes else None
        if not self.stem.weight.is_meta:  # drawing there would import the compiler (seconds)
            self.initialize()

    def initialize(self) -> None:
        """Draws new weights: He-normal convolutions, zero head."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, C)
        """Returns the input of the head: the mean over the last grid."""
        self.check_images(images)
        x = self.stem(images).to(self.norm.weight.dtype)
        return F.relu(self.norm(self.blocks(x))).mean(dim=(2, 3))


FAMILY = Family(
    name="small_resnet",
    title="Small ResNet",
    paper="pre-activation as in He et al. 2016, arXiv 1603.05027",
    config=SmallResNetConfig,
    build=SmallResNet,
    architectures={"small_resnet": SmallResNetConfig()},
)
