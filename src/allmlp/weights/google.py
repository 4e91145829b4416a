"""Google's names and layout of a Mixer's arrays, in both generations, and ours.

The arrays are Flax's: a dense kernel is (in, out) and the stem's (P, P, channels, C); torch has
(out, in) and (C, channels, P, P). The published files have the names of the second generation:

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

Source: google-research/vision_transformer, vit_jax/models_mixer.py and checkpoint.py;
google-research/big_vision, models/mlp_mixer.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from torch import Tensor

Tensors = dict[str, Tensor]

_SECOND = re.compile(
    r"(?:stem|head)/(?:kernel|bias)|pre_head_layer_norm/(?:scale|bias)|MixerBlock_\d+/"
    r"(?:LayerNorm_[01]/(?:scale|bias)|(?:token|channel)_mixing/Dense_[01]/(?:kernel|bias))"
)
_FIRST = re.compile(
    r"(?:embedding|head)/(?:kernel|bias)|Mixer/encoder_norm/(?:scale|bias)|Mixer/encoderblock_\d+/"
    r"(?:LayerNorm_\d+/(?:scale|bias)|(?:token|channel)_mixing_phase_\d+/(?:kernel|bias)[12])"
)


def is_second(name: str) -> bool:
    """Says whether a name is one of the published files' generation."""
    return bool(_SECOND.fullmatch(name))


def is_first(name: str) -> bool:
    """Says whether a name is one of the older generation."""
    return bool(_FIRST.fullmatch(name))


def to_ours(arrays: Tensors) -> Tensors:
    """Returns the tensors by our names and layout; names of neither generation stay as they are."""
    if any(is_first(name) and not is_second(name) for name in arrays):
        arrays = {new: arrays[old] for old, new in _second_names(arrays).items()}
        arrays = {
            name: value.squeeze() if is_second(name) and name.endswith(_FLAT) else value
            for name, value in arrays.items()
        }
    tensors: Tensors = {}
    for name, value in arrays.items():
        if is_second(name):
            tensors[our_name(name)] = _transposed(name, value)
        else:
            tensors[name] = value
    return tensors


_FLAT = ("Dense_0/kernel", "Dense_0/bias", "Dense_1/kernel", "Dense_1/bias")


def from_ours(tensors: Tensors) -> Tensors:
    """Returns the arrays by the published files' names and layout, in natural order of blocks."""
    arrays: Tensors = {}
    for name, value in tensors.items():
        key = re.sub(r"blocks\.(\d+)", r"MixerBlock_\1", name).replace(".", "/")
        key = key.replace("layer_norm_0", "LayerNorm_0").replace("layer_norm_1", "LayerNorm_1")
        key = key.replace("dense_", "Dense_")
        is_norm = "norm" in key.lower()
        key = re.sub("weight$", "scale" if is_norm else "kernel", key)
        arrays[key] = _transposed(key, value, back=True)
    return dict(sorted(arrays.items(), key=lambda item: natural(item[0])))


def first_from_ours(tensors: Tensors) -> Tensors:
    """Returns the arrays by the older generation's names."""
    arrays: Tensors = {}
    for name, value in from_ours(tensors).items():
        key = name.replace("stem/", "embedding/").replace(
            "pre_head_layer_norm", "Mixer/encoder_norm"
        )
        key = key.replace("MixerBlock_", "Mixer/encoderblock_")
        key = re.sub(r"_mixing/Dense_0/(\w+)", r"_mixing_phase_0/\g<1>1", key)
        key = re.sub(r"_mixing/Dense_1/(\w+)", r"_mixing_phase_0/\g<1>2", key)
        arrays[key] = value
    return arrays


def write_npz(path: Path, tensors: Tensors, *, first_generation: bool = False) -> None:
    """Writes tensors by our names as a file that Google's own code loads.

    Args:
        path: of the file.
        tensors: by our names.
        first_generation: by the older names, which only big_vision reads.

    Raises:
        OSError: the path cannot be written.
    """
    named = first_from_ours(tensors) if first_generation else from_ours(tensors)
    arrays = {name: each.float().contiguous().numpy() for name, each in named.items()}
    with path.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]; numbers, never pickled


def natural(name: str) -> list[tuple[int, str]]:
    """Returns a key for sorting by which MixerBlock_2 comes before MixerBlock_10."""
    parts = re.split(r"(\d{1,18})", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def our_name(key: str) -> str:
    """Returns our name of an array of the second generation."""
    name = re.sub(r"MixerBlock_(\d+)", r"blocks.\1", key).replace("/", ".")
    name = name.replace("LayerNorm_", "layer_norm_").replace("Dense_", "dense_")
    return re.sub("(kernel|scale)$", "weight", name)


def _transposed(key: str, value: Tensor, back: bool = False) -> Tensor:
    if key == "stem/kernel" and value.dim() == 4:
        return value.permute(2, 3, 1, 0) if back else value.permute(3, 2, 0, 1)
    return value.T if key.endswith("kernel") and value.dim() == 2 else value


def _second_names(arrays: Tensors) -> dict[str, str]:
    """Returns the published generation's name for each array of the older one."""
    norms: dict[str, list[int]] = {}  # of each block, the numbers of its LayerNorms
    for name in arrays:
        if found := re.match(r"Mixer/(encoderblock_\d+)/LayerNorm_(\d+)/scale", name):
            norms.setdefault(found[1], []).append(int(found[2]))

    def norm(found: re.Match[str]) -> str:
        numbers = sorted(norms.get(found[1], []))
        number = int(found[2])
        return f"{found[1]}/LayerNorm_{numbers.index(number) if number in numbers else number}/"

    names = {}
    for name in arrays:
        key = re.sub(r"(encoderblock_\d+)/LayerNorm_(\d+)/", norm, name)
        key = key.replace("embedding/", "stem/").replace(
            "Mixer/encoder_norm", "pre_head_layer_norm"
        )
        key = key.replace("Mixer/encoderblock_", "MixerBlock_")
        key = re.sub(r"_mixing_phase_\d+/(\w+)1$", r"_mixing/Dense_0/\1", key)
        key = re.sub(r"_mixing_phase_\d+/(\w+)2$", r"_mixing/Dense_1/\1", key)
        names[name] = key
    return names
