"""ImageNet ReaL: the ILSVRC-2012 validation images with every label that fits.

A prediction is correct if it is among the labels of the image. The 3,163 of 50,000 images without a
label are not scored. Images are identified by the number in the file name. Source: Beyer et al.
2020, "Are we done with ImageNet?"; the file is real.json of google-research/reassessed-imagenet.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from allmlp.data.source import Source, values_of
from allmlp.errors import UserError
from allmlp.io import expand, read_json

IMAGES, CLASSES = 50_000, 1000
_LABELS = TypeAdapter(
    Annotated[
        list[list[Annotated[int, Field(strict=True, ge=0, lt=CLASSES)]]],
        Field(min_length=IMAGES, max_length=IMAGES),
    ]
)
_FILE = "Take real.json of google-research/reassessed-imagenet"


@dataclass(frozen=True)
class RealScore:
    """Accuracy of a model on the images that have ReaL labels."""

    images: int  # number of scored images
    correct: int  # those whose predicted class is among their labels
    unlabelled: int  # excluded because they have no label

    @property
    def accuracy(self) -> float:
        return self.correct / self.images

    def to_json(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy, **asdict(self)}


@dataclass(frozen=True)
class RealLabels:
    """The ReaL labels of the images in a source, ready for scoring; K classes."""

    labels: Sequence[Sequence[int]]  # of all 50,000 validation images
    ids: np.ndarray  # int64 (num_images,), number of each image in the source, 1 to 50,000
    imagenet_class: np.ndarray  # int64 (K,), from 0 to 999, for each class of the model

    def score(self, indices: np.ndarray, predictions: np.ndarray) -> RealScore:
        """Scores predictions, int64 (N,), for the images with these indices."""
        truth = [self.labels[number - 1] for number in self.ids[indices].tolist()]
        guesses = self.imagenet_class[predictions].tolist()
        images = sum(map(bool, truth))
        if images == 0:
            what = f"none of the {len(indices):,} images has a ReaL label"
            raise UserError(what, fix="Give more of the validation images, or leave out real")
        right = sum(guess in labels for guess, labels in zip(guesses, truth, strict=True))
        return RealScore(images, right, len(indices) - images)


def open_real(
    path: str | Path, source: Source, class_names: Sequence[str], imagenet: Sequence[str]
) -> RealLabels:
    """Returns the labels of any of the validation images; see `imagenet_classes`."""
    labels, classes = read_real(path), imagenet_classes(class_names, imagenet)
    return RealLabels(labels, validation_ids(source), classes)


def read_real(path: str | Path) -> list[list[int]]:
    """Returns the classes, 0 to 999, that fit each of the 50,000 validation images."""
    path = expand(path)
    lists = read_json(path, "the ReaL labels are not JSON", _FILE)
    try:
        return _LABELS.validate_python(lists)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"the ReaL labels are {IMAGES:,} lists of classes from 0 to {CLASSES - 1}: "
        what += f"{first['msg']}, got {first['input']!r:.100}"
        place = "".join(f"[{at}]" for at in first["loc"])
        raise UserError(what, where=f"{path}{place}", fix=_FILE) from None


def validation_ids(source: Source) -> np.ndarray:
    """Returns the number of each image, 1 to 50,000, from its name or from a column `val_id`."""
    names = values_of(source, "path") or map(source.item_name, range(len(source)))
    pattern = re.compile(r"[^/\\:]*ILSVRC2012_val_(\d{8})(?!\d)[^/\\:]*$", re.IGNORECASE)
    found = [pattern.search(str(name)) for name in names]
    ids = [0 if match is None else int(match[1]) for match in found]
    column = None if all(found) else values_of(source, "val_id")
    if column is not None and all(type(value) is int for value in column):
        ids = column
    elif None in found:
        name = source.item_name(found.index(None))
        what = f"no validation number in the name {name!r} "
        what += f"({found.count(None):,} of {len(found):,} images have none)"
        fix = "ReaL needs the names of the validation images: ILSVRC2012_val_00000293.JPEG"
        raise UserError(what, where=name, fix=fix)
    for number, count in zip(*np.unique(ids, return_counts=True), strict=True):
        if not 1 <= number <= IMAGES or count > 1:
            what = f"validation images are numbered 1 to {IMAGES:,}, this one is {number}"
            what = f"validation image {number} is {count} times in the data" if count > 1 else what
            where = source.item_name(list(ids).index(number))
            raise UserError(what, where=where, fix="Give every validation image once")
    return np.array(ids, dtype=np.int64)


def imagenet_classes(class_names: Sequence[str], imagenet: Sequence[str]) -> np.ndarray:
    """Returns int64 (K,): the ImageNet class, 0 to 999, of each class of a model.

    `class_names` begin with WordNet ids, in any order, or are names in ImageNet's order; `imagenet`
    is ImageNet's 1,000 classes in order, "n01440764 tench".
    """
    fix = "ReaL is for models of ImageNet-1k: leave out real"
    if len(class_names) != CLASSES:
        what = f"ReaL needs ImageNet's {CLASSES:,} classes, the model knows {len(class_names):,}"
        raise UserError(what, fix=fix)
    if all(re.match(r"n\d{8}(?!\d)", name) for name in class_names):
        order = {name[:9]: at for at, name in enumerate(imagenet)}
        found = [order.get(name[:9], -1) for name in class_names]
        if sorted(found) != list(range(CLASSES)):
            unknown = [name for name, at in zip(class_names, found, strict=True) if at < 0]
            wrong = unknown[0] if unknown else "one of them is there twice"
            raise UserError(f"the model's classes are not those of ImageNet-1k: {wrong}", fix=fix)
        return np.array(found, dtype=np.int64)
    for at, (name, known) in enumerate(zip(class_names, imagenet, strict=True)):
        if _first_words(name) != _first_words(known[10:]):
            what = f"the model's class {at} is {name!r}, ImageNet's is {known!r}"
            raise UserError(what + ": another list, or another order", fix=fix)
    return np.arange(CLASSES)


def _first_words(name: str) -> str:
    return " ".join(name.partition(",")[0].replace("_", " ").split()).casefold()
