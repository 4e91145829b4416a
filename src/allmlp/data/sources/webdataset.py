"""WebDataset tars: KEY.jpg (or .png, ...) with its label in KEY.cls or KEY.json.

The tars are scanned when they are opened, and images read from their places.
"""

from __future__ import annotations

import functools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.archive import tar_members
from allmlp.data.classes import UNLABELLED, RawLabels, numbered
from allmlp.data.image import SUFFIXES
from allmlp.data.source import ByteRanges, PackedStrings
from allmlp.data.source_spec import SourceSpec, by_split
from allmlp.data.sources.columns import Kind, Rows
from allmlp.data.sources.folders import loose_image, subfolders
from allmlp.errors import UserError
from allmlp.io import parse_json

_LABEL_BYTES = 2**20  # a larger .cls or .json is not a label


def open_tars(spec: SourceSpec, labels: bool) -> Iterator[Rows]:
    for split, files in by_split(spec.path.glob("*.tar")).items():
        samples = [sample for at, file in enumerate(files) for sample in _samples(file, at, labels)]
        if not samples:
            raise UserError("the tars have no images", where=files[0], fix=f"Endings: {SUFFIXES}")
        places, names, cells = zip(*samples, strict=True)
        if labels and None in cells:
            fix = f"Every KEY.jpg needs a KEY.cls, or a KEY.json with a label; {UNLABELLED}"
            where = f"{files[places[cells.index(None)][0]]}:{names[cells.index(None)]}"
            raise UserError("the image has no label", where=where, fix=fix)
        file, offset, length = np.array(places, dtype=np.int64).T.copy()
        images = ByteRanges(files, file.astype(np.int32), offset, length, PackedStrings(names))
        index = spec.path / f"{split}.index.safetensors"
        read = functools.partial(_numbered_by, index) if index.exists() else numbered
        yield Rows(images, {"label": functools.partial(read, cells)}, split)


def _samples(
    path: str, number: int, labels: bool
) -> Iterator[tuple[tuple[int, int, int], str, Any]]:
    """Yields (file, offset, length), name and label of every image; None if it has no label."""
    last, image, label = None, None, None
    try:
        with open(path, "rb") as file:
            for member in tar_members(path):
                folder, base = os.path.split(member.name)
                key, suffix = (folder, base.partition(".")[0]), os.path.splitext(base)[1].lower()
                if base.startswith("."):  # macOS adds hidden files
                    continue
                if key != last:  # the members of a sample are adjacent
                    if image is not None:
                        yield *image, label
                    last, image, label = key, None, None
                if suffix in SUFFIXES:
                    if image is not None:
                        what = f"two images of one sample: {image[1]}, {member.name}"
                        raise UserError(what, where=path, fix="A sample has one image")
                    image = (number, member.offset_data, member.size), member.name
                elif labels and suffix in (".cls", ".json"):
                    file.seek(member.offset_data)
                    own = _label(member.name, file.read(min(member.size, _LABEL_BYTES)), path)
                    label = label if own is None else own
    except (tarfile.TarError, OSError, EOFError) as error:
        what = f"the tar is damaged, cut short or compressed: {error}"
        raise UserError(what, where=path, fix="Fetch it again; unpack .gz first") from error
    if image is not None:
        yield *image, label


def _label(name: str, text: bytes, path: str) -> Any:
    try:
        if name.lower().endswith(".cls"):
            return text.decode().strip()
        value = parse_json(text)
        return value.get("label", value.get("cls")) if isinstance(value, dict) else None
    except ValueError as error:
        raise UserError(f"the label cannot be read: {error}", where=f"{path}:{name}") from error


def _numbered_by(index: Path, cells: tuple[Any, ...]) -> RawLabels:
    """The labels of tars that earlier versions of `mixer data pack` wrote: numbers of classes that
    the index names. In an index of other tools' tars, which has no checksums, they are names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(index), framework="np") as file:
            metadata = file.metadata() or {}
        described = parse_json(metadata.get("allmlp_shards") or metadata["mlp_mixer_shards"])
        if not any(checksum for _, _, checksum in described["shards"]):
            return numbered(cells)
        names = [str(name) for name in described["class_names"]]
        return RawLabels(np.array(cells).astype(np.int64), names, are_classes=True)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        fix = "Pack the data again"
        raise UserError(f"the index is damaged: {error}", where=index, fix=fix) from error


def _are_tars(spec: SourceSpec) -> bool:
    """Whether a folder has tars and neither class folders nor images of its own."""
    folder = spec.path
    has_tars = folder.is_dir() and any(folder.glob("*.tar"))
    return has_tars and not subfolders(folder) and loose_image(folder) is None


KIND = Kind("WebDataset tars", _are_tars, open_tars, ("labels", "separator"))
