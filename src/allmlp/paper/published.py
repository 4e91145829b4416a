"""The paper's Tables 1, 2 and 3 as printed (arXiv 2105.01601); never our own measurements.

Values are the printed text, so that no digit is added or lost; None is a dash in the paper.
"""

from __future__ import annotations

from typing import NamedTuple

HARDWARE = "TPUv3"  # of the throughput, and of the cost of pre-training


class Architecture(NamedTuple):
    """A column of Table 1, for 224 pixels; parameters in millions, without the head."""

    name: str
    model: str  # our name
    layers: int
    patch: int
    hidden: int
    sequence: int
    channels_dim: int
    tokens_dim: int
    parameters: int


class Result(NamedTuple):
    """A row of Table 2 or 3: top-1 in per cent, images/s per core, thousands of core-days."""

    data: str  # of the pre-training
    model: str
    imagenet: str | None
    real: str | None
    avg5: str | None
    vtab: str | None
    throughput: str | None
    core_days: str
    pixels: int | None = None  # of the fine-tuning; Table 3 only
    epochs: int | None = None  # of the pre-training; Table 3 only

    @property
    def family(self) -> str:
        """MLP, attention or convolution, as the paper colours it."""
        if self.model.startswith("Mixer"):
            return "MLP"
        return "attention" if self.model.startswith(("ViT", "HaloNet")) else "convolution"


def number(text: str | None) -> float | None:
    """Parses a printed value: 410.0 from "0.41k", 85.8 from "85.8", None from a dash."""
    if text is None:
        return None
    return round(1000 * float(text[:-1]), 6) if text.endswith("k") else float(text)


TABLE_1 = (
    #                               L   P     C    S   D_C  D_S  millions
    Architecture("S/32", "mixer_s32", 8, 32, 512, 49, 2048, 256, 19),
    Architecture("S/16", "mixer_s16", 8, 16, 512, 196, 2048, 256, 18),
    Architecture("B/32", "mixer_b32", 12, 32, 768, 49, 3072, 384, 60),
    Architecture("B/16", "mixer_b16", 12, 16, 768, 196, 3072, 384, 59),
    Architecture("L/32", "mixer_l32", 24, 32, 1024, 49, 4096, 512, 206),
    Architecture("L/16", "mixer_l16", 24, 16, 1024, 196, 4096, 512, 207),
    Architecture("H/14", "mixer_h14", 32, 14, 1280, 256, 5120, 640, 431),
)

_I1K, _I21K, _JFT, _WEAK = "ImageNet", "ImageNet-21k", "JFT-300M", "un- or weakly labelled"

# Mixers fine-tuned at 448 pixels and evaluated with "resize-crop"; means of three runs.
TABLE_2 = (
    #                              ImageNet  ReaL    Avg 5    VTAB    img/s  core-days
    Result(_I21K, "HaloNet", "85.8", None, None, None, "120", "0.10k"),
    Result(_I21K, "Mixer-L/16", "84.15", "87.86", "93.91", "74.95", "105", "0.41k"),
    Result(_I21K, "ViT-L/16", "85.30", "88.62", "94.39", "72.72", "32", "0.18k"),
    Result(_I21K, "BiT-R152x4", "85.39", None, "94.04", "70.64", "26", "0.94k"),
    Result(_JFT, "NFNet-F4+", "89.2", None, None, None, "46", "1.86k"),
    Result(_JFT, "Mixer-H/14", "87.94", "90.18", "95.71", "75.33", "40", "1.01k"),
    Result(_JFT, "BiT-R152x4", "87.54", "90.54", "95.33", "76.29", "26", "9.90k"),
    Result(_JFT, "ViT-H/14", "88.55", "90.72", "95.97", "77.63", "15", "2.30k"),
    Result(_WEAK, "MPL", "90.0", "91.12", None, None, None, "20.48k"),
    Result(_WEAK, "ALIGN", "88.64", None, None, "79.99", "15", "14.82k"),
)

# Evaluated with "resmall-crop"; means of three runs.
TABLE_3 = (
    #                            ImageNet  ReaL    Avg 5    VTAB  img/s  core-days  px  epochs
    Result(_I1K, "Mixer-B/16", "76.44", "82.36", "88.33", None, "1384", "0.01k", 224, 300),
    Result(_I1K, "ViT-B/16", "79.67", "84.97", "90.79", None, "861", "0.02k", 224, 300),
    Result(_I1K, "Mixer-L/16", "71.76", "77.08", "87.25", None, "419", "0.04k", 224, 300),
    Result(_I1K, "ViT-L/16", "76.11", "80.93", "89.66", None, "280", "0.05k", 224, 300),
    Result(_I21K, "Mixer-B/16", "80.64", "85.80", "92.50", None, "1384", "0.15k", 224, 300),
    Result(_I21K, "ViT-B/16", "84.59", "88.93", "94.16", None, "861", "0.18k", 224, 300),
    Result(_I21K, "Mixer-L/16", "82.89", "87.54", "93.63", None, "419", "0.41k", 224, 300),
    Result(_I21K, "ViT-L/16", "84.46", "88.35", "94.49", None, "280", "0.55k", 224, 300),
    Result(_I21K, "Mixer-L/16", "83.91", "87.75", "93.86", None, "105", "0.41k", 448, 300),
    Result(_JFT, "Mixer-S/32", "68.70", "75.83", "87.13", None, "11489", "0.01k", 224, 5),
    Result(_JFT, "Mixer-B/32", "75.53", "81.94", "90.99", None, "4208", "0.05k", 224, 7),
    Result(_JFT, "Mixer-S/16", "73.83", "80.60", "89.50", None, "3994", "0.03k", 224, 5),
    Result(_JFT, "BiT-R50x1", "73.69", "81.92", None, None, "2159", "0.08k", 224, 7),
    Result(_JFT, "Mixer-B/16", "80.00", "85.56", "92.60", None, "1384", "0.08k", 224, 7),
    Result(_JFT, "Mixer-L/32", "80.67", "85.62", "93.24", None, "1314", "0.12k", 224, 7),
    Result(_JFT, "BiT-R152x1", "79.12", "86.12", None, None, "932", "0.14k", 224, 7),
    Result(_JFT, "BiT-R50x2", "78.92", "86.06", None, None, "890", "0.14k", 224, 7),
    Result(_JFT, "BiT-R152x2", "83.34", "88.90", None, None, "356", "0.58k", 224, 14),
    Result(_JFT, "Mixer-L/16", "84.05", "88.14", "94.51", None, "419", "0.23k", 224, 7),
    Result(_JFT, "Mixer-L/16", "84.82", "88.48", "94.77", None, "419", "0.45k", 224, 14),
    Result(_JFT, "ViT-L/16", "85.63", "89.16", "95.21", None, "280", "0.65k", 224, 14),
    Result(_JFT, "Mixer-H/14", "86.32", "89.14", "95.49", None, "194", "1.01k", 224, 14),
    Result(_JFT, "BiT-R200x3", "84.73", "89.58", None, None, "141", "1.78k", 224, 14),
    Result(_JFT, "Mixer-L/16", "86.78", "89.72", "95.13", None, "105", "0.45k", 448, 14),
    Result(_JFT, "ViT-H/14", "86.65", "89.56", "95.57", None, "87", "2.30k", 224, 14),
    Result(_JFT, "ViT-L/16", "87.76", "90.54", "95.63", None, "32", "0.65k", 512, 14),
)

# Figure 2, left: Table 2, plus the large ViT-L/16 and Mixer-L/16 on JFT-300M from Table 3. (It also
# has a BiT-R200x3 at a resolution that no table lists.)
FIGURE_2 = (*TABLE_2, *(row for row in TABLE_3 if row.data == _JFT and (row.pixels or 0) > 224))
# Figure 3: all models pre-trained on JFT-300M and fine-tuned at 224 pixels.
FIGURE_3 = tuple(row for row in TABLE_3 if row.data == _JFT and row.pixels == 224)

# Figure 2, right: fraction of the pre-training images -> epochs, so that all runs are equally long.
DATA_SCALE = {0.03: 233, 0.1: 70, 0.3: 23, 1.0: 7}
