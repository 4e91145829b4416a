"""save_model: writes a model to disk.

The header of our model.safetensors repeats config.json, so the file works on its own.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from allmlp.errors import UserError, fix_of, one_of
from allmlp.io import (
    Content,
    atomic_write_all,
    check_not_inputs,
    check_output_folder,
    expand,
    parse_json,
    staging_folder,
)
from allmlp.models.catalog import config_to_json, family_of
from allmlp.models.layers import ImageClassifier, num_logits
from allmlp.models.mixer import MixerConfig
from allmlp.names import NAME, is_format
from allmlp.weights.description import CONFIG, FORMAT_VERSION, WEIGHTS
from allmlp.weights.files import fingerprint
from allmlp.weights.layouts import GOOGLE
from allmlp.weights.load import open_model

FORMATS = (NAME, "google", "timm")
_OF_FILES = (".npz", ".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".onnx", ".json")


def save_model(
    model: ImageClassifier,
    path: str | Path,
    format: str = "allmlp",
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a model and returns the path of the weights.

    Args:
        model: with any class names and preprocessing it carries.
        path: "allmlp" and "timm": a folder for model.safetensors and config.json, or a single
            *.safetensors file that holds everything. "google": a *.npz file, with the metadata in a
            .json file next to it.
        format: "allmlp"; "google", arrays that Google's code can load; "timm", timm's names.
            Google's code computes the tanh GELU and timm's the exact one, whatever
            `model.config.gelu` says.
        overwrite: replace an existing model.

    Raises:
        UserError: unknown format, file name that does not match it, or the path exists or cannot be
            written.
    """
    path, model = expand(path), open_model(model)
    weights, beside = check_target(path, format, overwrite=overwrite)
    # Of the head that is there, which may have been replaced.
    config = replace(model.config, num_classes=num_logits(model))
    preprocessing = model.preprocessing
    theirs = next((names for names in family_of(config).names if names.title == format), None)
    theirs = GOOGLE if format == "google" else theirs
    is_plain = getattr(config, "is_plain", True)
    is_google = isinstance(config, MixerConfig) and is_plain and not config.gated
    if not {"allmlp": True, "google": is_google, "timm": theirs is not None and is_plain}[format]:
        what = f"the format {format!r} has no place for this model ({config.summary()})"
        raise UserError(what, fix="Use the format allmlp")
    tensors = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    checksum = 0  # ties the description to its weights
    for value in tensors.values():
        data = value.contiguous().view(-1).view(torch.uint8).numpy()
        checksum = zlib.crc32(data.data, checksum)
    described = {
        "format": NAME,
        "version": FORMAT_VERSION,
        "architecture": config_to_json(config),
        "class_names": model.class_names,
        "preprocessing": None if preprocessing is None else preprocessing.to_json(),
        **({"decision": decision} if (decision := model.decision.to_json()) else {}),
        "weights": f"crc32:{checksum:08x}",
    }

    def write_weights(partial: Path) -> None:
        named = tensors if theirs is None else theirs.from_ours(tensors)
        if format == "google":
            arrays: Any = {key: value.float().contiguous().numpy() for key, value in named.items()}
            with partial.open("wb") as file:
                np.savez(file, **arrays)
            described["weights"] = fingerprint(partial)
            return
        # The format requires every tensor to own its memory.
        whole = {name: value.contiguous().clone() for name, value in named.items()}
        metadata = {NAME: json.dumps(described)}  # one entry: the library shuffles several
        # The library writes a temporary file next to its target and leaves it there if it fails or
        # is killed; here it is removed with this folder, at the latest by the next save.
        with staging_folder(weights) as folder:
            safetensors.torch.save_file(whole, folder / WEIGHTS, metadata=metadata)
            os.replace(folder / WEIGHTS, partial)

    def write_description(partial: Path) -> None:  # with the checksum, which is known by then
        partial.write_bytes((json.dumps(described, indent=2) + "\n").encode())

    contents: dict[Path, Content] = {weights: write_weights}
    if beside is not None:
        contents[beside] = write_description
    try:
        weights.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_all(contents)
    except (OSError, SafetensorError) as error:
        what = f"cannot write the model: {getattr(error, 'strerror', None) or error}"
        fix = fix_of(error) if isinstance(error, OSError) else None
        raise UserError(what, where=path, fix=fix or "Give a place with room for it") from error
    return weights


def check_target(
    path: Path, format: str, *, overwrite: bool, inputs: Iterable[Path] = ()
) -> tuple[Path, Path | None]:
    """Returns the files that `save_model` would write: weights, and a description or None."""
    one_of("format", format, FORMATS)
    expected = ".npz" if format == "google" else ".safetensors"
    weights, beside = path / WEIGHTS, path / CONFIG
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        raise UserError("the name is not valid UTF-8", where=path, fix="Choose another")
    if path.suffix == expected:
        weights, beside = path, path.with_suffix(".json") if format == "google" else None
    elif format == "google" or path.suffix.lower() in _OF_FILES:
        what = f"format {format} is a {expected} file, got {path.name!r}"
        raise UserError(what, where=path, fix=f"Call it {path.with_suffix(expected).name}")
    if beside is not None and beside.is_file():
        try:
            found = parse_json(beside.read_bytes())
        except ValueError:
            found = None
        if not isinstance(found, dict) or not is_format(found.get("format"), NAME):
            what = "this file would be replaced, and it is not the description of a model"
            fix = "Give another name or folder; the model of a run is in its best/"
            raise UserError(what, where=beside, fix=fix)
    files = [file for file in (weights, beside) if file is not None]
    check_not_inputs(files, inputs)
    check_output_folder(weights.parent, [file.name for file in files], overwrite=overwrite)
    return weights, beside
