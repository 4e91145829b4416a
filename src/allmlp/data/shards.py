"""Tar shards in the WebDataset style, with an index of ours: as fast in random order as in order.

A folder has SPLIT-000000.tar, ... with two members for an image, KEY.jpg and KEY.cls (its label),
and SPLIT.index.safetensors: where every image lies, its label and its name, and of the shards their
sizes and sums. Images are read by offset; the tars are never scanned. The index is written last, so
that where there is one, all is there.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.folders import SPLIT_FOLDERS
from allmlp.data.items import no_labels
from allmlp.errors import UserError
from allmlp.io import parse_json

INDEX_SUFFIX = ".index.safetensors"
PACKING = ".packing"  # begins the name of a folder in which shards are written
PUBLISHED = "names.txt"  # there, before the first rename: the names of all files
_KEY, _VERSION = "allmlp_shards", 1
_OPEN_SHARDS = 64  # descriptors in each process; a process may have 1,024 as a rule


@dataclass(frozen=True)
class Shard:
    """A tar file of an index: its name, its size in bytes, and its sum if that is known."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class ShardIndex:
    """Where the images of a split lie.

    Attributes:
        class_names: the classes; none where the images have no labels.
        shards: the tar files, in the index's own folder.
        shard: int32 (num_images,), the place in `shards`.
        offset, length: int64 (num_images,), bytes.
        label: int64 (num_images,); -1 where the images have no labels.
        names: uint8, the images' names one after another.
        name_ends: int64 (num_images + 1,), from 0.
    """

    class_names: list[str]
    shards: list[Shard]
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray
    names: np.ndarray
    name_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def name_of(self, index: int) -> str:
        """Returns the name of an image."""
        begin, end = self.name_ends[index], self.name_ends[index + 1]
        return os.fsdecode(self.names[begin:end].tobytes())

    def save(self, path: Path) -> None:
        """Writes the index to a file and flushes it to the disk."""
        from safetensors.numpy import save

        shards = [[shard.name, shard.size, shard.sha256] for shard in self.shards]
        described = {"version": _VERSION, "class_names": self.class_names, "shards": shards}
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        with path.open("wb") as file:  # one key: several come in any order, and other bytes
            file.write(save(tensors, {_KEY: json.dumps(described)}))
            file.flush()
            os.fsync(file.fileno())


_ARRAYS = {
    "shard": np.int32,
    "offset": np.int64,
    "length": np.int64,
    "label": np.int64,
    "names": np.uint8,
    "name_ends": np.int64,
}


def load_index(path: Path) -> ShardIndex:
    """Returns the index that is in a file.

    Raises:
        UserError: the file is not such an index, is damaged, or contradicts itself.
    """
    from safetensors import SafetensorError, safe_open

    fix = "Pack the data again"
    try:
        with safe_open(str(path), framework="np") as file:
            metadata: dict[str, str] = file.metadata() or {}
            described = parse_json(metadata.get(_KEY, metadata.get("mlp_mixer_shards", "{}")))
            if described.get("version") != _VERSION:
                what = f"not an index of shards (version {_VERSION})"
                raise UserError(what, where=path, fix=fix)
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        class_names = described["class_names"]
        if not isinstance(class_names, list):
            raise ValueError("the class names are no list")
        shards = [Shard(str(name), int(size), sha) for name, size, sha in described["shards"]]
    except (
        *(SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError),
        OverflowError,
    ) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the index is damaged: {error}", where=path, fix=fix) from error
    index = ShardIndex(class_names, shards, **arrays)
    problem = _contradiction(index)
    if problem is not None:
        raise UserError(f"the index contradicts itself: {problem}", where=path, fix=fix)
    return index


def _contradiction(index: ShardIndex) -> str | None:
    count = len(index)
    for name, kind in _ARRAYS.items():
        array = getattr(index, name)
        if array.dtype != kind or array.ndim != 1:
            return f"{name} is {array.dtype} {array.shape}"
        expected = {"names": len(index.names), "name_ends": count + 1}.get(name, count)
        if len(array) != expected:
            return f"{len(array)} values of {name} for {count} images"
    if not all(isinstance(name, str) for name in index.class_names):
        return "class names that are no text"
    if any(not _is_file_name(each.name) for each in index.shards):
        return "a shard outside the folder"
    if any(not 0 <= each.size < 2**63 for each in index.shards):
        return "the size of a shard is none"
    if not count:
        return "no images"
    sizes = np.array([each.size for each in index.shards], dtype=np.int64)
    if index.class_names:
        has_others = not 0 <= index.label.min() <= index.label.max() < len(index.class_names)
    else:
        has_others = bool((index.label != -1).any())
    if has_others:
        return "a label that is no class"
    if count and not (0 <= index.shard.min() <= index.shard.max() < len(sizes)):
        return "an image in no shard"
    if count and (min(index.offset.min(), index.length.min()) < 0):
        return "an image before the beginning of its shard"
    if count and (index.length > sizes[index.shard] - index.offset).any():
        return "an image behind the end of its shard"
    ends = index.name_ends
    if ends[0] != 0 or ends[-1] != len(index.names) or (np.diff(ends) < 0).any():
        return "names that do not fill their buffer"
    return None


def _is_file_name(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return bool(name) and "\0" not in name and Path(name).name == name


@dataclass
class ShardImages:
    """The images of one split in tar shards."""

    name: str
    folder: str
    index: ShardIndex
    _descriptors: OrderedDict[int, _Descriptor] = field(
        default_factory=OrderedDict, repr=False, compare=False
    )

    @property
    def class_names(self) -> list[str]:
        """The classes."""
        return self.index.class_names or no_labels(0)[0]

    @property
    def labels(self) -> np.ndarray:
        """int64 (num_images,)."""
        return self.index.label if self.index.class_names else no_labels(len(self))[1]

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def item_name(self, index: int) -> str:
        shard = self.index.shards[int(self.index.shard[index])]
        return f"{os.path.join(self.folder, shard.name)}:{self.index.name_of(index)}"

    def read(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        length = int(self.index.length[index])
        try:
            descriptor = self._descriptor(int(self.index.shard[index]))
            # By position: a forked process shares the descriptor and disturbs nobody.
            data = os.pread(descriptor.number, length, int(self.index.offset[index]))
        except OSError as error:
            what = f"cannot read the shard: {error.strerror}"
            raise UserError(what, where=self.item_name(index)) from error
        if len(data) != length:
            what = f"the shard was cut short: {len(data)} of {length} bytes"
            raise UserError(what, where=self.item_name(index), fix="Pack or fetch it again")
        return data

    def _descriptor(self, shard: int) -> _Descriptor:
        found = self._descriptors.get(shard)
        if found is None:
            path = os.path.join(self.folder, self.index.shards[shard].name)
            found = self._descriptors[shard] = _Descriptor(path)
            while len(self._descriptors) > _OPEN_SHARDS:
                self._descriptors.popitem(last=False)
        return found


class _Descriptor:
    """An open file; it is closed when nobody uses it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def has_shards(folder: Path) -> bool:
    """Returns whether the folder has an index of shards."""
    return any(index_path(folder, split).exists() for split in SPLIT_FOLDERS)


def refuse_unfinished(folder: Path) -> None:
    """Refuses a folder that has only some of the files of a `mixer data pack`.

    Raises:
        UserError: the command was killed while it renamed them, or is at it now.
    """
    for aside in folder.glob(f"{PACKING}*"):
        if half_published(aside):
            what = f"mixer data pack was killed before all files were in place: see {aside.name}"
            fix = "Run the same mixer data pack again: it starts over"
            raise UserError(what, where=folder, fix=fix)


def half_published(aside: Path) -> list[str]:
    """Returns the files of a `mixer data pack` of which only some were renamed; else none."""
    try:
        names = [*filter(_is_file_name, (aside / PUBLISHED).read_text().splitlines())]
    except (OSError, ValueError):  # it had not come so far
        return []
    return names if any((aside / name).exists() for name in names) else []


def index_path(folder: Path, split: str) -> Path:
    """Returns where the index of a split is."""
    return folder / f"{split}{INDEX_SUFFIX}"


def open_shards(
    folder: Path, name: str, splits: Sequence[str] = (), *, labels: bool = True
) -> dict[str, ShardImages]:
    """Returns the splits that a folder of shards has an index of; the shards' sizes are checked.

    Args:
        folder: the folder.
        name: what to call it on screen.
        splits: look at these only; empty for all.
        labels: whether they are needed.

    Raises:
        UserError: an index is damaged, or a shard is missing or has another size; or labels are
            needed and the images have none.
    """
    found: dict[str, ShardImages] = {}
    for split in splits or SPLIT_FOLDERS:
        path = index_path(folder, split)
        if path.exists():
            index = load_index(path)
            if labels and not index.class_names:
                what = "the images have no labels: the index was written for predictions only"
                fix = f"Where there are labels: remove it, then mixer data index {folder}"
                raise UserError(what, where=path, fix=fix)
            _check_sizes(folder, index)
            found[split] = ShardImages(f"{name}:{split}", str(folder), index)
    return found


def _check_sizes(folder: Path, index: ShardIndex) -> None:
    for shard in index.shards:
        path = folder / shard.name
        try:
            size = path.stat().st_size
        except OSError as error:
            what = f"cannot read a shard: {error.strerror}"
            raise UserError(what, where=path, fix="Copy the whole folder again") from error
        if size != shard.size:
            what = f"the shard has {size:,} bytes, the index says {shard.size:,}"
            raise UserError(what, where=path, fix="Copy the whole folder again, or pack it again")
