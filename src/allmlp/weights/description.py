"""What a weights file is: architecture, class names, preprocessing, and who says so.

The first that is there counts: config.json beside a model.safetensors or <name>.json beside a .npz,
if they were written with these weights; the header of our own files; the list of published
checkpoints; timm's config.json; and at last the tensors themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from allmlp.errors import UserError
from allmlp.io import parse_json
from allmlp.models.catalog import (
    architectures,
    config_from_json,
    family,
    family_of,
    in_words,
    model_from_config,
)
from allmlp.models.layers import ModelConfig, checked_names
from allmlp.names import NAME, is_format, own_entry
from allmlp.preprocessing import Preprocessing
from allmlp.weights.checkpoints import Checkpoint
from allmlp.weights.files import WeightsFile, fingerprint
from allmlp.weights.layouts import (
    Layout,
    infer_config,
    layout_of,
    own_layout,
    timm_image_size,
    timm_preprocessing,
)

FORMAT_VERSION = 1
WEIGHTS, PICKLED, CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"


@dataclass(frozen=True)
class Description:
    """What a weights file is."""

    layout: Layout
    config: ModelConfig
    class_names: list[str] | None  # in the order of the logits
    preprocessing: Preprocessing | None
    source: str  # who says so
    notes: tuple[str, ...] = ()  # what the user should know


def describe(
    file: WeightsFile, checkpoint: Checkpoint | None, image_size: tuple[int, int] | None
) -> Description:
    """Returns what a file is, whose tensors may still have any shape; `image_size`, which was asked
    for, helps if the tokens make no square."""
    written, where = _written(file)
    if written is not None and "architecture" in written and is_format(written.get("format"), NAME):
        return _ours(written, where, file)
    layout = layout_of(file.tensors, file.path)
    shapes = {name: tuple(value.shape) for name, value in layout.to_ours(file.tensors).items()}
    own_size = None if written is None else timm_image_size(written)
    config = infer_config(shapes, layout, file.path, own_size, image_size)
    if checkpoint is not None:
        return _published(checkpoint, config, layout, file)
    return _foreign(written, where, config, layout)


def _written(file: WeightsFile) -> tuple[dict[str, Any] | None, str]:
    """Returns what is written about a file, and where; (None, "") if nothing is."""
    header, carried = own_entry(file.metadata), None
    if header is not None:
        carried = _parsed(header, f"{file.path} (header)")
    path = None
    if file.container == "npz":
        path = file.path.with_suffix(".json")
    elif file.path.name in (WEIGHTS, PICKLED):  # a file of another name describes itself
        path = file.path.with_name(CONFIG)
    if path is not None and path.is_file():
        try:
            beside = _parsed(path.read_text(encoding="utf-8", errors="replace"), str(path))
        except OSError as error:
            raise UserError(f"cannot read it: {error.strerror}", where=path) from error
        if _belongs(beside, carried, file):
            return beside, str(path)
    return (None, "") if carried is None else (carried, f"{file.path} (header)")


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
        if isinstance(found, dict):
            return found
        reason = str(found)
    except ValueError as error:
        reason = str(error)
    raise UserError(f"not a model description: {reason[:200]}", where=where)


def _belongs(beside: dict[str, Any], carried: dict[str, Any] | None, file: WeightsFile) -> bool:
    """Whether a description was written with these weights, as far as can be known: a save that is
    killed between its two renames, or a copy of one file, leaves a description of other weights."""
    known = beside.get("weights")
    if known is None:  # written by hand, by timm, or by an older version
        return True
    if file.container == "npz":
        return known == fingerprint(file.path)
    return carried is None or known == carried.get("weights")


def _ours(written: dict[str, Any], where: str, file: WeightsFile) -> Description:
    try:
        if written["version"] > FORMAT_VERSION:
            what = f"written by a newer allmlp (format {str(written['version'])[:20]})"
            raise UserError(what, where=where, fix=f"pip install --upgrade {NAME}")
        if not isinstance(written["architecture"], dict):
            raise TypeError("the architecture is not an object")
    except (KeyError, TypeError) as error:
        raise UserError(f"not a model description: {error!r}", where=where) from error
    preprocessing = None
    try:
        config = config_from_json(written["architecture"])
        if written.get("preprocessing") is not None:
            preprocessing = Preprocessing.from_json(written["preprocessing"])
    except UserError as error:
        raise UserError(error.what[:400], where=where, fix=error.fix, code=error.code) from error
    if file.container == "npz":
        layout = layout_of(file.tensors, file.path)
    else:
        layout = own_layout(file.tensors, family_of(config).name)
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
    return Description(layout, config, names, preprocessing, where)


def _published(
    checkpoint: Checkpoint, config: ModelConfig, layout: Layout, file: WeightsFile
) -> Description:
    if type(config) is not type(architectures()[checkpoint.model]):
        what = f"{checkpoint.name} is another architecture than the file's, {config.summary()}"
        raise UserError(what, where=file.path, fix="Give the file another name")
    if config.num_classes != checkpoint.num_classes:
        what = f"{checkpoint.name} has {checkpoint.num_classes:,} classes, the file "
        raise UserError(f"{what}{config.num_classes:,}: it is another one", where=file.path)
    if layout.gelu is not None:
        config = replace(config, gelu=checkpoint.gelu)
    preprocessing = replace(checkpoint.preprocessing, image_size=config.image_size)
    notes = (f"{checkpoint.name}: {checkpoint.note}",) if checkpoint.note else ()
    source = f"the list of published checkpoints ({checkpoint.name})"
    return Description(layout, config, checkpoint.class_names(), preprocessing, source, notes)


def _foreign(
    written: dict[str, Any] | None, where: str, config: ModelConfig, layout: Layout
) -> Description:
    """Other people's weights: preprocessing from timm's config.json, else assumed, with a note."""
    names, preprocessing, notes, source = None, None, [], "the tensors"
    has_colours = config.in_channels in (1, 3)
    if written is not None:
        inner = written.get("pretrained_cfg", written)
        inner = inner if isinstance(inner, dict) else {}
        try:
            if has_colours:
                preprocessing, notes = timm_preprocessing(
                    written, config.image_size, config.in_channels
                )
        except (ValueError, TypeError) as error:
            raise UserError(f"not a preprocessing: {error}", where=where) from error
        labels = written.get("label_names") or inner.get("label_names")
        if isinstance(labels, list) and len(labels) == config.num_classes:
            names = [str(label) for label in labels]
    if preprocessing is not None:
        source = f"the tensors and {where}"
    elif has_colours:
        authors, whose = family(layout.family).preprocessing, f"that of {layout.title}'s authors"
        if authors is None:
            whose = "Google's"
            preprocessing = Preprocessing(image_size=config.image_size, channels=config.in_channels)
        else:
            preprocessing = authors(config)
        if layout.title != "Google":
            what = f"the file does not say its preprocessing; {whose} is assumed"
            notes = [f"{what} ({preprocessing.summary()})"]
    return Description(layout, config, names, preprocessing, source, tuple(notes))


def check_shapes(description: Description, file: WeightsFile) -> None:
    """Compares a file's tensors, by its own names, with what the architecture wants; the UserError
    names each tensor that is missing, extra, misshapen or not of floating point."""
    config, layout, tensors = description.config, description.layout, file.tensors
    from_ours = layout.from_ours
    if layout.is_loose:
        tensors, from_ours = layout.to_ours(tensors), dict
    num_blocks = getattr(config, "num_blocks", 0)
    if num_blocks > len(tensors):  # before a description's million blocks are built
        what = f"the description says {num_blocks:,} blocks, the file has {len(tensors)} tensors"
        raise UserError(what, where=file.path)
    try:
        with torch.device("meta"):
            wanted = from_ours(model_from_config(config).state_dict())
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond what a tensor can have
        first = str(error).splitlines()[0]
        raise UserError(f"the architecture cannot be built: {first}", where=file.path) from error
    expected = {name: tuple(value.shape) for name, value in wanted.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    common = [name for name in expected if name in found]
    problems = [f"missing: {name} {expected[name]}" for name in expected if name not in found]
    problems += [f"extra: {name} {found[name]}" for name in found if name not in expected]
    problems += [
        f"misshapen: {name} is {found[name]}, the architecture wants {expected[name]}"
        for name in common
        if expected[name] != found[name]
    ]
    problems += [
        f"not floating point: {name} is {str(tensors[name].dtype).removeprefix('torch.')}"
        for name in common
        if wanted[name].is_floating_point() and not tensors[name].is_floating_point()
    ]
    if problems:
        more = [f"... and {len(problems) - 20} more"] * (len(problems) > 20)
        shown = "\n  ".join(problems[:20] + more)
        what = f"the tensors do not fit the architecture ({in_words(config)}):\n  {shown}"
        fix = "Is it the right file, and the right config.json beside it?"
        raise UserError(what, where=file.path, fix=fix, code="shapes")
