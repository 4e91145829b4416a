"""What a source of labelled images is, and the kinds that hold files, bytes or a part of another.

A source gives encoded files and labels by index. It must be cheap to hand to worker processes: the
names of a million images lie in one buffer (`PackedStrings`), not in a million objects.
"""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np

from allmlp.data.image import EncodedImage
from allmlp.errors import UserError


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be read or decoded."""

    index: int
    name: str
    what: str


class Source(Protocol):
    """Images with labels, by index.

    Attributes:
        name: what to call it on screen.
        class_names: the classes, in the order of the labels.
        labels: int64 (num_images,), an index into class_names each.
    """

    @property
    def name(self) -> str: ...
    @property
    def class_names(self) -> list[str]: ...
    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """Returns the encoded file of one image."""
        ...

    def item_name(self, index: int) -> str:
        """Returns the path or the name of one image."""
        ...


class PackedBytes(Sequence[bytes]):
    """Many byte strings in one buffer: no object for each, nothing to copy for worker processes."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        buffer, ends = bytearray(), array("q", [0])
        for part in parts:
            buffer += part
            ends.append(len(buffer))
        self._buffer = np.frombuffer(buffer, dtype=np.uint8)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> PackedBytes: ...
    def __getitem__(self, index: int | slice) -> bytes | PackedBytes:
        if isinstance(index, slice):
            return PackedBytes(self[each] for each in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._buffer[self._ends[index] : self._ends[index + 1]].tobytes()


class PackedStrings(Sequence[str]):
    """Many strings (names, paths of any bytes) in one buffer, as `PackedBytes`."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._packed = PackedBytes(os.fsencode(part) for part in parts)

    def __len__(self) -> int:
        return len(self._packed)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PackedStrings: ...
    def __getitem__(self, index: int | slice) -> str | PackedStrings:
        if isinstance(index, slice):
            return PackedStrings(self[each] for each in range(*index.indices(len(self))))
        return os.fsdecode(self._packed[index])


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file without waiting for the other end where it is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@dataclass(frozen=True)
class ImageFiles:
    """Image files on disk with their labels; `paths` may be relative to `folder`.

    `notes` say what else was found there, a line each.
    """

    name: str
    class_names: list[str]
    labels: np.ndarray
    paths: Sequence[str]
    folder: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        path = self.item_name(index)
        try:
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
    """Encoded images in memory with their labels."""

    name: str
    class_names: list[str]
    labels: np.ndarray
    files: Sequence[bytes]
    item_prefix: str

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return self.files[index]

    def item_name(self, index: int) -> str:
        return f"{self.item_prefix}[{index}]"


@dataclass(frozen=True)
class View:
    """Some images of another source, under the same classes or others: see `subset`, `relabel`."""

    name: str
    class_names: list[str]
    labels: np.ndarray
    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.indices[index]))

    def item_name(self, index: int) -> str:
        return self.source.item_name(int(self.indices[index]))


def no_labels(number: int) -> tuple[list[str], np.ndarray]:
    """Returns the class names and labels of so many images that have none: all "unknown"."""
    return ["unknown"], np.zeros(number, dtype=np.int64)


def subset(source: Source, indices: np.ndarray, name: str) -> View:
    """Returns the images of these indices, int64 (n,), as a source of its own."""
    return View(name, source.class_names, source.labels[indices], source, indices)


def relabel(source: Source, class_names: list[str]) -> View:
    """Returns the same images under another class list that has all of the source's names."""
    place = {name: at for at, name in enumerate(class_names)}
    labels = np.array([place[name] for name in source.class_names], dtype=np.int64)[source.labels]
    return View(source.name, class_names, labels, source, np.arange(len(source)))


def without_labels(source: Source) -> View:
    """Returns the same images without their labels."""
    return View(source.name, *no_labels(len(source)), source, np.arange(len(source)))


def random_subset(source: Source, fraction: float, seed: int) -> Source:
    """Returns a random share of the images, in their order; a smaller share is part of a larger.

    Args:
        source: any.
        fraction: above 0, at most 1; at least one image stays.
        seed: of the draw.
    """
    if fraction == 1.0:
        return source
    order = np.random.default_rng(seed).permutation(len(source))
    chosen = np.sort(order[: max(1, round(fraction * len(source)))])
    return subset(source, chosen, source.name)


def split_by_class(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices (kept, held out), with `fraction` of every class held out.

    A class with two images or more keeps at least one and gives at least one.

    Args:
        labels: int64 (num_images,).
        fraction: share of each class to hold out, above 0 and below 1.
        seed: of the draw; the same seed gives the same split.
    """
    random = np.random.default_rng(seed)
    held_out: list[np.ndarray] = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            number = min(max(round(fraction * len(members)), 1), len(members) - 1)
            held_out.append(members[:number])
    chosen = np.sort(np.concatenate(held_out)) if held_out else np.array([], dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def unreadable(source: Source, on_read: Callable[[bytes], None] | None = None) -> list[BadImage]:
    """Returns every image whose header cannot be read.

    Pixels are not decoded, so that a damaged image can still turn up later.

    Args:
        source: the images.
        on_read: called with the encoded file of each that can be read.
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
