"""Where images come from: (encoded bytes, label) by index, with the class names.

A source is named by a string, SOURCE or SOURCE:SPLIT:
    digits             the scikit-learn digits: 1,797 real 8x8 scans, installed with a dependency;
                       digits@1, digits@2, ... are the same images split otherwise
    FOLDER             FOLDER/train/<class>/*.jpg with val/ and test/ where they exist,
                       or FOLDER/<class>/*.jpg
Splits are train, validation (or val) and test. Class names belong to the data: every split is
matched by name, never by position. Nothing here ever writes to the user's files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from mlp_mixer.data.folders import find_splits, read_class_folders, split_named
from mlp_mixer.data.image import encode_png, read_header
from mlp_mixer.errors import UserError


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


@dataclass(frozen=True)
class ImageFiles:
    """Image files on disk with their labels."""

    name: str
    class_names: list[str]
    labels: np.ndarray
    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the file: {error.strerror}", where=self.paths[index]
            ) from error

    def item_name(self, index: int) -> str:
        return str(self.paths[index])


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


def subset(source: Source, indices: np.ndarray, name: str) -> View:
    """Returns the images of these indices, int64 (n,), as a source of its own."""
    return View(name, source.class_names, source.labels[indices], source, indices)


def relabel(source: Source, class_names: list[str]) -> View:
    """Returns the same images under another class list that has all of the source's names."""
    place = {name: at for at, name in enumerate(class_names)}
    labels = np.array([place[name] for name in source.class_names], dtype=np.int64)[source.labels]
    return View(source.name, class_names, labels, source, np.arange(len(source)))


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


def digits(seed: int = 0) -> dict[str, Source]:
    """Returns the three splits of the scikit-learn digits: 1,259 / 179 / 359 images.

    Stratified: a fifth of every class for test, then an eighth of the rest for validation.

    Args:
        seed: of the split; each gives one that is always the same, "digits" is that of seed 0.
    """
    from sklearn.datasets import load_digits  # half a second, so only where it is used

    data = cast(Any, load_digits())
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)  # 17 grey levels
    files = [encode_png(picture) for picture in pixels]
    names = [str(digit) for digit in data.target_names]
    whole = EncodedImages("digits", names, data.target.astype(np.int64), files, "digits")
    rest, test = split_by_class(whole.labels, 0.2, seed=2 * seed)
    kept, held_out = split_by_class(whole.labels[rest], 0.125, seed=2 * seed + 1)
    indices = {"train": rest[kept], "validation": rest[held_out], "test": test}
    name = f"digits@{seed}" if seed else "digits"
    return {split: subset(whole, at, f"{name}:{split}") for split, at in indices.items()}


def class_folder(folder: Path, name: str) -> ImageFiles:
    """Returns the images of FOLDER/<class>/ as a source.

    Raises:
        UserError: there are no class folders, a class is empty, or two differ in case only.
    """
    images = read_class_folders(folder)
    labels = np.repeat(np.arange(len(images)), [len(paths) for paths in images.values()])
    return ImageFiles(name, list(images), labels, [p for paths in images.values() for p in paths])


def open_splits(name: str) -> dict[str, Source]:
    """Returns the splits that a source has, by the names train, validation and test.

    A folder whose classes lie directly in it has the one split train.

    Args:
        name: "digits" or the path of a folder.

    Raises:
        UserError: there is no such source, or a split is not as it should be.
    """
    if names_source(name):
        return digits(_split_seed(name))
    splits: dict[str, Source] = {
        split: class_folder(path, f"{name}:{split}") for split, path in find_splits(name).items()
    }
    if "train" in splits:
        names = splits["train"].class_names
        for split, source in splits.items():
            splits[split] = match_classes(source, names, owner="train/", allow_missing=True)
    return splits


def names_source(name: str) -> bool:
    """Returns whether the string names data that is not on disk: digits, digits:test, digits@1."""
    return re.split("[:@]", name)[0] == "digits" and not Path(name).exists()


def _split_seed(name: str) -> int:
    _, _, seed = name.partition("@")
    if not (name == "digits" or seed.isdecimal()):
        raise UserError(f"unknown data {name!r}", fix="digits, or digits@1 for another split")
    return int(seed or 0)


def open_source(name: str) -> Source:
    """Returns one split: that of SOURCE:SPLIT, else of SOURCE the test, validation or train split.

    Raises:
        UserError: there is no such source or no such split.
    """
    base, _, alias = name.rpartition(":")
    split = split_named(alias)
    if not base or split is None:
        splits = open_splits(name)
        return next(splits[each] for each in ("test", "validation", "train") if each in splits)
    splits = open_splits(base)
    if split not in splits:
        fix = f"Known there: {', '.join(splits)}"
        raise UserError(f"the data has no {split} split", where=base, fix=fix)
    return splits[split]


def match_classes(
    source: Source, class_names: list[str], *, owner: str, allow_missing: bool
) -> Source:
    """Returns the source with its labels in the order of `class_names`, matched by name.

    Args:
        source: any.
        class_names: the classes to keep to.
        owner: whose they are, for the error: "the model", "train/".
        allow_missing: whether the source may lack some of the classes.

    Raises:
        UserError: the source has other classes, or lacks some where it must not.
    """
    # A model of ImageNet calls a class "n01440764 tench"; folders have the WordNet id alone.
    full = {name[:9]: name for name in class_names if re.match(r"n\d{8} ", name)}
    if full:
        names = [full.get(name, name) for name in source.class_names]
        source = View(source.name, names, source.labels, source, np.arange(len(source)))
    known, present = set(class_names), set(source.class_names)
    unknown = [name for name in source.class_names if name not in known]
    missing = [name for name in class_names if name not in present]
    if unknown or (missing and not allow_missing):
        what = [
            f"{owner} knows {len(class_names)} classes, {source.name} has {len(source.class_names)}"
        ]
        if unknown:
            what.append(f"unknown to {owner}: {_some(unknown)}")
        if missing:
            what.append(f"missing in the data: {_some(missing)}")
        if len(unknown) == len(source.class_names):
            fix = "These are other classes altogether: take a model that was trained on them"
        elif unknown:
            fix = "Rename or remove those class folders"
        else:
            fix = "Add images of them, or go on without with --allow-missing-classes"
        raise UserError("; ".join(what), where=source.name, fix=fix)
    return source if source.class_names == class_names else relabel(source, class_names)


def unreadable(source: Source) -> list[BadImage]:
    """Returns every image whose header cannot be read.

    Pixels are not decoded, so that a damaged image can still turn up later.
    """
    found: list[BadImage] = []
    for index in range(len(source)):
        try:
            read_header(source.read(index), source.item_name(index))
        except UserError as error:
            found.append(BadImage(index, source.item_name(index), error.what))
    return found


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
