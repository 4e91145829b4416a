"""Names and layouts of weights that other programs wrote, and ours.

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

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allmlp.errors import UserError
from allmlp.models.catalog import families, family, model_from_config
from allmlp.models.layers import MissingTensor, ModelConfig, Size, Tensors
from allmlp.preprocessing import INTERPOLATIONS, Preprocessing


@dataclass(frozen=True)
class Layout:
    """One way of naming and laying out the tensors of a family."""

    title: str
    family: str = "mixer"
    to_ours: Callable[[Tensors], Tensors] = dict
    from_ours: Callable[[Tensors], Tensors] = dict
    gelu: str | None = None  # of the models whose weights are so named
    is_loose: bool = False  # names and shapes leave a choice: compared by our names


@functools.cache
def _names(layout: Layout) -> frozenset[str]:
    """Returns the names of a layout's tensors, a # for each number."""
    config = next(iter(family(layout.family).architectures.values()))
    with torch.device("meta"):
        return frozenset(map(_pattern, layout.from_ours(model_from_config(config).state_dict())))


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def google_to_ours(arrays: Tensors) -> Tensors:
    """Returns the tensors by our names and layout."""
    is_first = any(name.startswith(("Mixer/", "embedding/")) for name in arrays)
    names = _second_names(arrays) if is_first else {name: name for name in arrays}
    tensors: Tensors = {}
    for name, value in arrays.items():
        key = names[name]
        if is_first and re.search(r"Dense_[01]/\w+$", key):
            value = value.squeeze()
        tensors[_our_name(key)] = _transposed(key, value)
    return tensors


def google_from_ours(tensors: Tensors) -> Tensors:
    """Returns the arrays by the published files' names and layout, in natural order of blocks."""
    arrays: Tensors = {}
    for name, value in tensors.items():
        key = re.sub(r"blocks\.(\d+)", r"MixerBlock_\1", name).replace(".", "/")
        key = re.sub(r"layer_norm_(\d)", r"LayerNorm_\1", key).replace("dense_", "Dense_")
        is_norm = "norm" in key.lower()
        key = re.sub("weight$", "scale" if is_norm else "kernel", key)
        arrays[key] = _transposed(key, value, back=True)
    return dict(sorted(arrays.items(), key=lambda item: natural(item[0])))


def google_first_from_ours(tensors: Tensors) -> Tensors:
    """Returns the arrays by the older generation's names."""
    arrays: Tensors = {}
    for name, value in google_from_ours(tensors).items():
        key = name.replace("stem/", "embedding/")
        key = key.replace("pre_head_layer_norm", "Mixer/encoder_norm")
        key = key.replace("MixerBlock_", "Mixer/encoderblock_")
        key = re.sub(r"_mixing/Dense_0/(\w+)", r"_mixing_phase_0/\g<1>1", key)
        key = re.sub(r"_mixing/Dense_1/(\w+)", r"_mixing_phase_0/\g<1>2", key)
        arrays[key] = value
    return arrays


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


def _our_name(key: str) -> str:
    name = re.sub(r"MixerBlock_(\d+)", r"blocks.\1", key).replace("/", ".")
    name = name.replace("LayerNorm_", "layer_norm_").replace("Dense_", "dense_")
    return re.sub("(kernel|scale)$", "weight", name)


def _transposed(key: str, value: torch.Tensor, back: bool = False) -> torch.Tensor:
    if key == "stem/kernel" and value.dim() == 4:
        return value.permute(2, 3, 1, 0) if back else value.permute(3, 2, 0, 1)
    return value.T if key.endswith("kernel") and value.dim() == 2 else value


def _second_names(arrays: Iterable[str]) -> dict[str, str]:
    """Returns the published generation's name for each array of the older one."""
    norms: dict[str, list[int]] = {}  # of each block, the numbers of its LayerNorms
    for name in arrays:
        if found := re.match(r"Mixer/(encoderblock_\d+)/LayerNorm_(\d+)/scale", name):
            norms.setdefault(found[1], []).append(int(found[2]))

    def norm(found: re.Match[str]) -> str:
        numbers, number = sorted(norms.get(found[1], [])), int(found[2])
        return f"{found[1]}/LayerNorm_{numbers.index(number) if number in numbers else number}/"

    names = {}
    for name in arrays:
        key = re.sub(r"(encoderblock_\d+)/LayerNorm_(\d+)/", norm, name)
        key = key.replace("embedding/", "stem/")
        key = key.replace("Mixer/encoder_norm", "pre_head_layer_norm")
        key = key.replace("Mixer/encoderblock_", "MixerBlock_")
        key = re.sub(r"_mixing_phase_\d+/(\w+)1$", r"_mixing/Dense_0/\1", key)
        names[name] = re.sub(r"_mixing_phase_\d+/(\w+)2$", r"_mixing/Dense_1/\1", key)
    return names


_TIMM = (  # timm's, ours
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
    return {_renamed(name, 0, 1): value for name, value in tensors.items()}


def timm_from_ours(tensors: Tensors) -> Tensors:
    """Returns the tensors by timm's names."""
    return {_renamed(name, 1, 0): value for name, value in tensors.items()}


def _renamed(name: str, old: int, new: int) -> str:
    for pair in _TIMM:
        name = name.replace(pair[old], pair[new])
    ends = ("norm.", "pre_head_layer_norm.")
    return ends[new] + name.removeprefix(ends[old]) if name.startswith(ends[old]) else name


_MIXERS = (
    Layout("allmlp", gelu="tanh"),
    Layout("Google", "mixer", google_to_ours, google_from_ours, "tanh"),
    Layout(
        "Google, first generation", "mixer", google_to_ours, google_first_from_ours, "tanh", True
    ),
    Layout("timm", "mixer", timm_to_ours, timm_from_ours, "exact"),
)


def own_layout(tensors: Tensors, of_family: str) -> Layout:
    """Returns the layout of a safetensors file that we wrote: our names, or timm's."""
    if of_family != "mixer":
        return Layout(family(of_family).title, of_family)
    return _MIXERS[3] if "stem.proj.weight" in tensors else _MIXERS[0]


def layout_of(tensors: Tensors, path: Path) -> Layout:
    """Returns the layout that knows most of a file's names."""
    others = [found for found in families() if found.name != "mixer" and found.infer]
    layouts = [*_MIXERS, *(Layout(found.title, found.name) for found in others)]
    patterns = [_pattern(name) for name in tensors]
    known = {layout: sum(name in _names(layout) for name in patterns) for layout in layouts}
    best = max(layouts, key=lambda layout: known[layout])
    if not known[best]:
        first = ", ".join(list(tensors)[:4])
        what = f"not a known model: none of the {len(tensors)} tensors has the name of one "
        titles = ", ".join(layout.title for layout in layouts)
        raise UserError(f"{what}({first}, ...)", where=path, fix=f"Known names: {titles}")
    return best


def infer_config(
    shapes: dict[str, tuple[int, ...]],
    layout: Layout,
    path: Path,
    written: Size | None = None,
    asked: Size | None = None,
) -> ModelConfig:
    """Returns the architecture of a file without a description of ours, see `Family.infer`; the
    layout decides the GELU."""
    kind = family(layout.family)
    assert kind.infer is not None
    try:
        config = kind.infer(shapes, written, asked)
    except MissingTensor as error:
        key = next(iter(layout.from_ours({error.name: torch.empty((1,) * error.axes)})))
        what = f"not a {kind.title}: the names are those of {layout.title}, but {key} is missing"
        raise UserError(what, where=path, fix="Is it the right file?") from error
    except ValueError as error:
        raise UserError(f"not a {kind.title}: {error}", where=path) from error
    return config if layout.gelu is None else dataclasses.replace(config, gelu=layout.gelu)


def timm_preprocessing(
    config: dict[str, Any], image_size: Size, channels: int
) -> tuple[Preprocessing | None, list[str]]:
    """Returns the preprocessing that timm's config.json describes, and notes on what is not kept.

    "pretrained_cfg" has mean, std, crop_pct, interpolation, crop_mode; what is missing has timm's
    defaults: bicubic, 0.875, the centre. None: nothing is described. ValueError and TypeError: a
    value is out of range.
    """
    found = config.get("pretrained_cfg", config)
    if not isinstance(found, dict) or found.get("mean") is None or found.get("std") is None:
        return None, []
    notes = []
    interpolation = found.get("interpolation") or "bicubic"
    if interpolation not in INTERPOLATIONS:
        notes.append(f"interpolation {interpolation!r} is not available; bicubic is used")
        interpolation = "bicubic"
    mode = found.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        notes.append(f"crop mode {mode!r} is not available; the centre is cropped")
    preprocessing = Preprocessing(
        image_size=image_size,
        # timm's "squash" scales each side and then crops: the paper's resize-crop.
        resize="resize-crop" if mode == "squash" else "resmall-crop",
        channels=channels,
        mean=_per_channel(found["mean"], channels),
        std=_per_channel(found["std"], channels),
        crop=float(found.get("crop_pct") or 0.875),
        interpolation=interpolation,
    )
    return preprocessing, notes


def timm_image_size(config: dict[str, Any]) -> Size | None:
    """Returns (H, W) of the "input_size" in timm's config.json; None without one."""
    found = config.get("pretrained_cfg", config)
    size = found.get("input_size") if isinstance(found, dict) else None
    if not isinstance(size, list) or len(size) != 3 or not all(type(n) is int for n in size):
        return None
    return size[1], size[2]


def _per_channel(values: Any, channels: int) -> float | tuple[float, ...]:
    """One number if all are equal, and their mean for a grey model."""
    numbers = tuple(float(value) for value in (values if isinstance(values, list) else [values]))
    if channels == 1 and len(numbers) == 3:
        return sum(numbers) / 3
    return numbers[0] if len(set(numbers)) == 1 else numbers
