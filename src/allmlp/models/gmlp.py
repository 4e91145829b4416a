"""gMLP: Pay Attention to MLPs (Liu et al. 2021, arXiv 2105.08050).

A block is one MLP over the channels. Between its layers a spatial gate multiplies one half of the
hidden units by the other half, which an S x S matrix has mixed over the tokens:

    u, v = GELU(dense_0 x);   x <- x + dense_1 (u * (mixing (layer_norm v)))

Matches timm, with LayerNorm epsilon 1e-6 in the block and 1e-5 in the gate.

Shapes: N batch, S tokens, C channels, D hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from allmlp.models.family import Family, Names, PatchConfig, infer_maps, named
from allmlp.models.layers import PatchClassifier, StochasticDepth
from allmlp.models.resize import resize_maps


class SpatialGate(nn.Module):
    """The spatial gating unit (equation 3 of the paper onwards)."""

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim, eps=1e-5)
        self.token_mixing = nn.Linear(tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:  # (N, S, 2 D') -> (N, S, D')
        value, gate = x.chunk(2, dim=-1)
        gate = self.token_mixing(self.layer_norm(gate).transpose(1, 2)).transpose(1, 2)
        return value * gate


class GatedMlp(nn.Sequential):
    """Two dense layers with a GELU and a spatial gate between them."""

    before_gelu: ClassVar[str] = "dense_0"  # for inference with packed weights

    def __init__(self, dim: int, mlp_dim: int, tokens: int) -> None:
        super().__init__()
        self.dense_0 = nn.Linear(dim, mlp_dim)
        self.gelu = nn.GELU()
        self.gate = SpatialGate(mlp_dim // 2, tokens)
        self.dense_1 = nn.Linear(mlp_dim // 2, dim)


class GMLPBlock(nn.Module):
    """A gated MLP with pre-LayerNorm and a skip connection."""

    def __init__(self, config: GMLPConfig, drop: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.hidden_dim, eps=1e-6)
        self.mlp = GatedMlp(config.hidden_dim, config.mlp_dim, config.num_tokens)
        self.drop = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:  # (N, S, C) -> (N, S, C)
        return x + self.drop(self.mlp(self.layer_norm(x)))


class GMLP(PatchClassifier):
    """gMLP Ti/16, S/16 and B/16, and custom sizes."""

    config: GMLPConfig
    why_one_size: ClassVar[str] = "its gates have a weight for each pair of patches"

    def block(self, index: int) -> GMLPBlock:
        config = self.config
        return GMLPBlock(config, config.stochastic_depth * index / max(1, config.num_blocks - 1))

    def initialize(self) -> None:
        """Draws new weights; gates start at one, so that a block starts as a plain MLP."""
        super().initialize()
        for module in self.modules():
            if isinstance(module, SpatialGate):
                nn.init.normal_(module.token_mixing.weight, std=1e-6)
                nn.init.ones_(module.token_mixing.bias)


@dataclass(frozen=True, kw_only=True)
class GMLPConfig(PatchConfig):
    """The architecture of a gMLP.

    Args:
        mlp_dim: outputs of the first dense layer in a block; one half gates the other.
        stochastic_depth: drop probability of the last block; it rises linearly from 0.

    The other fields are those of `PatchConfig`.
    """

    mlp_dim: int
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_dim % 2:
            raise ValueError(f"mlp_dim must be even, half of it is the gate, got {self.mlp_dim}")

    @property
    def flops(self) -> int:
        block = self.num_tokens * (self.mlp_dim // 2) * (3 * self.hidden_dim + self.num_tokens)
        return self.flops_with(self.num_blocks * block)

    @property
    def widest(self) -> int:
        return self.num_tokens * self.mlp_dim


_SHAPES = {"gmlp_ti16": (128, 768), "gmlp_s16": (256, 1536), "gmlp_b16": (512, 3072)}  # Table 1
FAMILY = Family(
    name="gmlp",
    title="gMLP",
    paper="Liu et al. 2021, arXiv 2105.08050",
    config=GMLPConfig,
    build=GMLP,
    architectures=named(GMLPConfig, "hidden_dim mlp_dim", _SHAPES, patch_size=16, num_blocks=30),
    resize=resize_maps("mlp.gate.token_mixing"),
    marker=r"blocks\.\d+\.mlp\.gate\.",
    infer=infer_maps(GMLPConfig, "mlp.gate.token_mixing", "mlp.dense_0", "mlp_dim"),
    names=(
        Names(
            "timm",
            r"blocks\.\d+\.(mlp_channels\.gate|norm)\.",
            "stem.proj=stem norm=pre_head_layer_norm",
            "norm=layer_norm mlp_channels.fc1=mlp.dense_0 mlp_channels.fc2=mlp.dense_1 "
            "mlp_channels.gate.norm=mlp.gate.layer_norm "
            "mlp_channels.gate.proj=mlp.gate.token_mixing",
        ),
    ),
)
