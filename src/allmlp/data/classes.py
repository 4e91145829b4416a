"""Class names and labels. Data and model classes are matched by name, never by position.

In data with several labels per image (multi-label) a cell is "cat|dog" or a list, and the labels of
its source are multi-hot.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from allmlp.data.source import MARK, Source, relabel
from allmlp.errors import UserError, one_of, some_of

UNLABELLED = "`mixer predict` reads images without labels"
_EMPTY = ("", "nan", "<na>")
_SEPARATORS = {"space": None, "comma": ",", "semicolon": ";", "tab": "\t"}


@dataclass(frozen=True)
class RawLabels:
    """Labels as stored in the data, where `values` are class names (-1 is no label) or the distinct
    cells of a column: text, numbers, true, false, None, or lists of these (several labels)."""

    codes: np.ndarray  # int (num_images,), indices into `values`
    values: Sequence[Any]
    are_classes: bool = False
    several: bool = False  # every value is a tuple of labels; the classes' labels are multi-hot
    class_names: Sequence[str] | None = None  # of columns of 0 and 1
    where: Callable[[int], object] = str  # names an image in errors


def numbered(cells: Iterable[Any]) -> RawLabels:
    numbers: dict[object, int] = {}
    values: list[Any] = []
    codes: list[int] = []
    for cell in cells:
        code = numbers.setdefault(cell if isinstance(cell, str) else (repr(cell),), len(values))
        codes.append(code)
        if code == len(values):
            values.append(cell)
    return RawLabels(np.array(codes, dtype=np.int64), values)


def split_labels(
    splits: Mapping[str, RawLabels], options: Mapping[str, str], name: str
) -> tuple[dict[str, RawLabels], str | None]:
    """Returns the labels, cells split if any split has several labels per image, and a note."""
    asked, separator = options.get("labels"), options.get("separator")
    one_of("labels", asked or "multi", ("single", "multi"), where=name)
    if asked == "single" and separator is not None:
        what = f"labels=single with separator={separator}: one label is not separated"
        raise UserError(what, where=name, fix="Leave out one of them", code="conflict")
    cells = [value for raw in splits.values() if not raw.are_classes for value in raw.values]
    lists = [cell for cell in cells if isinstance(cell, list | tuple)]
    mark = _SEPARATORS.get(separator, separator) if separator else MARK
    is_one_hot = any(raw.class_names is not None for raw in splits.values())
    several = next((cell for cell in lists if len(cell) != 1), None)
    if asked == "single" or (asked is None and is_one_hot and several is None):
        if several is not None:
            what = f"labels=single, and an image has {len(several)} labels: {str(several)[:60]}"
            raise UserError(what, where=name, fix="labels=multi, or correct the data")
        is_multi, note = False, None
    else:
        texts = (cell for cell in cells if isinstance(cell, str))
        marked = (t for t in texts if sum(bool(part.strip()) for part in t.split(MARK)) > 1)
        example = lists[0] if lists else next(marked, None)
        if example is None and asked is separator is None:
            return dict(splits), None
        is_multi, note = True, "multi-label: images have several labels"
        if example is not None:
            note += f", such as {example!r:.60}"
            if not lists and asked is separator is None:
                note += f"; if each has one, with {MARK} in its name: '{name}#labels=single'"

    def parts(cell: Any) -> Any:
        if not is_multi:
            return cell[0] if isinstance(cell, list | tuple) else cell
        if isinstance(cell, list | tuple):
            return tuple(cell)
        if cell is None or str(cell).strip().casefold() in _EMPTY:
            return ()
        return tuple(cell.split(mark)) if isinstance(cell, str) and not lists else (cell,)

    found = dict(splits)
    for split, raw in splits.items():
        if not raw.are_classes:
            names = raw.class_names if is_multi else None
            values = list(map(parts, raw.values))
            found[split] = replace(raw, values=values, several=is_multi, class_names=names)
    return found, note


def make_classes(
    raw: RawLabels, *, are_numbers: bool = False
) -> tuple[list[str], np.ndarray] | None:
    """Returns the class names and the labels, int64 or multi-hot; None if no image has a label."""
    where = raw.where
    if raw.are_classes:
        names = [str(name) for name in raw.values]
        if raw.codes.ndim == 2:  # multi-hot, of a subset
            return names, raw.codes
        labels = np.ascontiguousarray(raw.codes, dtype=np.int64)
        if len(labels) and (labels == -1).all():  # as hub data sets mark unlabelled splits
            return None
        wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
        if len(wrong):
            value, number = int(labels[wrong[0]]), f"{len(wrong):,} such images"
            what = f"label {value} is none of the {len(names)} classes; {number}"
            what = f"the image has no label (-1); {number}" if value == -1 else what
            fix = f"Remove the images without a class from the data; {UNLABELLED}"
            raise UserError(what, where=where(int(wrong[0])), fix=fix)
        return names, labels
    if list(raw.values) == [-1]:
        return None
    if raw.several and are_numbers:
        what = "a label rule needs one label per image, and these have several"
        raise UserError(what, where=where(0), code="multi-label")
    used, first = np.unique(raw.codes, return_index=True)
    texts: dict[int, list[str]] = {}
    rows: dict[str, int] = {}
    for code, row in sorted(zip(used.tolist(), first.tolist(), strict=True), key=lambda at: at[1]):
        value = raw.values[code]
        own = [label_text(item, where(row)) for item in (value if raw.several else (value,))]
        texts[code] = own
        for text in own:
            rows.setdefault(text, row)
    if not are_numbers:  # which may be -1, and 9 beside 9.0
        check_twins(rows, lambda name: where(rows[name]))
        # {-1, 1} and {-2, -1} are valid class sets; next to 0, 1, ... -1 means unlabelled.
        others = rows.keys() - {"-1"}
        if "-1" in rows and others != {"1"} and all(name.isdecimal() for name in others):
            fix = f"Remove these images, or give the class another name; {UNLABELLED}"
            raise UserError("the image has no label (-1)", where=where(rows["-1"]), fix=fix)
    names = in_class_order(rows) if raw.class_names is None else list(raw.class_names)
    if not names:
        return None
    place = {name: at for at, name in enumerate(names)}
    table = np.zeros(len(raw.values), dtype=np.int64)
    if raw.several:
        table = np.zeros((len(raw.values), len(names)), dtype=bool)
    for code, own in texts.items():
        if raw.several:
            table[code, [place[text] for text in own]] = True
        else:
            table[code] = place[own[0]]
    return names, table[raw.codes]


def label_text(value: object, where: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    if text.casefold() in _EMPTY:
        what = f"the label is empty: {text!r}" if text else "the label is empty"
        raise UserError(what, where=where, fix=f"Give it a label, or remove it; {UNLABELLED}")
    if not isinstance(value, int | str):
        what = f"a label is a whole number or text, got {text[:80]}"
        raise UserError(what, where=where, fix="Give every image one label")
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
    """Normalizes spaces, invisible characters, Unicode form and integers ("7" for "007", "7.0")."""
    seen = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    text = " ".join(unicodedata.normalize("NFC", seen).split())
    number = re.fullmatch(r"(-?)0*([0-9]+)(?:\.0*)?", text)
    return number[1] + number[2] if number else text


def check_twins(names: Iterable[str], where: object) -> None:
    """Checks that no two class names differ only in case or spelling (`class_key`), if at all."""
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


def matched_names(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Returns names as they are spelled in `known`, if they are there, compared by `class_key`."""
    # ImageNet models name a class "n01440764 tench"; folders often have the WordNet id alone or a
    # different separator.
    full = {name[:9]: name for name in known if _WORDNET.match(name)}
    exact, spelled = set(known), Counter(map(class_key, known))
    full |= {key: name for name in known if spelled[key := class_key(name)] == 1}

    def matched(name: str) -> str:
        key = name[:9] if _WORDNET.match(name) else name
        return name if name in exact else full.get(key, full.get(class_key(name), name))

    return [matched(name) for name in names]


def match_classes(
    source: Source, class_names: list[str], *, owner: str, allow_missing: bool
) -> Source:
    """Relabels a source in the order of `class_names` of `owner`, as `matched_names` does."""
    names = matched_names(source.class_names, class_names)
    source, known, present = replace(source, class_names=names), set(class_names), set(names)
    unknown = [repr(name) for name in names if name not in known]
    missing = [repr(name) for name in class_names if name not in present]
    if unknown or (missing and not allow_missing):
        what = f"{owner} has {len(class_names)} classes, {source.name} has {len(names)}"
        what += f"; unknown to {owner}: {some_of(unknown)}" if unknown else ""
        what += f"; missing in the data: {some_of(missing)}" if missing else ""
        fix = "Rename or remove those classes, or use a model that was trained on them"
        if not unknown:
            fix = "Add images of them, or set allow_missing_classes"
        raise UserError(what, where=source.name, fix=fix)
    return source if names == class_names else relabel(source, class_names)
