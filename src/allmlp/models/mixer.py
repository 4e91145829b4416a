"""MLP-Mixer: An all-MLP Architecture for Vision (Tolstikhin et al. 2021, arXiv 2105.01601).

To be read beside the paper's Listing 1, whose names and order it keeps. It equals Google's own code
(google-research/vision_transformer, models_mixer.py) to rounding: tanh GELU, LayerNorm epsilon
1e-6, LayerNorm before the mean over tokens, zero head, row-major tokens. Appendix B's stochastic
depth and dropout, which the listing leaves out, are here.

Shapes: N batch, S tokens, C channels, P patch side, H W pixels.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from allmlp.models.layers import ImageClassifier, StochasticDepth, lecun_normal_
from allmlp.models.mixer_config import MixerConfig


class MlpBlock(nn.Sequential):
    """Two dense layers with a GELU between them, applied to the last axis (equation 1)."""

    before_gelu: ClassVar[str] = "dense_0"  # for inference with packed weights

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
    included, subtracts the mean over channels. It is here because the paper's code and Google's
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
            ValueError: the images have another size or number of channels than the model.
        """
        self.check_images(images)
        x = self.stem(images).flatten(2).transpose(1, 2)  # (N, S, C), row-major over the grid
        # Under autocast the stem returns bfloat16; the residual stream stays in the weights'
        # float32. A token's channels must be contiguous, or each LayerNorm would copy them.
        x = x.to(self.pre_head_layer_norm.weight.dtype).contiguous()
        x = self.pre_head_layer_norm(self.blocks(x))
        return x.mean(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, num_classes), or the features (N, C) of a model without a head.

        Args:
            images: (N, channels, H, W); Google's weights expect values in [-1, 1].

        Raises:
            ValueError: the images have another size or number of channels than the model.
        """
        x = self.features(images)
        return x if self.head is None else self.head(x)

    def biases_without_effect(self) -> list[nn.Parameter]:
        """Returns the output biases of the token mixing, see `MixerBlock`."""
        is_shared = self.config.token_mixing == "shared"
        names = [f"blocks.{i}.token_mixing.dense_1.bias" for i in range(self.config.num_blocks)]
        return [self.get_parameter(name) for name in names] if is_shared else []
