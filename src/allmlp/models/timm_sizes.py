"""Sizes of the paper's comparison systems that timm does not register, built from its parts."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from allmlp.models.family import Size


class HandBuilt(NamedTuple):
    image_size: Size  # as in the source
    build: Callable[..., nn.Module]  # takes timm's settings: num_classes, in_chans, drop_rate, ...


def _bit(layers: tuple[int, ...], width: int, **settings: Any) -> nn.Module:
    """BiT's ResNet-v2 (Kolesnikov et al. 2020), built as timm builds the registered sizes."""
    resnetv2 = importlib.import_module("timm.models.resnetv2")
    timm_layers = importlib.import_module("timm.layers")
    return resnetv2.ResNetV2(
        layers=layers,
        width_factor=width,
        stem_type="fixed",
        conv_layer=partial(timm_layers.StdConv2d, eps=1e-8),
        **settings,
    )


def _nfnet_f4_plus(**settings: Any) -> nn.Module:
    """NFNet-F4+ (Brock et al. 2021; deepmind-research, nfnets/base.py)."""
    nfnet = importlib.import_module("timm.models.nfnet")
    config = nfnet._dm_nfnet_cfg(depths=(5, 10, 30, 15), channels=(384, 768, 2048, 2048))
    # timm's helper has 128, the stem of the narrower F4; it is half the width of the first stage.
    return nfnet.NormFreeNet(dataclasses.replace(config, stem_chs=192), **settings)


def _halonet_h4(**settings: Any) -> nn.Module:
    """HaloNet-H4 (Vaswani et al. 2021): block 12, halo 2, r_v 1, r_b 3, depths 3, 3, 12, 3."""
    byobnet = importlib.import_module("timm.models.byobnet")
    stages = zip((3, 3, 12, 3), (64, 128, 256, 512), (1, 2, 2, 2), strict=True)
    config = byobnet.ByoModelCfg(
        blocks=tuple(
            byobnet.ByoBlockCfg(type="self_attn", d=depth, c=3 * dim, s=stride, gs=0, br=1 / 3)
            for depth, dim, stride in stages
        ),
        stem_chs=64,
        stem_type="7x7",
        stem_pool="maxpool",
        num_features=1280,
        self_attn_layer="halo",
        self_attn_kwargs={"block_size": 12, "halo_size": 2},
    )
    return byobnet.ByobNet(config, **settings)


HAND_BUILT: dict[str, HandBuilt] = {
    "bit_r50x2": HandBuilt((224, 224), partial(_bit, (3, 4, 6, 3), 2)),
    "bit_r152x1": HandBuilt((224, 224), partial(_bit, (3, 8, 36, 3), 1)),
    "bit_r200x3": HandBuilt((224, 224), partial(_bit, (3, 24, 36, 3), 3)),
    "nfnet_f4_plus": HandBuilt((512, 512), _nfnet_f4_plus),
    "halonet_h4": HandBuilt((384, 384), _halonet_h4),
}
