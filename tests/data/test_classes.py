"""Class names: their order, those that look the same, and what is matched by them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from allmlp.data.check import check_source
from allmlp.data.classes import check_twins, match_classes
from allmlp.data.fingerprint import fingerprint
from allmlp.data.groups import split_by_class
from allmlp.data.loader import evaluation_batches
from allmlp.data.source import Source, subset
from allmlp.data.sources import notes_of, open_source, open_splits
from allmlp.data.sources.packed import pack_splits
from allmlp.errors import UserError
from allmlp.preprocessing import Preprocessing
from conftest import make_class_folder, user_error


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        ("Cat", "cat", ["Cat", "cat"]),
        ("caf\u00e9", "cafe\u0301", [r"'caf\xe9'", r"'cafe\u0301'"]),
        ("cat", "cat\u200b", ["'cat'", r"'cat\u200b'"]),
        ("sea blue", "sea\u00a0blue", ["'sea blue'", r"'sea\xa0blue'"]),
        ("0", "0.0", ["'0'", "'0.0'"]),
        ("-7", "-007", ["'-7'", "'-007'"]),
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


def test_another_form_of_a_name_that_is_there_twice_is_no_match(source: Source):
    """An old model may know both; and letters may be classes, so that case counts."""
    known = ["ant", "bee", "cat ", "cat."]
    assert match_classes(source, known, owner="x", allow_missing=True).class_names == known
    for name, others in (("cat", ["ant", "bee", "cat ", " cat"]), ("ant", ["Ant", "bee", "cat"])):
        with pytest.raises(UserError, match=f"'{name}'"):
            match_classes(source, others, owner="x", allow_missing=True)


def test_match_classes_by_name(source: Source):
    known = ["cat", "dog", "ant", "bee"]
    matched = match_classes(source, known, owner="the model", allow_missing=True)
    assert matched.class_names == known
    for index in range(len(source)):
        true = source.class_names[source.labels[index]]
        assert matched.class_names[matched.labels[index]] == true
        assert matched.read(index) == source.read(index)
    with pytest.raises(UserError, match=r"'dog'[\s\S]*allow_missing_classes"):
        match_classes(source, known, owner="the model", allow_missing=False)
    with pytest.raises(UserError, match="'ant', 'bee'"):
        match_classes(source, ["cat"], owner="the model", allow_missing=True)


# Several labels per image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with images a/0.png to a/5.png."""
    return make_class_folder(tmp_path, {"a": 6})


def opened(folder: Path, text: str, options: str = "", name: str = "list.csv") -> Source:
    (folder / name).write_text(text)
    return open_source(f"{folder / name}{options}")


def texts(source: Source) -> list[str]:
    return [source.label_text(at) for at in range(len(source))]


def parquet(folder: Path, columns: dict[str, object], features: object = None) -> Source:
    images = [{"bytes": (folder / f"a/{at}.png").read_bytes(), "path": ""} for at in range(3)]
    table = pa.table({"image": images, **columns})
    if features is not None:
        described = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": described})
    pq.write_table(table, folder / "x.parquet")
    options = "#label=cat|dog" if len(columns) > 1 else ""
    return open_source(f"{folder / 'x.parquet'}{options}")


CSV = "path,label\na/0.png,cat|dog\na/1.png,dog\na/2.png,\n"


def test_labels_in_a_cell_are_multi_hot(images: Path):
    source = opened(images, CSV)
    assert source.class_names == ["cat", "dog"]
    assert source.labels.tolist() == [[True, True], [False, True], [False, False]]
    assert texts(source) == ["cat|dog", "dog", ""]
    assert "labels=single" in " ".join(notes_of({"": source}))


def test_a_mark_in_the_name_of_a_class(images: Path):
    source = opened(images, CSV.replace("a/2.png,\n", ""), "#labels=single")
    assert source.class_names == ["cat|dog", "dog"]
    assert source.labels.tolist() == [0, 1]
    source = opened(images, "path,label\na/0.png,x\na/1.png,y|\n")  # no two labels in a cell
    assert source.labels.tolist() == [0, 1]
    assert notes_of({"": source}) == []


@pytest.mark.parametrize(
    ("options", "cells", "expected"),
    [
        ("#separator=space", ("haze primary", "haze"), ["haze|primary", "haze"]),
        ("#separator=comma", ('"haze, primary"', "haze"), ["haze|primary", "haze"]),
        ("#labels=multi", ("a", ""), ["a", ""]),
    ],
)
def test_separator_and_labels(images: Path, options: str, cells: tuple[str, str], expected: object):
    text = f"path,label\na/0.png,{cells[0]}\na/1.png,{cells[1]}\n"
    assert texts(opened(images, text, options)) == expected


def test_columns_of_zero_and_one(images: Path):
    several = opened(images, "path,cat,dog\na/0.png,1,1\na/1.png,0,0\na/2.png,0.0,1.0\n")
    assert texts(several) == ["cat|dog", "", "dog"]
    one = opened(images, "path,cat,dog\na/0.png,1,0\na/1.png,0,1\n")
    assert one.labels.tolist() == [0, 1]  # one label per image
    text = "path,age,cat,dog\na/0.png,31,1,0\na/1.png,40,0,1\n"
    assert texts(opened(images, text, "#label=cat|dog,labels=multi")) == ["cat", "dog"]
    text = "path,car,cat,person\na/0.png,1,0,1\na/1.png,0,1,1\n"
    with pytest.raises(UserError, match="person"):  # which may mean something else
        opened(images, text)
    assert opened(images, text, "#label=car|cat|person").class_names == ["car", "cat", "person"]


@pytest.mark.parametrize(
    ("text", "options", "what"),
    [
        ("path,cat,dog\na/0.png,1,7\n", "", "no label column found"),
        ("path,x,cat,dog\na/0.png,1,1,0\n", "#label=cat|bird", "'bird'"),
        ("path,cat,dog\na/0.png,1,2\n", "#label=cat|dog", "'2'"),
        ("path,label\na/0.png,cat||dog\n", "", "empty"),
        ("path,label\na/0.png,cat\n", "#labels=single,separator=;", "separator"),
    ],
)
def test_wrong_data_and_options(images: Path, text: str, options: str, what: str):
    with pytest.raises(UserError, match=what.replace("|", r"\|")):
        opened(images, text, options)


def test_json_lists(images: Path):
    rows = [{"path": "a/0.png", "labels": ["cat", "a|b"]}, {"path": "a/1.png", "labels": []}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    source = opened(images, text, name="list.jsonl")
    assert source.class_names == ["a|b", "cat"]
    assert source.labels.tolist() == [[True, True], [False, False]]


def test_parquet_lists_and_columns(images: Path):
    several = parquet(images, {"label": [["cat", "dog"], [], ["cat"]]})
    assert texts(several) == ["cat|dog", "", "cat"]
    assert parquet(images, {"label": [[2, 10], [10], None]}).class_names == ["2", "10"]
    classes = {"_type": "ClassLabel", "names": ["zebra", "ant"]}
    for feature in ({"_type": "Sequence", "feature": classes}, [classes]):
        source = parquet(images, {"label": [[0, 1], [1], []]}, {"label": feature})
        assert texts(source) == ["ant|zebra", "ant", ""]
    hot = parquet(images, {"id": [7, 8, 9], "cat": [1, 0, 1], "dog": [True, False, False]})
    assert texts(hot) == ["cat|dog", "", "cat"]


def test_operations_on_a_source(images: Path):
    source = opened(images, CSV)
    matched = match_classes(source, ["dog", "bird", "cat"], owner="x", allow_missing=True)
    assert matched.labels.tolist() == [[True, False, True], [True, False, False], [False] * 3]
    assert fingerprint(source) != fingerprint(replace(source, labels=~source.labels))
    assert source.class_counts().tolist() == [1, 2]
    assert subset(source, source.of_class(1), "x").labels.tolist() == [[True, True], [False, True]]
    preprocessing = Preprocessing(image_size=(8, 8), channels=3)
    (batch,) = evaluation_batches(source, preprocessing, batch_size=4, num_workers=0)
    assert batch.labels.tolist() == source.labels.tolist()


def test_check_counts_labels_and_pack_refuses(images: Path, tmp_path: Path):
    source = opened(images, CSV)
    split = check_source({"train": source}, "x", num_workers=0)[0]["splits"]["train"]
    assert split["labels_per_image"] == {"0": 1, "1": 1, "2": 1}
    assert split["class_counts"] == {"cat": 1, "dog": 2}
    with user_error("multi-label"):
        pack_splits({"train": source}, tmp_path / "packed")


def test_the_held_out_images_have_every_label():
    random = np.random.default_rng(0)
    labels = random.random((400, 12)) < np.geomspace(0.5, 0.008, 12)
    labels[:2, 11] = True  # at least two images
    kept, held_out = split_by_class(labels, 0.1, seed=0)
    assert sorted([*kept, *held_out]) == list(range(400))
    there, away = labels[kept].sum(axis=0), labels[held_out].sum(axis=0)
    assert (there[there + away > 1] > 0).all()
    assert (away[there + away > 1] > 0).all()
    assert np.abs(away - 0.1 * (there + away)).max() < 0.05 * 400
    assert 30 <= len(held_out) <= 50
    again = split_by_class(labels, 0.1, seed=0)
    assert np.array_equal(again[1], held_out)
