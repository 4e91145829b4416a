"""Tars in the WebDataset style: KEY.jpg with its label in KEY.cls or KEY.json, and our index.

SPLIT.index.safetensors says where every image lies, its label and its name, and the sizes of the
tars: images are read by offset, the tars are never scanned again. `mixer data index` writes it for
the tars of other tools; earlier versions of `mixer data pack` wrote such tars with their checksums.
"""

from __future__ import annotations

import json
import os
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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
_LABEL_BYTES = 2**20  # a larger .cls or .json is no label
_ARRAYS = {"shard": np.int32} | dict.fromkeys(("offset", "length", "label", "name_ends"), np.int64)
_FIX = "Pack the data again"


@dataclass(frozen=True)
class FileSize:
    """A file of packed data with its size in bytes, and its checksum if that is known."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class RangeIndex:
    """Where the images of a split lie.

    Attributes:
        class_names: the classes; none if the images have no labels.
        files: in the folder of the index.
        file: int32 (num_images,), the place in `files`.
        offset, length: int64 (num_images,), bytes.
        label: int64 (num_images,); -1 if the images have no labels.
        names: of the images.
    """

    class_names: list[str]
    files: list[FileSize]
    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray
    names: Sequence[str] | PackedStrings

    def __len__(self) -> int:
        return len(self.label)

    def to_bytes(self) -> bytes:
        """Returns the file that `load_index` reads."""
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
    """Returns the index in a file, checked: it may have been damaged, or made to mislead."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            metadata: dict[str, str] = file.metadata() or {}
            described = parse_json(metadata.get(_KEY, metadata.get(_OLD_KEY, "{}")))
            if described.get("version") != _VERSION:
                raise ValueError(f"it is not version {_VERSION}")
            arrays = {name: file.get_tensor(name) for name in (*_ARRAYS, "names")}
        files = [FileSize(str(name), int(size), sha) for name, size, sha in described["shards"]]
        problem = _contradiction(described["class_names"], files, arrays)
        if problem is not None:
            raise ValueError(problem)
    except (
        *(SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError),
        OverflowError,
    ) as error:
        raise UserError(f"the index is damaged: {error}", where=path, fix=_FIX) from error
    names = PackedStrings(PackedBytes.from_arrays(arrays["names"], arrays["name_ends"]))
    file, offset, length, label = (arrays[n] for n in ("shard", "offset", "length", "label"))
    return RangeIndex(described["class_names"], files, file, offset, length, label, names)


def _contradiction(
    class_names: Any, files: list[FileSize], arrays: dict[str, np.ndarray]
) -> str | None:
    label, ends, sizes = arrays["label"], arrays["name_ends"], np.array([f.size for f in files])
    lengths = dict.fromkeys(_ARRAYS, len(label)) | {"name_ends": len(label) + 1}
    for name, kind in _ARRAYS.items():
        if arrays[name].dtype != kind or arrays[name].shape != (lengths[name],):
            return f"{name} is {arrays[name].dtype} {arrays[name].shape}"
    if not isinstance(class_names, list) or not all(isinstance(n, str) for n in class_names):
        return "class names that are no text"
    if any(Path(f.name).name != f.name or "\0" in f.name or not f.name for f in files):
        return "a file outside the folder"
    if not len(label) or not 0 <= arrays["shard"].min() <= arrays["shard"].max() < len(files):
        return "no images, or an image in no file"
    offset, length = arrays["offset"], arrays["length"]
    is_inside = (offset >= 0) & (length >= 0) & (length <= sizes[arrays["shard"]] - offset)
    if not is_inside.all():
        return "an image outside its file"
    if ends[0] != 0 or ends[-1] != len(arrays["names"]) or (np.diff(ends) < 0).any():
        return "names that do not fill their buffer"
    return None


def index_tars(folder: Path, *, labels: bool = True) -> dict[Path, RangeIndex]:
    """Writes an index beside the tars that another tool wrote; returns what was written where.

    The split is read from the names of the tars, as in "x-val-000000.tar". Without labels the index
    is for predictions only. Only headers are read, so the index has no checksums.
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
    for left in folder.glob(".packing*"):  # these tars are not another tool's
        what = f"the folder has {left.name}, which an unfinished mixer data pack left"
        raise UserError(what, where=folder, fix="Remove it, and the tars that it wrote")
    indices = {split: _index(paths, labels) for split, paths in by_split.items()}
    written: dict[Path, RangeIndex] = {}
    for split in sorted(indices, key="train".__eq__):  # train last: never without its test set
        atomic_write(targets[split], indices[split].to_bytes())
        written[targets[split]] = indices[split]
    return written


def _index(paths: list[Path], labelled: bool) -> RangeIndex:
    offsets, lengths, numbers, codes = array("q"), array("q"), array("i"), array("q")
    names: list[str] = []
    values: dict[str, int] = {}
    files: list[FileSize] = []
    for path in paths:
        for member, label in samples(path, labelled):
            codes.append(values.setdefault(label, len(values)))
            offsets.append(member.offset_data)
            lengths.append(member.size)
            numbers.append(len(files))
            names.append(member.name)
        files.append(FileSize(path.name, path.stat().st_size, None))
    if not len(codes):
        raise UserError("the tars have no images", where=paths[0], fix=f"Endings: {SUFFIXES}")
    class_names, label = [], np.full(len(codes), -1, dtype=np.int64)
    if labelled:

        def where(at: int) -> str:
            return f"{paths[numbers[at]]}:{names[at]}"

        made = make_classes(RawLabels(np.array(codes), list(values)), where)
        assert made is not None  # texts, never the number -1
        class_names, label = made
    ranges = np.array(offsets, np.int64), np.array(lengths, np.int64)
    return RangeIndex(class_names, files, np.array(numbers, np.int32), *ranges, label, names)


def samples(path: Path, labelled: bool = True) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yields every image of a tar with its label, or with "" if labels are not needed.

    The members of a sample lie one after another.
    """
    key, image, label = "", None, None
    for member, text in chain(_members(path), [(None, None)]):
        folder, _, base = ("", "", "") if member is None else member.name.rpartition("/")
        if base.startswith("."):  # what macOS adds, and other hidden files
            continue
        stem, _, ending = base.partition(".")
        this = f"{folder}/{stem}"
        if member is None or this != key:
            if image is not None:
                if label is None and labelled:
                    what = f"the image has no label: {image.name}"
                    fix = "Every KEY.jpg needs a KEY.cls, or a KEY.json with a label; or, to "
                    fix += f"predict only: mixer data index {path.parent} --unlabelled"
                    raise UserError(what, where=path, fix=fix)
                yield image, label or ""
            key, image, label = this, None, None
        if member is None:
            return
        if text is not None and labelled:
            label = _label(ending.lower(), text, f"{path}:{member.name}") or label
        elif text is None and os.path.splitext(base)[1].lower() in SUFFIXES:
            if image is not None:
                what = f"two images of one sample: {image.name}, {member.name}"
                raise UserError(what, where=path, fix="A sample has one image")
            image = member


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Yields the files of a tar, for a .cls or .json with its contents."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                cast(Any, tar).members = []  # it would keep a list of them all
                if not member.isreg():
                    continue
                text = None
                if member.name.lower().endswith((".cls", ".json")):
                    file = tar.extractfile(member)
                    text = b"" if file is None else file.read(_LABEL_BYTES)
                yield member, text
            # tarfile takes a damaged header in the middle for the end.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"neither an end nor a member at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        what = f"the tar is damaged, cut short or compressed: {error}"
        raise UserError(what, where=path, fix="Fetch it again; unpack .gz first") from error


def _label(ending: str, text: bytes, where: str) -> str | None:
    """The label in a .cls or .json; None if a .json has none."""
    try:
        if ending.endswith("json"):
            value = parse_json(text)
            value = value.get("label", value.get("cls")) if isinstance(value, dict) else None
            if value is None:
                return None
        else:
            value = text.decode().strip()
    except ValueError as error:
        raise UserError(f"the label cannot be read: {error}", where=where) from error
    try:
        return label_text(value)
    except UserError as error:
        raise UserError(error.what, where=where, fix=error.fix) from None


def verify_tar(path: Path, index: RangeIndex, number: int) -> Iterator[str]:
    """Yields the images of an index that are not members of their tar, with length and label."""
    labelled = bool(index.class_names)
    try:
        members = {m.offset_data: (m.size, label) for m, label in samples(path, labelled)}
    except UserError as error:
        yield f"{path}: {error.what}"
        return
    for at in np.flatnonzero(index.file == number).tolist():
        offset, length, label = int(index.offset[at]), int(index.length[at]), int(index.label[at])
        size, text = members.get(offset, (None, None))
        name = f"{path}:{index.names[at]}"
        if size is None:
            yield f"{name}: no member of the tar begins at byte {offset}"
        elif size != length:
            yield f"{name}: {size} bytes in the tar, {length} in the index"
        elif labelled and text not in (str(label), index.class_names[label]):
            yield f"{name}: label {text!r} in the tar, {index.class_names[label]!r} in the index"
