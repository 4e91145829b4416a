"""MLP-Mixer: An all-MLP Architecture for Vision (Tolstikhin et al. 2021, arXiv 2105.01601).

Follows the names and order of the paper's Listing 1. Matches Google's code
(google-research/vision_transformer, models_mixer.py) up to rounding: tanh GELU, LayerNorm epsilon
1e-6, LayerNorm before the mean over tokens, zero head, row-major tokens. Includes the stochastic
depth and dropout of appendix B, which the listing omits.

Shapes: N batch, S tokens, C channels, H W pixels.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allmlp.errors import UserError
from allmlp.models.family import (
    Family,
    Names,
    PatchConfig,
    Shapes,
    Size,
    Tensors,
    infer_patches,
    is_integer,
    named,
    shape_of,
)
from allmlp.models.gelu import Gelu
from allmlp.models.layers import PatchClassifier, StochasticDepth, lecun_normal_
from allmlp.models.resize import TOKENS, Weight, resize_tokens


class MlpBlock(nn.Sequential):
    """Two dense layers with a GELU in between, applied to the last axis (equation 1).

    If gated, the first layer is twice as wide and `SiluGate` replaces the GELU.
    """

    before_gelu: ClassVar[str] = "dense_0"  # for inference with packed weights

    def __init__(
        self, dim: int, mlp_dim: int, gelu: str, dropout: float, gated: bool = False
    ) -> None:
        super().__init__()
        self.dense_0 = nn.Linear(dim, 2 * mlp_dim if gated else mlp_dim)
        form = "tanh" if gelu == "tanh" else "none"
        self.gelu = SiluGate() if gated else Gelu(approximate=form)
        self.dropout_0 = nn.Dropout(dropout)
        self.dense_1 = nn.Linear(mlp_dim, dim)
        self.dropout_1 = nn.Dropout(dropout)


class SiluGate(nn.Module):
    """The first half of the last axis times SiLU of the second (Shazeer 2020, "SwiGLU")."""

    def forward(self, x: Tensor) -> Tensor:  # (..., 2 D) -> (..., D)
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each with pre-LayerNorm and a skip connection.

    The output bias of token mixing changes no logit, and its gradient is rounding noise: it adds
    the same number to all channels of a token (not in untied, grouped and views), and every
    LayerNorm subtracts the mean over channels. It exists because the paper's code and Google's
    files have it; inference with packed weights skips it.

    The index is that of the block, from 0; `drops` are the stochastic depth of both branches.
    """

    def __init__(self, config: MixerConfig, index: int, *drops: float) -> None:
        super().__init__()
        dim, tokens = config.hidden_dim, config.num_tokens
        how = config.gelu, config.dropout, config.gated
        self.layer_norm_0 = nn.LayerNorm(dim, eps=1e-6)
        self.token_mixing = MlpBlock(tokens, config.tokens_mlp_dim, *how)
        self.drop_0 = StochasticDepth(drops[0])
        self.layer_norm_1 = nn.LayerNorm(dim, eps=1e-6)
        self.channel_mixing = MlpBlock(dim, config.channels_mlp_dim, *how)
        self.drop_1 = StochasticDepth(drops[1])

    def forward(self, x: Tensor) -> Tensor:  # (N, S, C) -> (N, S, C)
        y = self.layer_norm_0(x).transpose(1, 2)  # (N, C, S)
        y = self.token_mixing(y).transpose(1, 2)  # (N, S, C)
        x = x + self.drop_0(y)
        y = self.channel_mixing(self.layer_norm_1(x))
        return x + self.drop_1(y)


class MlpMixer(PatchClassifier):
    """The network of Figure 1: stem, mixer blocks, LayerNorm, mean over tokens, head."""

    config: MixerConfig

    def block(self, index: int) -> MixerBlock:
        config, last = self.config, 2 * self.config.num_blocks - 1
        drops = [config.stochastic_depth * mlp / last for mlp in (2 * index, 2 * index + 1)]
        return (MixerBlock if config.is_plain else VariantBlock)(config, index, *drops)

    def initialize(self) -> None:
        super().initialize()
        for module in self.modules():
            if isinstance(module, UntiedLinear):
                module.initialize()

    def biases_without_effect(self) -> list[nn.Parameter]:
        """Returns the output biases of the token mixing, see `MixerBlock`."""
        is_shared = self.config.token_mixing == "shared"
        names = [f"blocks.{i}.token_mixing.dense_1.bias" for i in range(self.config.num_blocks)]
        return [self.get_parameter(name) for name in names] if is_shared else []


# --- Appendix A.1, "Things that did not help"; see `MixerConfig` and docs/ablations.md ------------
#
# Views are G linear maps from C to C / G, whose g-th outputs are laid out like the G channels of a
# group. Our choices where the paper is silent: D_S is that of the configuration; the maps of the
# views have no bias; views are undone as groups are, without a second map; the skip connection of a
# block that reduces the tokens is a linear map over the tokens without bias, like the projection
# shortcut of a ResNet (He et al. 2016).


class UntiedLinear(nn.Module):
    """A dense layer per channel: (N, C, in) -> (N, C, out); weight (C, out, in), bias (C, out)."""

    half_products: ClassVar[bool] = True  # an export may compute the matmuls in bfloat16

    def __init__(self, channels: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(channels, out_features))
        self.initialize()

    def initialize(self) -> None:
        """Draws new weights with the scale of `lecun_normal_` for a layer of this fan-in."""
        with torch.no_grad():  # drawn for all channels at once, then scaled to the fan-in of one
            lecun_normal_(self.weight)
            self.weight.mul_(math.sqrt(self.weight.shape[1]))
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.baddbmm(self.bias.unsqueeze(1), x.transpose(0, 1), self.weight.transpose(1, 2))
        return y.transpose(0, 1)


class VariantBlock(MixerBlock):
    """A mixer block with one of the token-mixing variants."""

    def __init__(self, config: MixerConfig, index: int, *drops: float) -> None:
        super().__init__(config, index, *drops)
        dim, hidden, groups = config.hidden_dim, config.tokens_mlp_dim, config.token_groups
        before, after = config.tokens[index : index + 2]
        dense_0: nn.Module = nn.Linear(before * groups, hidden)
        dense_1: nn.Module = nn.Linear(hidden, after * groups)
        if config.token_mixing == "untied":
            dense_0 = UntiedLinear(dim, before, hidden)
            dense_1 = UntiedLinear(dim, hidden, after)
        self.token_mixing.add_module("dense_0", dense_0)  # replaces the standard layer
        self.token_mixing.add_module("dense_1", dense_1)
        self.groups = groups
        has_views, is_smaller = config.token_mixing == "views", after < before
        self.views = nn.Linear(dim, dim, bias=False) if has_views else None
        self.shortcut = nn.Linear(before, after, bias=False) if is_smaller else None

    def forward(self, x: Tensor) -> Tensor:  # (N, S, C) -> (N, S', C)
        y = self.layer_norm_0(x)
        y = self.mix_tokens(y if self.views is None else self.views(y))
        if self.shortcut is not None:
            short = self.shortcut(x.transpose(1, 2)).transpose(1, 2)
            x = short.to(x.dtype).contiguous()  # the residual stream stays float32 under autocast
        x = x + self.drop_0(y)
        y = self.channel_mixing(self.layer_norm_1(x))
        return x + self.drop_1(y)

    def mix_tokens(self, y: Tensor) -> Tensor:
        """Applies the MLP to vectors of G neighbouring channels, and returns (N, S', C)."""
        samples, tokens, dim = y.shape
        columns = y.transpose(1, 2).reshape(samples, dim // self.groups, self.groups * tokens)
        return self.token_mixing(columns).reshape(samples, dim, -1).transpose(1, 2)


# --- the architecture -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MixerConfig(PatchConfig):
    """The architecture of an MLP-Mixer (Table 1 of the paper).

    Args:
        image_size: (H, W) in pixels; a single number means a square. The patch must divide both.
        patch_size: P in pixels, or (P_h, P_w).
        hidden_dim: C, channels of a token.
        num_blocks: mixer layers, each a token-mixing and a channel-mixing MLP.
        tokens_mlp_dim: D_S, hidden units of the token-mixing MLPs.
        channels_mlp_dim: D_C, hidden units of the channel-mixing MLPs.
        num_classes: outputs of the head; 0 removes the head, and the model returns its features.
        in_channels: channels of the input images.
        dropout: probability after both dense layers of every MLP.
        stochastic_depth: s, drop probability of the last MLP; it rises linearly from 0 at the first
            of the 2 * num_blocks MLPs (appendix B).
        gelu: "tanh" as in Google's training, "exact" for weights trained in timm.
        token_mixing: variant of appendix A.1: one MLP for all channels ("shared"), one per channel
            ("untied"), one over `token_groups` neighbouring channels at once ("grouped"), or over
            as many learned views of all channels ("views").
        token_groups: G, for "grouped" and "views"; must divide hidden_dim.
        pyramid: (block, S') pairs: token mixing in these blocks, counted from 0, reduces the tokens
            to S', and all later blocks work on S' tokens.
        gated: a SiLU gate replaces the GELU in all MLPs, as in timm's gMixer; D_S and D_C count
            the hidden units after the gate.

    Raises:
        ValueError: the patch does not divide the image, or a value is out of range.
    """

    tokens_mlp_dim: int
    channels_mlp_dim: int
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    gelu: Literal["tanh", "exact"] = "tanh"
    token_mixing: Literal["shared", "untied", "grouped", "views"] = "shared"
    token_groups: int = 1
    pyramid: tuple[tuple[int, int], ...] = ()
    gated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = self.token_groups
        if self.hidden_dim % groups:
            raise ValueError(f"token_groups must divide {self.hidden_dim} channels, got {groups}")
        if groups > 1 and self.token_mixing not in ("grouped", "views"):
            what = f"token_groups={groups} has no effect with token_mixing={self.token_mixing!r}"
            raise ValueError(f"{what}; it is for 'grouped' and 'views'")
        try:
            steps = tuple((block, fewer) for block, fewer in self.pyramid)
        except (TypeError, ValueError):
            steps = ((-1, -1),)
        if not all(is_integer(number, 0) for step in steps for number in step):
            what = "pyramid must be pairs of a block and its tokens, as [[4, 49]]"
            raise ValueError(f"{what}, got {self.pyramid!r}")
        blocks, tokens = [-1, *(block for block, _ in steps)], self.num_tokens
        if blocks != sorted(set(blocks)) or blocks[-1] >= self.num_blocks:
            what = f"the blocks of a pyramid rise from 0 to {self.num_blocks - 1}"
            raise ValueError(f"{what}, got {self.pyramid!r}")
        for block, fewer in steps:
            if not 1 <= fewer < tokens:
                what = f"block {block} of the pyramid must bring {tokens} tokens down to fewer"
                raise ValueError(f"{what}, got {fewer}")
            tokens = fewer
        object.__setattr__(self, "pyramid", steps)
        if self.gated and not self.is_plain:
            raise ValueError(f"gated MLPs mix all tokens alike: not with {self.variant}")

    @property
    def is_plain(self) -> bool:
        """Whether this is the paper's Mixer, not a variant of appendix A.1."""
        return self.token_mixing == "shared" and not self.pyramid

    @property
    def tokens(self) -> tuple[int, ...]:
        steps, counts = dict(self.pyramid), [self.num_tokens]
        for block in range(self.num_blocks):
            counts.append(steps.get(block, counts[-1]))
        return tuple(counts)

    @property
    def flops(self) -> int:
        dim, wide, total = self.hidden_dim, 2 if self.gated else 1, 0
        for before, after in itertools.pairwise(self.tokens):
            total += dim * (wide * before + after) * self.tokens_mlp_dim
            total += (wide + 1) * after * dim * self.channels_mlp_dim
            total += before * dim**2 if self.token_mixing == "views" else 0
            total += dim * before * after if after < before else 0
        return self.flops_with(total)

    @property
    def widest(self) -> int:
        hidden = self.hidden_dim * self.tokens_mlp_dim, self.num_tokens * self.channels_mlp_dim
        return max(hidden) * (2 if self.gated else 1)

    @property
    def variant(self) -> str:
        """Describes the variant of appendix A.1; "" for the paper's Mixer."""
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
        words = "gated" if self.gated else ""
        return ", ".join(filter(None, (super().summary(), words, self.variant)))


def _infer(shapes: Shapes, written: Size | None, asked: Size | None) -> MixerConfig:
    rows, num_tokens = shape_of(shapes, "blocks.0.token_mixing.dense_0.weight", 2)
    hidden = shape_of(shapes, "blocks.0.token_mixing.dense_1.weight", 2)[1]
    return MixerConfig(
        **infer_patches(shapes, num_tokens, written, asked),
        tokens_mlp_dim=hidden,
        channels_mlp_dim=shape_of(shapes, "blocks.0.channel_mixing.dense_1.weight", 2)[1],
        gated=rows == 2 * hidden,
    )


def _suffix(config: MixerConfig, named: MixerConfig) -> str | None:
    """Suffix for block-diagonal growth to K tiles (K times wider token mixing) and for variants."""
    shape = ("patch_size", "hidden_dim", "num_blocks", "channels_mlp_dim", "gated")
    tiles, rest = divmod(config.tokens_mlp_dim, named.tokens_mlp_dim)
    if rest or any(getattr(config, name) != getattr(named, name) for name in shape):
        return None
    grown = "" if tiles == 1 else f" grown to {tiles} tiles"
    return f"{grown} ({config.variant})" if config.variant else grown


def token_weights(config: MixerConfig) -> list[Weight]:
    """Returns the weights of a block that depend on the number of tokens, see `resize_tokens`."""
    read = (2 if config.gated else 1, config.tokens_mlp_dim)
    return [
        ("token_mixing.dense_0.weight", (read, TOKENS)),
        ("token_mixing.dense_0.bias", (read,)),
        ("token_mixing.dense_1.weight", (TOKENS, (1, config.tokens_mlp_dim))),
        ("token_mixing.dense_1.bias", (TOKENS,)),
    ]


def _resize(
    tensors: Tensors, old: MixerConfig, new: MixerConfig, method: str
) -> tuple[MixerConfig, str]:
    """In block-diagonal growth every tile gets its own hidden units, see `Family.resize`."""
    if not old.is_plain:
        what = f"this variant ({old.summary()}) cannot be brought to another image size"
        fix = "Only the paper's own token mixing has a rule for that; train it at that size"
        raise UserError(what, fix=fix)
    tiles, words = resize_tokens(tensors, token_weights(old), old, new, method)
    return replace(new, tokens_mlp_dim=tiles * old.tokens_mlp_dim), words


# Table 1 of the paper; S/8 is Google's later release (SAM-trained, not in the paper).
_SIZES = "patch_size hidden_dim num_blocks tokens_mlp_dim channels_mlp_dim"
_TABLE_1 = {
    "mixer_s32": (32, 512, 8, 256, 2048),
    "mixer_s16": (16, 512, 8, 256, 2048),
    "mixer_s8": (8, 512, 8, 256, 2048),
    "mixer_b32": (32, 768, 12, 384, 3072),
    "mixer_b16": (16, 768, 12, 384, 3072),
    "mixer_l32": (32, 1024, 24, 512, 4096),
    "mixer_l16": (16, 1024, 24, 512, 4096),
    "mixer_h14": (14, 1280, 32, 640, 5120),
}
_OF_TIMM = {"gmixer_24": (16, 384, 24, 192, 768)}
FAMILY = Family(
    name="mixer",
    title="MLP-Mixer",
    paper="Tolstikhin et al. 2021, arXiv 2105.01601",
    config=MixerConfig,
    build=MlpMixer,
    architectures={
        **named(MixerConfig, _SIZES, _TABLE_1),
        **named(MixerConfig, _SIZES, _OF_TIMM, gated=True),
    },
    suffix=_suffix,
    resize=_resize,
    marker=r"blocks\.\d+\.token_mixing\.dense_",
    infer=_infer,
    names=(
        Names(
            "timm",
            r"blocks\.\d+\.mlp_tokens\.",
            "stem.proj=stem norm=pre_head_layer_norm",
            "norm1=layer_norm_0 norm2=layer_norm_1 "
            "mlp_tokens.fc1=token_mixing.dense_0 mlp_tokens.fc2=token_mixing.dense_1 "
            "mlp_channels.fc1=channel_mixing.dense_0 mlp_channels.fc2=channel_mixing.dense_1",
            gelu="exact",
        ),
    ),
)
