"""WebDataset tars (KEY.jpg with its label in KEY.cls or KEY.json) and our index.

SPLIT.index.safetensors stores the location of every image, so that tars are scanned only once.
Earlier versions of `mixer data pack` wrote such tars, with checksums.
"""

from __future__ import annotations

import json
import os
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np

from allmlp.data.classes import RawLabels, label_text, make_classes, natural_order
from allmlp.data.image import SUFFIXES
from allmlp.data.source import PackedBytes, PackedStrings
from allmlp.data.source_spec import SPLITS, split_of_file
from allmlp.errors import UserError
from allmlp.io import atomic_write, parse_json

INDEX_SUFFIX = ".index.safetensors"
_KEY, _OLD_KEY, _VERSION = "allmlp_shards", "mlp_mixer_shards", 1
_LABEL_BYTES = 2**20  # a larger .cls or .json is not a label
_ARRAYS = {"shard": np.int32} | dict.fromkeys(("offset", "length", "label", "name_ends"), np.int64)
_FIX = "Pack the data again"


@dataclass(frozen=True)
class FileSize:
    """A file of packed data with its size in bytes and, if known, its checksum."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class RangeIndex:
    """Locations of the images of a split."""

    class_names: list[str]  # empty if the images have no labels
    files: list[FileSize]  # relative to the index
    file: np.ndarray  # int32 (num_images,), indices into `files`
    offset: np.ndarray  # int64 (num_images,), bytes
    length: np.ndarray
    label: np.ndarray  # int64 (num_images,); -1 if the images have no labels
    names: Sequence[str] | PackedStrings

    def __len__(self) -> int:
        return len(self.label)

    def to_bytes(self) -> bytes:
        """Serializes for `load_index`."""
        from safetensors.numpy import save

        files = [[file.name, file.size, file.sha256] for file in self.files]
        described = {"version": _VERSION, "class_names": self.class_names, "shards": files}
        encoded = [os.fsencode(name) for name in self.names]
        tensors = {
            "shard": self.file,
            "offset": self.offset,
            "length": self.length,
            "label": self.label,
            "names": np.frombuffer(b"".join(encoded), np.uint8),
            "name_ends": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        }
        return save(tensors, {_KEY: json.dumps(described)})


def load_index(path: Path) -> RangeIndex:
    """Loads an index and validates it, since it may be damaged or malicious."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            metadata: dict[str, str] = file.metadata() or {}
            described = parse_json(metadata.get(_KEY, metadata.get(_OLD_KEY, "{}")))
            arrays = {name: file.get_tensor(name) for name in (*_ARRAYS, "names")}
        if described["version"] != _VERSION:
            raise ValueError(f"it is not version {_VERSION}")
        files = [FileSize(str(name), int(size), sha) for name, size, sha in described["shards"]]
        class_names = described["class_names"]
        problem = _contradiction(class_names, files, arrays)
        if problem is not None:
            raise ValueError(problem)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f"the index is damaged: {error}", where=path, fix=_FIX) from error
    names = PackedStrings(PackedBytes((arrays["names"], arrays["name_ends"])))
    file, offset, length, label = (arrays[n] for n in ("shard", "offset", "length", "label"))
    return RangeIndex(class_names, files, file, offset, length, label, names)


def _contradiction(
    class_names: Any, files: list[FileSize], arrays: dict[str, np.ndarray]
) -> str | None:
    label, ends, shard = arrays["label"], arrays["name_ends"], arrays["shard"]
    for name, kind in _ARRAYS.items():
        shape = (len(label) + (name == "name_ends"),)
        if arrays[name].dtype != kind or arrays[name].shape != shape:
            return f"{name} is {arrays[name].dtype} {arrays[name].shape}"
    if not isinstance(class_names, list) or not all(isinstance(n, str) for n in class_names):
        return "class names that are no text"
    if any(Path(file.name).name != file.name or "\0" in file.name for file in files):
        return "a file outside the folder"
    if not len(label) or not 0 <= shard.min() <= shard.max() < len(files):
        return "no images, or an image in no file"
    offset, length, sizes = arrays["offset"], arrays["length"], np.array([f.size for f in files])
    if not ((offset >= 0) & (length >= 0) & (length <= sizes[shard] - offset)).all():
        return "an image outside its file"
    if ends[0] != 0 or ends[-1] != len(arrays["names"]) or (np.diff(ends) < 0).any():
        return "names that do not fill their buffer"
    return None


def index_tars(folder: Path, *, labels: bool = True) -> dict[Path, RangeIndex]:
    """Writes indices next to tars from another tool; returns them by path.

    The split is taken from the tars' names. An index without labels is for predictions only.
    """
    by_split: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.tar"), key=lambda path: natural_order(path.name)):
        by_split.setdefault(split_of_file(path), []).append(path)
    if not by_split:
        raise UserError("the folder has no .tar files", where=folder)
    targets = {split: folder / f"{split}{INDEX_SUFFIX}" for split in SPLITS}
    for path in targets.values():
        if path.exists():
            raise UserError("the folder has an index already", where=path)
    indices = {split: _index(paths, labels) for split, paths in by_split.items()}
    written: dict[Path, RangeIndex] = {}
    for split in sorted(indices, key="train".__eq__):  # train last: never without the test set
        atomic_write(targets[split], indices[split].to_bytes())
        written[targets[split]] = indices[split]
    return written


def _index(paths: list[Path], labelled: bool) -> RangeIndex:
    columns = [array("i"), array("q"), array("q"), array("q")]  # file, offset, length, label
    names: list[str] = []
    values: dict[str, int] = {}
    for number, path in enumerate(paths):
        for member, label in _samples(path, labelled):
            code = values.setdefault(label, len(values))
            for column, value in zip(
                columns, (number, member.offset_data, member.size, code), strict=True
            ):
                column.append(value)
            names.append(member.name)
    if not names:
        raise UserError("the tars have no images", where=paths[0], fix=f"Endings: {SUFFIXES}")
    file, offset, length, codes = (np.array(column) for column in columns)
    class_names, label = [], np.full(len(codes), -1, dtype=np.int64)
    if labelled:
        raw = RawLabels(codes, list(values))
        made = make_classes(raw, lambda at: f"{paths[file[at]]}:{names[at]}")
        assert made is not None  # labels are text, never the number -1
        class_names, label = made
    files = [FileSize(path.name, path.stat().st_size, None) for path in paths]
    return RangeIndex(class_names, files, file, offset, length, label, names)


def _samples(path: Path, labelled: bool) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yields every image of a tar with its label, or "" if labels are not needed.

    The members of a sample are adjacent.
    """

    def key(item: tuple[tarfile.TarInfo, bytes | None]) -> tuple[str, str]:
        folder, _, base = item[0].name.rpartition("/")
        return folder, base.partition(".")[0]

    for _, members in groupby(_members(path), key):
        image, label = None, None
        for member, text in members:
            if text is not None and labelled:
                label = _label(member.name, text, path) or label
            elif text is None and os.path.splitext(member.name)[1].lower() in SUFFIXES:
                if image is not None:
                    what = f"two images of one sample: {image.name}, {member.name}"
                    raise UserError(what, where=path, fix="A sample has one image")
                image = member
        if image is None:
            continue
        if label is None and labelled:
            fix = "Every KEY.jpg needs a KEY.cls, or a KEY.json with a label; or, to "
            fix += f"predict only: mixer data index {path.parent} --unlabelled"
            raise UserError(f"the image has no label: {image.name}", where=path, fix=fix)
        yield image, label or ""


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Yields the files of a tar; .cls and .json with their contents."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                cast(Any, tar).members = []  # tarfile would keep a list of all members
                if not member.isreg() or os.path.basename(member.name).startswith("."):
                    continue  # macOS adds hidden files
                text = None
                if member.name.lower().endswith((".cls", ".json")):
                    file = tar.extractfile(member)
                    text = b"" if file is None else file.read(_LABEL_BYTES)
                yield member, text
            # tarfile treats a damaged header as the end.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"neither an end nor a member at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        what = f"the tar is damaged, cut short or compressed: {error}"
        raise UserError(what, where=path, fix="Fetch it again; unpack .gz first") from error


def _label(name: str, text: bytes, path: Path) -> str | None:
    """Returns the label from a .cls or .json; None if a .json has none."""
    where = f"{path}:{name}"
    try:
        value = parse_json(text) if name.lower().endswith("json") else text.decode().strip()
    except ValueError as error:
        raise UserError(f"the label cannot be read: {error}", where=where) from error
    if name.lower().endswith("json"):
        value = value.get("label", value.get("cls")) if isinstance(value, dict) else None
    return None if value is None else label_text(value, where)
