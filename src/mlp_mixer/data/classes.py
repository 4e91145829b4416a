"""Classes belong to the data and to the model: labels are matched by name, never by position."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mlp_mixer.data.items import Source, View, relabel
from mlp_mixer.errors import UserError


def natural_order(name: str) -> tuple[list[tuple[bool, int, str, str]], str]:
    """The sort key under which class "2" comes before class "10"."""
    parts = re.split(r"([0-9]+)", name.casefold())
    keys: list[tuple[bool, int, str, str]] = []
    for part in parts:
        # As text, for a number may be too long for int(): the longer one is the larger.
        digits = part.lstrip("0") if part.isdecimal() else ""
        keys.append((part.isdecimal(), len(digits), digits, part))
    return keys, name


def in_class_order(names: Iterable[str]) -> list[str]:
    """Returns class names sorted: integers as numbers, other names in natural order.

    The order depends on the names alone, never on where they came from or in which order.
    """
    names = list(names)
    if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names, key=natural_order)


def refuse_twins(names: Iterable[str], where: object) -> None:
    """Refuses class names that are equal, or differ in case only.

    Raises:
        UserError: two are; on some file systems their folders would be one.
    """
    seen: dict[str, str] = {}
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            what = f"the name of a class is not valid text: {name!r}"
            raise UserError(what, where=where, fix="Rename the class") from error
        twin = seen.get(name.casefold())
        if twin == name:
            raise UserError(f"two classes have one name: {name}", where=where, fix="Rename one")
        if twin is not None:
            what = f"classes that differ only in case: {twin}, {name}"
            raise UserError(what, where=where, fix="Merge or rename them")
        seen[name.casefold()] = name


def labels_of_values(codes: np.ndarray, values: Sequence[object]) -> tuple[np.ndarray, list[str]]:
    """Returns the labels and the sorted class names of a column of class names or numbers.

    Args:
        codes: int (num_images,), an index into `values` each.
        values: the different values of the column, in any order; those of no image are no class.

    Returns:
        labels, int64 (num_images,), and the class names.
    """
    present = np.zeros(len(values), dtype=bool)
    present[codes] = True
    texts = [str(value) for value in values]
    names = in_class_order({text for text, used in zip(texts, present, strict=True) if used})
    place = {name: at for at, name in enumerate(names)}
    table = np.array([place.get(text, -1) for text in texts], dtype=np.int64)
    return table[codes], names


def check_labels(
    labels: np.ndarray, class_names: list[str], item_name: Callable[[int], str]
) -> np.ndarray | None:
    """Returns labels as int64 that stand for places in `class_names`; None if all are -1.

    Hub data sets mark an image without a label, often a whole test split, by -1.

    Args:
        labels: int (num_images,).
        class_names: the classes.
        item_name: the name of the image of an index, for the error.

    Raises:
        UserError: names the first image whose label is no place in the list.
    """
    labels = np.ascontiguousarray(labels, dtype=np.int64)
    if len(labels) and (labels == -1).all():
        return None
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(wrong):
        value = int(labels[wrong[0]])
        missing = "the image has no label (-1)"
        other = f"label {value} is none of the {len(class_names)} classes"
        what = f"{missing if value == -1 else other}; {len(wrong):,} such images"
        fix = "Remove the images without a class from the data"
        raise UserError(what, where=item_name(int(wrong[0])), fix=fix)
    return labels


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
    # A model of ImageNet calls a class "n01440764 tench"; folders have the WordNet id alone, and
    # others join the words otherwise.
    full = {name[:9]: name for name in class_names if _WORDNET.match(name)}
    if full:
        names = [full.get(_wordnet_id(name), name) for name in source.class_names]
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
            fix = "Rename or remove those classes"
        else:
            fix = "Add images of them, or go on without with --allow-missing-classes"
        raise UserError("; ".join(what), where=source.name, fix=fix)
    return source if source.class_names == class_names else relabel(source, class_names)


_WORDNET = re.compile(r"n\d{8}(?= |$)")


def _wordnet_id(name: str) -> str:
    return name[:9] if _WORDNET.match(name) else name


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
