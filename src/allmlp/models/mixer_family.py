"""The record of the family of MLP-Mixers: its named architectures, and the shapes of its files."""

from __future__ import annotations

import math
from collections.abc import Mapping

from allmlp.models.layers import Family, Size, count_blocks, shape_of
from allmlp.models.mixer import MlpMixer
from allmlp.models.mixer_config import MixerConfig
from allmlp.models.mixer_variants import MixerVariant
from allmlp.models.resize import resize_tokens


def infer(
    shapes: Mapping[str, tuple[int, ...]], written: Size | None, asked: Size | None
) -> MixerConfig:
    """Returns the configuration that a Mixer's tensors imply, see `Family.infer`."""
    dim, channels, patch, patch_width = shape_of(shapes, "stem.weight", 4)
    if patch != patch_width:
        raise ValueError(f"the patch is {patch}x{patch_width} pixels, not square")
    num_blocks = max(1, count_blocks(shapes, r"blocks\.(\d{1,6})\."))
    hidden, num_tokens = shape_of(shapes, "blocks.0.token_mixing.dense_0.weight", 2)
    channels_hidden, _ = shape_of(shapes, "blocks.0.channel_mixing.dense_0.weight", 2)
    has_head = "head.weight" in shapes or "head.bias" in shapes
    side = math.isqrt(num_tokens) * patch
    for height, width in filter(None, (written, (side, side), asked)):
        if height % patch == width % patch == 0 and height * width == num_tokens * patch**2:
            break
    else:
        raise ValueError(
            f"the weights are for {num_tokens} patches of {patch}x{patch} pixels, not a "
            "square, and the file does not say the height and width: give its own image_size"
        )
    return MixerConfig(
        image_size=(height, width),
        patch_size=patch,
        hidden_dim=dim,
        num_blocks=num_blocks,
        tokens_mlp_dim=hidden,
        channels_mlp_dim=channels_hidden,
        num_classes=shape_of(shapes, "head.weight", 2)[0] if has_head else 0,
        in_channels=channels,
    )


def _tell(config: MixerConfig, named: MixerConfig) -> str | None:
    """A model grown to K tiles has K times wider token-mixing MLPs; a variant says what it is."""
    shape = ("patch_size", "hidden_dim", "num_blocks", "channels_mlp_dim")
    tiles, rest = divmod(config.tokens_mlp_dim, named.tokens_mlp_dim)
    if rest or any(getattr(config, name) != getattr(named, name) for name in shape):
        return None
    grown = "" if tiles == 1 else f" grown to {tiles} tiles"
    return f"{grown} ({config.variant})" if config.variant else grown


# Table 1 of the paper; S/8 is Google's later release (SAM-trained, not in the paper).
_TABLE_1 = {  # P, C, L, D_S, D_C
    "mixer_s32": (32, 512, 8, 256, 2048),
    "mixer_s16": (16, 512, 8, 256, 2048),
    "mixer_s8": (8, 512, 8, 256, 2048),
    "mixer_b32": (32, 768, 12, 384, 3072),
    "mixer_b16": (16, 768, 12, 384, 3072),
    "mixer_l32": (32, 1024, 24, 512, 4096),
    "mixer_l16": (16, 1024, 24, 512, 4096),
    "mixer_h14": (14, 1280, 32, 640, 5120),
}
_SIZES = ("patch_size", "hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")
FAMILY = Family(
    name="mixer",
    title="MLP-Mixer",
    paper="Tolstikhin et al. 2021, arXiv 2105.01601",
    config=MixerConfig,
    build=lambda config: (MlpMixer if config.is_plain else MixerVariant)(config),
    architectures={
        name: MixerConfig(**dict(zip(_SIZES, sizes, strict=True)))
        for name, sizes in _TABLE_1.items()
    },
    tell=_tell,
    resize=resize_tokens,
    infer=infer,
)
