"""Label rules: numbers become classes as VTAB's code makes them, at every edge."""

from __future__ import annotations

import numpy as np
import pytest

from allmlp.data.items import EncodedImages
from allmlp.data.label_rules import LabelRule, apply_rule, is_applied, rule_from_json
from allmlp.errors import UserError

NAN = float("nan")


def slow_between(thresholds: tuple[float, ...], number: float) -> int:
    """As the code of task_adaptation has it: the last threshold below the number."""
    below = np.flatnonzero(np.array(thresholds) - number < 0)
    return int(below.max()) if len(below) else -1


@pytest.mark.parametrize(
    ("rule", "numbers", "classes"),
    [
        (LabelRule("shift", (3, 8)), [3, 4, 10], [0, 1, 7]),
        (LabelRule("shift", (3, 8)), [2, 11, 3.5, NAN, np.inf], [-1] * 5),
        (LabelRule("bins", (32, 16)), [0, 1, 2, 15, 16, 30, 31], [0, 0, 1, 7, 8, 15, 15]),
        (LabelRule("bins", (40, 16)), [0, 2, 3, 4, 5, 7, 8, 39], [0, 0, 1, 1, 2, 2, 3, 15]),
        (LabelRule("bins", (40, 16)), [-1, 40, 2.5, NAN, -np.inf], [-1] * 5),
        (
            LabelRule("between", (0.0, 8.0, 8.5, 100.0)),
            [0.1, 8.0, 8.0001, 8.5, 8.6, 100.0],
            [0, 0, 1, 1, 2, 2],
        ),
        (LabelRule("between", (0.0, 8.0, 8.5, 100.0)), [0.0, -1, 100.1, NAN, np.inf], [-1] * 5),
    ],
)
def test_the_rules(rule: LabelRule, numbers: list[float], classes: list[int]):
    found = rule.classes_of(np.array(numbers, dtype=float))
    assert found.dtype == np.int64
    assert found.tolist() == classes


def test_bins_are_those_of_google():
    """floordiv by 40 / 16, in float32."""
    found = LabelRule("bins", (40, 16)).classes_of(np.arange(40.0))
    assert found.tolist() == np.floor_divide(np.arange(40, dtype=np.float32), 2.5).tolist()
    assert np.bincount(found).tolist() == [3, 2] * 8


def test_between_is_that_of_google():
    thresholds = (-100.0, 8.0, 20.0, 999.0, 1e9)
    numbers = np.concatenate([np.random.default_rng(0).uniform(-99, 1500, 300), thresholds[1:]])
    found = LabelRule("between", thresholds).classes_of(numbers)
    assert found.tolist() == [slow_between(thresholds, each) for each in numbers.tolist()]


def source(names: list[str]) -> EncodedImages:
    return EncodedImages("somewhere", names, np.arange(len(names)), [b""] * len(names), "x")


def test_a_source_under_a_rule():
    rule = LabelRule("between", (0.0, 8.0, 9.0))
    found = apply_rule(source(["9", "3.25", "8.0", "8.01"]), rule)
    assert found.class_names == ["0", "1"]
    assert found.labels.tolist() == [1, 0, 0, 1]
    assert found.item_name(1) == "x[1]"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["4", "near"], "the rule takes numbers, and the data has a class 'near'"),
        (["4", "nan"], "the label 'nan' has no class by the rule: n - 3"),
        (["4", "11"], "the label '11' has no class by the rule: n - 3"),
    ],
)
def test_labels_without_a_class(names: list[str], message: str):
    with pytest.raises(UserError, match=message) as caught:
        apply_rule(source(names), LabelRule("shift", (3, 8)))
    assert caught.value.where == "somewhere"


def test_classes_that_are_there_already():
    rule = LabelRule("bins", (40, 16))
    assert is_applied(rule, ["0", "3", "15"])
    assert not is_applied(rule, ["0", "16"])
    assert not is_applied(rule, ["0", "2.5"])


@pytest.mark.parametrize(
    "values",
    [
        {"rule": "halve", "numbers": [1, 2]},
        {"rule": "bins", "numbers": [8, 16]},
        {"rule": "bins", "numbers": [8.5, 2]},
        {"rule": "bins", "numbers": [8]},
        {"rule": "shift", "numbers": [3, 1]},
        {"rule": "between", "numbers": [0, 1]},
        {"rule": "between", "numbers": [0, 2, 1]},
        {"rule": "between", "numbers": [0, 1, float("inf")]},
        {"rule": "between", "numbers": ["0", 1, 2]},
        {"rule": "between"},
        "between",
    ],
)
def test_what_is_no_rule(values: object):
    with pytest.raises(UserError, match="not a label rule"):
        rule_from_json(values)


def test_a_rule_in_words():
    assert LabelRule("shift", (3, 8)).describe() == "n - 3"
    assert LabelRule("bins", (40, 16)).describe() == "40 values in 16 bins"
    assert LabelRule("between", (0.0, 8.5, 100.0)).describe() == "cut at 0, 8.5, 100"
    assert LabelRule("between", (0.0, 8.5, 100.0)).num_classes == 2
