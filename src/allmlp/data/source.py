"""Source: indexed images with labels, the common form of all data, and operations on sources.

Passing images to worker processes must be cheap: the names of a million share one buffer.
"""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from allmlp.data import archive
from allmlp.data.image import EncodedImage
from allmlp.errors import UserError


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be read or decoded."""

    index: int
    name: str
    what: str


class Images(Protocol):
    """Encoded images by index."""

    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes: ...
    def item_name(self, index: int) -> str: ...


class PackedBytes:
    """Many byte strings in one buffer, shared by forked workers."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        buffer, ends = bytearray(), array("q", [0])
        for part in parts:
            buffer += part
            ends.append(len(buffer))
        self._buffer = np.frombuffer(buffer, dtype=np.uint8)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    @classmethod
    def from_arrays(cls, buffer: np.ndarray, ends: np.ndarray) -> PackedBytes:
        """Wraps a buffer, uint8, split at `ends`, int64 (n + 1,)."""
        packed = cls.__new__(cls)
        packed._buffer, packed._ends = buffer, ends
        return packed

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
        self._packed = parts if is_packed else PackedBytes(os.fsencode(part) for part in parts)

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._packed[index])

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file without blocking on a named pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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
            if not os.path.exists(path) and archive.is_archive(path):
                data = archive.read(path)
                if data is not None:
                    return data
            with open(path, "rb", opener=_open_at_once) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise UserError("not a regular file", where=path)
                return file.read()
        except OSError as error:
            raise UserError(f"cannot read the file: {error.strerror}", where=path) from error

    def item_name(self, index: int) -> str:
        return os.path.join(self.folder, self.paths[index])


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images in memory."""

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

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes:
        return self.images.read(int(self.indices[index]))

    def item_name(self, index: int) -> str:
        return self.images.item_name(int(self.indices[index]))

    @property
    def is_multi_label(self) -> bool:
        """Whether images have several labels, or none."""
        return self.labels.ndim == 2

    def class_counts(self) -> np.ndarray:
        """Returns the number of images of each class, int64 (num_classes,)."""
        if self.is_multi_label:
            return self.labels.sum(axis=0)
        return np.bincount(self.labels, minlength=len(self.class_names))

    def of_class(self, number: int) -> np.ndarray:
        """Returns the indices of a class's images."""
        own = self.labels[:, number] if self.is_multi_label else self.labels == number
        return np.flatnonzero(own)

    def label_text(self, index: int) -> str:
        """Returns the class of an image, "cat", or its classes, "cat|dog"."""
        if not self.is_multi_label:
            return self.class_names[int(self.labels[index])]
        return "|".join(self.class_names[at] for at in np.flatnonzero(self.labels[index]))


@dataclass(frozen=True)
class Joined:
    """Several `Images`, concatenated."""

    parts: tuple[Images, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def _at(self, index: int) -> tuple[Images, int]:
        for part in self.parts:
            if 0 <= index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)

    def read(self, index: int) -> bytes:
        part, at = self._at(index)
        return part.read(at)

    def item_name(self, index: int) -> str:
        part, at = self._at(index)
        return part.item_name(at)


def values_of(images: Images, column: str) -> list[Any] | None:
    """Returns another column of the data, a value per image; None if there is no such column.

    "path" is an image's original name in a Parquet file or hub data set.
    """
    if isinstance(images, Source):
        whole = values_of(images.images, column)
        return None if whole is None else [whole[at] for at in images.indices.tolist()]
    if isinstance(images, Joined):
        found = [values_of(part, column) for part in images.parts]
        return None if None in found else [value for values in found for value in values or ()]
    own = getattr(images, "values_of", None)
    return None if own is None else own(column)


def labelled(
    images: Images,
    name: str,
    class_names: list[str],
    labels: np.ndarray,
    notes: tuple[str, ...] = (),
) -> Source:
    """Returns labelled images as a source."""
    if isinstance(images, Source):  # avoid nesting
        return replace(images, name=name, class_names=class_names, labels=labels, notes=notes)
    return Source(name, class_names, labels, images, np.arange(len(images)), notes)


def unlabelled(images: Images, name: str, notes: tuple[str, ...] = ()) -> Source:
    """Returns images without labels as a source with the single class "unknown"."""
    return labelled(images, name, ["unknown"], np.zeros(len(images), dtype=np.int64), notes)


def subset(source: Source, indices: np.ndarray, name: str) -> Source:
    """Returns the images at `indices`, int64 (n,), as a source."""
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
    """Concatenates sources with the same classes."""
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


def split_by_class(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices (kept, held out), with `fraction` of every class held out.

    A class with two or more images has at least one on either side. With several labels per image
    the classes take their turns from the rarest on, so that its images are divided first; images
    without a label come last.
    """
    random = np.random.default_rng(seed)
    if labels.ndim == 2:
        return _split_multi_label(labels, fraction, random)
    held_out: list[np.ndarray] = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            number = min(max(round(fraction * len(members)), 1), len(members) - 1)
            held_out.append(members[:number])
    chosen = np.sort(np.concatenate(held_out)) if held_out else np.array([], dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def stratified_folds(labels: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """Returns the fold of every image, int64 (n,): random, with each class spread evenly."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    chosen = np.empty(len(labels), dtype=np.int64)
    chosen[by_class] = np.arange(len(labels)) % folds
    return chosen


def _split_multi_label(
    labels: np.ndarray, fraction: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    order, side = random.permutation(len(labels)), np.full(len(labels), -1)  # 1: held out
    hot = np.column_stack([labels, ~labels.any(axis=1)])
    counts = hot.sum(axis=0)
    counts[-1] = len(labels) + 1  # last
    for column in np.argsort(counts, kind="stable"):
        members = order[hot[order, column]]
        if len(members) > 1:
            number = min(max(round(fraction * len(members)), 1), len(members) - 1)
            undecided = members[side[members] < 0]
            missing = max(0, number - int((side[members] == 1).sum()))
            side[undecided] = np.arange(len(undecided)) < missing
    return np.flatnonzero(side < 1), np.flatnonzero(side == 1)


def unreadable(source: Source, on_read: Callable[[bytes], None] | None = None) -> list[BadImage]:
    """Returns the images with unreadable headers; `on_read` gets the bytes of the others.

    Pixels are not decoded, so damaged images may still turn up later.
    """
    found: list[BadImage] = []
    for index in range(len(source)):
        try:
            encoded = source.read(index)
            EncodedImage(encoded, source.item_name(index))
            if on_read is not None:
                on_read(encoded)
        except UserError as error:
            found.append(BadImage(index, source.item_name(index), error.what))
    return found
