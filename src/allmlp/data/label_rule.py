"""Label rules: numbers measured on images -> classes, as some benchmarks make their tasks.

Three rules are enough for all of VTAB's; each gives the classes the names "0", "1", ...
    shift    (first, classes)        the number less `first`: 3 to 10 objects are 8 classes
    bins     (values, classes)       neighbours of 0 to values - 1: floor(n * classes / values)
    between  (t0, t1, ..., tn)       class k for t_k < x <= t_k+1: n classes of distances
Source: the preprocessing functions of google-research/task_adaptation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from allmlp.data.source import Source
from allmlp.errors import UserError

RULES = ("shift", "bins", "between")


@dataclass(frozen=True)
class LabelRule:
    """How a number becomes a class.

    Args:
        rule: one of `RULES`.
        numbers: see the module.
    """

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
        """Returns it in words: "n - 3", "40 values in 16 bins", "cut at 0, 8, ..., 100"."""
        words = {"shift": "n - {}", "bins": "{} values in {} bins"}
        listed = [f"{number:g}" for number in self.numbers]
        return words.get(self.rule, f"cut at {', '.join(listed)}").format(*listed)

    def classes_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the classes of numbers, float64 (n,), as int64; -1 for a number without one."""
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
    """Returns whether the classes are the rule's own already: whole numbers below their number."""
    return set(class_names) <= set(map(str, range(rule.num_classes)))


def apply_rule(source: Source, rule: LabelRule) -> Source:
    """Returns the same images under the classes that the rule makes of theirs, such as "9.25"."""
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
    """Returns the rule of {"rule": ..., "numbers": [...]}."""
    try:
        return LabelRule(values["rule"], tuple(values["numbers"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"not a label rule: {str(values)[:200]}") from error
