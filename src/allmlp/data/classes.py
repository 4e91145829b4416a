"""Classes belong to the data and to the model: labels are matched by name, never by position."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from allmlp.data.items import Source, View, relabel
from allmlp.errors import UserError


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


def class_key(name: str) -> str:
    """Returns what names of one class share that differ in what nobody sees or means.

    That is: blanks, invisible characters, Unicode form, and the format of a whole number: "7" of
    "007" and "7.0".
    """
    seen = "".join(each for each in name if unicodedata.category(each) != "Cf")
    text = " ".join(unicodedata.normalize("NFC", seen).split())
    number = re.fullmatch(r"(-?)0*([0-9]+)(?:\.0*)?", text)
    return number[1] + number[2] if number else text


def refuse_twins(names: Iterable[str], where: object) -> None:
    """Refuses class names that are equal, or differ in case or in what `class_key` leaves out.

    Args:
        names: any; only names that are not text have no key.
        where: the place of all, or a function that gives the place of each.

    Raises:
        UserError: two are; on some file systems their folders would be one.
    """
    place = where if callable(where) else lambda _: where
    seen: dict[str, str] = {}
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            what = f"the name of a class is not valid text: {name!r}"
            raise UserError(what, where=place(name), fix="Rename the class") from error
        key = class_key(class_key(name).casefold())
        twin = seen.get(key)
        seen[key] = name
        if twin is None:
            continue
        if twin == name:
            what = f"two classes have one name: {name}"
            raise UserError(what, where=place(name), fix="Rename one")
        first = f" ({place(twin)})" if callable(where) else ""
        if twin.casefold() == name.casefold():
            what = f"classes that differ only in case: {twin}{first}, {name}"
        else:
            what = f"classes with the same name, written differently: {_escaped(twin)}{first}, "
            what += _escaped(name)
        raise UserError(what, where=place(name), fix="Merge or rename them")


def _escaped(name: str) -> str:
    return re.sub(r"\\x(..)", r"\\u00\1", ascii(name))


def label_text(value: object) -> str:
    """Returns the class name that a cell stands for: text, a whole number, true or false.

    Raises:
        UserError: it stands for none; the place is left to the caller.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    if text.casefold() in ("", "nan", "<na>"):
        what = f"the label is empty: {text!r}" if text else "the label is empty"
        raise UserError(what, fix=f"Give it a label, or remove it; {_UNLABELLED}")
    if not isinstance(value, int | str):
        what = f"a label is a whole number or text, got {text[:80]}"
        raise UserError(what, fix="Give every image one label")
    return text


_UNLABELLED = "`mixer predict` reads images without labels"


class Cells:
    """The different cells of a column of labels, whatever their type; each has a number."""

    def __init__(self) -> None:
        self.values: list[object] = []
        self._codes: dict[object, int] = {}

    def code(self, value: object) -> int:
        """Returns the place of a cell in `values`, at the end of which a new one is put."""
        key = value if isinstance(value, str) else (repr(value),)
        code = self._codes.setdefault(key, len(self.values))
        if code == len(self.values):
            self.values.append(value)
        return code


def labels_of_values(
    codes: np.ndarray,
    values: Sequence[object],
    where: Callable[[int], object],
    *,
    are_numbers: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """Returns the labels and the sorted class names of a column of class names or numbers.

    Args:
        codes: int (num_images,), an index into `values` each.
        values: the different values of the column, in any order; those of no image are no class.
        where: the place of an image, for the error.
        are_numbers: whether they are for a label rule, so that "9", "9.0" and -1 may be among them.

    Returns:
        labels, int64 (num_images,), and the class names.

    Raises:
        UserError: names the first image whose value is not a class: empty, -1 among the classes
            0, 1, ..., or written in two ways.
    """
    used, first = np.unique(codes, return_index=True)
    texts: dict[int, str] = {}
    rows: dict[str, int] = {}
    for code, row in sorted(zip(used.tolist(), first.tolist(), strict=True), key=lambda at: at[1]):
        try:
            texts[code] = label_text(values[code])
        except UserError as error:
            raise UserError(error.what, where=where(row), fix=error.fix) from None
        rows.setdefault(texts[code], row)
    if not are_numbers:
        refuse_twins(rows, lambda name: where(rows[name]))
        # -1 and 1 are two classes, and so are -2 and -1; beside 0, 1, ... it means: no label.
        others = rows.keys() - {"-1"}
        if "-1" in rows and others != {"1"} and all(name.isdecimal() for name in others):
            fix = f"Remove these images, or give the class another name; {_UNLABELLED}"
            raise UserError("the image has no label (-1)", where=where(rows["-1"]), fix=fix)
    names = in_class_order(rows)
    place = {name: at for at, name in enumerate(names)}
    table = np.full(len(values), -1, dtype=np.int64)
    table[list(texts)] = [place[text] for text in texts.values()]
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
        fix += f"; {_UNLABELLED}" if value == -1 else ""
        raise UserError(what, where=item_name(int(wrong[0])), fix=fix)
    return labels


def combined_names(names: Sequence[str]) -> list[str]:
    """Returns the class names that read like several labels, such as "cat|dog" beside "cat"."""
    words = {name: re.split(r"[\s|,;]+", name) for name in names}
    combined = [name for name in names if len(words[name]) > 1]
    each_has_a_class = all(not words.keys().isdisjoint(words[name]) for name in combined)
    different = {word for some in words.values() for word in some}
    return combined if each_has_a_class and len(different) < len(names) else []


def match_classes(
    source: Source, class_names: list[str], *, owner: str, allow_missing: bool
) -> Source:
    """Returns the source with its labels in the order of `class_names`, matched by name.

    A name that is there in another Unicode form or the like (see `class_key`) is the same class.

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
    known, spelled = set(class_names), Counter(map(class_key, class_names))
    full |= {key: name for name in class_names if spelled[key := class_key(name)] == 1}
    names = [
        name if name in known else full.get(_wordnet_id(name), full.get(class_key(name), name))
        for name in source.class_names
    ]
    if names != source.class_names:
        source = View(source.name, names, source.labels, source, np.arange(len(source)))
    present = set(source.class_names)
    unknown = [name for name in source.class_names if name not in known]
    missing = [name for name in class_names if name not in present]
    if unknown or (missing and not allow_missing):
        what = [
            f"{owner} knows {len(class_names)} classes, {source.name} has {len(source.class_names)}"
        ]
        if unknown:
            what.append(f"unknown to {owner}: {some_of(unknown)}")
        if missing:
            what.append(f"missing in the data: {some_of(missing)}")
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


def some_of(names: list[str], most: int = 8) -> str:
    """Returns the first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
