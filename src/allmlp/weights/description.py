"""What a weights file is: architecture, class names, preprocessing, and who says so.

The first that is there counts: config.json beside a model.safetensors or <name>.json beside a .npz,
if they were written with these weights; the header of our own files; the list of published
checkpoints; timm's config.json; and at last the tensors themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from allmlp.errors import UserError
from allmlp.io import parse_json
from allmlp.models.catalog import ARCHITECTURES, config_from_json
from allmlp.models.layers import ModelConfig, checked_names
from allmlp.models.mixer import MixerConfig
from allmlp.models.staged import StagedConfig
from allmlp.names import NAME, is_format, own_entry
from allmlp.preprocessing import Preprocessing
from allmlp.weights import timm
from allmlp.weights.architecture import Layout, infer_config, layout_of
from allmlp.weights.checkpoints import Checkpoint, authors_preprocessing
from allmlp.weights.files import WeightsFile
from allmlp.weights.npz import fingerprint

FORMAT_VERSION = 1
WEIGHTS, PICKLED, CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"


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
    config: ModelConfig
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
    if said is not None and "architecture" in said and is_format(said.get("format"), NAME):
        return _ours(said, where, layout, file)
    shapes = {name: tuple(each.shape) for name, each in layout.to_ours(file.tensors).items()}
    said_size = None if said is None else timm.image_size_of(said)
    config = infer_config(shapes, layout, file.path, image_size, said_size)
    if checkpoint is not None:
        return _published(checkpoint, config, layout, file)
    return _foreign(said, where, config, layout)


def _written(file: WeightsFile) -> tuple[dict[str, Any] | None, str]:
    """Returns what is written about a file, and where; (None, "") where nothing is."""
    carried = None
    header = own_entry(file.metadata)
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
    except ValueError as error:
        what = f"not a model description: {str(error)[:200]}"
        raise UserError(what, where=where) from error
    if not isinstance(found, dict):
        raise UserError(f"not a model description: {str(found)[:200]}", where=where)
    return found


def _belongs(beside: dict[str, Any], carried: dict[str, Any] | None, file: WeightsFile) -> bool:
    """Says whether a description was written with these weights, as far as can be known.

    A save that is killed between its two renames, or a copy of one of the two files, leaves a
    description of other weights.
    """
    known = beside.get("weights")
    if known is None:  # written by hand, by timm, or by an older version
        return True
    if file.container == "npz":
        return known == fingerprint(file.path)
    return carried is None or known == carried.get("weights")


def _ours(said: dict[str, Any], where: str, layout: Layout, file: WeightsFile) -> Description:
    try:
        if said["version"] > FORMAT_VERSION:
            what = f"written by a newer allmlp (format {str(said['version'])[:20]})"
            raise UserError(what, where=where, fix=f"pip install --upgrade {NAME}")
        if not isinstance(said["architecture"], dict):
            raise TypeError("the architecture is not an object")
    except (KeyError, TypeError) as error:
        raise UserError(f"not a model description: {error!r}", where=where) from error
    preprocessing = None
    try:
        config = config_from_json(said["architecture"])
        if said.get("preprocessing") is not None:
            preprocessing = Preprocessing.from_json(said["preprocessing"])
    except UserError as error:
        raise UserError(error.what[:400], where=where, fix=error.fix) from error
    if preprocessing is not None:
        preprocessed = (preprocessing.image_size, preprocessing.channels)
        if preprocessed != (config.image_size, config.in_channels):
            what = f"the preprocessing gives {preprocessed} (size, channels), the model takes "
            raise UserError(f"{what}{(config.image_size, config.in_channels)}", where=file.path)
    names = _checked_names(said.get("class_names"), config.num_classes, where)
    return Description(layout, config, names, preprocessing, where)


def _checked_names(names: Any, num_classes: int, where: str) -> list[str] | None:
    if names is None:
        return None
    names = checked_names(names, num_classes, where)
    if any("\ud800" <= letter <= "\udfff" for name in names for letter in name):
        raise UserError("class_names hold letters that are no valid text", where=where)
    return names


def _published(
    checkpoint: Checkpoint, config: ModelConfig, layout: Layout, file: WeightsFile
) -> Description:
    if type(config) is not type(ARCHITECTURES[checkpoint.model]):
        what = f"{checkpoint.name} is another architecture than the file's, {config.summary()}"
        raise UserError(what, where=file.path, fix="Give the file another name")
    if config.num_classes != checkpoint.num_classes:
        what = f"{checkpoint.name} has {checkpoint.num_classes:,} classes, the file "
        raise UserError(f"{what}{config.num_classes:,}: it is another one", where=file.path)
    if isinstance(config, MixerConfig):
        config = replace(config, gelu=checkpoint.gelu)
    preprocessing = replace(checkpoint.preprocessing, image_size=config.image_size)
    notes = (f"{checkpoint.name}: {checkpoint.note}",) if checkpoint.note else ()
    names = checkpoint.class_names()
    said_by = f"the list of published checkpoints ({checkpoint.name})"
    return Description(layout, config, names, preprocessing, said_by, notes)


def _foreign(
    said: dict[str, Any] | None, where: str, config: ModelConfig, layout: Layout
) -> Description:
    """Weights of somebody else: preprocessing from timm's config.json, else assumed; said so."""
    names, preprocessing, notes = None, None, []
    if said is not None:
        found = said.get("pretrained_cfg", said)
        try:
            if config.in_channels in (1, 3):
                preprocessing, notes = timm.preprocessing_of(
                    said, config.image_size, config.in_channels
                )
        except (ValueError, TypeError) as error:
            raise UserError(f"not a preprocessing: {error}", where=where) from error
        inner = found if isinstance(found, dict) else {}
        labels = said.get("label_names") or inner.get("label_names")
        if isinstance(labels, list) and len(labels) == config.num_classes:
            names = [str(label) for label in labels]
    if preprocessing is not None:
        said_by = f"the tensors and {where}"
        return Description(layout, config, names, preprocessing, said_by, tuple(notes))
    if isinstance(config, StagedConfig):  # as they were published, whoever trained these
        preprocessing = authors_preprocessing(config)
        if preprocessing is not None:
            what = f"the file does not say its preprocessing; that of {layout.title}'s authors is"
            notes = [f"{what} assumed ({preprocessing.summary()})"]
    elif config.in_channels in (1, 3):
        preprocessing = Preprocessing(image_size=config.image_size, channels=config.in_channels)
        if layout.title != "Google":
            what = "the file does not say its preprocessing; Google's is assumed"
            notes = [f"{what} ({preprocessing.summary()})"]
    return Description(layout, config, names, preprocessing, "the tensors", tuple(notes))
