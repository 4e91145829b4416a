"""Selections: a JSON file that says which images of another source make up the splits."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

import allmlp as am
from allmlp.data.label_rules import LabelRule
from allmlp.data.selections import Selection, read_selection, write_selection
from allmlp.data.sources import is_data, open_source, open_splits, open_unmatched
from conftest import draw, make_class_folder

WHOLE = {"format": "allmlp selection", "version": 1, "source": "digits"}


def write(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps({**WHOLE, "splits": {"train": ["train"]}, **changes}))
    return path


def test_parts_of_several_splits_become_one(class_folder: Path, tmp_path: Path):
    file = tmp_path / "some.json"
    parts = {"train": ("train[:8]", "validation[:3]"), "test": ("validation[3:]",)}
    write_selection(file, Selection(str(class_folder), parts))
    assert read_selection(file) == Selection(str(class_folder), parts)
    splits = open_splits(str(file))
    assert {name: len(split) for name, split in splits.items()} == {"train": 11, "test": 6}
    whole, train = open_splits(str(class_folder)), splits["train"]
    assert train.class_names == ["ant", "bee", "cat"]
    assert train.name == f"{file}:train"
    files = {name: {whole[name].item_name(at) for at in range(len(whole[name]))} for name in whole}
    names = [train.item_name(at) for at in range(11)]
    assert set(names[:8]) < files["train"]
    assert set(names[8:]) < files["validation"]
    assert len(set(names)) == 11
    for at, name in enumerate(names):
        assert train.read(at) == Path(name).read_bytes()
        assert Path(name).parent.name == train.class_names[train.labels[at]]
    test = {splits["test"].item_name(at) for at in range(6)}
    assert test == files["validation"] - set(names)
    for index in (-1, 11):
        with pytest.raises(IndexError):
            train.read(index)
    assert pickle.loads(pickle.dumps(train)).item_name(10) == names[10]
    assert is_data(str(file))
    assert len(open_source(f"{file}:train[:50%]")) == 5


def test_a_selection_trains(class_folder: Path, tmp_path: Path):
    file = tmp_path / "some.json"
    splits = {"train": ("train",), "validation": ("validation[:6]",), "test": ("validation[6:]",)}
    write_selection(file, Selection(str(class_folder), splits))
    config = am.recipe("digits").with_values(
        {"data.source": str(file), "output": str(tmp_path / "run"), "epochs": 1, "device": "cpu"}
    )
    result = am.train(config, quiet=True)
    assert result.validation is not None
    assert result.test is not None
    assert (len(result.validation.labels), len(result.test.labels)) == (6, 3)


def test_numbers_become_classes(tmp_path: Path):
    """A distance of the test images need not be one of the training images."""
    draw(0).save(tmp_path / "0.png")
    rows = [("train", 1.5), ("train", 9.25), ("train", 3), ("test", 8.0), ("test", 8.125)]
    rows += [("test", 8), ("train", -1)]
    lines = ["path,distance,split"]
    lines += [f"{at}.png,{number},{split}" for at, (split, number) in enumerate(rows)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    source = f"{tmp_path / 'list.csv'}#label=distance"
    with pytest.raises(am.UserError, match="'8.0' .*, '8'"):
        open_splits(source)
    assert len(open_unmatched(source)["test"]) == 3
    file, rule = tmp_path / "near.json", LabelRule("between", (-2.0, 8.0, 100.0))
    write_selection(file, Selection(source, {"train": ("train",), "test": ("test",)}, rule))
    splits = open_splits(str(file))
    assert splits["train"].class_names == splits["test"].class_names == ["0", "1"]
    assert splits["train"].labels.tolist() == [0, 1, 0, 0]
    assert splits["test"].labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a selection of images"),
        ({"version": 2}, r"written by another allmlp \(version 2\)"),
        ({"source": None}, "has no source, or its splits are not lists"),
        ({"splits": {}}, "has no source, or its splits are not lists"),
        ({"splits": {"train": []}}, "has no source, or its splits are not lists"),
        ({"splits": {"train": "train"}}, "has no source, or its splits are not lists"),
        ({"splits": {"learn": ["train"]}}, "has no source, or its splits are not lists"),
        ({"splits": {"train": ["train[:5]x"]}}, r"not a part of a source: 'train\[:5\]x'"),
        ({"splits": {"train": ["all"]}}, "not a part of a source: 'all'"),
        ({"splits": {"train": ["train[5]"]}}, r"not a part of a split: '\[5\]'"),
        ({"splits": {"train": ["train[:9999]"]}}, "only some images in"),
        ({"source": "FOLDER", "splits": {"test": ["test"]}}, "the data has no test split"),
        ({"source": "nowhere"}, "no such data: 'nowhere'"),
        ({"source": "other.json"}, "a selection of a selection: 'other.json'"),
        ({"source": "other.json:train"}, "a selection of a selection"),
        ({"labels": {"rule": "x", "numbers": []}}, "not a label rule: 'x'"),
        ({"labels": {"rule": "shift", "numbers": [3, 8]}}, "label '0' has no class by the rule"),
    ],
)
def test_what_is_no_selection(class_folder: Path, changes: dict, message: str):
    file = class_folder.parent / "s.json"
    if changes.get("source") == "FOLDER":
        changes = {**changes, "source": str(class_folder)}
    write(file, **changes)
    with pytest.raises(am.UserError, match=message):
        open_splits(str(file))


def test_files_that_are_no_selection(tmp_path: Path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(am.UserError, match=r"not a selection of images: Expecting"):
        open_splits(str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text("[" * 100_000)
    with pytest.raises(am.UserError, match=r"not a selection of images"):
        open_splits(str(tmp_path / "b.json"))
    (tmp_path / "c.json").mkdir()
    make_class_folder(tmp_path / "c.json", {"a": 1, "b": 1})
    assert len(open_splits(str(tmp_path / "c.json"))["train"]) == 2  # a folder of that name
    with pytest.raises(am.UserError, match="the option 'label' means nothing for a selection"):
        open_splits(f"{write(tmp_path / 'd.json')}#label=x")
