"""The systems that the paper's Tables 2 and 3 compare the Mixer with, as timm builds them.

Their weights in the paper were trained on JFT-300M, ALIGN's and MPL's data and never published.
Sizes that timm does not register are assembled here from its parts, under names of ours.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from allmlp.console import table


@dataclass(frozen=True)
class ComparisonSystem:
    """One of the paper's comparison systems."""

    paper_name: str  # with the size where the paper leaves it out
    model: str  # for `create_model`
    parameters: int  # with 1000 classes, at the image size that it is built for
    weights: str  # for `load_model`, or "none"
    caveat: str = ""  # how it differs from the paper's


_BIT = "the paper's BiT-R runs are trainings of its authors and were not published"
_NOT_JFT = "the paper's JFT-300M weights were not published"

SYSTEMS: tuple[ComparisonSystem, ...] = (
    ComparisonSystem(
        "HaloNet",
        "timm:halonet_h4",
        19_101_976,
        "none",
        "H4 of base width 64; the paper's ImageNet-21k row is reported to be a wider H4. Halo "
        "attention in timm is slow: its speed says little of HaloNet's",
    ),
    ComparisonSystem(
        "ViT-B/16",
        "timm:vit_base_patch16_224",
        86_567_656,
        "timm:vit_base_patch16_224.orig_in21k_ft_in1k",
        "without a tag timm takes augreg2, another recipe than the paper's",
    ),
    ComparisonSystem(
        "ViT-L/16",
        "timm:vit_large_patch16_224",
        304_326_632,
        "timm:vit_large_patch16_224.augreg_in21k_ft_in1k",
        f"another recipe; {_NOT_JFT}",
    ),
    ComparisonSystem(
        "ViT-H/14",
        "timm:vit_huge_patch14_224",
        632_045_800,
        "timm:vit_huge_patch14_224.orig_in21k",
        f"these weights have no head; {_NOT_JFT}",
    ),
    ComparisonSystem(
        "BiT-R50x1",
        "timm:resnetv2_50x1_bit",
        25_549_352,
        "timm:resnetv2_50x1_bit.goog_in21k_ft_in1k",
        _BIT,
    ),
    ComparisonSystem("BiT-R50x2", "timm:bit_r50x2", 97_988_712, "none", _BIT),
    ComparisonSystem("BiT-R152x1", "timm:bit_r152x1", 60_185_128, "none", _BIT),
    ComparisonSystem(
        "BiT-R152x2",
        "timm:resnetv2_152x2_bit",
        236_335_208,
        "timm:resnetv2_152x2_bit.goog_in21k_ft_in1k",
        _BIT,
    ),
    ComparisonSystem("BiT-R200x3", "timm:bit_r200x3", 568_633_000, "none", _BIT),
    ComparisonSystem(
        "BiT-R152x4",
        "timm:resnetv2_152x4_bit",
        936_533_224,
        "timm:resnetv2_152x4_bit.goog_in21k_ft_in1k",
        _BIT,
    ),
    ComparisonSystem(
        "NFNet-F4+",
        "timm:nfnet_f4_plus",
        525_038_908,
        "none",
        f"nearest with weights: timm:dm_nfnet_f4, 316 M parameters, ImageNet-1k; {_NOT_JFT}",
    ),
    ComparisonSystem(
        "ALIGN",
        "timm:tf_efficientnet_l2",
        480_309_308,
        "timm:tf_efficientnet_l2.ns_jft_in1k_475",
        "EfficientNet-L2, the architecture of ALIGN's image tower; the weights are Noisy Student's",
    ),
    ComparisonSystem(
        "MPL",
        "timm:tf_efficientnet_l2",
        480_309_308,
        "timm:tf_efficientnet_l2.ns_jft_in1k_475",
        "EfficientNet-L2, the weights are Noisy Student's, not MPL's; the paper's row of 90.0 is "
        "reported to be EfficientNet-B6-Wide, which timm does not register",
    ),
)

# The paper's name -> the name that builds it.
PAPER_SYSTEMS: dict[str, str] = {system.paper_name: system.model for system in SYSTEMS}


def list_comparison() -> list[str]:
    """Returns a table of the paper's comparison systems, with their weights and caveats."""
    rows = [[system.paper_name, system.model, f"{system.parameters:,}"] for system in SYSTEMS]
    lines = table(["in the paper", "model", "parameters"], rows, left=2)
    lines += ["Parameters with 1000 classes, at the size that timm builds it for.", ""]
    for system in SYSTEMS:
        lines += [system.paper_name, f"  weights  {system.weights}", f"  note     {system.caveat}"]
    if importlib.util.find_spec("timm") is None:
        lines += ["", "timm, which builds them, is not installed: pip install timm (docs/timm.md)"]
    return lines


@dataclass(frozen=True)
class HandBuilt:
    """A size that timm does not register."""

    image_size: tuple[int, int]  # (H, W) of the source
    build: Callable[..., nn.Module]  # takes timm's settings: num_classes, in_chans, drop_rate, ...


def _bit(layers: tuple[int, ...], width: int, **settings: Any) -> nn.Module:
    """BiT's ResNet-v2 (Kolesnikov et al. 2020) as timm builds the registered ones."""
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
    # timm's helper has 128, the stem of the narrower F4; it is half of the first stage's width.
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
