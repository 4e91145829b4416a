"""Subset files: small JSON files that define splits by selecting from another source.

    {"format": "allmlp selection", "version": 1, "source": "hf:owner/name",
     "splits": {"train": ["train[:800]", "validation[:200]"], "test": ["test"]},
     "labels": {"rule": "bins", "numbers": [40, 16]}}

A split concatenates parts of the source's splits; no image is copied. The optional `labels` turns
numbers measured on images into classes "0", "1", ..., as some benchmarks define their tasks; three
rules cover all of VTAB (google-research/task_adaptation):
    shift    (first, classes)        number - first: 3 to 10 objects are 8 classes
    bins     (values, classes)       equal bins of 0 to values - 1: floor(n * classes / values)
    between  (t0, t1, ..., tn)       class k for t_k < x <= t_k+1: n classes of distances
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.source import Source, join
from allmlp.data.source_spec import SPLITS, SourceSpec, parse_name, part_of
from allmlp.errors import UserError
from allmlp.io import atomic_write, read_json
from allmlp.names import NAME, is_format

SUFFIX = ".json"
FORMAT, VERSION = "allmlp selection", 1
RULES = ("shift", "bins", "between")


@dataclass(frozen=True)
class LabelRule:
    """Maps numbers to classes by one of `RULES`, described above."""

    rule: str
    numbers: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = self.numbers
        fits = self.rule in RULES and all(
            isinstance(n, int | float) and math.isfinite(n) for n in numbers
        )
        if fits and self.rule == "between":
            fits = len(numbers) > 2 and all(np.diff(numbers) > 0)
        elif fits:
            fits = len(numbers) == 2 and all(n == round(n) for n in numbers) and numbers[1] >= 2
            fits = fits and (self.rule != "bins" or numbers[0] >= numbers[1])
        if not fits:
            what = f"not a label rule: {self.rule!r} of {list(numbers)}"
            raise UserError(what, fix=f"Known: {', '.join(RULES)}")

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.numbers) - 1 if self.rule == "between" else int(self.numbers[1])

    def describe(self) -> str:
        """Returns for example "n - 3", "40 values in 16 bins", "cut at 0, 8, ..., 100"."""
        words = {"shift": "n - {}", "bins": "{} values in {} bins"}
        listed = [f"{number:g}" for number in self.numbers]
        return words.get(self.rule, f"cut at {', '.join(listed)}").format(*listed)

    def classes_of(self, numbers: np.ndarray) -> np.ndarray:
        """Maps numbers, float64 (n,), to classes, int64; -1 for numbers outside all classes."""
        if self.rule == "between":
            found = np.searchsorted(np.array(self.numbers), numbers, side="left") - 1
        else:
            first, classes = self.numbers
            is_whole = np.isfinite(numbers) & (numbers == np.floor(numbers))
            whole = np.where(is_whole, numbers, -np.inf)
            found = whole - first
            if self.rule == "bins":
                found = np.where(whole < first, np.floor(whole / (first / classes)), -1)
        is_class = ~np.isnan(numbers) & (found >= 0) & (found < self.num_classes)
        return np.where(is_class, found, -1).astype(np.int64)


def is_applied(rule: LabelRule, class_names: Sequence[str]) -> bool:
    """Returns whether the rule is applied already: integer classes below its `num_classes`."""
    return set(class_names) <= set(map(str, range(rule.num_classes)))


def apply_rule(source: Source, rule: LabelRule) -> Source:
    """Applies the rule to a source whose class names are numbers, such as "9.25"."""
    try:
        numbers = np.array([float(name) for name in source.class_names])
    except ValueError as error:
        what = f"a label rule needs numbers as classes: {error}"
        raise UserError(what, where=source.name, fix="Choose the column of the numbers") from error
    table = rule.classes_of(numbers)
    wrong = [name for name, at in zip(source.class_names, table, strict=True) if at < 0]
    if wrong:
        what = f"the label {wrong[0]!r} has no class by the rule: {rule.describe()}"
        fix = "Give the labels before the rule, or whole numbers from 0 that are its classes"
        raise UserError(what, where=source.name, fix=fix)
    names = [str(label) for label in range(rule.num_classes)]
    return replace(source, class_names=names, labels=table[source.labels])


def rule_from_json(values: Any) -> LabelRule:
    """Parses {"rule": ..., "numbers": [...]}."""
    try:
        return LabelRule(values["rule"], tuple(values["numbers"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"not a label rule: {str(values)[:200]}") from error


@dataclass(frozen=True)
class SubsetFile:
    """The contents of a subset file.

    Args:
        source: name of the source; paths are relative to the working directory.
        splits: split -> parts, such as "train[:800]" or "test".
        labels: rule applied to the labels; None keeps the source's classes.
    """

    source: str
    splits: dict[str, tuple[str, ...]]
    labels: LabelRule | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        values: dict[str, Any] = {"format": FORMAT, "version": VERSION, "source": self.source}
        values["splits"] = {name: list(parts) for name, parts in self.splits.items()}
        if self.labels is not None:
            values["labels"] = {"rule": self.labels.rule, "numbers": list(self.labels.numbers)}
        return values


def is_subset_file(spec: SourceSpec) -> bool:
    """Whether the name is a subset file."""
    return spec.path.suffix.lower() == SUFFIX and spec.path.is_file()


def write_subset_file(path: Path, subset: SubsetFile) -> None:
    """Writes a subset file atomically."""
    text = json.dumps(subset.to_json(), indent=2) + "\n"
    atomic_write(path, text.encode(errors="surrogateescape"))


def read_subset_file(path: Path) -> SubsetFile:
    """Reads a subset file."""
    values = read_json(path, "not a subset of images")
    if not isinstance(values, dict) or not is_format(values.get("format"), FORMAT):
        fix = "As data, a .json file is a subset; see docs/transfer.md. A list is .jsonl"
        raise UserError("not a subset of images", where=path, fix=fix)
    if values.get("version") != VERSION:
        what = f"written by another allmlp (version {str(values.get('version'))[:20]})"
        raise UserError(what, where=path, fix=f"pip install --upgrade {NAME}")
    rule = None if values.get("labels") is None else rule_from_json(values["labels"])
    try:
        source, splits = values["source"], values["splits"]
        base = Path(parse_name(source).base)
        is_valid = splits.keys() <= SPLITS.keys() and all(splits.values())
        if not (splits and is_valid and all(type(parts) is list for parts in splits.values())):
            raise ValueError(splits)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = "the subset has no source, or its splits are not lists of parts"
        fix = '"source": "NAME", "splits": {"train": ["train[:800]"], "test": ["test"]}'
        raise UserError(what, where=path, fix=fix) from error
    if base.suffix.lower() == SUFFIX:
        what = f"a subset of a subset: {source!r}"
        raise UserError(what, where=path, fix="Name the source itself")
    return SubsetFile(source, {split: tuple(parts) for split, parts in splits.items()}, rule)


def select(subset: SubsetFile, theirs: Mapping[str, Source], name: str) -> dict[str, Source]:
    """Returns the splits of a subset, given the splits of its source."""
    if subset.labels is not None:
        theirs = {split: apply_rule(theirs[split], subset.labels) for split in theirs}
    found: dict[str, Source] = {}
    for split in (split for split in SPLITS if split in subset.splits):
        parts = [_part(theirs, text, subset.source) for text in subset.splits[split]]
        found[split] = join(parts, f"{name}:{split}")
    return found


def _part(theirs: Mapping[str, Source], text: str, source: str) -> Source:
    split, part = split_and_part(text)
    if split not in theirs:
        fix = f"Known there: {', '.join(theirs)}"
        raise UserError(f"the data has no {split} split", where=source, fix=fix)
    whole = theirs[split]
    return part_of(whole, part, f"{source}:{text}") if part else whole


def split_and_part(text: str) -> tuple[str, str]:
    """Returns ("train", "[:800]") for "train[:800]", and ("test", "") for "test"."""
    found = re.fullmatch(rf"({'|'.join(SPLITS)})(\[.*\])?", str(text))
    if found is None:
        fix = "train, validation or test, or a part: train[:800]"
        raise UserError(f"not a part of a source: {str(text)[:80]!r}", fix=fix)
    return found[1], found[2] or ""
