"""Tensor names and layouts in weights files: ours, Google's, timm's.

Google's arrays follow Flax: a dense kernel is (in, out) and the stem's (P, P, channels, C); torch
has (out, in) and (C, channels, P, P). Names in the published files:

    stem/{kernel,bias}
    MixerBlock_{i}/LayerNorm_{0,1}/{scale,bias}
    MixerBlock_{i}/{token_mixing,channel_mixing}/Dense_{0,1}/{kernel,bias}
    pre_head_layer_norm/{scale,bias}   head/{kernel,bias}

All other code bases use torch's shapes, as we do; their names are in the file of each family. timm
computes the exact GELU even for weights that Google trained with the tanh form.

Sources: google-research/vision_transformer, vit_jax/models_mixer.py; google-research/big_vision,
models/mlp_mixer.py, which loads the published files; timm 1.0, models/mlp_mixer.py.
"""

from __future__ import annotations

import re

import torch

from allmlp.models.catalog import ALL_MLP
from allmlp.models.family import Family, Names, Tensors
from allmlp.models.mixer import FAMILY as MIXER


class _GoogleNames(Names):
    def to_ours(self, tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for key, value in tensors.items():
            name = re.sub(r"^MixerBlock_(\d+)", r"blocks.\1", key).replace("/", ".")
            name = name.replace("LayerNorm_", "layer_norm_").replace("Dense_", "dense_")
            found[re.sub("(kernel|scale)$", "weight", name)] = _transposed(key, value)
        return found

    def from_ours(self, tensors: Tensors) -> Tensors:
        """Returns Google's arrays, blocks in natural order."""
        arrays: Tensors = {}
        for name, value in tensors.items():
            key = re.sub(r"blocks\.(\d+)", r"MixerBlock_\1", name).replace(".", "/")
            key = re.sub(r"layer_norm_(\d)", r"LayerNorm_\1", key).replace("dense_", "Dense_")
            key = re.sub("weight$", "scale" if "norm" in key.lower() else "kernel", key)
            arrays[key] = _transposed(key, value, back=True)
        return dict(sorted(arrays.items(), key=lambda item: natural(item[0])))


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts MixerBlock_2 before MixerBlock_10."""
    parts = re.split(r"(\d{1,18})", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _transposed(key: str, value: torch.Tensor, back: bool = False) -> torch.Tensor:
    if key == "stem/kernel" and value.dim() == 4:
        return value.permute(2, 3, 1, 0) if back else value.permute(3, 2, 0, 1)
    return value.T if key.endswith("kernel") and value.dim() == 2 else value


GOOGLE = _GoogleNames("Google", "stem/|MixerBlock_", gelu="tanh")
LAYOUTS: list[tuple[Family, Names]] = [
    (MIXER, Names("allmlp", MIXER.marker, gelu="tanh")),
    (MIXER, GOOGLE),
    *((found, Names(found.title, found.marker)) for found in ALL_MLP if found is not MIXER),
    *((found, names) for found in ALL_MLP for names in found.names),
]


def layout_of(tensors: Tensors, family: Family | None = None) -> tuple[Family, Names] | None:
    """Returns the layout that matches most tensor names, of `family` if given, or None."""
    best, most = None, 0
    for layout in LAYOUTS:
        if family is None or layout[0] is family:
            known = sum(re.match(layout[1].marker, name) is not None for name in tensors)
            best, most = (layout, known) if known > most else (best, most)
    return best
