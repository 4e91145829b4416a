"""The systems that the paper's Tables 2 and 3 compare the Mixer with, as timm builds them.

Their weights in the paper were trained on JFT-300M, ALIGN's and MPL's data and never published.
Sizes that timm does not register are those of `models/timm_sizes.py`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

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
