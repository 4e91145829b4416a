"""load_model and save_model: one door between models and files, whoever wrote them.

Our own model on disk is a folder with
    model.safetensors   the tensors; its header repeats the next file, so that it can travel alone
    config.json         architecture, class names, preprocessing
A .npz in Google's layout has no place for these: they lie beside it in <name>.json.
Nothing that is loaded runs code. Every file is written aside and renamed when it is whole.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mlp_mixer.console import Reporter
from mlp_mixer.errors import UserError
from mlp_mixer.models.catalog import config_to_json, model_from_config
from mlp_mixer.models.layers import ImageClassifier
from mlp_mixer.models.mixer import MixerConfig
from mlp_mixer.weights import google, timm
from mlp_mixer.weights.architecture import check_shapes
from mlp_mixer.weights.description import CONFIG, FORMAT_VERSION, WEIGHTS, describe
from mlp_mixer.weights.files import read_weights, write_aside
from mlp_mixer.weights.locate import locate
from mlp_mixer.weights.resolution import Growth, resize_tokens

FORMATS = ("mlp_mixer", "google", "timm")


def load_model(
    source: str | Path,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    *,
    growth: Growth = "auto",
    quiet: bool = False,
) -> ImageClassifier:
    """Returns a trained model in evaluation mode, with its class names and preprocessing.

    Weights are float32 in memory, whatever the file holds.

    Args:
        source: a run folder, a folder with model.safetensors (best/), a .safetensors, .npz
            (Google's layout) or .pth (timm's names) file, the name of a published checkpoint
            ("mixer_b16.i21k", see `mixer models --weights`), or "hf:owner/name[@revision]".
        image_size: pixels, a number or (H, W); None keeps the weights' own. Another size changes
            the token-mixing MLPs, see `mlp_mixer.weights.resolution`.
        num_classes: None keeps the trained head; another number puts a new zero head in its place
            (and drops the class names), 0 takes the head off.
        growth: how to reach another image size: "block-diagonal", "resample" or "auto".
        quiet: do not say on standard error what is downloaded, changed or assumed.

    Raises:
        UserError: nothing is there, it is damaged or would run code, its tensors make no model, or
            it cannot be brought to that size.
    """
    report = Reporter(quiet=quiet, stderr=True)
    wanted = _height_and_width(image_size)
    place = locate(source, report)
    file = read_weights(place.path)
    description = describe(file, place.checkpoint, wanted)
    for note in description.notes:
        report.say(f"note     {note}")
    config, layout = description.config, description.layout
    check_shapes(config, layout, file.tensors, place.path)
    tensors = layout.to_ours(file.tensors)
    file.tensors.clear()  # what is replaced below need not stay in memory
    tensors = {name: tensors.pop(name).float().contiguous() for name in list(tensors)}
    preprocessing = description.preprocessing
    if wanted is not None and wanted != config.image_size:
        old = config
        config, how = resize_tokens(tensors, config, wanted, growth)
        report.say(f"grown    {_pixels(old)} -> {_pixels(config)} pixels: {how}")
        if preprocessing is not None:
            preprocessing = dataclasses.replace(preprocessing, image_size=config.image_size)
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        model = model_from_config(config)
    model.load_state_dict(tensors, assign=True)
    model.class_names, model.preprocessing = description.class_names, preprocessing
    if num_classes is not None and num_classes != config.num_classes:
        model = with_new_head(model, num_classes)
        what = f"new, all zeros, for {num_classes:,} classes" if num_classes else "taken off"
        report.say(f"head     {what}; the weights had {config.num_classes:,} classes")
    return model.eval()


def _height_and_width(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        fix = "a number of pixels, or (height, width)"
        raise UserError(f"not an image size: {image_size!r}", where="image_size", fix=fix)
    return pair


def _pixels(config: MixerConfig) -> str:
    return f"{config.image_size[0]}x{config.image_size[1]}"


def with_new_head(model: ImageClassifier, num_classes: int) -> ImageClassifier:
    """Returns the model with a zero head of `num_classes` outputs, 0 for none; no class names.

    Raises:
        UserError: the number is below 0.
    """
    try:
        config = dataclasses.replace(model.config, num_classes=num_classes)
    except ValueError as error:
        raise UserError(str(error)) from error
    with torch.device("meta"):
        fresh = model_from_config(config)
    trained = model.state_dict()
    tensors = {
        name: torch.zeros(shape.shape) if name.startswith("head.") else trained[name]
        for name, shape in fresh.state_dict().items()
    }
    fresh.load_state_dict(tensors, assign=True)
    fresh.preprocessing = model.preprocessing
    return fresh


def save_model(model: ImageClassifier, path: str | Path, format: str = "mlp_mixer") -> Path:
    """Writes the model, and returns the path of the weights.

    Args:
        model: with whatever class names and preprocessing it carries.
        path: "mlp_mixer" and "timm": a folder for model.safetensors and config.json, or one file
            named *.safetensors, which holds everything. "google": a file named *.npz; a .json
            beside it keeps what that layout has no place for.
        format: "mlp_mixer"; "google", the arrays that Google's own code loads; "timm", its names.
            Google's code computes the tanh GELU and timm's the exact one, whatever
            `model.config.gelu` says.

    Raises:
        UserError: an unknown format, a name that does not go with it, or the path cannot be
            written.
    """
    path = Path(path).expanduser()
    check_target(path, format)
    text = json.dumps(model_to_json(model))
    readable = (json.dumps(model_to_json(model), indent=2) + "\n").encode()
    tensors = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    try:
        if format == "google":
            path.parent.mkdir(parents=True, exist_ok=True)
            write_aside(path.with_suffix(".json"), readable)
            google.write_npz(path, tensors)
            return path
        if format == "timm":
            tensors = timm.from_ours(tensors)
        if path.suffix == ".safetensors":
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_aside(path / CONFIG, readable)
            path = path / WEIGHTS
        _write_safetensors(path, tensors, text)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the model: {reason}", where=path) from error
    return path


def check_target(path: Path, format: str) -> list[Path]:
    """Returns the files that `save_model` would write there.

    Raises:
        UserError: an unknown format, or a name that does not go with it.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", fix=f"Known: {', '.join(FORMATS)}")
    expected = ".npz" if format == "google" else ".safetensors"
    if path.suffix != expected and (format == "google" or path.suffix in _OTHER_SUFFIXES):
        what = f"format {format} is a {expected} file, got {path.name!r}"
        raise UserError(what, where=path, fix=f"Call it {path.with_suffix(expected).name}")
    if path.suffix == expected:
        if path.is_dir():
            raise UserError("the output is a folder, a file is meant", where=path)
        return [path, path.with_suffix(".json")] if format == "google" else [path]
    if path.is_file():
        raise UserError("the output is a file, a folder is meant", where=path)
    return [path / WEIGHTS, path / CONFIG]


_OTHER_SUFFIXES = (".npz", ".pth", ".pt", ".bin", ".ckpt", ".onnx", ".json")


def _write_safetensors(path: Path, tensors: dict[str, Tensor], description: str) -> None:
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    metadata = {"format": "pt", "mlp_mixer": description}

    def write(aside: Path) -> None:
        safetensors.torch.save_file(tensors, aside, metadata=metadata)

    write_aside(path, write)


def model_to_json(model: ImageClassifier) -> dict[str, Any]:
    """Returns what config.json holds: architecture, class names and preprocessing."""
    preprocessing = model.preprocessing
    return {
        "format": "mlp_mixer",
        "version": FORMAT_VERSION,
        "architecture": config_to_json(model.config),
        "class_names": model.class_names,
        "preprocessing": None if preprocessing is None else preprocessing.to_json(),
    }
