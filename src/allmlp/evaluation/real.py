"""ImageNet ReaL: the validation images of ILSVRC-2012 with every label that fits each of them.

An answer is right if it is among the labels of its image. Images without a label, 3,163 of 50,000,
are not scored. An image is found by the number in its file name. Source: Beyer et al. 2020, "Are we
done with ImageNet?"; the file is real.json of google-research/reassessed-imagenet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.hub_dataset import HubImages
from allmlp.data.items import Source, View
from allmlp.data.parquet_images import ParquetImages
from allmlp.errors import UserError
from allmlp.io import expand, parse_json

IMAGES, CLASSES = 50_000, 1000
EXPECTED_NAME = "ILSVRC2012_val_00000293.JPEG"
_ID = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)", re.IGNORECASE)
_FILE = "Take real.json of google-research/reassessed-imagenet"


@dataclass(frozen=True)
class RealScore:
    """What a model made of the images that have ReaL labels.

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
        """Share of the scored images that were answered rightly."""
        return self.correct / self.images

    def metrics(self) -> Iterator[tuple[str, float]]:
        """Yields (name, value)."""
        yield "real", self.accuracy

    def to_json(self) -> dict[str, Any]:
        """Returns the figures as JSON values."""
        return {
            "accuracy": self.accuracy,
            "images": self.images,
            "correct": self.correct,
            "unlabelled": self.unlabelled,
        }


@dataclass(frozen=True)
class RealLabels:
    """The ReaL labels of a source's images, ready to score a model by; K classes.

    Attributes:
        labels: for each of the 50,000 validation images the ImageNet classes that are right.
        ids: int64 (num_images,), the number of each image of the source, 1 to 50,000.
        places: int64 (K,), the ImageNet class, 0 to 999, of each class of the model.
    """

    labels: Sequence[frozenset[int]]
    ids: np.ndarray
    places: np.ndarray

    def score(self, indices: np.ndarray, predictions: np.ndarray) -> RealScore:
        """Returns how many of the answers are right.

        Args:
            indices: int64 (N,), of the images in the source.
            predictions: int64 (N,), the model's class of each.

        Raises:
            UserError: none of the images has a label.
        """
        images = correct = 0
        answers = self.places[predictions].tolist()
        for number, answer in zip(self.ids[indices].tolist(), answers, strict=True):
            labels = self.labels[number - 1]
            images += bool(labels)
            correct += answer in labels
        if images == 0:
            what = f"none of the {len(indices):,} images has a ReaL label"
            raise UserError(what, fix="Give more of the validation images, or leave --real out")
        return RealScore(images, correct, len(indices) - images)


def open_real(
    path: str | Path, source: Source, class_names: Sequence[str], imagenet: Sequence[str]
) -> RealLabels:
    """Returns the labels of a source's images; all is checked before any image is looked at.

    Args:
        path: of real.json.
        source: images of the ILSVRC-2012 validation set, any number of them.
        class_names: the model's, in the order of its logits.
        imagenet: ImageNet's 1,000 classes in their order, "n01440764 tench" each.

    Raises:
        UserError: the file is not what it should be, an image's name has no number, or the model
            does not know ImageNet's classes.
    """
    labels = read_real(path)
    places = places_in_imagenet(class_names, imagenet)
    return RealLabels(labels, validation_ids(source), places)


def read_real(path: str | Path) -> list[frozenset[int]]:
    """Returns the classes, 0 to 999, that are right for each of the 50,000 validation images.

    Raises:
        UserError: it is not JSON, not 50,000 lists, or a label is no class.
    """
    path = expand(path)
    try:
        lists = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=path, fix=_FILE) from error
    except ValueError as error:
        what = f"the ReaL labels are not JSON: {str(error)[:200]}"
        raise UserError(what, where=path, fix=_FILE) from error
    if not isinstance(lists, list):
        what = f"the ReaL labels are a list of {IMAGES:,} lists, this is {_cut(lists)}"
        raise UserError(what, where=path, fix=_FILE)
    if len(lists) != IMAGES:
        what = f"the ReaL labels are {IMAGES:,} lists, one for each validation image, "
        raise UserError(what + f"and here are {len(lists):,}", where=path, fix=_FILE)
    for at, labels in enumerate(lists):
        where = f"{path}, entry {at} (image {at + 1})"
        if not isinstance(labels, list):
            raise UserError(f"not a list of labels: {_cut(labels)}", where=where, fix=_FILE)
        for label in labels:
            if type(label) is not int or not 0 <= label < CLASSES:
                what = f"a label is a class from 0 to {CLASSES - 1}, got {_cut(label)}"
                raise UserError(what, where=where, fix=_FILE)
    return [frozenset(labels) for labels in lists]


def _cut(value: object) -> str:
    return repr(value)[:100]


def validation_ids(source: Source) -> np.ndarray:
    """Returns int64 (num_images,): the number of each image in the validation set, 1 to 50,000.

    It stands in the file's name, in any folder or archive; Parquet files may say it in a column
    `val_id` instead.

    Raises:
        UserError: a name has no such number, or two images have the same.
    """
    names = [str(each) for each in _original_names(source)]
    found = [_ID.search(re.split(r"[/\\:]", name)[-1]) for name in names]
    if all(found):
        ids = np.array([int(each[1]) for each in found if each], dtype=np.int64)
    else:
        column = _column_of_ids(source)
        if column is None:
            first = next(at for at, each in enumerate(found) if each is None)
            what = f"no validation number in the name {names[first]!r}"
            without = sum(each is None for each in found)
            what += f" ({without:,} of {len(names):,} images have none)"
            fix = f"ReaL needs the names of the ILSVRC-2012 validation images: {EXPECTED_NAME}"
            raise UserError(what, where=source.item_name(first), fix=fix)
        ids = column
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


def _original_names(source: Source) -> Sequence[str | None]:
    """The name of each image's file, as it was before it was packed."""
    if isinstance(source, View):
        whole = _original_names(source.source)
        return [whole[at] for at in source.indices.tolist()]
    if isinstance(source, ParquetImages):
        paths = source.paths()
        if paths is not None:
            return paths
    if isinstance(source, HubImages):
        return _hub_names(source)
    return [source.item_name(at) for at in range(len(source))]


def _hub_names(source: HubImages) -> list[str | None]:
    names: list[str | None] = []
    for batch in source.dataset.with_format("arrow").iter(batch_size=1000):
        for chunk in batch.column(source.column).chunks:
            names += chunk.field("path").to_pylist()
    return names


def _column_of_ids(source: Source) -> np.ndarray | None:
    if isinstance(source, View):
        whole = _column_of_ids(source.source)
        return None if whole is None else whole[source.indices]
    values = source.values_of("val_id") if isinstance(source, ParquetImages) else None
    if values is None or not all(type(each) is int for each in values):
        return None
    return np.array(values, dtype=np.int64)


def places_in_imagenet(class_names: Sequence[str], imagenet: Sequence[str]) -> np.ndarray:
    """Returns int64 (K,): the ImageNet class, 0 to 999, of each class of a model.

    Args:
        class_names: WordNet ids in any order, "n01440764" or "n01440764 tench"; or words in the
            order of ImageNet, "tench" or "tench, Tinca tinca".
        imagenet: ImageNet's 1,000 classes in their order, "n01440764 tench" each.

    Raises:
        UserError: these are other classes.
    """
    fix = "ReaL is for models of ImageNet-1k: leave --real out"
    if len(class_names) != CLASSES:
        what = f"ReaL needs ImageNet's {CLASSES:,} classes, the model knows {len(class_names):,}"
        raise UserError(what, fix=fix)
    place = {name[:9]: at for at, name in enumerate(imagenet)}
    if all(re.match(r"n\d{8}(?!\d)", name) for name in class_names):
        unknown = [name for name in class_names if name[:9] not in place]
        if unknown:
            what = f"{len(unknown):,} of the model's classes are not of ImageNet-1k: {unknown[0]!r}"
            raise UserError(what, fix=fix)
        places = np.array([place[name[:9]] for name in class_names], dtype=np.int64)
        if len(np.unique(places)) < CLASSES:
            raise UserError("two of the model's classes have one WordNet id", fix=fix)
        return places
    for at, (name, known) in enumerate(zip(class_names, imagenet, strict=True)):
        if _first_words(name) != _first_words(known[10:]):
            what = f"the model's class {at} is {name!r}, ImageNet's is {known!r}"
            raise UserError(what + ": another list, or another order", fix=fix)
    return np.arange(CLASSES)


def _first_words(name: str) -> str:
    """The first of the names that a class has, without regard to case and to how words join."""
    return " ".join(name.partition(",")[0].replace("_", " ").split()).casefold()
