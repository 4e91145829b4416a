"""Class names: their order, those that look the same, and what is matched by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from allmlp.data.classes import check_twins, in_class_order, match_classes, natural_order
from allmlp.data.sources import open_splits
from allmlp.errors import UserError
from conftest import make_class_folder


def test_natural_order_of_classes(tmp_path: Path):
    make_class_folder(tmp_path, {"10": 1, "9": 1, "a2": 1, "a10": 1, "B1": 1})
    names = open_splits(str(tmp_path))["train"].class_names
    assert names == ["9", "10", "a2", "a10", "B1"]
    assert sorted(["2", "x", "x\u00b2", "10"], key=natural_order) == ["2", "10", "x", "x\u00b2"]


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        ("Cat", "cat", ["Cat", "cat"]),
        ("caf\u00e9", "cafe\u0301", [r"'caf\xe9'", r"'cafe\u0301'"]),
        ("cat", "cat ", ["'cat'", "'cat '"]),
        ("cat", "cat\u200b", ["'cat'", r"'cat\u200b'"]),
        ("sea blue", "sea\u00a0blue", ["'sea blue'", r"'sea\xa0blue'"]),
        ("sea blue", "Sea  blue", ["'sea blue'", "'Sea  blue'"]),
        ("0", "0.0", ["'0'", "'0.0'"]),
        ("-7", "-007", ["'-7'", "'-007'"]),
        ("1", "1.", ["'1'", "'1.'"]),
    ],
)
def test_names_that_look_the_same(tmp_path: Path, one: str, other: str, shown: list[str]):
    make_class_folder(tmp_path, {one: 1, other: 1, "dog": 1})
    with pytest.raises(UserError) as refused:
        open_splits(str(tmp_path))
    for name in shown:
        assert name in refused.value.what
    assert "dog" not in str(refused.value)
    with pytest.raises(UserError, match="'dog', 'dog'"):
        check_twins(["cat", "dog", "dog"], "a list of classes")


def test_a_class_is_the_same_in_another_unicode_form(tmp_path: Path):
    """A zip that was packed on macOS has the other form."""
    make_class_folder(tmp_path / "train", {"caf\u00e9": 1, "tea": 2, "7": 1})
    make_class_folder(tmp_path / "test", {"cafe\u0301": 3, "tea ": 1, "07": 2}, start=9)
    test = open_splits(str(tmp_path))["test"]
    assert test.class_names == ["7", "caf\u00e9", "tea"]
    assert np.bincount(test.labels).tolist() == [2, 3, 1]
    assert "cafe\u0301" in test.item_name(2)
    known = ["tea", "cafe\u0301", "7"]
    matched = match_classes(test, known, owner="the model", allow_missing=False)
    assert matched.class_names == known
    assert np.bincount(matched.labels).tolist() == [1, 3, 2]


def test_another_form_of_a_name_that_is_there_twice_is_no_match(class_folder: Path):
    """An old model may know both; and letters may be classes, so that case counts."""
    source = open_splits(str(class_folder))["train"]
    for known in (["ant", "bee", "cat ", "cat."], ["ant", "bee", "cat ", "0", " cat"]):
        if "cat." in known:
            assert match_classes(source, known, owner="x", allow_missing=True).class_names == known
        else:
            with pytest.raises(UserError, match="'cat'"):
                match_classes(source, known, owner="x", allow_missing=True)
    with pytest.raises(UserError, match="'ant'"):
        match_classes(source, ["Ant", "bee", "cat"], owner="x", allow_missing=True)


def test_match_classes_by_name(class_folder: Path):
    source = open_splits(str(class_folder))["train"]
    matched = match_classes(
        source, ["cat", "dog", "ant", "bee"], owner="the model", allow_missing=True
    )
    assert matched.class_names == ["cat", "dog", "ant", "bee"]
    for index in range(len(source)):
        true = source.class_names[source.labels[index]]
        assert matched.class_names[matched.labels[index]] == true
        assert matched.read(index) == source.read(index)
    with pytest.raises(UserError, match=r"'dog'[\s\S]*allow_missing_classes"):
        match_classes(source, ["cat", "dog", "ant", "bee"], owner="the model", allow_missing=False)
    with pytest.raises(UserError, match="'ant', 'bee'"):
        match_classes(source, ["cat"], owner="the model", allow_missing=True)


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["10", "2", "1"], ["1", "2", "10"]),
        (["10", "-2", "007", "7"], ["-2", "007", "7", "10"]),
        (["b10", "b9", "A"], ["A", "b9", "b10"]),
        (["10", "2", "x"], ["2", "10", "x"]),
    ],
)
def test_class_order(names, ordered):
    assert in_class_order(names) == ordered
    assert in_class_order(reversed(names)) == ordered
