"""load_model: loads a model from anything that names one. Loading never runs code."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from allmlp.console import Reporter
from allmlp.decision import Decision
from allmlp.errors import UserError, near_names, one_of, plural
from allmlp.io import expand, parse_json, sha256_of
from allmlp.models.catalog import architectures, family_of, model_from_config
from allmlp.models.family import ModelConfig, Size, is_integer, size_text
from allmlp.models.layers import Classifier, ImageClassifier, checked_names, preprocessing_of
from allmlp.models.timm_model import PREFIX, TimmModel, resize_timm
from allmlp.options import ResizeWeights
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.device import check_fits_memory
from allmlp.weights.checkpoints import (
    CHECKPOINTS,
    Checkpoint,
    checkpoint_of_file,
    find_checkpoint,
)
from allmlp.weights.description import CONFIG, PICKLED, WEIGHTS, check_shapes, describe
from allmlp.weights.download import (
    HUB_PREFIX,
    cache_folder,
    cached,
    fetch_from_hub,
    parse_hub_name,
)
from allmlp.weights.files import read_weights
from allmlp.weights.timm_weights import load_pretrained

EXPORTED = (".onnx", ".xml", ".pt2")  # suffixes of exported files


def load_model(
    source: str | Path,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    *,
    resize_weights: ResizeWeights = "auto",
    quiet: bool = False,
    class_names: str | Path | Iterable[str] | None = None,
    mean: float | tuple[float, ...] | None = None,
    std: float | tuple[float, ...] | None = None,
) -> ImageClassifier:
    """Returns a trained model in evaluation mode, with its class names and preprocessing.

    Weights are float32 in memory, whatever the dtype in the file.

    Args:
        source: a run folder, a folder with model.safetensors (best/), a .safetensors, .npz
            (Google's layout) or .pth (timm's names) file, the name of a published checkpoint
            ("mixer_b16.i21k", see `list_checkpoints()`), "hf:owner/name[@revision]", or
            "timm:NAME[.TAG]" where timm is installed.
        image_size: in pixels, an integer or (H, W); None keeps that of the weights. Another size
            resizes the weights that depend on it, see `allmlp.models.resize`.
        num_classes: None keeps the trained head; a number replaces it with a new zero head (and
            drops the class names), 0 removes it.
        resize_weights: method for another image size: "block-diagonal" growth, "resample", or
            "auto": the former if both sides grow by integer factors, else the latter.
        quiet: do not report downloads, changes and assumptions on standard error.
        class_names: for weights that carry none: the names in the order of the logits, or a file of
            them, one per line or a JSON list.
        mean: of the pixels on [0, 1], one number or one per channel, instead of the weights' own.
        std: likewise.

    Raises:
        UserError: the source does not exist, is damaged or would run code, its tensors match no
            model or contain NaN, or it cannot be resized to that size.
    """
    report = Reporter(quiet=quiet, stderr=True)
    size: Any = (image_size, image_size) if isinstance(image_size, int) else image_size
    is_pair = isinstance(size, tuple | list) and len(size) == 2
    if size is not None and not (is_pair and all(map(is_integer, size))):
        what, fix = f"not an image size: {image_size!r}", "a number of pixels, or (height, width)"
        raise UserError(what, where="image_size", fix=fix)
    size = None if size is None else tuple(size)
    one_of("resize_weights", resize_weights, get_args(ResizeWeights))
    if str(source).startswith(PREFIX):
        model: ImageClassifier = load_pretrained(str(source), report)
    else:
        model = _from_file(source, size, resize_weights, report)
    if isinstance(model, TimmModel):
        _resize_timm(model, size, resize_weights, report)
    had = model.config.num_classes
    if num_classes is not None and num_classes != had:
        model = with_new_head(model, num_classes)
        what = f"new, all zeros, for {plural(num_classes, 'class')}" if num_classes else "removed"
        report.say(f"head     {what}; the weights had {plural(had, 'class')}")
    if isinstance(class_names, str | Path):
        names = _names_in(expand(class_names))
        model.class_names = checked_names(names, model.config.num_classes, class_names)
    elif class_names is not None:
        model.class_names = class_names
    for name, value in {"mean": mean, "std": std}.items():
        if value is not None:
            numbers = value if isinstance(value, float | int) else tuple(value)
            numbers = numbers[0] if isinstance(numbers, tuple) and len(numbers) == 1 else numbers
            try:
                model.preprocessing = replace(preprocessing_of(model), **{name: numbers})
            except ValueError as error:
                raise UserError(str(error), where=name, code="out-of-range") from error
    model.source = str(source)
    return model.eval()


def _names_in(path: Path) -> Any:
    try:
        text = path.read_text("utf-8-sig").strip()
        return parse_json(text) if text.startswith("[") else [x.strip() for x in text.splitlines()]
    except (OSError, ValueError) as error:
        what = f"cannot read the class names: {getattr(error, 'strerror', None) or error}"
        raise UserError(what, where=path, fix="One name per line, or a JSON list") from error


def open_model(model: Classifier | str | Path, **loading: Any) -> ImageClassifier:
    """Returns `model` if it is a model, else what `load_model` returns for it."""
    if isinstance(model, str | Path):
        return load_model(model, **loading)
    if not isinstance(model, ImageClassifier):
        what = f"expected a model with weights or its path, got {model!r}"
        raise UserError(what, where="model", fix="am.load_model(...) gives one", code="wrong-type")
    for name, value in loading.items():
        if value not in (None, "auto"):
            what = f"{name} {value} has no effect on a model object"
            raise UserError(what, where=name, fix="Give the path that it was loaded from")
    return model


def _from_file(
    source: str | Path, size: Size | None, method: ResizeWeights, report: Reporter
) -> ImageClassifier:
    path, checkpoint = locate(source, report)
    file = read_weights(path)
    description = describe(file, checkpoint, size)
    if file.chosen:
        report.say(f"note     the tensors are those of {file.chosen}")
    for note in description.notes:
        report.say(f"note     {note}")
    check_shapes(description, file)
    config, preprocessing = description.config, description.preprocessing
    tensors = description.layout.to_ours(file.tensors)
    file.tensors.clear()  # frees the memory of tensors replaced below
    is_mapped = file.container != "npz"  # memory-mapped, so copy: the file may change later
    for name in list(tensors):
        value = tensors.pop(name)
        dtype = torch.float32 if value.is_floating_point() else value.dtype  # for counters
        tensors[name] = value.to(dtype, copy=is_mapped).contiguous()
    _check_finite(tensors, path)
    is_timm = family_of(config).name == "timm"  # timm resizes with the weights loaded
    if size is not None and size != config.image_size and not is_timm:
        new, how = resize_model(tensors, config, size, method)
        preprocessing, config = _at_size(preprocessing, config, new, how, report), new
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        model = model_from_config(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except UserError as error:  # values that no model of the family can have
        raise UserError(error.what, where=path, fix=error.fix) from error
    model.class_names, model.preprocessing = description.class_names, preprocessing
    model.decision = description.decision
    return model


def resize_model(
    tensors: dict[str, Tensor], config: ModelConfig, image_size: Size, method: ResizeWeights
) -> tuple[ModelConfig, str]:
    """Resizes a model's tensors in place; returns the new architecture and how it was done."""
    resize = family_of(config).resize
    if resize is None:
        what = f"{config.summary()} cannot be brought to another image size"
        raise UserError(what, fix="Leave the image size out")
    try:
        new = replace(config, image_size=image_size)
    except ValueError as error:
        raise UserError(str(error), where="image_size") from error
    return resize(tensors, config, new, method)


def _resize_timm(
    model: TimmModel, size: Size | None, method: ResizeWeights, report: Reporter
) -> None:
    old = model.config
    if method != "auto":
        what = f"resize_weights={method!r} has no effect: timm resizes its own models"
        raise UserError(what, where=old.name, fix="Leave it out")
    if size is not None and size != old.image_size:
        resize_timm(model, size)
        model.preprocessing = _at_size(model.preprocessing, old, model.config, "by timm", report)


def _at_size(
    preprocessing: Preprocessing | None,
    old: ModelConfig,
    new: ModelConfig,
    how: str,
    report: Reporter,
) -> Preprocessing | None:
    sizes = f"{size_text(old.image_size)} -> {size_text(new.image_size)}"
    if preprocessing is not None and preprocessing.permutation != "none":
        what = "the model was trained on permuted pixels, which belong to one image size"
        raise UserError(what, where="image_size", fix="Leave it out")
    report.say(f"resized  {sizes} pixels: {how}")
    return preprocessing and replace(preprocessing, image_size=new.image_size)


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """NaN in the weights, as after a diverged training run, would be in every prediction."""
    for name, tensor in tensors.items():
        # The sum is finite for all but huge values, and costs a tenth of an elementwise check.
        if not tensor.is_floating_point() or tensor.sum().isfinite():
            continue
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            what = f"{name} holds NaN or infinity: {bad:,} of its {tensor.numel():,} values"
            fix = "Take a checkpoint from before training diverged"
            raise UserError(what, where=path, fix=fix, code="not-finite")


def with_new_head(model: ImageClassifier, num_classes: int) -> ImageClassifier:
    """Returns the model with a zero head (0: none); everything else is shared with the original."""
    dim = model.config.hidden_dim
    try:
        config = replace(model.config, num_classes=num_classes)
    except ValueError as error:
        raise UserError(f"not a number of classes: {error}", where="num_classes") from error
    check_fits_memory(num_classes * dim, f"a head for {plural(num_classes, 'class')}")
    head: Any = nn.Linear(dim, num_classes, device="meta") if num_classes else None
    for name, parameter in () if head is None else list(head.named_parameters()):
        setattr(head, name, nn.Parameter(torch.zeros(parameter.shape)))
    fresh = copy.copy(model)
    fresh._modules = dict(model._modules)
    fresh.config, fresh.class_names, fresh.head = config, None, head
    fresh.decision = Decision()
    return fresh


def locate(source: str | Path, report: Reporter) -> tuple[Path, Checkpoint | None]:
    """Returns the weights file of a source, downloaded if necessary, and its checkpoint."""
    text = str(source)
    if text.startswith(HUB_PREFIX):
        name, revision = parse_hub_name(text)
        is_published = revision is None and name.startswith("timm/")
        return fetch_from_hub(name, revision), find_checkpoint(name) if is_published else None
    path = expand(source)
    if path.suffix.lower() in EXPORTED and not os.path.isdir(path):
        what = "an exported file has no weights to load: it only computes logits"
        raise UserError(what, where=path, fix="Give the run or the weights it was made from")
    if os.path.isdir(path):
        for found in (path / "best" / WEIGHTS, path / WEIGHTS):
            if found.is_file():
                return found, None
        what = f"the folder has no weights: neither best/{WEIGHTS} nor {WEIGHTS}"
        fix = "Give the run folder of a training that reached its first evaluation, or a file"
        raise UserError(what, where=path, fix=fix)
    if os.path.isfile(path):
        return path, checkpoint_of_file(path.name)
    checkpoint = find_checkpoint(text)
    if checkpoint is not None:
        path = cache_folder() / checkpoint.name / checkpoint.file_name
        if checkpoint.by_hand and not path.is_file():
            what = f"{checkpoint.name} can only be downloaded with a browser"
            fix = f"Download it there and put it at {path}, or give your copy as the model"
            raise UserError(what, where=checkpoint.url, fix=fix)
        return cached(checkpoint, path, report), checkpoint
    if text in architectures():
        published = [name for name in CHECKPOINTS if name.partition(".")[0] == text]
        fix = f"Its published weights: {', '.join(published)}" if published else None
        raise UserError(f"{text!r} is an architecture and has no weights of its own", fix=fix)
    fix = f"{near_names(text, CHECKPOINTS)}Give a run folder, a .safetensors, .npz or .pth file, "
    fix += "hf:owner/name, or a name of `mixer models --weights`"
    raise UserError(f"no such model: {text!r}", fix=fix, code="unknown-name")


def weights_fingerprint(source: str, *, quiet: bool = True) -> str:
    """Returns the sha256 of the weights and of a description beside them; timm names as given."""
    if source.startswith(PREFIX):
        return source
    path, _ = locate(source, Reporter(quiet=quiet, stderr=True))
    beside = path.with_suffix(".json")
    if path.name in (WEIGHTS, PICKLED):
        beside = path.with_name(CONFIG)
    return " ".join(sha256_of(file) for file in (path, beside) if file.is_file())


def files_of(source: str | Path) -> list[Path]:
    """Returns the files that a local model may be loaded from."""
    path = expand(source)
    names = [folder / name for folder in (path / "best", path) for name in (WEIGHTS, CONFIG)]
    return names if path.is_dir() else [path, path.with_suffix(".json"), path.with_suffix(".bin")]
