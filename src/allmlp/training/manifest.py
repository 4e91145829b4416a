"""The manifest of a checkpoint: what lies in its folder, and the proof that it is whole.

manifest.json holds the step, the JSON values of the run, the size and sha256 of every other file,
and a sha256 of itself. It is written last, so a folder without one was never finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from allmlp.errors import UserError
from allmlp.io import fsync, parse_json
from allmlp.training.dcp_storage import parse_index

MANIFEST = "manifest.json"
FORMAT = 1
_INDEX = ".metadata"
_OTHER = "it is damaged: its sha256 is not the manifest's"
_BLANK = "0" * 64  # stands where the manifest's own sha256 will stand while that is computed


@dataclass(frozen=True)
class Manifest:
    """What a manifest says.

    Attributes:
        step: of the run.
        is_best: this was the best step when it was saved.
        values: what the run saved beside its tensors.
        files: name -> (size in bytes, sha256) of every other file of the folder.
    """

    step: int
    is_best: bool
    values: dict[str, Any]
    files: dict[str, tuple[int, str]]


def write_manifest(folder: Path, step: int, is_best: bool, values: dict[str, Any]) -> None:
    """Writes manifest.json about the files that lie in the folder, and brings both to disk.

    Args:
        folder: with everything else in it, already on disk.
        step: of the run.
        is_best: this is the best step so far.
        values: JSON values.
    """
    content = {
        "format": FORMAT,
        "allmlp": version("allmlp"),
        "step": step,
        "is_best": is_best,
        "values": values,
        "files": {
            path.name: {"size": path.stat().st_size, "sha256": _digest(path)}
            for path in sorted(folder.iterdir())
        },
        "sha256": _BLANK,
    }
    blank = json.dumps(content, indent=1) + "\n"
    # The last one is its own: values may hold the same 64 characters.
    head, _, tail = blank.rpartition(_BLANK)
    with (folder / MANIFEST).open("xb") as file:
        file.write(f"{head}{hashlib.sha256(blank.encode()).hexdigest()}{tail}".encode())
        file.flush()
        os.fsync(file.fileno())
    fsync(folder)


def read_manifest(folder: Path) -> Manifest:
    """Returns what the manifest says, after a look at the sizes of the files but not into them.

    Raises:
        UserError: it is missing, damaged or not ours, or a file is missing or of another size.
    """
    path = folder / MANIFEST
    raw = _read(path)
    try:
        content = parse_json(raw)
        digest = content["sha256"]
        head, _, tail = raw.rpartition(digest.encode())
        if hashlib.sha256(head + _BLANK.encode() + tail).hexdigest() != digest:
            raise UserError("it is damaged: its checksum is not right", where=path)
        if content["format"] != FORMAT:
            what = f"it is of format {content['format']!r}, this version reads {FORMAT}"
            raise UserError(what, where=path, fix="Update allmlp")
        files = {name: (each["size"], each["sha256"]) for name, each in content["files"].items()}
        step, values = content["step"], dict(content["values"])
        if folder.name != folder_name(step):
            raise UserError(f"the folder was renamed: it holds step {step}", where=path)
        for name, (size, _) in files.items():
            _check_size(folder, name, size)
        return Manifest(step, bool(content["is_best"]), values, files)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("it is damaged: not a whole manifest", where=path) from error


def verify(folder: Path) -> Manifest:
    """Returns what the manifest says, after every byte of the folder was compared with it.

    Raises:
        UserError: what is wrong, and with which file.
    """
    manifest = read_manifest(folder)
    for name, (_, digest) in manifest.files.items():
        try:
            found = _digest(folder / name)
        except OSError as error:
            raise _unreadable(folder / name, error) from error
        if found != digest:
            raise UserError(_OTHER, where=folder / name)
    read_index(folder, manifest)
    return manifest


def read_index(folder: Path, manifest: Manifest) -> Metadata:
    """Returns DCP's index of the tensors, see `parse_index`.

    Raises:
        UserError: it is missing, damaged, or could run code.
    """
    path = folder / _INDEX
    if _INDEX not in manifest.files:
        raise UserError("it is missing", where=path)
    raw = _read(path)
    if hashlib.sha256(raw).hexdigest() != manifest.files[_INDEX][1]:
        raise UserError(_OTHER, where=path)
    return parse_index(raw, manifest.files, path)


def folder_name(step: int) -> str:
    """Returns the name of the folder of a step."""
    return f"step-{step:08d}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _check_size(folder: Path, name: str, size: int) -> None:
    path = folder / name
    if Path(name).name != name:
        raise UserError(f"it names a file of another folder: {name!r}", where=folder / MANIFEST)
    try:
        found = path.lstat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):  # a pipe would block whoever opens it
        raise UserError("it is not a plain file", where=path)
    if found.st_size != size:
        what = f"it is damaged: {found.st_size:,} bytes and not {size:,}"
        raise UserError(what, where=path)


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError("it is missing", where=path)
    return UserError(f"it cannot be read: {error.strerror}", where=path)
