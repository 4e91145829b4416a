"""The token-mixing variants of appendix A.1, "Things that did not help", as settings of a Mixer.

    untied    a token-mixing MLP for each of the C channels instead of one for all
    grouped   G neighbouring channels are one vector of G * S numbers: the MLP sees them together
    views     as grouped, but of C features that are learned: G linear maps from C to C / G, whose
              g-th outputs stand beside each other as the G channels of a group do
    pyramid   the token mixing of chosen blocks maps S tokens to S' < S

The paper leaves open, and we chose: D_S stays that of the configuration; the maps of the views have
no bias; the way back from views is the groups' own, with no second map; the skip connection of a
block with fewer tokens after it than before is a linear map over the tokens without bias, as the
projection shortcut of a ResNet (He et al. 2016).

Shapes: N batch, S tokens, S' tokens after the block, C channels, G groups.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from allmlp.models.layers import lecun_normal_
from allmlp.models.mixer import MixerBlock, MlpMixer
from allmlp.models.mixer_config import MixerConfig


class UntiedLinear(nn.Module):
    """A dense layer per channel: (N, C, in) -> (N, C, out); weight (C, out, in), bias (C, out)."""

    half_products: ClassVar[bool] = True  # an export may compute them in bfloat16

    def __init__(self, channels: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(channels, out_features))
        self.initialize()

    def initialize(self) -> None:
        """Draws new weights as `lecun_normal_` does for a layer of that many inputs."""
        with torch.no_grad():  # drawn for all channels at once, scaled to the fan-in of one
            lecun_normal_(self.weight)
            self.weight.mul_(math.sqrt(self.weight.shape[1]))
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.baddbmm(self.bias.unsqueeze(1), x.transpose(0, 1), self.weight.transpose(1, 2))
        return y.transpose(0, 1)

    def extra_repr(self) -> str:
        channels, out_features, in_features = self.weight.shape
        return f"channels={channels}, in_features={in_features}, out_features={out_features}"


class VariantBlock(MixerBlock):
    """A mixer layer whose token mixing is one of the variants; `index` counts from 0."""

    def __init__(self, config: MixerConfig, index: int, *drops: float) -> None:
        super().__init__(config, *drops)
        dim, hidden, groups = config.hidden_dim, config.tokens_mlp_dim, config.token_groups
        before, after = config.tokens[index : index + 2]
        dense_0: nn.Module = nn.Linear(before * groups, hidden)
        dense_1: nn.Module = nn.Linear(hidden, after * groups)
        if config.token_mixing == "untied":
            dense_0 = UntiedLinear(dim, before, hidden)
            dense_1 = UntiedLinear(dim, hidden, after)
        self.token_mixing.add_module("dense_0", dense_0)  # in the place of the paper's own
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
        """Returns (N, S', C): each vector of G neighbouring channels through the MLP."""
        samples, tokens, dim = y.shape
        columns = y.transpose(1, 2).reshape(samples, dim // self.groups, self.groups * tokens)
        return self.token_mixing(columns).reshape(samples, dim, -1).transpose(1, 2)


class MixerVariant(MlpMixer):
    """A Mixer with the token mixing that its configuration chooses."""

    def block(self, index: int, *drops: float) -> nn.Module:
        return VariantBlock(self.config, index, *drops)

    def initialize(self) -> None:
        super().initialize()
        for module in self.modules():
            if isinstance(module, UntiedLinear):
                module.initialize()
