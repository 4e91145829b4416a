"""load_model and save_model: one door between models and files.

A model on disk is a folder with
    model.safetensors   the tensors; its header repeats the next file, so that it can travel alone
    config.json         architecture, class names, preprocessing
Nothing that is loaded runs code. Every file is written aside and renamed when it is whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from mlp_mixer.errors import UserError
from mlp_mixer.models.catalog import config_from_json, config_to_json, model_from_config
from mlp_mixer.models.layers import ImageClassifier
from mlp_mixer.preprocessing import Preprocessing

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


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


def save_model(model: ImageClassifier, path: str | Path, format: str = "mlp_mixer") -> Path:
    """Writes the model, and returns the path of the weights.

    Args:
        model: with whatever class names and preprocessing it carries.
        path: a folder for model.safetensors and config.json, or one file named *.safetensors,
            which holds everything.
        format: "mlp_mixer".

    Raises:
        UserError: an unknown format, or the path cannot be written.
    """
    if format != "mlp_mixer":
        raise UserError(f"unknown format {format!r}", fix="Known: mlp_mixer")
    path = Path(path).expanduser()
    description = model_to_json(model)
    tensors = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    content = safetensors.torch.save(tensors, metadata={"mlp_mixer": json.dumps(description)})
    try:
        if path.suffix == ".safetensors":
            path.parent.mkdir(parents=True, exist_ok=True)
            write_aside(path, content)
            return path
        path.mkdir(parents=True, exist_ok=True)
        write_aside(path / CONFIG, (json.dumps(description, indent=2) + "\n").encode())
        write_aside(path / WEIGHTS, content)
    except OSError as error:
        raise UserError(f"cannot write the model: {error.strerror}", where=path) from error
    return path / WEIGHTS


def write_aside(path: Path, content: bytes) -> None:
    """Writes a file under another name, brings it to disk, then renames it: whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_model(
    source: str | Path,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
) -> ImageClassifier:
    """Returns a trained model in evaluation mode, with its class names and preprocessing.

    Args:
        source: a run folder, a folder with model.safetensors (best/), or a .safetensors file.
        image_size: pixels, a number or (H, W); None keeps the weights' own, and another size is
            refused: the token-mixing MLPs have one weight for each patch.
        num_classes: None keeps the trained head; another number puts a new zero head in its place
            (and drops the class names), 0 takes the head off.

    Raises:
        UserError: nothing is there, it is damaged, or its tensors do not fit its architecture.
    """
    weights = find_weights(source)
    description, tensors = _read(weights)
    config = config_from_json(description["architecture"])
    wanted = (image_size, image_size) if isinstance(image_size, int) else image_size
    if wanted is not None and tuple(wanted) != tuple(config.image_size):
        raise UserError(
            f"the weights were trained at {_pixels(config.image_size)} pixels, asked for "
            f"{_pixels(wanted)}: the token-mixing MLPs have one weight for each patch",
            where=weights,
            fix="Leave image_size out; images of any size are resized to the model's",
        )
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        model = model_from_config(config)
    _check_tensors(model, tensors, weights)
    model.load_state_dict(tensors, assign=True)
    model.class_names = _checked_names(description.get("class_names"), config.num_classes)
    if description.get("preprocessing") is not None:
        model.preprocessing = Preprocessing.from_json(description["preprocessing"])
        preprocessed = (model.preprocessing.image_size, model.preprocessing.channels)
        if preprocessed != (config.image_size, config.in_channels):
            what = f"the preprocessing gives {preprocessed} (size, channels), the model takes "
            raise UserError(f"{what}{(config.image_size, config.in_channels)}", where=weights)
    if num_classes is not None and num_classes != config.num_classes:
        model = with_new_head(model, num_classes)
    return model.eval()


def with_new_head(model: ImageClassifier, num_classes: int) -> ImageClassifier:
    """Returns the model with a zero head of `num_classes` outputs, 0 for none; no class names."""
    with torch.device("meta"):
        fresh = model_from_config(dataclasses.replace(model.config, num_classes=num_classes))
    trained = model.state_dict()
    tensors = {
        name: torch.zeros(shape.shape) if name.startswith("head.") else trained[name]
        for name, shape in fresh.state_dict().items()
    }
    fresh.load_state_dict(tensors, assign=True)
    fresh.preprocessing = model.preprocessing
    return fresh


def find_weights(source: str | Path) -> Path:
    """Returns the weights file that a source means.

    Raises:
        UserError: there is no such path, or no weights in it.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(
            f"no such model: {str(source)!r}",
            where=path.absolute(),
            fix="Give a run folder, its best/ folder or a .safetensors file",
        )
    if path.is_file():
        return path
    for candidate in (path / "best" / WEIGHTS, path / WEIGHTS):
        if candidate.is_file():
            return candidate
    what = "the folder has no weights: neither best/model.safetensors nor model.safetensors"
    fix = "Give the run folder of a training that reached its first evaluation"
    raise UserError(what, where=path, fix=fix)


def _checked_names(names: Any, num_classes: int) -> list[str] | None:
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"class_names must be a list of names, got {names!r}")
    if len(names) != num_classes:
        raise UserError(f"there are {len(names)} class names for {num_classes} classes")
    return names


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _read(weights: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, struct.error) as error:
        raise UserError(
            f"not a whole safetensors file: {error}",
            where=weights,
            fix="Copy or download it again",
        ) from error
    beside = weights.with_name(CONFIG)
    # config.json describes the model.safetensors beside it; a file of another name, itself.
    if beside.is_file() and (weights.name == WEIGHTS or "mlp_mixer" not in metadata):
        text, where = beside.read_text(encoding="utf-8", errors="replace"), str(beside)
    elif "mlp_mixer" in metadata:
        text, where = metadata["mlp_mixer"], f"{weights} (header)"
    else:
        what = "the file says nothing of its architecture and no config.json lies beside it"
        raise UserError(what, where=weights, fix="Put the config.json of its folder beside it")
    try:
        description = json.loads(text)
        if description["version"] > FORMAT_VERSION:
            what = f"written by a newer mlp_mixer (format {description['version']})"
            raise UserError(what, where=where, fix="pip install --upgrade mlp_mixer")
        if not isinstance(description["architecture"], dict):
            raise TypeError("the architecture is not an object")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"not a model description: {error!r}", where=where) from error
    return description, tensors


def _check_tensors(model: ImageClassifier, tensors: dict[str, torch.Tensor], weights: Path) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected == found:
        return
    problems = [f"missing: {name} {expected[name]}" for name in expected if name not in found]
    problems += [f"extra: {name} {found[name]}" for name in found if name not in expected]
    problems += [
        f"misshapen: {name} is {found[name]}, the architecture wants {expected[name]}"
        for name in expected
        if name in found and expected[name] != found[name]
    ]
    shown = "\n  ".join(
        problems[:20] + [f"... and {len(problems) - 20} more"] * (len(problems) > 20)
    )
    raise UserError(f"the tensors do not fit the architecture:\n  {shown}", where=weights)
