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
import operator
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from allmlp.console import Reporter
from allmlp.errors import UserError, fix_of, near_names, plural
from allmlp.io import (
    Content,
    atomic_write_all,
    check_output_folder,
    expand,
    parse_json,
    partial_path,
    staging_folder,
)
from allmlp.models.catalog import config_to_json, model_from_config
from allmlp.models.layers import ImageClassifier, ModelConfig
from allmlp.models.mixer import MixerConfig
from allmlp.models.timm_model import PREFIX, TimmModel, resized
from allmlp.names import NAME, is_format
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.device import check_fits_memory
from allmlp.weights import google, timm
from allmlp.weights.architecture import check_shapes
from allmlp.weights.description import CONFIG, FORMAT_VERSION, WEIGHTS, describe
from allmlp.weights.files import read_weights
from allmlp.weights.growth import resize_model
from allmlp.weights.locate import locate
from allmlp.weights.npz import fingerprint
from allmlp.weights.resolution import RESIZE_WEIGHTS, ResizeWeights
from allmlp.weights.timm_pretrained import load_pretrained

FORMATS = (NAME, "google", "timm")


def load_model(
    source: str | Path,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    *,
    resize_weights: ResizeWeights = "auto",
    quiet: bool = False,
) -> ImageClassifier:
    """Returns a trained model in evaluation mode, with its class names and preprocessing.

    Weights are float32 in memory, whatever the file holds.

    Args:
        source: a run folder, a folder with model.safetensors (best/), a .safetensors, .npz
            (Google's layout) or .pth (timm's names) file, the name of a published checkpoint
            ("mixer_b16.i21k", see `mixer models --weights`), "hf:owner/name[@revision]", or
            "timm:NAME[.TAG]" where timm is installed.
        image_size: pixels, a number or (H, W); None keeps the weights' own. Another size changes
            the layers that depend on it, see `allmlp.weights.growth`.
        num_classes: None keeps the trained head; another number puts a new zero head in its place
            (and drops the class names), 0 takes the head off.
        resize_weights: how to reach another image size: "block-diagonal", "resample" or "auto".
        quiet: do not say on standard error what is downloaded, changed or assumed.

    Raises:
        UserError: nothing is there, it is damaged or would run code, its tensors make no model or
            hold NaN, or it cannot be brought to that size.
    """
    report = Reporter(quiet=quiet, stderr=True)
    wanted = _height_and_width(image_size)
    if str(source).startswith(PREFIX):
        theirs = load_pretrained(str(source), report)
        return _finished(theirs, wanted, resize_weights, num_classes, source, report)
    place = locate(source, report)
    file = read_weights(place.path)
    description = describe(file, place.checkpoint, wanted)
    for note in description.notes:
        report.say(f"note     {note}")
    config, layout = description.config, description.layout
    check_shapes(config, layout, file.tensors, place.path)
    tensors = layout.to_ours(file.tensors)
    file.tensors.clear()  # what is replaced below need not stay in memory
    # A copy where the file is mapped into memory: somebody may write to it later.
    mapped = file.container != "npz"
    tensors = {
        name: _as_float32(tensors.pop(name), copy=mapped).contiguous() for name in list(tensors)
    }
    _refuse_not_finite(tensors, place.path)
    preprocessing = description.preprocessing
    if resize_weights not in RESIZE_WEIGHTS:
        raise UserError(
            f"unknown resize_weights {resize_weights!r}", fix=f"Known: {', '.join(RESIZE_WEIGHTS)}"
        )
    is_timm = layout.family == "timm"  # changes its size with the weights in it
    if wanted is not None and wanted != config.image_size and not is_timm:
        old = config
        config, how = resize_model(tensors, config, wanted, resize_weights)
        report.say(f"grown    {_pixels(old)} -> {_pixels(config)} pixels: {how}")
        preprocessing = _at_size(preprocessing, config.image_size, source)
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        model = model_from_config(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except UserError as error:  # values that no model of the family has
        raise UserError(error.what, where=place.path, fix=error.fix) from error
    model.class_names, model.preprocessing = description.class_names, preprocessing
    return _finished(model, wanted, resize_weights, num_classes, source, report)


def _finished(
    model: ImageClassifier,
    wanted: tuple[int, int] | None,
    resize_weights: ResizeWeights,
    num_classes: int | None,
    source: str | Path,
    report: Reporter,
) -> ImageClassifier:
    """Returns the model at the wanted size, where it is timm's, and with the wanted head."""
    if isinstance(model, TimmModel):
        if resize_weights != "auto":
            what = f"resize_weights={resize_weights!r} has no effect: timm resizes its own models"
            raise UserError(what, where=source, fix="Leave it out")
        if wanted is not None and wanted != model.config.image_size:
            old, model = model.config, resized(model, wanted)
            report.say(f"resized  {_pixels(old)} -> {_pixels(model.config)} pixels, by timm")
            model.preprocessing = _at_size(model.preprocessing, wanted, source)
    had = model.config.num_classes
    if num_classes is not None and num_classes != had:
        model = with_new_head(model, num_classes)
        what = f"new, all zeros, for {plural(num_classes, 'class')}" if num_classes else "taken off"
        report.say(f"head     {what}; the weights had {plural(had, 'class')}")
    model.source = str(source)
    return model.eval()


def _at_size(
    preprocessing: Preprocessing | None, image_size: tuple[int, int], source: str | Path
) -> Preprocessing | None:
    if preprocessing is None:
        return None
    if preprocessing.permutation != "none":
        what = "the model was trained on permuted pixels, which belong to one image size"
        raise UserError(what, where=source, fix="Leave --image-size out")
    return dataclasses.replace(preprocessing, image_size=image_size)


def _as_float32(tensor: Tensor, *, copy: bool) -> Tensor:
    """Returns numbers of any precision as float32; counters stay whole numbers."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=copy)


def _refuse_not_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuses weights that are no numbers, as of a training that diverged: so is every answer."""
    for name, tensor in tensors.items():
        # The sum is finite for all but huge values, and costs a tenth of looking at each.
        if not tensor.is_floating_point() or tensor.sum().isfinite():
            continue
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            what = f"{name} holds NaN or infinity: {bad:,} of its {tensor.numel():,} values"
            raise UserError(what, where=path, fix="Take a checkpoint from before training diverged")


def _height_and_width(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    try:
        if isinstance(image_size, tuple | list):
            height, width = (operator.index(side) for side in image_size)
        else:
            height = width = operator.index(image_size)
        if not (0 < height < 2**31 and 0 < width < 2**31):
            raise ValueError
    except (TypeError, ValueError) as error:
        fix = "a number of pixels, or (height, width)"
        raise UserError(
            f"not an image size: {image_size!r}", where="image_size", fix=fix
        ) from error
    return height, width


def _pixels(config: ModelConfig) -> str:
    return f"{config.image_size[0]}x{config.image_size[1]}"


def with_new_head(model: ImageClassifier, num_classes: int) -> ImageClassifier:
    """Returns the model with a zero head of `num_classes` outputs, 0 for none; no class names.

    Raises:
        UserError: the number is below 0.
    """
    try:
        config = dataclasses.replace(model.config, num_classes=operator.index(num_classes))
    except (TypeError, ValueError) as error:
        raise UserError(f"not a number of classes: {error}", where="num_classes") from error
    check_fits_memory(
        num_classes * model.config.hidden_dim, f"a head for {plural(num_classes, 'class')}"
    )
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


def save_model(
    model: ImageClassifier,
    path: str | Path,
    format: str = "allmlp",
    *,
    overwrite: bool = False,
) -> Path:
    """Writes the model, and returns the path of the weights.

    Args:
        model: with whatever class names and preprocessing it carries.
        path: "allmlp" and "timm": a folder for model.safetensors and config.json, or one file
            named *.safetensors, which holds everything. "google": a file named *.npz; a .json
            beside it keeps what that layout has no place for.
        format: "allmlp"; "google", the arrays that Google's own code loads; "timm", its names.
            Google's code computes the tanh GELU and timm's the exact one, whatever
            `model.config.gelu` says.
        overwrite: replace a model that is there.

    Raises:
        UserError: an unknown format, a name that does not go with it, or the path is there already
            or cannot be written.
    """
    path = expand(path)
    weights, beside = check_target(path, format, overwrite=overwrite)
    refuse_unknown_there(model.config, format)
    tensors = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    said = {**model_to_json(model), "weights": _fingerprint(tensors)}
    try:
        weights.parent.mkdir(parents=True, exist_ok=True)
        if format == "google":
            _write_google(weights, beside, tensors, said)
            return weights
        names = timm.from_ours(tensors) if format == "timm" else tensors
        metadata = {NAME: json.dumps(said)}  # one entry: the library shuffles several

        def write(aside: Path) -> None:
            # Each tensor with memory of its own, as the format wants it.
            whole = {name: value.contiguous().clone() for name, value in names.items()}
            # The library writes a temporary file beside its target and leaves it when it fails or
            # is killed: it goes with this folder, at the latest in the next save.
            with staging_folder(weights) as folder:
                safetensors.torch.save_file(whole, folder / WEIGHTS, metadata=metadata)
                os.replace(folder / WEIGHTS, aside)

        contents: dict[Path, Content] = {weights: write}
        if beside is not None:
            contents[beside] = _readable(said)
        atomic_write_all(contents)
    except (OSError, SafetensorError) as error:
        what = f"cannot write the model: {getattr(error, 'strerror', None) or error}"
        fix = fix_of(error) if isinstance(error, OSError) else None
        raise UserError(what, where=path, fix=fix or "Give a place with room for it") from error
    return weights


def refuse_unknown_there(config: object, format: str) -> None:
    """Refuses a format of another program that does not know such an architecture.

    Raises:
        UserError: the format is Google's or timm's, and the model is not the paper's own Mixer.
    """
    is_plain = isinstance(config, MixerConfig) and config.is_plain
    if format != "allmlp" and not is_plain:
        summary = getattr(config, "summary", lambda: str(config))()
        what = f"the format {format!r} has no place for this model ({summary})"
        raise UserError(what, fix="--format allmlp")


def _write_google(
    path: Path, beside: Path | None, tensors: dict[str, Tensor], said: dict[str, Any]
) -> None:
    """Writes the arrays, and beside them what their layout has no place for."""
    assert beside is not None

    def describe_aside(aside: Path) -> None:
        aside.write_bytes(_readable({**said, "weights": fingerprint(partial_path(path))}))

    def write(aside: Path) -> None:
        google.write_npz(aside, tensors)

    atomic_write_all({path: write, beside: describe_aside})


def _readable(said: dict[str, Any]) -> bytes:
    return (json.dumps(said, indent=2) + "\n").encode()


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    """Returns a checksum by which a description and its weights know each other."""
    checksum = 0
    for value in tensors.values():
        data = value.contiguous().view(-1).view(torch.uint8).numpy()
        checksum = zlib.crc32(data.data, checksum)
    return f"crc32:{checksum:08x}"


def check_target(path: Path, format: str, *, overwrite: bool = True) -> tuple[Path, Path | None]:
    """Returns the files that `save_model` would write there: weights, and a description or None.

    Raises:
        UserError: an unknown format, a name that does not go with it, a folder of something else,
            or files that are there and may not be replaced.
    """
    weights, beside = _target(path, format)
    for each in (weights, beside):
        if not overwrite and each is not None and os.path.lexists(each):
            fix = "Add --overwrite (in Python overwrite=True)"
            raise UserError("the output is there already", where=each, fix=fix)
    return weights, beside


def _target(path: Path, format: str) -> tuple[Path, Path | None]:
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", fix=f"Known: {', '.join(FORMATS)}")
    expected = ".npz" if format == "google" else ".safetensors"
    suffix = path.suffix
    is_near = suffix.lower() in _SUFFIXES or near_names(suffix, [".safetensors", ".npz"])
    if suffix != expected and (format == "google" or is_near):
        what = f"format {format} is a {expected} file, got {path.name!r}"
        raise UserError(what, where=path, fix=f"Call it {path.with_suffix(expected).name}")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError("the name is not valid UTF-8", where=path, fix="Choose another") from error
    if suffix == expected:
        if path.is_dir():
            raise UserError("the output is a folder, a file is meant", where=path)
        if format != "google":
            return path, None
        beside = path.with_suffix(".json")
        _check_description(beside, "Choose another name")
        return path, beside
    check_output_folder(path)
    if (path / "best").is_dir():
        what = "the output is a run folder; its model lies in best/"
        raise UserError(what, where=path, fix="Give a new folder")
    _check_description(path / CONFIG, "Give a new folder")
    return path / WEIGHTS, path / CONFIG


def _check_description(path: Path, fix: str) -> None:
    """Refuses to replace a JSON file that is not the description of a model of ours."""
    if not path.is_file():
        return
    try:
        found = parse_json(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not is_format(found.get("format"), NAME):
        what = "this file would be replaced, and it is not the description of a model"
        raise UserError(what, where=path, fix=fix)


_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".onnx", ".json")


def model_to_json(model: ImageClassifier) -> dict[str, Any]:
    """Returns what config.json holds: architecture, class names and preprocessing."""
    preprocessing = model.preprocessing
    return {
        "format": NAME,
        "version": FORMAT_VERSION,
        "architecture": config_to_json(model.config),
        "class_names": model.class_names,
        "preprocessing": None if preprocessing is None else preprocessing.to_json(),
    }
