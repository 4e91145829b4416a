"""WebDataset tars (KEY.jpg with its label in KEY.cls or KEY.json), and our index of them.

Earlier versions of `mixer data pack` wrote such tars, with checksums.
"""

from __future__ import annotations

import functools
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np

from allmlp.data.classes import label_text, make_classes, natural_order, numbered
from allmlp.data.image import SUFFIXES
from allmlp.data.source import PackedBytes, PackedStrings
from allmlp.data.source_spec import split_of_file
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


class _Descriptor:
    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_opened = functools.lru_cache(maxsize=64)(_Descriptor)  # the usual limit is 1,024 a process


@dataclass(frozen=True)
class RangeIndex:
    """The images of a split as byte ranges of files."""

    folder: str
    class_names: list[str]  # empty if the images have no labels
    files: list[FileSize]  # in the folder
    file: np.ndarray  # int32 (num_images,), indices into `files`
    offset: np.ndarray  # int64 (num_images,), bytes
    length: np.ndarray
    label: np.ndarray  # int64 (num_images,); -1 if the images have no labels
    names: Sequence[str] | PackedStrings

    def __len__(self) -> int:
        return len(self.label)

    def _path(self, index: int) -> str:
        return os.path.join(self.folder, self.files[int(self.file[index])].name)

    def item_name(self, index: int) -> str:
        return f"{self._path(index)}:{self.names[index]}"

    def read(self, index: int) -> bytes:
        length = int(self.length[index])
        try:
            # pread: forked processes share the descriptor and its file position.
            number = _opened(self._path(index)).number
            data = os.pread(number, length, int(self.offset[index]))
        except OSError as error:
            what = f"cannot read the file: {error.strerror}"
            raise UserError(what, where=self.item_name(index)) from error
        if len(data) != length:
            what = f"the file was cut short: {len(data)} of {length} bytes"
            raise UserError(what, where=self.item_name(index), fix="Copy the folder again")
        return data

    def to_bytes(self) -> bytes:
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
        files = [FileSize(str(name), int(size), sha) for name, size, sha in described["shards"]]
        sizes = np.array([file.size for file in files])
        class_names = described["class_names"]
        shard, offset, length, label, ends = (arrays[name] for name in _ARRAYS)
        problems = {
            "its version": described["version"] != _VERSION,
            "the type of an array": any(
                arrays[n].dtype != kind or arrays[n].ndim != 1 for n, kind in _ARRAYS.items()
            ),
            "class names that are no text": not all(isinstance(n, str) for n in class_names),
            "a file outside the folder": any(
                Path(f.name).name != f.name or "\0" in f.name for f in files
            ),
            "an image in no file": not 0 <= shard.min() <= shard.max() < len(files),
            "an image outside its file": ((offset < 0) | (length < 0)).any()
            or (length > sizes[shard] - offset).any(),
            "names outside their buffer": ends[0] != 0
            or ends[-1] != len(arrays["names"])
            or (np.diff(ends) < 0).any(),
            "the length of an array": {len(shard), len(offset), len(length), len(label)}
            != {len(ends) - 1},
        }
        problem = next((text for text, is_there in problems.items() if is_there), None)
        if problem is not None:
            raise ValueError(problem)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f"the index is damaged: {error}", where=path, fix=_FIX) from error
    names = PackedStrings(PackedBytes((arrays["names"], ends)))
    return RangeIndex(str(path.parent), class_names, files, shard, offset, length, label, names)


def index_tars(folder: Path, *, labels: bool = True) -> dict[Path, RangeIndex]:
    """Writes indices next to tars from another tool; the split is taken from the tars' names."""
    by_split: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.tar"), key=lambda path: natural_order(path.name)):
        by_split.setdefault(split_of_file(path), []).append(path)
    if not by_split:
        raise UserError("the folder has no .tar files", where=folder)
    known = next(folder.glob(f"*{INDEX_SUFFIX}"), None)
    if known is not None:
        raise UserError("the folder has an index already", where=known)
    splits = sorted(by_split, key="train".__eq__)  # train last: never without the test set
    indices = {folder / f"{s}{INDEX_SUFFIX}": _index(by_split[s], labels) for s in splits}
    for path, index in indices.items():
        atomic_write(path, index.to_bytes())
    return indices


def _index(paths: list[Path], labelled: bool) -> RangeIndex:
    places: list[tuple[int, int, int]] = []  # file, offset, length
    names: list[str] = []
    labels: list[str] = []

    def key(item: tuple[tarfile.TarInfo, bytes | None]) -> tuple[str, str]:
        folder, base = os.path.split(item[0].name)
        return folder, base.partition(".")[0]

    for number, path in enumerate(paths):
        for _, members in groupby(_members(path), key):  # the members of a sample are adjacent
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
            places.append((number, image.offset_data, image.size))
            names.append(image.name)
            labels.append(label or "")
    if not names:
        raise UserError("the tars have no images", where=paths[0], fix=f"Endings: {SUFFIXES}")
    file, offset, length = np.array(places, dtype=np.int64).T.copy()
    class_names, codes = [], np.full(len(names), -1, dtype=np.int64)
    if labelled:
        made = make_classes(numbered(labels), lambda at: f"{paths[file[at]]}:{names[at]}")
        assert made is not None  # labels are text, never the number -1
        class_names, codes = made
    files = [FileSize(path.name, path.stat().st_size, None) for path in paths]
    folder = str(paths[0].parent)
    return RangeIndex(
        *(folder, class_names, files, file.astype(np.int32), offset, length, codes, names)
    )


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
