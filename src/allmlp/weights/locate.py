"""What the user calls a model -> the file with its weights, downloaded where it has to be."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from allmlp.console import Reporter
from allmlp.errors import UserError
from allmlp.io import expand
from allmlp.models.catalog import ARCHITECTURES
from allmlp.models.timm_model import PREFIX
from allmlp.weights import hub
from allmlp.weights.checkpoints import (
    CHECKPOINTS,
    Checkpoint,
    checkpoint_of_file,
    find_checkpoint,
    unknown_checkpoint,
)
from allmlp.weights.description import CONFIG, WEIGHTS
from allmlp.weights.download import Published, cache_folder, cached

EXPORTED = (".onnx", ".xml", ".pt2")  # the endings of the verb export


@dataclass(frozen=True)
class Place:
    """Where weights lie.

    Attributes:
        path: of the file.
        checkpoint: the published checkpoint that it is; None where it is none, or not known to be.
    """

    path: Path
    checkpoint: Checkpoint | None = None


def locate(source: str | Path, report: Reporter) -> Place:
    """Returns the weights that a source means; what lies on the disk comes before names.

    Args:
        source: a run folder, a folder with model.safetensors, a file, a checkpoint's name or
            "hf:owner/name[@revision]".
        report: says what is downloaded.

    Raises:
        UserError: there is no such thing, it has no weights, or it cannot be downloaded.
    """
    text = str(source)
    if text.startswith(hub.PREFIX):
        model = hub.parse(text)
        is_published = model.revision is None and model.owner_and_name.startswith("timm/")
        known = find_checkpoint(model.owner_and_name) if is_published else None
        return Place(hub.fetch(model), known)
    if text.startswith(PREFIX):
        what = f"{text!r} is a model of timm, which brings its own weights: no file can be shown"
        raise UserError(what, fix=f"mixer evaluate {text} --data SOURCE")
    path = expand(source)
    if path.suffix.lower() in EXPORTED and not os.path.isdir(path):
        what = "an exported file has no weights to load: it only computes logits"
        fix = "Give the run or the weights that it was made from"
        if path.suffix.lower() != ".pt2":
            fix += ". To use the file: am.open_exported(FILE), `mixer predict FILE`"
        raise UserError(what, where=path, fix=fix)
    try:
        if path.is_dir():
            return Place(_in_folder(path))
        if path.exists():
            if not path.is_file():
                raise UserError("neither a file nor a folder", where=path)
            return Place(path, checkpoint_of_file(path.name))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot look for a model there: {reason}", where=path) from error
    checkpoint = find_checkpoint(text)
    if checkpoint is not None:
        return Place(fetch_checkpoint(checkpoint, report), checkpoint)
    if text in ARCHITECTURES:
        published = [name for name in CHECKPOINTS if name.partition(".")[0] == text]
        fix = f"Its published weights: {', '.join(published)}" if published else None
        raise UserError(f"{text!r} is an architecture and has no weights of its own", fix=fix)
    raise unknown_checkpoint(text)


def files_of(source: str | Path) -> list[Path]:
    """Returns the files that a model of the user's is read from, where such a one is there."""
    path = expand(source)
    names = [folder / name for folder in (path / "best", path) for name in (WEIGHTS, CONFIG)]
    return names if path.is_dir() else [path, path.with_suffix(".json"), path.with_suffix(".bin")]


def fetch_checkpoint(checkpoint: Checkpoint, report: Reporter) -> Path:
    """Returns the checked file of a published checkpoint, downloaded where it is not there yet."""
    path = cache_folder() / checkpoint.name / checkpoint.file_name
    if checkpoint.by_hand and not path.is_file():
        what = f"{checkpoint.name} lies on a page for browsers, no program can fetch it"
        fix = f"Download it there and put it at {path}, or give the file you have got as the model"
        raise UserError(what, where=checkpoint.url, fix=fix)
    published = Published(checkpoint.name, checkpoint.url, checkpoint.mebibytes, checkpoint.sha256)
    return cached(published, path, report)


def _in_folder(folder: Path) -> Path:
    for candidate in (folder / "best" / WEIGHTS, folder / WEIGHTS):
        if candidate.is_file():
            return candidate
    what = "the folder has no weights: neither best/model.safetensors nor model.safetensors"
    fix = "Give the run folder of a training that reached its first evaluation, or a file"
    raise UserError(what, where=folder, fix=fix)
