"""ResMLP: Feedforward networks for image classification with data-efficient training (Touvron et
al. 2021, arXiv 2105.03404).

An S x S matrix mixes the tokens, and a per-channel affine map replaces LayerNorm, so the whole
block is linear except for the GELU of the channel MLP:

    x <- x + scale_0 * (mixing (affine_0 x)),   x <- x + scale_1 * MLP(affine_1 x)

Matches the authors' code (facebookresearch/deit) and timm. As there, stochastic depth is the same
in all blocks.

Shapes: N batch, S tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from allmlp.models.family import Family, Names, PatchConfig, infer_maps, named
from allmlp.models.layers import PatchClassifier, StochasticDepth
from allmlp.models.mixer import MlpBlock
from allmlp.models.resize import resize_maps


class Affine(nn.Module):
    """alpha * x + beta per channel (equation 1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        return torch.addcmul(self.beta, self.alpha, x)


class ResMLPBlock(nn.Module):
    """A linear map over the tokens, then an MLP over the channels (equations 2 and 3)."""

    def __init__(self, config: ResMLPConfig) -> None:
        super().__init__()
        dim, tokens = config.hidden_dim, config.num_tokens
        self.affine_0 = Affine(dim)
        self.token_mixing = nn.Linear(tokens, tokens)
        self.scale_0 = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.drop_0 = StochasticDepth(config.stochastic_depth)
        self.affine_1 = Affine(dim)
        self.channel_mixing = MlpBlock(dim, config.channels_mlp_dim, "exact", 0.0)
        self.scale_1 = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.drop_1 = StochasticDepth(config.stochastic_depth)

    def forward(self, x: Tensor) -> Tensor:  # (N, S, C) -> (N, S, C)
        y = self.token_mixing(self.affine_0(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.drop_0(self.scale_0 * y)
        y = self.channel_mixing(self.affine_1(x))
        return x + self.drop_1(self.scale_1 * y)


class ResMLP(PatchClassifier):
    """ResMLP S12, S24, S36 and B24, and custom sizes."""

    config: ResMLPConfig
    last_norm: ClassVar[str] = "pre_head_affine"
    why_one_size: ClassVar[str] = "its token mixing has a weight for each pair of patches"

    def block(self, index: int) -> ResMLPBlock:
        return ResMLPBlock(self.config)

    def norm(self) -> Affine:
        return Affine(self.config.hidden_dim)

    def initialize(self) -> None:
        """Draws new weights as the authors do, but with a zero head, as in all models here."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)


@dataclass(frozen=True, kw_only=True)
class ResMLPConfig(PatchConfig):
    """The architecture of a ResMLP.

    Args:
        channels_mlp_dim: hidden units of the channel MLP.
        layer_scale: initial value of the scales (LayerScale).
        stochastic_depth: drop probability of a branch, the same in all blocks.

    The other fields are those of `PatchConfig`.
    """

    channels_mlp_dim: int
    layer_scale: float = 1e-5
    stochastic_depth: float = 0.0

    @property
    def flops(self) -> int:
        width = self.num_tokens + 2 * self.channels_mlp_dim
        return self.flops_with(self.num_blocks * self.num_tokens * self.hidden_dim * width)

    @property
    def widest(self) -> int:
        return self.num_tokens * self.channels_mlp_dim


# Of the authors' code.
_FIELDS = "patch_size hidden_dim num_blocks channels_mlp_dim layer_scale"
_SHAPES = {
    "resmlp_12": (16, 384, 12, 1536, 0.1),
    "resmlp_24": (16, 384, 24, 1536, 1e-5),
    "resmlp_36": (16, 384, 36, 1536, 1e-6),
    "resmlp_big_24": (8, 768, 24, 3072, 1e-6),
}
FAMILY = Family(
    name="resmlp",
    title="ResMLP",
    paper="Touvron et al. 2021, arXiv 2105.03404",
    config=ResMLPConfig,
    build=ResMLP,
    architectures=named(ResMLPConfig, _FIELDS, _SHAPES),
    resize=resize_maps("token_mixing"),
    marker=r"pre_head_affine\.|blocks\.\d+\.(affine|scale)_",
    infer=infer_maps(ResMLPConfig, "token_mixing", "channel_mixing.dense_0", "channels_mlp_dim"),
    crops=dict.fromkeys(_SHAPES, 0.9),  # the authors evaluate at 0.9, timm at 0.875
    names=(
        Names(
            "timm",
            r"blocks\.\d+\.(linear_tokens\.|ls[12]$)",
            "stem.proj=stem norm=pre_head_affine",
            "norm1=affine_0 linear_tokens=token_mixing ls1=scale_0 norm2=affine_1 ls2=scale_1 "
            "mlp_channels.fc1=channel_mixing.dense_0 mlp_channels.fc2=channel_mixing.dense_1",
            scale_axes=3,
        ),
        Names(
            "ResMLP's authors",
            r"blocks\.\d+\.(attn\.(weight|bias)|gamma_[12])$",
            "patch_embed.proj=stem norm=pre_head_affine",
            "norm1=affine_0 attn=token_mixing gamma_1=scale_0 norm2=affine_1 gamma_2=scale_1 "
            "mlp.fc1=channel_mixing.dense_0 mlp.fc2=channel_mixing.dense_1",
        ),
    ),
)
