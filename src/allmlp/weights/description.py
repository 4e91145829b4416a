"""Describes a weights file: architecture, class names, preprocessing, and where these come from.

Sources in order of precedence: config.json next to a model.safetensors or <name>.json next to a
.npz, if written with these weights; the header of our own files; the list of published checkpoints;
timm's config.json; and finally the tensors themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from allmlp.decision import Decision
from allmlp.errors import UserError
from allmlp.io import parse_json, read_json
from allmlp.models.catalog import (
    architectures,
    config_from_json,
    family_of,
    in_words,
    model_from_config,
)
from allmlp.models.family import Family, ModelConfig, Names, Size
from allmlp.models.layers import checked_names
from allmlp.names import NAME, is_format, own_entry
from allmlp.preprocessing import INTERPOLATIONS, Preprocessing
from allmlp.weights.checkpoints import Checkpoint
from allmlp.weights.files import WeightsFile, fingerprint
from allmlp.weights.layouts import LAYOUTS, layout_of

FORMAT_VERSION = 1
WEIGHTS, PICKLED, CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"
Json = dict[str, Any]


@dataclass(frozen=True)
class Description:
    layout: Names
    config: ModelConfig
    class_names: list[str] | None  # in the order of the logits
    preprocessing: Preprocessing | None
    source: str  # where the description comes from
    notes: tuple[str, ...] = ()  # for the user
    decision: Decision = field(default_factory=Decision)


def describe(
    file: WeightsFile, checkpoint: Checkpoint | None, image_size: Size | None
) -> Description:
    """Returns the description of a file; `image_size` helps if the grid is not square."""
    written, where = _written(file)
    if "architecture" in written and is_format(written.get("format"), NAME):
        return _ours(written, where, file)
    found = layout_of(file.tensors)
    if found is None:
        first = ", ".join(list(file.tensors)[:4])
        what = f"not a known model: none of the {len(file.tensors)} tensors has the name of one "
        fix = f"Known names: {', '.join(known.title for _, known in LAYOUTS)}"
        raise UserError(f"{what}({first}, ...)", where=file.path, fix=fix)
    family, layout = found
    settings = written.get("pretrained_cfg", written)  # of timm
    settings = settings if isinstance(settings, dict) else {}
    size: Any = settings.get("input_size")
    is_size = isinstance(size, list) and [type(n) for n in size] == [int] * 3
    config = _infer(file, family, layout, (size[1], size[2]) if is_size else None, image_size)
    if checkpoint is not None:
        return _published(checkpoint, config, layout, file)
    labels = written.get("label_names") or settings.get("label_names")
    names = list(map(str, labels)) if isinstance(labels, list) else []
    names = names if names and len(names) == config.num_classes else None
    found = timm_preprocessing(settings, config.image_size, config.in_channels, where)
    if found is not None:
        source = f"the tensors and {where}"
        return Description(layout, config, names, found[0], source, found[1])
    assumed, notes = None, ()
    if config.in_channels in (1, 3):
        assumed = family.published_preprocessing(config)
        authors = f"that of {layout.title}'s authors" if family.crops else "Google's"
        what = f"the file does not say its preprocessing; {authors} is assumed"
        notes = () if layout.title == "Google" else (f"{what} ({assumed.summary()})",)
    return Description(layout, config, names, assumed, "the tensors", notes)


def _written(file: WeightsFile) -> tuple[Json, str]:
    """Returns the written description of a file and its location; ({}, "") if there is none."""
    header, in_header = own_entry(file.metadata), f"{file.path} (header)"
    try:
        carried = None if header is None else _checked(parse_json(header), in_header)
    except ValueError as error:
        raise UserError(f"not a model description: {error}", where=in_header) from error
    path = file.path.with_suffix(".json") if file.container == "npz" else None
    if file.path.name in (WEIGHTS, PICKLED):  # only files of these names have a config.json
        path = file.path.with_name(CONFIG)
    if path is not None and path.is_file():
        beside = _checked(read_json(path, "not a model description"), path)
        # A save killed between its two renames, or a copy of only one of the files, leaves a
        # mismatched pair. A description by hand, by timm or an older version has no fingerprint.
        known = beside.get("weights")
        own = known if carried is None else carried.get("weights")
        is_ours = carried is None or is_format(beside.get("format"), NAME)
        own = fingerprint(file.path) if file.container == "npz" else own
        if is_ours and known in (None, own):
            return beside, str(path)
    return ({}, "") if carried is None else (carried, in_header)


def _checked(found: Any, where: object) -> Json:
    if not isinstance(found, dict):
        raise UserError(f"not a model description: {str(found)[:200]}", where=where)
    return found


def _ours(written: Json, where: str, file: WeightsFile) -> Description:
    version = written.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        what = f"written by a newer allmlp (format {str(version)[:20]})"
        raise UserError(what, where=where, fix=f"pip install --upgrade {NAME}")
    try:
        config = config_from_json(dict(written["architecture"]))
        preprocessing = written.get("preprocessing")
        if preprocessing is not None:
            preprocessing = Preprocessing.from_json(preprocessing)
        decision = Decision.from_json(written.get("decision"), config.num_classes)
    except (KeyError, TypeError, ValueError) as error:
        what = error.what[:400] if isinstance(error, UserError) else f"{error!r}"
        raise UserError(f"not a model description: {what}", where=where) from error
    family = family_of(config)
    _, layout = layout_of(file.tensors, family) or (family, Names(family.title, family.marker))
    if preprocessing is not None:
        prepared = (preprocessing.image_size, preprocessing.channels)
        if prepared != (config.image_size, config.in_channels):
            what = f"the preprocessing gives {prepared} (size, channels), the model takes "
            raise UserError(f"{what}{(config.image_size, config.in_channels)}", where=file.path)
    names = written.get("class_names")
    if names is not None:
        names = checked_names(names, config.num_classes, where)
        if any("\ud800" <= letter <= "\udfff" for name in names for letter in name):
            raise UserError("class_names hold letters that are not valid text", where=where)
    return Description(layout, config, names, preprocessing, where, decision=decision)


def _infer(
    file: WeightsFile, family: Family, layout: Names, written: Size | None, asked: Size | None
) -> ModelConfig:
    """Returns the architecture that the tensors imply; the layout decides the GELU."""
    title, infer = family.title, family.infer
    shapes = {name: tuple(value.shape) for name, value in layout.to_ours(file.tensors).items()}
    assert infer is not None
    try:
        config = infer(shapes, written, asked)
    except KeyError as error:
        key = next(iter(layout.from_ours({str(error.args[0]): torch.empty(1)})))
        what = f"not a {title}: the names are those of {layout.title}, but {key} is missing"
        raise UserError(what, where=file.path, fix="Is it the right file?") from error
    except ValueError as error:
        raise UserError(f"not a {title}: {error}", where=file.path) from error
    return config if layout.gelu is None else replace(config, gelu=layout.gelu)


def _published(
    checkpoint: Checkpoint, config: ModelConfig, layout: Names, file: WeightsFile
) -> Description:
    kind = type(architectures()[checkpoint.model])
    if type(config) is not kind or config.num_classes != checkpoint.num_classes:
        what = f"{checkpoint.name} has {checkpoint.num_classes:,} classes and is a {kind.__name__}"
        what += f", not the file's {in_words(config)}"
        raise UserError(what, where=file.path, fix="Give the file another name")
    if layout.gelu is not None:
        config = replace(config, gelu=checkpoint.gelu)
    preprocessing = replace(checkpoint.preprocessing, image_size=config.image_size)
    notes = (f"{checkpoint.name}: {checkpoint.note}",) if checkpoint.note else ()
    source = f"the list of published checkpoints ({checkpoint.name})"
    return Description(layout, config, checkpoint.class_names(), preprocessing, source, notes)


def timm_preprocessing(
    settings: Json, image_size: Size, channels: int, where: str
) -> tuple[Preprocessing, tuple[str, ...]] | None:
    """Returns the preprocessing in timm's `PretrainedCfg`, if any, and notes on what is lost."""
    if settings.get("mean") is None or settings.get("std") is None or channels not in (1, 3):
        return None
    notes, interpolation = (), settings.get("interpolation") or "bicubic"
    mode = settings.get("crop_mode") or "center"
    try:
        if interpolation not in INTERPOLATIONS:
            notes = (f"interpolation {interpolation!r} is not available; bicubic is used",)
            interpolation = "bicubic"
        if mode not in ("center", "squash"):
            notes += (f"crop mode {mode!r} is not available; the centre is cropped",)
        preprocessing = Preprocessing(
            image_size=image_size,
            # timm's "squash" scales each side and then crops: the paper's resize-crop.
            resize="resize-crop" if mode == "squash" else "resmall-crop",
            channels=channels,
            mean=_per_channel(settings["mean"], channels),
            std=_per_channel(settings["std"], channels),
            crop=float(settings.get("crop_pct") or 0.875),
            interpolation=interpolation,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"not a preprocessing: {error}", where=where) from error
    return preprocessing, notes


def _per_channel(values: Any, channels: int) -> float | tuple[float, ...]:
    """One number if all values are equal; their mean for a grayscale model."""
    numbers = tuple(map(float, values if isinstance(values, list | tuple) else [values]))
    if channels == 1 and len(numbers) == 3:
        return sum(numbers) / 3
    return numbers[0] if len(set(numbers)) == 1 else numbers


def check_shapes(description: Description, file: WeightsFile) -> None:
    """Raises UserError with every tensor that is missing, extra, misshapen or no floats."""
    config, tensors = description.config, file.tensors
    num_blocks = getattr(config, "num_blocks", 0)
    if num_blocks > len(tensors):  # before building a million blocks from a bad description
        what = f"the description says {num_blocks:,} blocks, the file has {len(tensors)} tensors"
        raise UserError(what, where=file.path)
    try:
        with torch.device("meta"):
            wanted = description.layout.from_ours(model_from_config(config).state_dict())
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond what a tensor can have
        first = str(error).splitlines()[0]
        raise UserError(f"the architecture cannot be built: {first}", where=file.path) from error
    problems = []
    for name, value in wanted.items():
        shape, found = tuple(value.shape), tensors.get(name)
        if found is None:
            problems.append(f"missing: {name} {shape}")
        elif (have := tuple(found.shape)) != shape:
            problems.append(f"misshapen: {name} is {have}, the architecture wants {shape}")
        elif value.is_floating_point() and not found.is_floating_point():
            dtype = str(found.dtype).removeprefix("torch.")
            problems.append(f"not floating point: {name} is {dtype}")
    extra = [name for name in tensors if name not in wanted]
    problems += [f"extra: {name} {tuple(tensors[name].shape)}" for name in extra]
    if problems:
        more = [f"... and {len(problems) - 20} more"] * (len(problems) > 20)
        shown = "\n  ".join(problems[:20] + more)
        what = f"the tensors do not fit the architecture ({in_words(config)}):\n  {shown}"
        fix = "Is it the right file, and the right config.json beside it?"
        raise UserError(what, where=file.path, fix=fix, code="shapes")
