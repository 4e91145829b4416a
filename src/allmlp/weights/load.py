"""load_model: whatever the user calls a model -> the model, whoever wrote it.

Nothing that is loaded runs code.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from allmlp.console import Reporter
from allmlp.errors import UserError, one_of, plural
from allmlp.io import expand
from allmlp.models.catalog import architectures, family_of, model_from_config
from allmlp.models.family import ModelConfig, Size, is_integer
from allmlp.models.layers import Classifier, ImageClassifier
from allmlp.models.timm_model import PREFIX, TimmModel, resized
from allmlp.options import ResizeWeights
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.device import check_fits_memory
from allmlp.weights import hub
from allmlp.weights.checkpoints import (
    CHECKPOINTS,
    Checkpoint,
    checkpoint_of_file,
    find_checkpoint,
    unknown_checkpoint,
)
from allmlp.weights.description import CONFIG, WEIGHTS, check_shapes, describe
from allmlp.weights.download import cache_folder, cached
from allmlp.weights.files import read_weights
from allmlp.weights.timm_weights import load_pretrained

EXPORTED = (".onnx", ".xml", ".pt2")  # the endings of exported files


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
            ("mixer_b16.i21k", see `list_checkpoints()`), "hf:owner/name[@revision]", or
            "timm:NAME[.TAG]" where timm is installed.
        image_size: pixels, a number or (H, W); None keeps the weights' own. Another size changes
            the layers that depend on it, see `allmlp.models.resize`.
        num_classes: None keeps the trained head; another number puts a new zero head in its place
            (and drops the class names), 0 removes the head.
        resize_weights: how to reach another image size: "block-diagonal" growth, "resample", or
            "auto": the first where both sides grow by whole factors, else the second.
        quiet: do not say on standard error what is downloaded, changed or assumed.

    Raises:
        UserError: the source does not exist, is damaged or would run code, its tensors make no
            model or hold NaN, or it cannot be brought to that size.
    """
    report = Reporter(quiet=quiet, stderr=True)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    is_size = isinstance(size, tuple | list) and len(size) == 2 and all(map(is_integer, size))
    if size is not None and (not is_size or max(size) >= 2**31):
        what, fix = f"not an image size: {image_size!r}", "a number of pixels, or (height, width)"
        raise UserError(what, where="image_size", fix=fix)
    size = None if size is None else (size[0], size[1])
    one_of("resize_weights", resize_weights, get_args(ResizeWeights))
    if str(source).startswith(PREFIX):
        model: ImageClassifier = load_pretrained(str(source), report)
    else:
        model = _from_file(source, size, resize_weights, report)
    if isinstance(model, TimmModel):
        model = _timm_at_size(model, size, resize_weights, report)
    had = model.config.num_classes
    if num_classes is not None and num_classes != had:
        model = with_new_head(model, num_classes)
        what = f"new, all zeros, for {plural(num_classes, 'class')}" if num_classes else "removed"
        report.say(f"head     {what}; the weights had {plural(had, 'class')}")
    model.source = str(source)
    return model.eval()


def open_model(
    model: Classifier | str | Path,
    image_size: int | tuple[int, int] | None = None,
    resize_weights: ResizeWeights = "auto",
) -> ImageClassifier:
    """Returns the model that a command is given: the object itself, or what `load_model` loads."""
    if isinstance(model, str | Path):
        return load_model(model, image_size, resize_weights=resize_weights)
    if not isinstance(model, ImageClassifier):
        what = f"expected a model with weights or its path, got {model!r}"
        raise UserError(what, where="model", fix="am.load_model(...) gives one", code="wrong-type")
    if image_size is not None:
        what = f"image_size {image_size} has no effect on a model object"
        raise UserError(what, where="image_size", fix="Give the path that it was loaded from")
    return model


def _from_file(
    source: str | Path, size: Size | None, method: ResizeWeights, report: Reporter
) -> ImageClassifier:
    path, checkpoint = locate(source, report)
    file = read_weights(path)
    description = describe(file, checkpoint, size)
    for note in description.notes:
        report.say(f"note     {note}")
    check_shapes(description, file)
    config, preprocessing = description.config, description.preprocessing
    tensors = description.layout.to_ours(file.tensors)
    file.tensors.clear()  # what is replaced below need not stay in memory
    is_mapped = file.container != "npz"  # then copied: somebody may write to the file later
    for name in list(tensors):
        value = tensors.pop(name)
        dtype = torch.float32 if value.is_floating_point() else value.dtype  # of counters
        tensors[name] = value.to(dtype, copy=is_mapped).contiguous()
    _check_finite(tensors, path)
    is_timm = description.layout.family.name == "timm"  # changes its size with the weights in it
    if size is not None and size != config.image_size and not is_timm:
        config, words = resize_model(tensors, config, size, method)
        report.say(f"resized  {_pixels(description.config)} -> {_pixels(config)} pixels: {words}")
        preprocessing = _at_size(preprocessing, size, source)
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        model = model_from_config(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except UserError as error:  # values that no model of the family has
        raise UserError(error.what, where=path, fix=error.fix) from error
    model.class_names, model.preprocessing = description.class_names, preprocessing
    return model


def resize_model(
    tensors: dict[str, Tensor], config: ModelConfig, image_size: Size, method: ResizeWeights
) -> tuple[ModelConfig, str]:
    """Changes a model's tensors, by our names and in place, to those of another image size; returns
    the new architecture, and in words how it was reached."""
    resize = family_of(config).resize
    if resize is None:
        what = f"{config.summary()} cannot be brought to another image size"
        raise UserError(what, fix="Leave the image size out")
    try:
        new = dataclasses.replace(config, image_size=image_size)
    except ValueError as error:
        raise UserError(str(error), where="image_size") from error
    return resize(tensors, config, new, method)


def _timm_at_size(
    model: TimmModel, size: Size | None, method: ResizeWeights, report: Reporter
) -> TimmModel:
    old = model.config
    if method != "auto":
        what = f"resize_weights={method!r} has no effect: timm resizes its own models"
        raise UserError(what, where=old.name, fix="Leave it out")
    if size is not None and size != old.image_size:
        model = resized(model, size)
        report.say(f"resized  {_pixels(old)} -> {_pixels(model.config)} pixels, by timm")
        model.preprocessing = _at_size(model.preprocessing, size, old.name)
    return model


def _at_size(
    preprocessing: Preprocessing | None, image_size: Size, source: str | Path
) -> Preprocessing | None:
    if preprocessing is None:
        return None
    if preprocessing.permutation != "none":
        what = "the model was trained on permuted pixels, which belong to one image size"
        raise UserError(what, where=source, fix="Leave image_size out")
    return dataclasses.replace(preprocessing, image_size=image_size)


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """NaN in the weights, as of a training that diverged, would be in every prediction."""
    for name, tensor in tensors.items():
        # The sum is finite for all but huge values, and costs a tenth of looking at each.
        if not tensor.is_floating_point() or tensor.sum().isfinite():
            continue
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            what = f"{name} holds NaN or infinity: {bad:,} of its {tensor.numel():,} values"
            fix = "Take a checkpoint from before training diverged"
            raise UserError(what, where=path, fix=fix, code="not-finite")


def _pixels(config: ModelConfig) -> str:
    return f"{config.image_size[0]}x{config.image_size[1]}"


def with_new_head(model: ImageClassifier, num_classes: int) -> ImageClassifier:
    """Returns the model with a zero head of `num_classes` outputs, 0 for none; no class names. It
    shares all else with the given one, which stays unchanged."""
    dim = model.config.hidden_dim
    try:
        config = dataclasses.replace(model.config, num_classes=num_classes)
    except ValueError as error:
        raise UserError(f"not a number of classes: {error}", where="num_classes") from error
    check_fits_memory(num_classes * dim, f"a head for {plural(num_classes, 'class')}")
    head: Any = nn.utils.skip_init(nn.Linear, dim, num_classes) if num_classes else None
    for parameter in () if head is None else head.parameters():
        nn.init.zeros_(parameter)
    fresh = copy.copy(model)
    fresh._modules = dict(model._modules)
    fresh.config, fresh.class_names, fresh.head = config, None, head
    return fresh


def locate(source: str | Path, report: Reporter) -> tuple[Path, Checkpoint | None]:
    """Returns the weights file of a source, downloaded if necessary, and the published checkpoint
    that it is known to be; what lies on the disk comes before names."""
    text = str(source)
    if text.startswith(hub.PREFIX):
        name, revision = hub.parse(text)
        is_published = revision is None and name.startswith("timm/")
        return hub.fetch(name, revision), find_checkpoint(name) if is_published else None
    path = expand(source)
    if path.suffix.lower() in EXPORTED and not os.path.isdir(path):
        what = "an exported file has no weights to load: it only computes logits"
        raise UserError(what, where=path, fix="Give the run or the weights it was made from")
    try:
        if path.is_dir():
            return _in_folder(path), None
        if path.is_file():
            return path, checkpoint_of_file(path.name)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot look for a model there: {reason}", where=path) from error
    checkpoint = find_checkpoint(text)
    if checkpoint is not None:
        return _fetch(checkpoint, report), checkpoint
    if text in architectures():
        published = [name for name in CHECKPOINTS if name.partition(".")[0] == text]
        fix = f"Its published weights: {', '.join(published)}" if published else None
        raise UserError(f"{text!r} is an architecture and has no weights of its own", fix=fix)
    raise unknown_checkpoint(text)


def files_of(source: str | Path) -> list[Path]:
    """Returns the files that a local model may be read from."""
    path = expand(source)
    names = [folder / name for folder in (path / "best", path) for name in (WEIGHTS, CONFIG)]
    return names if path.is_dir() else [path, path.with_suffix(".json"), path.with_suffix(".bin")]


def _fetch(checkpoint: Checkpoint, report: Reporter) -> Path:
    path = cache_folder() / checkpoint.name / checkpoint.file_name
    if checkpoint.by_hand and not path.is_file():
        what = f"{checkpoint.name} is on a page for browsers, which no program can download"
        fix = f"Download it there and put it at {path}, or give your copy of the file as the model"
        raise UserError(what, where=checkpoint.url, fix=fix)
    return cached(checkpoint, path, report)


def _in_folder(folder: Path) -> Path:
    for candidate in (folder / "best" / WEIGHTS, folder / WEIGHTS):
        if candidate.is_file():
            return candidate
    what = "the folder has no weights: neither best/model.safetensors nor model.safetensors"
    fix = "Give the run folder of a training that reached its first evaluation, or a file"
    raise UserError(what, where=folder, fix=fix)
