"""MLP-Mixer: An all-MLP Architecture for Vision (Tolstikhin et al. 2021, arXiv 2105.01601).

To be read beside the paper's Listing 1, whose names and order it keeps, and equal to Google's own
code (google-research/vision_transformer, models_mixer.py) to rounding: tanh GELU, LayerNorm epsilon
1e-6, LayerNorm before the mean over tokens, zero head, row-major tokens. Appendix B's stochastic
depth and dropout, which the listing leaves out, are here; the token-mixing variants of appendix A.1
are settings of the configuration, and their layers lie in `ablations.py`.

Shapes: N batch, S tokens, C channels, P patch side, H W pixels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from allmlp.models.layers import (
    ImageClassifier,
    StochasticDepth,
    is_number,
    is_share,
    lecun_normal_,
)

TOKEN_MIXING = ("shared", "untied", "grouped", "views")


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """The architecture of an MLP-Mixer (Table 1 of the paper).

    Args:
        image_size: (H, W) in pixels, one number for a square; the patch must divide both.
        patch_size: P, side of a patch in pixels.
        hidden_dim: C, channels of a token.
        num_blocks: mixer layers; each has a token-mixing and a channel-mixing MLP.
        tokens_mlp_dim: D_S, hidden units of the token-mixing MLPs.
        channels_mlp_dim: D_C, hidden units of the channel-mixing MLPs.
        num_classes: outputs of the head; 0 leaves the head out: the model returns its features.
        in_channels: channels of the input images.
        dropout: probability after each of the two dense layers of every MLP.
        stochastic_depth: s, probability of dropping the last MLP; it rises linearly from 0 at the
            first of the 2 * num_blocks MLPs (appendix B).
        gelu: "tanh" as Google's weights were trained, "exact" for weights trained in timm.
        token_mixing: which weights mix the tokens, see `ablations.py`: one MLP for all channels
            ("shared"), one for each ("untied"), one that sees `token_groups` neighbouring channels
            at once ("grouped"), or so many learned views of all channels ("views").
        token_groups: G, for "grouped" and "views"; it divides hidden_dim.
        pyramid: (block, S') pairs: the token mixing of these blocks, counted from 0, brings the
            tokens down to S', and all later blocks work on so many.

    Raises:
        ValueError: the patch does not divide the image, or a value is out of range.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int
    hidden_dim: int
    num_blocks: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    num_classes: int = 1000
    in_channels: int = 3
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    gelu: Literal["tanh", "exact"] = "tanh"
    token_mixing: Literal["shared", "untied", "grouped", "views"] = "shared"
    token_groups: int = 1
    pyramid: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        height, width = self.image_size
        sizes = ("patch_size", "hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")
        for name in (*sizes, "in_channels"):
            value = getattr(self, name)
            if not is_number(value):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not is_number(self.num_classes, 0):
            raise ValueError(f"num_classes must be at least 0, got {self.num_classes}")
        for name in ("dropout", "stochastic_depth"):
            if not is_share(getattr(self, name)):
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        if self.gelu not in ("tanh", "exact"):
            raise ValueError(f"gelu must be 'tanh' or 'exact', got {self.gelu!r}")
        if min(height, width) < 1 or height % self.patch_size or width % self.patch_size:
            near = [
                max(1, round(side / self.patch_size)) * self.patch_size for side in (height, width)
            ]
            raise ValueError(
                f"image size {height}x{width} is not divisible by the patch size "
                f"{self.patch_size}; the nearest that is: {near[0]}x{near[1]}"
            )
        self._check_variant()

    def _check_variant(self) -> None:
        if self.token_mixing not in TOKEN_MIXING:
            known = ", ".join(TOKEN_MIXING)
            raise ValueError(f"token_mixing must be one of {known}, got {self.token_mixing!r}")
        groups = self.token_groups
        if not is_number(groups) or self.hidden_dim % groups:
            what = f"token_groups must divide hidden_dim, {self.hidden_dim}"
            raise ValueError(f"{what}, got {groups!r}")
        if groups > 1 and self.token_mixing not in ("grouped", "views"):
            what = f"token_groups={groups} has no effect with token_mixing={self.token_mixing!r}"
            raise ValueError(f"{what}; it is for 'grouped' and 'views'")
        last_block, tokens = -1, self.num_tokens
        try:
            steps = tuple((block, fewer) for block, fewer in self.pyramid)
        except (TypeError, ValueError):
            steps = None
        is_list = isinstance(self.pyramid, tuple | list) and steps is not None
        if not is_list or not all(is_number(each, 0) for step in steps or () for each in step):
            what = "pyramid must be pairs of a block and its tokens, as [[4, 49]]"
            raise ValueError(f"{what}, got {self.pyramid!r}")
        assert steps is not None
        for block, fewer in steps:
            if not last_block < block < self.num_blocks:
                what = f"the blocks of a pyramid rise from 0 to {self.num_blocks - 1}"
                raise ValueError(f"{what}, got {self.pyramid!r}")
            if not 1 <= fewer < tokens:
                what = f"block {block} of the pyramid must bring {tokens} tokens down to fewer"
                raise ValueError(f"{what}, got {fewer}")
            last_block, tokens = block, fewer
        object.__setattr__(self, "pyramid", steps)

    @property
    def is_plain(self) -> bool:
        """Whether this is the paper's Mixer and none of appendix A.1."""
        return self.token_mixing == "shared" and not self.pyramid

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens before each block and, at last, those before the head: num_blocks + 1."""
        steps, counts = dict(self.pyramid), [self.num_tokens]
        for block in range(self.num_blocks):
            counts.append(steps.get(block, counts[-1]))
        return tuple(counts)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row: (H / P, W / P)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def flops(self) -> int:
        """Operations of one image, a multiply-add counted as two.

        Biases, GELU and LayerNorm, below one per cent together, are left out, as is usual.
        """
        dim, counts = self.hidden_dim, self.tokens
        total = self.num_tokens * self.in_channels * self.patch_size**2 * dim
        for before, after in itertools.pairwise(counts):
            total += dim * (before + after) * self.tokens_mlp_dim
            total += 2 * after * dim * self.channels_mlp_dim
            total += before * dim**2 if self.token_mixing == "views" else 0
            total += dim * before * after if after < before else 0
        return 2 * (total + dim * self.num_classes)

    @property
    def widest(self) -> int:
        """Values of one image's largest activation, a hidden layer of the first block."""
        return max(self.hidden_dim * self.tokens_mlp_dim, self.num_tokens * self.channels_mlp_dim)

    @property
    def num_parameters(self) -> int:
        """Trained values, by a closed formula: that of Table 1 and, beside it, the variants'."""
        dim, counts = self.hidden_dim, self.tokens
        total = (self.in_channels * self.patch_size**2 + 1) * dim + 2 * dim
        for before, after in itertools.pairwise(counts):
            inside, outside = before * self.token_groups, after * self.token_groups
            mixing = (inside + 1) * self.tokens_mlp_dim + (self.tokens_mlp_dim + 1) * outside
            total += mixing * (dim if self.token_mixing == "untied" else 1)
            total += (dim + 1) * self.channels_mlp_dim + (self.channels_mlp_dim + 1) * dim
            total += 4 * dim  # two LayerNorms
            total += dim**2 if self.token_mixing == "views" else 0
            total += before * after if after < before else 0
        return total + ((dim + 1) * self.num_classes if self.num_classes else 0)

    @property
    def variant(self) -> str:
        """What of appendix A.1 it has, in words; "" for the paper's own Mixer."""
        words = {
            "shared": [],
            "untied": ["untied token mixing"],
            "grouped": [f"channels in groups of {self.token_groups}"],
            "views": [f"{self.token_groups} learned views"],
        }[self.token_mixing]
        if self.pyramid:
            words = [*words, "pyramid " + " > ".join(map(str, dict.fromkeys(self.tokens)))]
        return ", ".join(words)

    def summary(self) -> str:
        """Returns the shape in a few words: "12 layers, patch 16, 768 channels"."""
        shape = f"{self.num_blocks} layers, patch {self.patch_size}, {self.hidden_dim} channels"
        return f"{shape}, {self.variant}" if self.variant else shape

    @property
    def num_tokens(self) -> int:
        """S = HW / P^2, the length of the token sequence."""
        return self.grid[0] * self.grid[1]


class MlpBlock(nn.Sequential):
    """Two dense layers with a GELU between them, applied to the last axis (equation 1)."""

    def __init__(self, dim: int, mlp_dim: int, gelu: str, dropout: float) -> None:
        super().__init__()
        self.dense_0 = nn.Linear(dim, mlp_dim)
        self.gelu = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.dropout_0 = nn.Dropout(dropout)
        self.dense_1 = nn.Linear(mlp_dim, dim)
        self.dropout_1 = nn.Dropout(dropout)


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each with a LayerNorm before and a skip around it.

    The output bias of the token mixing changes no logit and has no gradient but rounding: it adds
    one number to all channels of a token, and whatever reads the tokens, the last LayerNorm
    included, takes the mean over channels away. It is here because the paper's code and Google's
    files have it; inference with packed weights leaves it out. (A pyramid's shortcut mixes such
    numbers among tokens and never among channels. Untied, grouped and views' biases do count.)

    Args:
        config: the architecture.
        drop_token_mixing, drop_channel_mixing: stochastic depth of the two branches.
    """

    def __init__(
        self, config: MixerConfig, drop_token_mixing: float, drop_channel_mixing: float
    ) -> None:
        super().__init__()
        dim, tokens = config.hidden_dim, config.num_tokens
        self.layer_norm_0 = nn.LayerNorm(dim, eps=1e-6)
        self.token_mixing = MlpBlock(tokens, config.tokens_mlp_dim, config.gelu, config.dropout)
        self.drop_0 = StochasticDepth(drop_token_mixing)
        self.layer_norm_1 = nn.LayerNorm(dim, eps=1e-6)
        self.channel_mixing = MlpBlock(dim, config.channels_mlp_dim, config.gelu, config.dropout)
        self.drop_1 = StochasticDepth(drop_channel_mixing)

    def forward(self, x: Tensor) -> Tensor:  # (N, S, C) -> (N, S, C)
        y = self.layer_norm_0(x).transpose(1, 2)  # (N, C, S)
        y = self.token_mixing(y).transpose(1, 2)  # (N, S, C)
        x = x + self.drop_0(y)
        y = self.channel_mixing(self.layer_norm_1(x))
        return x + self.drop_1(y)


class MlpMixer(ImageClassifier):
    """The network of Figure 1: stem, mixer blocks, LayerNorm, mean over tokens, head."""

    config: MixerConfig

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config
        patch, dim, last_mlp = config.patch_size, config.hidden_dim, 2 * config.num_blocks - 1
        drops = [config.stochastic_depth * mlp / last_mlp for mlp in range(last_mlp + 1)]
        if not config.is_plain and type(self) is MlpMixer:
            raise ValueError(f"{config.summary()}: model_from_config builds it, MlpMixer does not")
        self.stem = nn.Conv2d(config.in_channels, dim, kernel_size=patch, stride=patch)
        self.blocks = nn.Sequential(
            *(self.block(i, *drops[2 * i : 2 * i + 2]) for i in range(config.num_blocks))
        )
        self.pre_head_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, config.num_classes) if config.num_classes else None
        self.initialize()

    def block(self, index: int, *drops: float) -> nn.Module:
        """Returns a new mixer layer; `index` counts from 0."""
        return MixerBlock(self.config, *drops)

    def initialize(self) -> None:
        """Draws new weights as Flax does: lecun-normal kernels, zero biases, a zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                lecun_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)

    def features(self, images: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, C)
        """Returns the mean over tokens of the normalised last layer, which the head reads.

        Raises:
            ValueError: the images have another size or other channels than the model.
        """
        self.check_images(images)
        x = self.stem(images).flatten(2).transpose(1, 2)  # (N, S, C), row-major over the grid
        # Under autocast the stem gives bfloat16; the residual stream keeps the weights' float32. A
        # token's channels lie side by side, or each LayerNorm would copy them to be so.
        x = x.to(self.pre_head_layer_norm.weight.dtype).contiguous()
        x = self.pre_head_layer_norm(self.blocks(x))
        return x.mean(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, num_classes), or the features (N, C) of a model without a head.

        Args:
            images: (N, channels, H, W); Google's weights expect values in [-1, 1].

        Raises:
            ValueError: the images have another size or other channels than the model.
        """
        x = self.features(images)
        return x if self.head is None else self.head(x)
