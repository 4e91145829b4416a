"""Class names and labels. Data and model classes are matched by name, never by position."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from allmlp.data.source import Source, relabel
from allmlp.errors import UserError

UNLABELLED = "`mixer predict` reads images without labels"


@dataclass(frozen=True)
class RawLabels:
    """Labels as stored in the data.

    `values` are class names if the data lists them (`are_classes`; a code of -1 means no label),
    else the distinct cells of a column in any order: text, numbers, true, false or None.
    """

    codes: np.ndarray  # int (num_images,), indices into `values`
    values: Sequence[Any]
    are_classes: bool = False
    several: bool = False  # every value is a tuple of labels; the classes' labels are multi-hot
    class_names: Sequence[str] | None = None  # with `several`, if the data lists them
    where: Callable[[int], object] | None = None  # names an image in errors; None: its own name


class Cells:
    """The distinct cells of a column, of any type, numbered."""

    def __init__(self) -> None:
        self.values: list[object] = []
        self._codes: dict[object, int] = {}

    def code(self, value: object) -> int:
        """Returns the index of a cell in `values`, appending it if new."""
        key = value if isinstance(value, str) else (repr(value),)
        code = self._codes.setdefault(key, len(self.values))
        if code == len(self.values):
            self.values.append(value)
        return code


def numbered(cells: Iterable[object]) -> RawLabels:
    """Returns the labels of a column, given its cells."""
    distinct = Cells()
    codes = np.array([distinct.code(cell) for cell in cells], dtype=np.int64)
    return RawLabels(codes, distinct.values)


def make_classes(
    raw: RawLabels, item_name: Callable[[int], str], *, are_numbers: bool = False
) -> tuple[list[str], np.ndarray] | None:
    """Returns the class names and the labels, int64 (num_images,); None if no image has a label.

    Several labels per image are multi-hot, bool (num_images, num_classes); an image may have none.
    With `are_numbers` the values feed a label rule, so -1, and 9 beside 9.0, are allowed. Raises
    UserError for the first image with an invalid value: empty, -1, or spelt in two ways.
    """
    where = raw.where or item_name
    if raw.are_classes:
        return _checked(raw, where)
    if list(raw.values) == [-1]:
        return None
    if raw.several and are_numbers:
        what = "a label rule needs one label per image, and these have several"
        raise UserError(what, where=where(0), code="multi-label")
    used, first = np.unique(raw.codes, return_index=True)
    texts: dict[int, list[str]] = {}
    rows: dict[str, int] = {}
    for code, row in sorted(zip(used.tolist(), first.tolist(), strict=True), key=lambda at: at[1]):
        try:
            value = raw.values[code]
            texts[code] = list(map(label_text, value)) if raw.several else [label_text(value)]
        except UserError as error:
            raise UserError(error.what, where=where(row), fix=error.fix) from None
        for text in texts[code]:
            rows.setdefault(text, row)
    if not are_numbers:
        check_twins(rows, lambda name: where(rows[name]))
        # {-1, 1} and {-2, -1} are valid class sets; next to 0, 1, ... -1 means unlabelled.
        others = rows.keys() - {"-1"}
        if "-1" in rows and others != {"1"} and all(name.isdecimal() for name in others):
            fix = f"Remove these images, or give the class another name; {UNLABELLED}"
            raise UserError("the image has no label (-1)", where=where(rows["-1"]), fix=fix)
    names = in_class_order(rows) if raw.class_names is None else list(raw.class_names)
    place = {name: at for at, name in enumerate(names)}
    if raw.several:
        hot = np.zeros((len(raw.values), len(names)), dtype=bool)
        for code, own in texts.items():
            hot[code, [place[text] for text in own]] = True
        return (names, hot[raw.codes]) if names else None
    table = np.full(len(raw.values), -1, dtype=np.int64)
    table[list(texts)] = [place[text] for (text,) in texts.values()]
    return names, table[raw.codes]


def _checked(raw: RawLabels, where: Callable[[int], object]) -> tuple[list[str], np.ndarray] | None:
    """Checks labels that index a class list. Hub data sets mark unlabelled splits with -1."""
    names = [str(name) for name in raw.values]
    if raw.codes.ndim == 2:  # multi-hot, of a subset
        return names, raw.codes
    labels = np.ascontiguousarray(raw.codes, dtype=np.int64)
    if len(labels) and (labels == -1).all():
        return None
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        value = int(labels[wrong[0]])
        what, fix = f"label {value} is none of the {len(names)} classes", ""
        if value == -1:
            what, fix = "the image has no label (-1)", f"; {UNLABELLED}"
        fix = f"Remove the images without a class from the data{fix}"
        raise UserError(f"{what}; {len(wrong):,} such images", where=where(int(wrong[0])), fix=fix)
    return names, labels


def label_text(value: object) -> str:
    """Returns the class name for a cell: text, an integer, true or false."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    if text.casefold() in ("", "nan", "<na>"):
        what = f"the label is empty: {text!r}" if text else "the label is empty"
        raise UserError(what, fix=f"Give it a label, or remove it; {UNLABELLED}")
    if not isinstance(value, int | str):
        what = f"a label is a whole number or text, got {text[:80]}"
        raise UserError(what, fix="Give every image one label")
    return text


def natural_order(name: str) -> tuple[list[tuple[bool, int, str, str]], str]:
    """Sort key that puts class "2" before class "10"."""
    keys: list[tuple[bool, int, str, str]] = []
    for part in re.split(r"([0-9]+)", name.casefold()):
        # Compared as text, longer is larger: a number may be too long for int().
        digits = part.lstrip("0") if part.isdecimal() else ""
        keys.append((part.isdecimal(), len(digits), digits, part))
    return keys, name


def in_class_order(names: Iterable[str]) -> list[str]:
    """Sorts class names: integers numerically, other names in natural order."""
    names = list(names)
    if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names, key=natural_order)


def class_key(name: str) -> str:
    """Normalizes a name for matching: spaces, invisible characters, Unicode form and the format of
    integers ("7" for "007" and "7.0")."""
    seen = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    text = " ".join(unicodedata.normalize("NFC", seen).split())
    number = re.fullmatch(r"(-?)0*([0-9]+)(?:\.0*)?", text)
    return number[1] + number[2] if number else text


def check_twins(names: Iterable[str], where: object) -> None:
    """Checks that no two class names are equal or differ only in case or spelling (`class_key`).

    Some file systems would merge their folders. `where` is the location, or maps a name to one.
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
        if key in seen:
            first = f" ({place(seen[key])})" if callable(where) else ""
            what = "classes that are equal, or differ only in case or spelling: "
            what += f"{seen[key]!a}{first}, {name!a}"
            raise UserError(what, where=place(name), fix="Merge or rename them")
        seen[key] = name


_WORDNET = re.compile(r"n\d{8}(?= |$)")


def match_classes(
    source: Source, class_names: list[str], *, owner: str, allow_missing: bool
) -> Source:
    """Relabels a source in the order of `class_names`, matched by `class_key`.

    Extra classes, and missing ones unless `allow_missing`, are errors. `owner` is the name used in
    the message, such as "the model" or "train/".
    """
    # ImageNet models name a class "n01440764 tench"; folders often have the WordNet id alone or a
    # different separator.
    full = {name[:9]: name for name in class_names if _WORDNET.match(name)}
    known, spelled = set(class_names), Counter(map(class_key, class_names))
    full |= {key: name for name in class_names if spelled[key := class_key(name)] == 1}

    def matched(name: str) -> str:
        key = name[:9] if _WORDNET.match(name) else name
        return name if name in known else full.get(key, full.get(class_key(name), name))

    source = replace(source, class_names=[matched(name) for name in source.class_names])
    names = source.class_names
    present = set(names)
    unknown = [name for name in names if name not in known]
    missing = [name for name in class_names if name not in present]
    if unknown or (missing and not allow_missing):
        what = [f"{owner} has {len(class_names)} classes, {source.name} has {len(names)}"]
        if unknown:
            what.append(f"unknown to {owner}: {some_of(unknown)}")
        if missing:
            what.append(f"missing in the data: {some_of(missing)}")
        fix = "Rename or remove those classes, or use a model that was trained on them"
        if not unknown:
            fix = "Add images of them, or set allow_missing_classes"
        raise UserError("; ".join(what), where=source.name, fix=fix)
    return source if names == class_names else relabel(source, class_names)


def some_of(names: list[str], most: int = 8) -> str:
    """Lists the first names and the number of the rest."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
