"""What a kind of source reads, `Rows`, and which of its columns says what: splits, labels, groups.

Splits, groups, folds and notes are made here for all kinds of sources.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from allmlp.data.classes import RawLabels, numbered
from allmlp.data.source import (
    FOLD,
    GROUP,
    Images,
    PackedStrings,
    Source,
    subset,
    unlabelled,
    values_of,
)
from allmlp.data.source_spec import SPLITS, SourceSpec, split_named
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
    images: Images
    columns: dict[str, Callable[[], RawLabels]]  # read when they are needed
    split: str | None = None  # None: in the column `split` or `is_valid`, or else train
    likely: Sequence[str] = ("label",)  # columns that may be the label, by type or name
    is_labelled: bool = True
    may_be_hot: bool = False  # without a label column, the others may be columns of 0 and 1
    file: object = None  # for messages
    where: Callable[[int], object] | None = None  # a row, for messages; None: its image
    notes: tuple[str, ...] = ()  # one line each
    # Checks the rows, given the split of each and its label; returns a note on some splits.
    check: Callable[[list[str], RawLabels], Mapping[str, str]] = lambda *_: {}
    prepare: Callable[[], object] = lambda: None  # called once in the main process before reading

    def named(self, row: int) -> object:
        return (self.where or self.images.item_name)(row)


@dataclass(frozen=True)
class Kind:
    name: str  # for messages, plural: "Parquet files"
    matches: Callable[[SourceSpec], bool]
    open: Callable[[SourceSpec, bool], Iterable[Rows]]  # True: labels are needed
    options: tuple[str, ...] = ()  # options accepted after "#"


def divide(
    spec: SourceSpec, rows: Rows, labels: bool
) -> Iterator[tuple[str, Source, RawLabels | None]]:
    """Yields every split of the rows: its name, its images still without classes, its labels."""
    labels = labels and rows.is_labelled
    known = {name.casefold(): name for name in reversed(rows.columns)}
    roles = {"split": known.get("split", known.get("is_valid"))}
    if labels:
        roles[FOLD] = known.get(FOLD, known.get("kfold"))
        if GROUP in spec.options and values_of(rows.images, GROUP) is None:
            roles[GROUP] = choose_column(GROUP, spec, [*rows.columns], (), rows.file)
    used = {role: column for role, column in roles.items() if column is not None}
    splits, notes = np.full(len(rows.images), rows.split or "train"), []
    if "split" in used and rows.split is not None:
        notes.append(f"the column {used['split']!r} is not used: the names of the splits say it")
    elif "split" in used:
        notes.append(f"splits by the column {used['split']!r}")
        splits = np.array(_splits(rows, used["split"]))
    columns = {
        role: PackedStrings(_texts(rows, column, role))
        for role, column in used.items()
        if role != "split"
    }
    raw, more = None, {}
    if labels:
        rest = [name for name in rows.columns if name not in used.values()]
        chosen = _label_columns(spec, rows, rest)
        raw = _labels(spec, rows, chosen)
        more = rows.check(splits.tolist(), raw)
        if FOLD in used:
            notes.append(f"the column {used[FOLD]!r} is used by cross-validation (folds) only")
        unused = [n for n in rest if n not in chosen and re.search(_SPLITS_OR_GROUPS, n)]
        if unused:
            why = "a column split or is_valid makes splits, #group=COLUMN keeps groups together"
            notes.append(f"columns that are not used: {', '.join(unused)} ({why})")
    whole = unlabelled(rows.images, "")
    for split in SPLITS:
        at = np.flatnonzero(splits == split)
        if len(at):
            said = (*rows.notes, *(notes if labels else ()), *filter(None, [more.get(split)]))
            source = replace(subset(whole, at, ""), notes=said, columns=columns or whole.columns)
            where = lambda index, at=at: rows.named(int(at[index]))  # noqa: E731
            yield split, source, raw and replace(raw, codes=raw.codes[at], where=where)


def _texts(rows: Rows, column: str, role: str) -> list[str]:
    raw = rows.columns[column]()
    texts = ["" if value is None else str(value).strip() for value in raw.values]
    if "" in texts and role != FOLD:  # test images need none
        row = int(np.flatnonzero(raw.codes == texts.index(""))[0])
        fix = f"Give every row one, or choose another {role}"
        raise UserError(f"the {role} is empty", where=rows.named(row), fix=fix)
    return [texts[code] for code in raw.codes.tolist()]


def _splits(rows: Rows, column: str) -> list[str]:
    texts = _texts(rows, column, "split")
    is_valid = column.casefold() == "is_valid"
    meaning = {t: _IS_VALID.get(t.casefold()) if is_valid else split_named(t) for t in set(texts)}
    for row, text in enumerate(texts):
        if meaning[text] is None:
            fix = f"Known: {', '.join(SPLITS)}; in a column is_valid: true, false"
            what = f"unknown split {text!r} in the column {column!r}"
            raise UserError(what, where=rows.named(row), fix=fix)
    return [str(meaning[text]) for text in texts]


def _is_hot(raw: RawLabels) -> bool:
    return all(str(value).strip().casefold() in _ZERO_ONE for value in raw.values)


def _label_columns(spec: SourceSpec, rows: Rows, rest: Sequence[str]) -> list[str]:
    given = spec.options.get("label", "")
    likely = [name for name in rows.likely if name in rest]
    others = [name for name in rest if not re.search(_SPLITS_OR_GROUPS, name)]
    if rows.may_be_hot and not (likely or given) and len(others) > 1:
        unclear = [name for name in rest if name not in others and _is_hot(rows.columns[name]())]
        if unclear:
            every = "|".join(name for name in rest if name in others or name in unclear)
            what = f"columns of 0 and 1 that may be classes or not: {', '.join(unclear)}"
            fix = f"Name the classes, without what is none: #label={every}"
            raise UserError(what, where=rows.file, fix=fix)
        return others
    names = [given] if "|" not in given or given in rows.columns else given.split("|")
    if len(set(names)) < len(names):
        raise UserError(f"a column is named twice: {given!r}", where=rows.file)
    if given:
        return [one_of("column", name, rows.columns, where=rows.file) for name in names]
    return [choose_column("label", spec, [*rows.columns], likely, rows.file)]


def _labels(spec: SourceSpec, rows: Rows, columns: list[str]) -> RawLabels:
    if len(columns) == 1:
        return rows.columns[columns[0]]()
    hot: list[list[str]] = [[] for _ in range(len(rows.images))]
    for column in columns:
        raw = rows.columns[column]()
        values = [_ZERO_ONE.get(str(value).strip().casefold()) for value in raw.values]
        for row, code in enumerate(raw.codes.tolist()):
            if values[code]:
                hot[row].append(column)
            elif values[code] is None:
                what = f"column {column!r} has {str(raw.values[code])[:40]!r}, not 0 or 1"
                if "label" in spec.options:
                    raise UserError(what, where=rows.named(row), fix="Name columns of 0 and 1")
                fix = f"Name it, or columns of 0 and 1: '{spec.base}#label=COLUMN' or '...=A|B'"
                what = f"no label column found; columns: {', '.join(rows.columns)} ({what})"
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
