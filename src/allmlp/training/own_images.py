"""Finds out which images a run was trained on, and which it held out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from allmlp.data.fingerprint import image_key
from allmlp.data.source import Source
from allmlp.data.source_spec import parse_name
from allmlp.data.sources import open_source, open_splits
from allmlp.errors import UserError
from allmlp.io import parse_json
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import MOST_CHECKED, split_data
from allmlp.training.run_folder import TRAINING_IMAGES, config_of, environment_of

# A file or values that are not there, or not as they should be.
_UNKNOWN = (OSError, ValueError, LookupError, TypeError)


@dataclass(frozen=True)
class Measured:
    source: Source
    are_held_out: bool = False  # whether these are the images that the model's run held out
    trained_on: int | None = None  # number of them in the training set; None: unknown
    notes: tuple[str, ...] = ()


def open_measured(model: str | None, name: str, *, count: bool = True) -> Measured:
    """Returns the images that a data name refers to: those that the run of the model at a path held
    out, for that data's validation split, or its bare name without a test split. Of others (with
    `count`) up to 5,000 are compared with the run's training images."""
    run = _run_of(model)
    own = None if run is None else _held_out(*run, name)
    if own is not None:
        return Measured(own, are_held_out=True, trained_on=0)
    source = open_source(name)
    return counted(model, source) if count else Measured(source)


def counted(model: str | None, source: Source) -> Measured:
    """Returns the images with how many of them the run of the model at a path was trained on."""
    run = _run_of(model)
    if run is None:
        return Measured(source)
    try:
        own = (run[0] / TRAINING_IMAGES).read_text("ascii").split()
        total = int(environment_of(run[0])["data"]["training_images"])
    except _UNKNOWN:
        note = "which of these images the run was trained on is not known: an older version made it"
        return Measured(source, notes=(note,))
    known, found = set(own), 0
    looked_at = range(0, len(source), -(-len(source) // MOST_CHECKED))
    for index in looked_at:
        with contextlib.suppress(UserError):  # reported as a bad image
            found += image_key(source.read(index)) in known
    about = ""
    if max(total, len(source)) > MOST_CHECKED:  # both are samples
        about, scale = "about ", len(source) / len(looked_at) * total / max(1, len(own))
        found = min(len(source), round(found * scale))
    note = f"{about}{found:,} of {len(source):,} images were trained on"
    return Measured(source, trained_on=found, notes=(note,) if found else ())


def _run_of(model: str | None) -> tuple[Path, TrainConfig] | None:
    """The run of a run folder, its best/, a file in either, or a study folder."""
    path = Path(model or "").expanduser()
    if model is None or not path.exists():
        return None
    path = path.parent if path.is_file() else path
    path = path.parent if path.absolute().name == "best" else path
    for file, run_of in (
        ("finetune.json", lambda study: f"seed-{study['seeds'][0]}"),
        ("folds.json", lambda study: f"fold-{study['best']}"),
    ):
        with contextlib.suppress(*_UNKNOWN):
            study = parse_json((path / file).read_bytes())
            path /= study["run"] if "run" in study else run_of(study)  # as earlier versions
    try:
        return path, config_of(path)
    except UserError:
        return None


def _held_out(path: Path, config: TrainConfig, name: str) -> Source | None:
    asked, own = parse_name(name), parse_name(config.data.source)
    if asked.part is not None or asked.split not in (None, "validation"):
        return None
    there = open_splits(asked.source)
    if "validation" in there or (asked.split is None and "test" in there):
        return None
    moved = replace(own, base=asked.base, options=asked.options or own.options)
    part = f":{moved.split}{moved.part or ''}" if moved.split else ""
    try:
        splits = split_data(replace(config.data, source=f"{moved.source}{part}"))
        known = environment_of(path)["data"]["fingerprint"]
    except _UNKNOWN:  # different data, or nothing is known
        return None
    is_own = splits.held_out and splits.has_fingerprint(known, "train")
    return splits.validation if is_own else None
