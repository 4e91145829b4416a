"""Systems that the paper's Tables 2 and 3 compare the Mixer with, as built by timm.

The paper's weights were trained on JFT-300M and the data of ALIGN and MPL, and never published.
Sizes that timm does not register are in `models/timm_model.py`.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from allmlp.console import table


class ComparisonSystem(NamedTuple):
    paper_name: str  # includes the size even where the paper omits it
    model: str  # for `create_model`
    parameters: int  # with 1000 classes, at the default image size
    tag: str  # of timm's weights, if any
    caveat: str  # differences from the paper's


_HALO = "H4 of base width 64; the paper's ImageNet-21k row is reported to be a wider H4. "
_HALO += "Halo attention in timm is slow: its speed says little of HaloNet's"
_BIT = "the paper's BiT-R runs are trainings of its authors and were not published"
_JFT = "the paper's JFT-300M weights were not published"
_F4 = f"nearest with weights: timm:dm_nfnet_f4, 316 M parameters, ImageNet-1k; {_JFT}"
_L2 = "EfficientNet-L2, the architecture of ALIGN's image tower; the weights are Noisy Student's"
_MPL = "EfficientNet-L2, the weights are Noisy Student's, not MPL's; the paper's row of 90.0 is "
_MPL += "reported to be EfficientNet-B6-Wide, which timm does not register"
_VIT = "without a tag timm takes augreg2, another recipe than the paper's"
_L16, _H14 = f"another recipe; {_JFT}", f"these weights have no head; {_JFT}"
_BIT_TAG, _VIT_TAG = "goog_in21k_ft_in1k", "orig_in21k_ft_in1k"
_L2_TAG = "ns_jft_in1k_475"

SYSTEMS = tuple(
    ComparisonSystem(name, f"timm:{model}", parameters, tag, caveat)
    for name, model, parameters, tag, caveat in (
        ("HaloNet", "halonet_h4", 19_101_976, "", _HALO),
        ("ViT-B/16", "vit_base_patch16_224", 86_567_656, _VIT_TAG, _VIT),
        ("ViT-L/16", "vit_large_patch16_224", 304_326_632, "augreg_in21k_ft_in1k", _L16),
        ("ViT-H/14", "vit_huge_patch14_224", 632_045_800, "orig_in21k", _H14),
        ("BiT-R50x1", "resnetv2_50x1_bit", 25_549_352, _BIT_TAG, _BIT),
        ("BiT-R50x2", "bit_r50x2", 97_988_712, "", _BIT),
        ("BiT-R152x1", "bit_r152x1", 60_185_128, "", _BIT),
        ("BiT-R152x2", "resnetv2_152x2_bit", 236_335_208, _BIT_TAG, _BIT),
        ("BiT-R200x3", "bit_r200x3", 568_633_000, "", _BIT),
        ("BiT-R152x4", "resnetv2_152x4_bit", 936_533_224, _BIT_TAG, _BIT),
        ("NFNet-F4+", "nfnet_f4_plus", 525_038_908, "", _F4),
        ("ALIGN", "tf_efficientnet_l2", 480_309_308, _L2_TAG, _L2),
        ("MPL", "tf_efficientnet_l2", 480_309_308, _L2_TAG, _MPL),
    )
)


def list_comparison() -> list[str]:
    """Returns a table of the paper's comparison systems, with weights and caveats."""
    rows = [[system.paper_name, system.model, f"{system.parameters:,}"] for system in SYSTEMS]
    lines = table(["in the paper", "model", "parameters"], rows, left=2)
    lines += ["Parameters with 1000 classes, at the size that timm builds it for.", ""]
    for name, model, _, tag, caveat in SYSTEMS:
        weights = f"{model}.{tag}" if tag else "none"
        lines += [name, f"  weights  {weights}", f"  note     {caveat}"]
    if importlib.util.find_spec("timm") is None:
        lines += ["", "timm, which builds them, is not installed: pip install timm (docs/timm.md)"]
    return lines
