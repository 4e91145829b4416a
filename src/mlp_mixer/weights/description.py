"""What a weights file is: architecture, class names, preprocessing, and who says so.

The first that is there counts: config.json beside a model.safetensors, <name>.json beside a .npz,
the header of our own files, the list of published checkpoints, timm's config.json, and at last the
tensors themselves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from mlp_mixer.errors import UserError
from mlp_mixer.models.catalog import config_from_json
from mlp_mixer.models.mixer import MixerConfig
from mlp_mixer.preprocessing import Preprocessing
from mlp_mixer.weights import timm
from mlp_mixer.weights.architecture import Layout, infer_config, layout_of
from mlp_mixer.weights.checkpoints import Checkpoint
from mlp_mixer.weights.files import WeightsFile

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class Description:
    """What a weights file is.

    Attributes:
        layout: whose names the tensors have.
        config: the architecture.
        class_names: in the order of the logits; None where they are unknown.
        preprocessing: None where our own file says that there is none.
        said_by: where this comes from, in words.
        notes: what the user should know of it.
    """

    layout: Layout
    config: MixerConfig
    class_names: list[str] | None
    preprocessing: Preprocessing | None
    said_by: str
    notes: tuple[str, ...] = ()


def describe(
    file: WeightsFile, checkpoint: Checkpoint | None, image_size: tuple[int, int] | None
) -> Description:
    """Returns what a file is.

    Args:
        file: whose tensors may still be of any shape.
        checkpoint: the published one that it is, where that is known.
        image_size: (H, W) that was asked for, which helps where the tokens make no square.

    Raises:
        UserError: what is written of it is not a description, or the tensors make no model.
    """
    layout = layout_of(file.tensors, file.path)
    said, where = _written(file)
    if said is not None and "architecture" in said and said.get("format") == "mlp_mixer":
        return _ours(said, where, layout, file)
    shapes = {name: tuple(each.shape) for name, each in layout.to_ours(file.tensors).items()}
    config = infer_config(shapes, layout, file.path, image_size)
    if checkpoint is not None:
        return _published(checkpoint, config, layout, file)
    return _foreign(said, where, config, layout)


def _written(file: WeightsFile) -> tuple[dict[str, Any] | None, str]:
    """Returns what is written about a file, and where; (None, "") where nothing is."""
    beside = file.path.with_name(CONFIG)
    sidecar = file.path.with_suffix(".json")
    carried = file.metadata.get("mlp_mixer")
    # config.json describes the weights beside it; a file of another name, itself.
    is_its_own = file.path.name in (WEIGHTS, "pytorch_model.bin") or carried is None
    if file.container == "npz":
        path = sidecar if sidecar.is_file() else None
    else:
        path = beside if beside.is_file() and is_its_own else None
    if path is not None:
        text, where = path.read_text(encoding="utf-8", errors="replace"), str(path)
    elif carried is not None:
        text, where = carried, f"{file.path} (header)"
    else:
        return None, ""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not a model description: {error!r}", where=where) from error
    if not isinstance(found, dict):
        raise UserError(f"not a model description: {found!r}", where=where)
    return found, where


def _ours(said: dict[str, Any], where: str, layout: Layout, file: WeightsFile) -> Description:
    try:
        if said["version"] > FORMAT_VERSION:
            what = f"written by a newer mlp_mixer (format {said['version']})"
            raise UserError(what, where=where, fix="pip install --upgrade mlp_mixer")
        if not isinstance(said["architecture"], dict):
            raise TypeError("the architecture is not an object")
    except (KeyError, TypeError) as error:
        raise UserError(f"not a model description: {error!r}", where=where) from error
    config = config_from_json(said["architecture"])
    preprocessing = None
    if said.get("preprocessing") is not None:
        preprocessing = Preprocessing.from_json(said["preprocessing"])
        preprocessed = (preprocessing.image_size, preprocessing.channels)
        if preprocessed != (config.image_size, config.in_channels):
            what = f"the preprocessing gives {preprocessed} (size, channels), the model takes "
            raise UserError(f"{what}{(config.image_size, config.in_channels)}", where=file.path)
    names = _checked_names(said.get("class_names"), config.num_classes, where)
    return Description(layout, config, names, preprocessing, where)


def _checked_names(names: Any, num_classes: int, where: str) -> list[str] | None:
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"class_names must be a list of names, got {names!r}", where=where)
    if len(names) != num_classes:
        what = f"there are {len(names)} class names for {num_classes} classes"
        raise UserError(what, where=where)
    return names


def _published(
    checkpoint: Checkpoint, config: MixerConfig, layout: Layout, file: WeightsFile
) -> Description:
    if config.num_classes != checkpoint.num_classes:
        what = f"{checkpoint.name} has {checkpoint.num_classes:,} classes, the file "
        raise UserError(f"{what}{config.num_classes:,}: it is another one", where=file.path)
    config = replace(config, gelu=checkpoint.gelu)
    preprocessing = replace(checkpoint.preprocessing, image_size=config.image_size)
    notes = (f"{checkpoint.name}: {checkpoint.note}",) if checkpoint.note else ()
    names = checkpoint.class_names()
    said_by = f"the list of published checkpoints ({checkpoint.name})"
    return Description(layout, config, names, preprocessing, said_by, notes)


def _foreign(
    said: dict[str, Any] | None, where: str, config: MixerConfig, layout: Layout
) -> Description:
    """Weights of somebody else: preprocessing from timm's config.json, else assumed; said so."""
    names, preprocessing = None, None
    if said is not None:
        found = said.get("pretrained_cfg", said)
        try:
            if config.in_channels in (1, 3):
                preprocessing = timm.preprocessing_of(said, config.image_size, config.in_channels)
        except (ValueError, TypeError) as error:
            raise UserError(f"not a preprocessing: {error}", where=where) from error
        inner = found if isinstance(found, dict) else {}
        labels = said.get("label_names") or inner.get("label_names")
        if isinstance(labels, list) and len(labels) == config.num_classes:
            names = [str(label) for label in labels]
    if preprocessing is not None:
        return Description(layout, config, names, preprocessing, f"the tensors and {where}")
    notes = ()
    if config.in_channels in (1, 3):
        preprocessing = Preprocessing(image_size=config.image_size, channels=config.in_channels)
        if layout.title != "Google":
            what = "the file does not say its preprocessing; Google's is assumed"
            notes = (f"{what} ({preprocessing.summary()})",)
    return Description(layout, config, names, preprocessing, "the tensors", notes)
