"""Source: indexed images with labels, the common form of all data, and operations on sources.

Passing images to worker processes must be cheap: the names of a million share one buffer.
"""

from __future__ import annotations

import functools
import os
import stat
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from allmlp.data import archive
from allmlp.errors import UserError

MARK = "|"  # between several labels of an image
GROUP, FOLD = "group", "fold"  # roles of columns, which `values_of` takes as their names


@dataclass(frozen=True)
class BadImage:
    index: int
    name: str
    what: str


class Images(Protocol):
    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes: ...
    def item_name(self, index: int) -> str: ...


class PackedBytes:
    """Many byte strings in one buffer, uint8, split at `ends`, int64 (n + 1,); shared by forks."""

    def __init__(self, parts: Iterable[bytes] | tuple[np.ndarray, np.ndarray]) -> None:
        self._buffer: Any
        self._ends: Any
        if isinstance(parts, tuple):
            self._buffer, self._ends = parts
            return
        buffer, ends = bytearray(), array("q", [0])
        for part in parts:
            buffer += part
            ends.append(len(buffer))
        self._buffer = np.frombuffer(buffer, dtype=np.uint8)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._buffer[self._ends[index] : self._ends[index + 1]].tobytes()


class PackedStrings:
    """Many strings (paths, in any encoding) in one buffer, like `PackedBytes`."""

    def __init__(self, parts: Iterable[str] | PackedBytes) -> None:
        is_packed = isinstance(parts, PackedBytes)
        self._packed = parts if is_packed else PackedBytes(map(os.fsencode, parts))

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._packed[index])


@dataclass(frozen=True)
class ImageFiles:
    """Image files on disk or in archives; `paths` may be relative to `folder`."""

    paths: Sequence[str] | PackedStrings
    folder: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        path = self.item_name(index)
        try:
            data = None if os.path.exists(path) else archive.read(path)
            if data is not None:
                return data
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # a named pipe must not block
            with open(path, "rb", opener=lambda path, _: os.open(path, flags)) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise UserError("not a regular file", where=path)
                return file.read()
        except OSError as error:
            raise UserError(f"cannot read the file: {error.strerror}", where=path) from error

    def item_name(self, index: int) -> str:
        return os.path.join(self.folder, self.paths[index])


class _Descriptor:
    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_opened = functools.lru_cache(maxsize=64)(_Descriptor)  # the usual limit is 1,024 a process


@dataclass(frozen=True)
class ByteRanges:
    files: Sequence[str]
    file: np.ndarray  # int32 (num_images,), indices into `files`
    offset: np.ndarray  # int64 (num_images,), bytes
    length: np.ndarray
    names: Sequence[str] | PackedStrings

    def __post_init__(self) -> None:
        _opened.cache_clear()  # a file of the same name may have replaced an earlier one

    def __len__(self) -> int:
        return len(self.file)

    def item_name(self, index: int) -> str:
        return f"{self.files[int(self.file[index])]}:{self.names[index]}"

    def read(self, index: int) -> bytes:
        length = int(self.length[index])
        try:
            # pread: forked processes share the descriptor and its file position, and a truncated
            # memory map would kill the process.
            file = _opened(self.files[int(self.file[index])])  # kept open by this name
            data = os.pread(file.number, length, int(self.offset[index]))
        except OSError as error:
            what = f"cannot read the file: {error.strerror}"
            raise UserError(what, where=self.item_name(index)) from error
        if len(data) != length:
            what = f"the file was cut short: {len(data)} of {length} bytes"
            raise UserError(what, where=self.item_name(index), fix="Copy the folder again")
        return data


@dataclass(frozen=True)
class EncodedImages:
    files: Sequence[bytes] | PackedBytes
    item_prefix: str

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return self.files[index]

    def item_name(self, index: int) -> str:
        return f"{self.item_prefix}[{index}]"


@dataclass(frozen=True)
class Source:
    """Labelled images: a selection of `images`."""

    name: str  # for display
    class_names: list[str]
    # int64 (num_images,), indices into class_names; several labels per image are multi-hot, bool
    # (num_images, num_classes).
    labels: np.ndarray
    images: Images
    indices: np.ndarray  # int64 (num_images,), indices into `images`
    notes: tuple[str, ...] = ()  # one line each
    columns: Mapping[str, PackedStrings] = field(default_factory=dict)  # by role, as `images`

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes:
        return self.images.read(int(self.indices[index]))

    def item_name(self, index: int) -> str:
        return self.images.item_name(int(self.indices[index]))

    @property
    def is_multi_label(self) -> bool:
        return self.labels.ndim == 2

    def class_counts(self) -> np.ndarray:
        """Returns the number of images of each class, int64 (num_classes,)."""
        if self.is_multi_label:
            return self.labels.sum(axis=0)
        return np.bincount(self.labels, minlength=len(self.class_names))

    def of_class(self, number: int) -> np.ndarray:
        own = self.labels[:, number] if self.is_multi_label else self.labels == number
        return np.flatnonzero(own)

    def label_text(self, index: int) -> str:
        """Returns the class of an image, "cat", or its classes, "cat|dog"."""
        if not self.is_multi_label:
            return self.class_names[int(self.labels[index])]
        return MARK.join(self.class_names[at] for at in np.flatnonzero(self.labels[index]))


@dataclass(frozen=True)
class Joined:
    parts: tuple[Images, ...]

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [*accumulate(map(len, self.parts), initial=0)]

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, index: int) -> tuple[Images, int]:
        at = bisect_right(self._starts, index) - 1
        return self.parts[at], index - self._starts[at]

    def read(self, index: int) -> bytes:
        part, at = self._at(index)
        return part.read(at)

    def item_name(self, index: int) -> str:
        part, at = self._at(index)
        return part.item_name(at)


def values_of(images: Images, column: str) -> list[Any] | None:
    """Returns a column ("path": the original names in Parquet files, the hub); None if missing."""
    if isinstance(images, Source):
        whole = images.columns.get(column) or values_of(images.images, column)
        return None if whole is None else [whole[at] for at in images.indices.tolist()]
    if isinstance(images, Joined):
        found = [values_of(part, column) for part in images.parts]
        return None if None in found else [value for values in found for value in values or ()]
    own = getattr(images, "values_of", None)
    return None if own is None or column in (GROUP, FOLD) else own(column)


ROW = "<f4"  # how the numbers of a row of an array are encoded


def array_shape(images: Images) -> tuple[int, int, int] | None:
    """Returns the shape (C, H, W) of rows of arrays; None for images."""
    if isinstance(images, Source):
        return array_shape(images.images)
    if isinstance(images, Joined):
        return array_shape(images.parts[0])
    return getattr(images, "shape", None)


def array_row(source: Source, index: int) -> np.ndarray:
    """Returns a row of an array, float32 (C, H, W)."""
    return np.frombuffer(source.read(index), ROW).reshape(array_shape(source) or ())


def only_images(source: Source, what: str) -> None:
    if array_shape(source) is not None:
        fix = "train, finetune, evaluate, predict, few-shot and export take arrays"
        raise UserError(f"{what} is for images", where=source.name, fix=fix, code="arrays")


def labelled(
    images: Images,
    name: str,
    class_names: list[str],
    labels: np.ndarray,
    notes: tuple[str, ...] = (),
) -> Source:
    if isinstance(images, Source):  # avoid nesting
        return replace(images, name=name, class_names=class_names, labels=labels, notes=notes)
    return Source(name, class_names, labels, images, np.arange(len(images)), notes)


def unlabelled(images: Images, name: str, notes: tuple[str, ...] = ()) -> Source:
    return labelled(images, name, ["unknown"], np.zeros(len(images), dtype=np.int64), notes)


def subset(source: Source, indices: np.ndarray, name: str) -> Source:
    labels, places = source.labels[indices], source.indices[indices]
    return replace(source, name=name, labels=labels, indices=places)


def relabel(source: Source, class_names: list[str]) -> Source:
    """Returns the source with another class list, which must contain all its class names."""
    place = {name: at for at, name in enumerate(class_names)}
    places = np.array([place[name] for name in source.class_names], dtype=np.int64)
    if source.is_multi_label:
        labels = np.zeros((len(source), len(class_names)), dtype=bool)
        labels[:, places] = source.labels
    else:
        labels = places[source.labels]
    return replace(source, class_names=class_names, labels=labels)


def join(parts: Sequence[Source], name: str) -> Source:
    labels = np.concatenate([part.labels for part in parts])
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    return labelled(Joined(tuple(parts)), name, parts[0].class_names, labels, tuple(notes))


def random_subset(source: Source, fraction: float, seed: int) -> Source:
    """Returns a random fraction of the images, in order; smaller fractions are nested in larger."""
    if fraction == 1.0:
        return source
    order = np.random.default_rng(seed).permutation(len(source))
    chosen = np.sort(order[: max(1, round(fraction * len(source)))])
    return subset(source, chosen, source.name)


def as_multi_label(source: Source) -> Source:
    if source.is_multi_label:
        return source
    return replace(source, labels=np.eye(len(source.class_names), dtype=bool)[source.labels])


def check_one_label(sources: Iterable[Source], what: str) -> None:
    for source in sources:
        if source.is_multi_label:
            fix = f"If each image has one, with {MARK} in its name: SOURCE#labels=single"
            what = f"{what} needs one label per image; {source.name} has several"
            raise UserError(what, where=source.name, fix=fix, code="multi-label")
