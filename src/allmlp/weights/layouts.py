"""How the tensors of a weights file are called and laid out: by us, by Google, by timm.

Google's arrays are Flax's: a dense kernel is (in, out) and the stem's (P, P, channels, C); torch
has (out, in) and (C, channels, P, P). The published files have the names of the second generation:

    stem/{kernel,bias}
    MixerBlock_{i}/LayerNorm_{0,1}/{scale,bias}
    MixerBlock_{i}/{token_mixing,channel_mixing}/Dense_{0,1}/{kernel,bias}
    pre_head_layer_norm/{scale,bias}   head/{kernel,bias}

An older generation, which big_vision still reads, numbers LayerNorms among all modules of a block
and may have axes of length one:

    embedding/{kernel,bias}
    Mixer/encoderblock_{i}/LayerNorm_{m}/{scale,bias}
    Mixer/encoderblock_{i}/{token_mixing,channel_mixing}_phase_0/{kernel,bias}{1,2}
    Mixer/encoder_norm/{scale,bias}    head/{kernel,bias}

timm has torch's shapes, as ours, under these names:

    stem.proj.{weight,bias}
    blocks.{i}.norm{1,2}.{weight,bias}
    blocks.{i}.{mlp_tokens,mlp_channels}.fc{1,2}.{weight,bias}
    norm.{weight,bias}   head.{weight,bias}

timm computes the exact GELU, also for weights that Google trained with the tanh form; loaded from
timm's files a model does what timm's does. The files of CycleMLP's and Vision Permutator's authors
have the names of our own modules.

Sources: google-research/vision_transformer, vit_jax/models_mixer.py and checkpoint.py;
google-research/big_vision, models/mlp_mixer.py; timm 1.0, models/mlp_mixer.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from allmlp.errors import UserError
from allmlp.models.catalog import ALL_MLP
from allmlp.models.family import Family, Tensors
from allmlp.models.mixer import FAMILY as MIXER


@dataclass(frozen=True)
class Layout:
    """One way of naming and laying out the tensors of a family."""

    title: str
    family: Family
    marker: str  # a pattern of names that only this layout has
    to_ours: Callable[[Tensors], Tensors] = dict
    from_ours: Callable[[Tensors], Tensors] = dict
    gelu: str | None = None  # of the models whose weights are so named
    is_loose: bool = False  # names and shapes leave a choice: compared by our names


_OLDER = (  # the older generation's names, the published ones
    (r"^embedding/", "stem/"),
    (r"^Mixer/encoder_norm/", "pre_head_layer_norm/"),
    (r"^Mixer/encoderblock_", "MixerBlock_"),
    (r"_phase_\d+/(\w+)([12])$", lambda found: f"/Dense_{int(found[2]) - 1}/{found[1]}"),
)
_GOOGLE = (  # the published names, ours
    (r"^MixerBlock_(\d+)/", r"blocks.\1."),
    (r"LayerNorm_", "layer_norm_"),
    (r"Dense_", "dense_"),
    (r"/", "."),
    (r"(kernel|scale)$", "weight"),
)


def google_to_ours(arrays: Tensors) -> Tensors:
    """Returns the tensors by our names and layout."""
    return {_substituted(name, _GOOGLE): _transposed(name, value) for name, value in arrays.items()}


def older_to_ours(arrays: Tensors) -> Tensors:
    """Returns the older generation's tensors by our names and layout."""
    second: dict[str, int] = {}  # of each block, the number of its second LayerNorm
    for name in arrays:
        if found := re.search(r"(block_\d+)/LayerNorm_(\d+)/", name):
            second[found[1]] = max(second.get(found[1], 0), int(found[2]))

    def norm(found: re.Match[str]) -> str:
        is_second = 0 < int(found[2]) == second[found[1]]
        return f"{found[1]}/LayerNorm_{int(is_second)}/"

    published: Tensors = {}
    for name, value in arrays.items():
        key = _substituted(re.sub(r"(block_\d+)/LayerNorm_(\d+)/", norm, name), _OLDER)
        published[key] = value.squeeze() if "/Dense_" in key else value
    return google_to_ours(published)


def google_from_ours(tensors: Tensors) -> Tensors:
    """Returns the arrays by the published files' names and layout, in natural order of blocks."""
    arrays: Tensors = {}
    for name, value in tensors.items():
        key = re.sub(r"blocks\.(\d+)", r"MixerBlock_\1", name).replace(".", "/")
        key = re.sub(r"layer_norm_(\d)", r"LayerNorm_\1", key).replace("dense_", "Dense_")
        key = re.sub("weight$", "scale" if "norm" in key.lower() else "kernel", key)
        arrays[key] = _transposed(key, value, back=True)
    return dict(sorted(arrays.items(), key=lambda item: natural(item[0])))


def _substituted(name: str, pairs: tuple[tuple[str, str | Callable[..., str]], ...]) -> str:
    for pattern, ours in pairs:
        name = re.sub(pattern, ours, name)
    return name


def _transposed(key: str, value: torch.Tensor, back: bool = False) -> torch.Tensor:
    if key == "stem/kernel" and value.dim() == 4:
        return value.permute(2, 3, 1, 0) if back else value.permute(3, 2, 0, 1)
    return value.T if key.endswith("kernel") and value.dim() == 2 else value


def write_npz(path: Path, tensors: Tensors) -> None:
    """Writes tensors by our names as a file that Google's own code loads."""
    named = google_from_ours(tensors)
    arrays = {name: value.float().contiguous().numpy() for name, value in named.items()}
    with path.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]; numbers, never pickled


def natural(name: str) -> list[tuple[int, str]]:
    """Returns a key for sorting by which MixerBlock_2 comes before MixerBlock_10."""
    parts = re.split(r"(\d{1,18})", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


_TIMM = (  # timm's, ours
    ("norm.", "pre_head_layer_norm."),
    ("stem.proj.", "stem."),
    (".norm1.", ".layer_norm_0."),
    (".norm2.", ".layer_norm_1."),
    (".mlp_tokens.", ".token_mixing."),
    (".mlp_channels.", ".channel_mixing."),
    (".fc1.", ".dense_0."),
    (".fc2.", ".dense_1."),
)


def timm_to_ours(tensors: Tensors) -> Tensors:
    """Returns the tensors by our names."""
    return {_replaced(name, _TIMM): value for name, value in tensors.items()}


def timm_from_ours(tensors: Tensors) -> Tensors:
    """Returns the tensors by timm's names."""
    pairs = tuple((ours, theirs) for theirs, ours in _TIMM)
    return {_replaced(name, pairs): value for name, value in tensors.items()}


def _replaced(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


LAYOUTS = [
    Layout("allmlp", MIXER, MIXER.marker, gelu="tanh"),
    Layout("Google", MIXER, "stem/|MixerBlock_", google_to_ours, google_from_ours, "tanh"),
    Layout(
        "Google, older names", MIXER, "embedding/|Mixer/", older_to_ours, gelu="tanh", is_loose=True
    ),
    Layout(
        "timm",
        MIXER,
        r"stem\.proj\.|blocks\.\d+\.mlp_(tokens|channels)\.",
        timm_to_ours,
        timm_from_ours,
        "exact",
    ),
    *(Layout(found.title, found, found.marker) for found in ALL_MLP if found is not MIXER),
]


def layout_of(tensors: Tensors, family: Family | None = None) -> Layout | None:
    """Returns the layout that knows most of a file's names, of one family if it is given; None if
    none knows any."""
    best, most = None, 0
    for layout in LAYOUTS:
        if family is None or layout.family is family:
            known = sum(re.match(layout.marker, name) is not None for name in tensors)
            best, most = (layout, known) if known > most else (best, most)
    return best


def known_layout(tensors: Tensors, path: Path) -> Layout:
    """Returns the layout of a file without a description, or raises UserError."""
    layout = layout_of(tensors)
    if layout is None:
        first = ", ".join(list(tensors)[:4])
        what = f"not a known model: none of the {len(tensors)} tensors has the name of one "
        titles = ", ".join(known.title for known in LAYOUTS)
        raise UserError(f"{what}({first}, ...)", where=path, fix=f"Known names: {titles}")
    return layout
