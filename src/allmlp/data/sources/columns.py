"""Rows with columns (of a list, of Parquet files, of the hub): which column has which role.

A reader gives `Rows`; their splits, labels, groups and folds are made here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from allmlp.data.classes import RawLabels, numbered
from allmlp.data.source import FOLD, GROUP, Images, PackedStrings, Source
from allmlp.data.source_spec import SPLITS, Records, SourceSpec, split_named
from allmlp.errors import UserError, one_of

LABEL_COLUMNS = ("label", "labels", "class", "target")
_IS_VALID: dict[str, str] = dict.fromkeys(("true", "1", "1.0", "yes"), "validation")
_IS_VALID |= dict.fromkeys(("false", "0", "0.0", "no"), "train")
_ZERO_ONE = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
# Columns that users may expect to be used.
_SPLITS_OR_GROUPS = (
    r"(?i)(?<![a-z])(is_?)?(val|valid|validation|test|train|training|holdout|set|subset|partition|phase"
    r"|folds?|groups?|patients?|subjects?|persons?|video|clip|sequence|session|site|slide|study)"
    r"[-_ ]?(id|no|nr|num|number|name|idx|index)?(?![a-z])"
)


@dataclass(frozen=True)
class Rows:
    """Images and the columns beside them."""

    images: Images
    image_column: str
    names: Sequence[str]  # of all columns
    cells: Callable[[str], RawLabels]  # reads a column
    label_columns: Sequence[str]  # what may be the label, by type or name
    where: Callable[[int], str]  # a row, for messages
    file: object  # for messages
    may_be_hot: bool = False  # without a label column, the others may be columns of 0 and 1

    def texts(self, column: str, role: str) -> list[str]:
        """Returns the cells of a column as text; an empty one is an error."""
        raw = self.cells(column)
        texts = ["" if value is None else str(value).strip() for value in raw.values]
        if "" in texts and role != FOLD:  # test images need none
            row = int(np.flatnonzero(raw.codes == texts.index(""))[0])
            fix = f"Give every row one, or choose another {role}"
            raise UserError(f"the {role} is empty", where=self.where(row), fix=fix)
        return [texts[code] for code in raw.codes.tolist()]


def open_rows(
    spec: SourceSpec, rows: Rows, labels: bool, *, split: str | None = None
) -> dict[str, Records]:
    """Returns the rows by split: the one given, else by the column `split` or `is_valid`."""
    rest = [name for name in rows.names if name != rows.image_column]
    known = {name.casefold(): name for name in reversed(rest)}
    roles = {"split": known.get("split", known.get("is_valid"))}
    if labels:
        roles[FOLD] = known.get(FOLD, known.get("kfold"))
        if GROUP in spec.options:
            roles[GROUP] = choose_column(GROUP, spec, rest, (), rows.file)
    used = {role: column for role, column in roles.items() if column is not None}
    splits, notes = np.full(len(rows.images), list(SPLITS).index(split or "train")), []
    if "split" in used and split is not None:
        notes.append(f"the column {used['split']!r} is not used: the names of the splits say it")
    elif "split" in used:
        notes.append(f"splits by the column {used['split']!r}")
        splits = _splits(rows, used["split"])
    columns = {
        role: PackedStrings(rows.texts(column, role))
        for role, column in used.items()
        if role != "split"
    }
    raw = None
    if labels:
        rest = [name for name in rest if name not in used.values()]
        chosen = _label_columns(spec, rows, rest)
        raw = _labels(spec, rows, chosen)
        if FOLD in used:
            notes.append(f"the column {used[FOLD]!r} is used by cross-validation (folds) only")
        unused = [n for n in rest if n not in chosen and re.search(_SPLITS_OR_GROUPS, n)]
        if unused:
            why = "a column split or is_valid makes splits, #group=COLUMN keeps groups together"
            notes.append(f"columns that are not used: {', '.join(unused)} ({why})")
    found: dict[str, Records] = {}
    for number, name in enumerate(SPLITS):
        at = np.flatnonzero(splits == number)
        if len(at):
            source = Source(name, [], at, rows.images, at, columns=columns)  # labels follow later
            own = None if raw is None else _some(raw, rows, at)
            found[name] = Records(source, own, tuple(notes) if labels else ())
    return found


def _some(raw: RawLabels, rows: Rows, at: np.ndarray) -> RawLabels:
    return replace(raw, codes=raw.codes[at], where=lambda index: rows.where(int(at[index])))


def _splits(rows: Rows, column: str) -> np.ndarray:
    texts = rows.texts(column, "split")
    is_valid = column.casefold() == "is_valid"
    meaning = {t: _IS_VALID.get(t.casefold()) if is_valid else split_named(t) for t in set(texts)}
    for row, text in enumerate(texts):
        if meaning[text] is None:
            fix = f"Known: {', '.join(SPLITS)}; in a column is_valid: true, false"
            what = f"unknown split {text!r} in the column {column!r}"
            raise UserError(what, where=rows.where(row), fix=fix)
    numbers = {split: number for number, split in enumerate(SPLITS)}
    return np.array([numbers[str(meaning[text])] for text in texts])


def _is_hot(raw: RawLabels) -> bool:
    return all(str(value).strip().casefold() in _ZERO_ONE for value in raw.values)


def _label_columns(spec: SourceSpec, rows: Rows, rest: Sequence[str]) -> list[str]:
    """Returns the label column, or the columns of 0 and 1 in label=A|B|C."""
    given = spec.options.get("label", "")
    likely = [name for name in rows.label_columns if name in rest]
    others = [name for name in rest if not re.search(_SPLITS_OR_GROUPS, name)]
    if rows.may_be_hot and not (likely or given) and len(others) > 1:
        unclear = [name for name in rest if name not in others and _is_hot(rows.cells(name))]
        if unclear:
            every = "|".join(name for name in rest if name in others or name in unclear)
            what = f"columns of 0 and 1 that may be classes or not: {', '.join(unclear)}"
            raise UserError(
                what, where=rows.file, fix=f"Name the classes, without what is none: #label={every}"
            )
        return others
    named = [given] if "|" not in given or given in rows.names else given.split("|")
    if len(set(named)) < len(named):
        raise UserError(f"a column is named twice: {given!r}", where=rows.file)
    return [
        choose_column(
            *("label", replace(spec, options={"label": name} if name else {}), rows.names, likely),
            rows.file,
        )
        for name in named
    ]


def _labels(spec: SourceSpec, rows: Rows, columns: list[str]) -> RawLabels:
    if len(columns) == 1:
        return rows.cells(columns[0])
    hot: list[list[str]] = [[] for _ in range(len(rows.images))]
    for column in columns:
        raw = rows.cells(column)
        values = [_ZERO_ONE.get(str(value).strip().casefold()) for value in raw.values]
        for row, code in enumerate(raw.codes.tolist()):
            if values[code]:
                hot[row].append(column)
            elif values[code] is None:
                what = f"column {column!r} has {str(raw.values[code])[:40]!r}, not 0 or 1"
                if "label" in spec.options:
                    raise UserError(what, where=rows.where(row), fix="Name columns of 0 and 1")
                fix = f"Name it, or columns of 0 and 1: '{spec.base}#label=COLUMN' or '...=A|B'"
                what = f"no label column found; columns: {', '.join(rows.names)} ({what})"
                raise UserError(what, where=rows.file, fix=fix)
    return replace(numbered(map(tuple, hot)), class_names=columns)


def choose_column(
    role: str, spec: SourceSpec, columns: Sequence[str], likely: Sequence[str], where: Any
) -> str:
    """Returns the column given by the option `role`, else the only likely one, or that named so."""
    given = spec.options.get(role)
    if given is not None:
        return one_of("column", given, columns, where=where)
    exact = [name for name in likely if name.casefold() == role]
    if len(likely) == 1 or exact:
        return (exact or likely)[0]
    if likely:
        what = f"several {role} columns: {', '.join(likely)}"
        raise UserError(what, where=where, fix=f"Choose one: '{spec.base}#{role}={likely[0]}'")
    what = f"no {role} column found; columns: {', '.join(columns) or 'none'}"
    raise UserError(what, where=where, fix=f"Name it: '{spec.base}#{role}=COLUMN'")
