"""Subset files: JSON files that define splits as parts of another source's; docs/transfer.md."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from allmlp.data.source import Source, join
from allmlp.data.source_spec import SPLITS, SourceSpec, parse_name, part_of
from allmlp.errors import UserError, one_of
from allmlp.io import atomic_write, read_json
from allmlp.names import NAME, is_format
from allmlp.options import validated

SUFFIX = ".json"
FORMAT, VERSION = "allmlp selection", 1


@dataclass(frozen=True)
class LabelRule:
    """Turns numbers measured on images into classes, as in VTAB (google-research/task_adaptation):

    shift    (first, classes)        number - first: 3 to 10 objects are 8 classes
    bins     (values, classes)       equal bins of 0 to values - 1: floor(n * classes / values)
    between  (t0, t1, ..., tn)       class k for t_k < x <= t_k+1: n classes of distances
    """

    rule: Literal["shift", "bins", "between"]
    numbers: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = self.numbers
        fits = all(map(math.isfinite, numbers))
        if self.rule == "between":
            fits = fits and len(numbers) > 2 and all(np.diff(numbers) > 0)
        else:
            fits = fits and len(numbers) == 2 and all(n == round(n) for n in numbers)
            fits = fits and numbers[1] >= 2 and (self.rule == "shift" or numbers[0] >= numbers[1])
        if not fits:
            raise UserError(f"not a label rule: {self.rule!r} of {list(numbers)}")

    @property
    def num_classes(self) -> int:
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


@dataclass(frozen=True)
class SubsetFile:
    source: str  # its paths are relative to the working directory
    splits: dict[str, tuple[str, ...]]  # parts such as "train[:800]" or "test"
    labels: LabelRule | None = None  # None keeps the source's classes

    def __post_init__(self) -> None:
        if not (self.splits and self.splits.keys() <= SPLITS.keys() and all(self.splits.values())):
            fix = '"splits": {"train": ["train[:800]"], "test": ["test"]}'
            raise UserError(f"splits must have lists of parts, got {self.splits}", fix=fix)
        if Path(parse_name(self.source).base).suffix.lower() == SUFFIX:
            what = f"a subset of a subset: source is {self.source!r}"
            raise UserError(what, fix="Name the source itself")


def is_subset_file(spec: SourceSpec) -> bool:
    return spec.path.suffix.lower() == SUFFIX and spec.path.is_file()


def write_subset_file(path: Path, subset: SubsetFile) -> None:
    values = {"format": FORMAT, "version": VERSION, **asdict(subset)}
    if subset.labels is None:
        del values["labels"]
    atomic_write(path, json.dumps(values, indent=2) + "\n")


def read_subset_file(path: Path) -> SubsetFile:
    values = read_json(path, "not a subset of images")
    if not isinstance(values, dict) or not is_format(values.get("format"), FORMAT):
        fix = "As data, a .json file is a subset; see docs/transfer.md. A list is .jsonl"
        raise UserError("not a subset of images", where=path, fix=fix)
    if values.get("version") != VERSION:
        what = f"written by another allmlp (version {str(values.get('version'))[:20]})"
        raise UserError(what, where=path, fix=f"pip install --upgrade {NAME}")
    try:
        return validated(SubsetFile, values)
    except UserError as error:
        raise UserError(error.what, where=path, fix=error.fix) from error


def select(subset: SubsetFile, theirs: Mapping[str, Source], name: str) -> dict[str, Source]:
    if subset.labels is not None:
        theirs = {split: apply_rule(theirs[split], subset.labels) for split in theirs}
    found: dict[str, Source] = {}
    for own in (own for own in SPLITS if own in subset.splits):
        parts: list[Source] = []
        for text in subset.splits[own]:
            split, part = split_and_part(text)
            whole = theirs[one_of("split", split, theirs, where=subset.source)]
            parts.append(part_of(whole, part, f"{subset.source}:{text}") if part else whole)
        found[own] = join(parts, f"{name}:{own}")
    return found


def split_and_part(text: str) -> tuple[str, str]:
    """Returns ("train", "[:800]") for "train[:800]", and ("test", "") for "test"."""
    found = re.fullmatch(rf"({'|'.join(SPLITS)})(\[.*\])?", str(text))
    if found is None:
        fix = "train, validation or test, or a part: train[:800]"
        raise UserError(f"not a part of a source: {str(text)[:80]!r}", fix=fix)
    return found[1], found[2] or ""
