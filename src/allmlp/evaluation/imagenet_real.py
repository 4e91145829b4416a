"""ImageNet ReaL: the validation images of ILSVRC-2012 with every label that fits each of them.

A prediction is correct if it is among the labels of its image. Images without a label, 3,163 of
50,000, are not scored. An image is found by the number in its file name. Source: Beyer et al. 2020,
"Are we done with ImageNet?"; the file is real.json of google-research/reassessed-imagenet.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.source import Source, values_of
from allmlp.errors import UserError
from allmlp.io import expand, read_json

IMAGES, CLASSES = 50_000, 1000
EXPECTED_NAME = "ILSVRC2012_val_00000293.JPEG"
_ID = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)", re.IGNORECASE)
_FILE = "Take real.json of google-research/reassessed-imagenet"


@dataclass(frozen=True)
class RealScore:
    """A model's predictions for the images that have ReaL labels.

    Attributes:
        images: that were scored.
        correct: those whose predicted class is among their labels.
        unlabelled: images that have no label and were left out.
    """

    images: int
    correct: int
    unlabelled: int

    @property
    def accuracy(self) -> float:
        """Fraction of the scored images that were classified correctly."""
        return self.correct / self.images

    def to_json(self) -> dict[str, Any]:
        """Returns all numbers as JSON values."""
        return {"accuracy": self.accuracy, **asdict(self)}


@dataclass(frozen=True)
class RealLabels:
    """The ReaL labels of a source's images, ready to score a model by; K classes.

    Attributes:
        labels: for each of the 50,000 validation images the ImageNet classes that fit.
        ids: int64 (num_images,), the number of each image of the source, 1 to 50,000.
        imagenet_class: int64 (K,), the ImageNet class, 0 to 999, of each class of the model.
    """

    labels: Sequence[frozenset[int]]
    ids: np.ndarray
    imagenet_class: np.ndarray

    def score(self, indices: np.ndarray, predictions: np.ndarray) -> RealScore:
        """Returns how many predictions are correct.

        Args:
            indices: int64 (N,), of the images in the source.
            predictions: int64 (N,), the model's class of each.
        """
        images = correct = 0
        predicted = self.imagenet_class[predictions].tolist()
        for number, label in zip(self.ids[indices].tolist(), predicted, strict=True):
            labels = self.labels[number - 1]
            images += bool(labels)
            correct += label in labels
        if images == 0:
            what = f"none of the {len(indices):,} images has a ReaL label"
            raise UserError(what, fix="Give more of the validation images, or leave out real")
        return RealScore(images, correct, len(indices) - images)


def open_real(
    path: str | Path, source: Source, class_names: Sequence[str], imagenet: Sequence[str]
) -> RealLabels:
    """Returns the labels of a source's images; all is checked before any image is read.

    Args:
        path: of real.json.
        source: images of the ILSVRC-2012 validation set, any number of them.
        class_names: the model's, in the order of its logits.
        imagenet: ImageNet's 1,000 classes in their order, such as "n01440764 tench".
    """
    labels, classes = read_real(path), imagenet_classes(class_names, imagenet)
    return RealLabels(labels, validation_ids(source), classes)


def read_real(path: str | Path) -> list[frozenset[int]]:
    """Returns the classes, 0 to 999, that fit each of the 50,000 validation images."""
    path = expand(path)
    lists = read_json(path, "the ReaL labels are not JSON", _FILE)
    if not isinstance(lists, list) or len(lists) != IMAGES:
        found = f"{len(lists):,} lists" if isinstance(lists, list) else f"{lists!r:.100}"
        what = f"the ReaL labels are {IMAGES:,} lists, one for each validation image; got {found}"
        raise UserError(what, where=path, fix=_FILE)
    for at, labels in enumerate(lists):
        where = f"{path}, entry {at} (image {at + 1})"
        if not isinstance(labels, list):
            raise UserError(f"not a list of labels: {labels!r:.100}", where=where, fix=_FILE)
        for label in labels:
            if type(label) is not int or not 0 <= label < CLASSES:
                what = f"a label is a class from 0 to {CLASSES - 1}, got {label!r:.100}"
                raise UserError(what, where=where, fix=_FILE)
    return [frozenset(labels) for labels in lists]


def validation_ids(source: Source) -> np.ndarray:
    """Returns int64 (num_images,): the number of each image in the validation set, 1 to 50,000.

    It stands in the file's name, in any folder or archive; Parquet files may have it in a column
    `val_id` instead.
    """
    own = values_of(source, "path") or map(source.item_name, range(len(source)))
    names = [str(name) for name in own]
    found = [_ID.search(re.split(r"[/\\:]", name)[-1]) for name in names]
    column = None if all(found) else values_of(source, "val_id")
    if all(found):
        ids = np.array([int(match[1]) for match in found if match], dtype=np.int64)
    elif column is not None and all(type(value) is int for value in column):
        ids = np.array(column, dtype=np.int64)
    else:
        first = found.index(None)
        what = f"no validation number in the name {names[first]!r} "
        what += f"({found.count(None):,} of {len(names):,} images have none)"
        fix = f"ReaL needs the names of the ILSVRC-2012 validation images: {EXPECTED_NAME}"
        raise UserError(what, where=source.item_name(first), fix=fix)
    outside = np.flatnonzero((ids < 1) | (ids > IMAGES))
    if len(outside):
        first = int(outside[0])
        what = f"validation images are numbered 1 to {IMAGES:,}, this one is {ids[first]}"
        raise UserError(what, where=source.item_name(first), fix="Remove it from the data")
    _, firsts, counts = np.unique(ids, return_index=True, return_counts=True)
    if counts.max(initial=1) > 1:
        first = int(firsts[counts > 1][0])
        what = f"validation image {ids[first]} is {counts.max()} times in the data"
        raise UserError(what, where=source.item_name(first), fix="Give every image once")
    return ids


def imagenet_classes(class_names: Sequence[str], imagenet: Sequence[str]) -> np.ndarray:
    """Returns int64 (K,): the ImageNet class, 0 to 999, of each class of a model.

    Args:
        class_names: WordNet ids in any order, "n01440764" or "n01440764 tench"; or words in the
            order of ImageNet, "tench" or "tench, Tinca tinca".
        imagenet: ImageNet's 1,000 classes in their order, such as "n01440764 tench".
    """
    fix = "ReaL is for models of ImageNet-1k: leave out real"
    if len(class_names) != CLASSES:
        what = f"ReaL needs ImageNet's {CLASSES:,} classes, the model knows {len(class_names):,}"
        raise UserError(what, fix=fix)
    order = {name[:9]: at for at, name in enumerate(imagenet)}
    if all(re.match(r"n\d{8}(?!\d)", name) for name in class_names):
        unknown = [name for name in class_names if name[:9] not in order]
        if unknown:
            what = f"{len(unknown):,} of the model's classes are not of ImageNet-1k: {unknown[0]!r}"
            raise UserError(what, fix=fix)
        classes = np.array([order[name[:9]] for name in class_names], dtype=np.int64)
        if len(np.unique(classes)) < CLASSES:
            raise UserError("two of the model's classes have one WordNet id", fix=fix)
        return classes
    for at, (name, known) in enumerate(zip(class_names, imagenet, strict=True)):
        if _first_words(name) != _first_words(known[10:]):
            what = f"the model's class {at} is {name!r}, ImageNet's is {known!r}"
            raise UserError(what + ": another list, or another order", fix=fix)
    return np.arange(CLASSES)


def _first_words(name: str) -> str:
    """The first of a class's names, ignoring case and how words are joined."""
    return " ".join(name.partition(",")[0].replace("_", " ").split()).casefold()
