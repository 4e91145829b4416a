"""Names of sources, their splits and parts, subset files, and data without labels."""

import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from allmlp.data.groups import split_by_class
from allmlp.data.image import decode
from allmlp.data.source import Source
from allmlp.data.source_spec import SourceSpec, by_split, parse_name
from allmlp.data.sources import is_data, names_source, open_source, open_splits, parquet
from allmlp.data.sources.packed import pack_splits
from allmlp.data.sources.subset_file import (
    LabelRule,
    SubsetFile,
    is_applied,
    read_subset_file,
    write_subset_file,
)
from allmlp.errors import UserError
from allmlp.training.dataset import check_readable
from conftest import draw, make_class_folder

NAN = float("nan")


def test_the_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    known, seen = datasets.load_digits(), set()
    splits = open_splits("digits")
    assert [len(source) for source in splits.values()] == [1259, 179, 359]
    for source in splits.values():
        assert source.class_names == [str(digit) for digit in range(10)]
        counts = np.bincount(source.labels)
        assert counts.max() - counts.min() <= 7  # stratified; the data itself differs by 9
        for index in range(len(source)):
            at = int(source.item_name(index).removeprefix("digits[").removesuffix("]"))
            seen.add(at)
            expected = np.round(known.images[at] * (255 / 16)).astype(np.uint8)
            assert (decode(source.read(index), "x", 1)[..., 0] == expected).all()
            assert source.labels[index] == known.target[at]
    assert len(seen) == 1797


def test_other_splits_of_the_digits():
    first, second = open_splits("digits@1"), open_splits("digits@2")
    names = [{s["test"].item_name(i) for i in range(359)} for s in (first, second)]
    assert len(names[0] | names[1]) > 500
    assert (open_splits("digits@0")["test"].labels == open_splits("digits")["test"].labels).all()
    with pytest.raises(UserError, match="digits@x"):
        open_splits("digits@x")


@pytest.mark.parametrize("counts", [(10, 10), (2, 7), (1, 5), (100, 3)])
def test_split_by_class(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    kept, held_out = split_by_class(labels, 0.3, seed=0)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        expected = 0 if count == 1 else min(max(round(0.3 * count), 1), count - 1)
        assert (labels[held_out] == label).sum() == expected
    assert (split_by_class(labels, 0.3, seed=0)[1] == held_out).all()


def test_which_split_a_name_means(class_folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert open_source(str(class_folder)).name.endswith(":validation")
    assert len(open_source(f"{class_folder}:train")) == 20
    make_class_folder(class_folder / "test", {"ant": 1, "bee": 1, "cat": 1})
    assert len(open_source(str(class_folder))) == 3
    with pytest.raises(UserError, match=r"unknown split .validation.[\s\S]*Known: train"):
        open_source(f"{class_folder / 'train'}:validation")
    monkeypatch.chdir(class_folder)
    assert names_source("digits:test")
    assert names_source("digits@1:test")
    assert not names_source("photo.jpg")
    (class_folder / "digits").mkdir()
    assert not names_source("digits")


def test_a_split_is_matched_by_name_not_by_position(class_folder: Path):
    """A missing class in val/ must not shift the labels of those behind it."""
    for path in (class_folder / "val" / "ant").iterdir():
        path.unlink()
    (class_folder / "val" / "ant").rmdir()
    validation = open_splits(str(class_folder))["validation"]
    assert validation.class_names == ["ant", "bee", "cat"]
    for index in range(6):
        folder = Path(validation.item_name(index)).parent.name
        assert folder == validation.class_names[validation.labels[index]]
    make_class_folder(class_folder / "val", {"dog": 1})
    with pytest.raises(UserError, match="'dog'"):
        open_splits(str(class_folder))
    assert len(open_source(str(class_folder), labels="any")) == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nowhere/at/all", "nowhere/at/all"),
        ("{folder}/dta", "Did you mean data"),
        ("{folder}/x.doc", "x.doc"),
        ("", "digits"),
        ("x#lable=y", "Did you mean label"),
        ("x#label=y,label=z", "'label=z'"),
        ("x:holdout[:3]", "'holdout'"),
        ("digits[:90%]", "SOURCE:train[:90%]"),
        ("digits#label=y", "'label'"),
    ],
)
def test_names_of_nothing(class_folder: Path, name: str, value: str):
    (class_folder.parent / "x.doc").write_text("x")
    with pytest.raises(UserError) as error:
        open_splits(name.format(folder=class_folder.parent))
    assert value in str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x", SourceSpec("x")),
        ("x:val", SourceSpec("x", {}, "validation")),
        ("x:train[:90%]", SourceSpec("x", {}, "train", "[:90%]")),
        ("x#label=a,image=b", SourceSpec("x", {"label": "a", "image": "b"})),
        ("x#label=a:test[1:2]", SourceSpec("x", {"label": "a"}, "test", "[1:2]")),
        ("x:test[1:2]#label=a", SourceSpec("x", {"label": "a"}, "test", "[1:2]")),
        ("C:\\data:train", SourceSpec("C:\\data", {}, "train")),
        ("hf:a/b@main#config=c", SourceSpec("hf:a/b@main", {"config": "c"})),
        ("a#b", SourceSpec("a#b")),
        ("d/x_[ab].parquet:test", SourceSpec("d/x_[ab].parquet", {}, "test")),
    ],
)
def test_the_parts_of_a_name(name, expected):
    assert parse_name(name) == expected


def test_names_of_files_that_exist_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:train", "b#label=x", "c:test[1:2]", "d"):
        make_class_folder(tmp_path / name, {"ant": 1, "bee": 1})
        assert parse_name(name) == SourceSpec(name)
        assert len(open_source(name)) == 2
        assert parse_name(f"{name}:train[:1]") == SourceSpec(name, {}, "train", "[:1]")
        assert parse_name(f"{name}#label=y").options == {"label": "y"}


@pytest.mark.parametrize("percent", ["0.5", "33.3", "99.9"])
def test_two_parts_are_disjoint_and_complete(percent):
    whole = open_source("digits:train")
    first = open_source(f"digits:train[:{percent}%]")
    second = open_source(f"digits:train[{percent}%:]")
    assert len(first) == int(1259 * float(percent) / 100)
    names = [s.item_name(at) for s in (first, second) for at in range(len(s))]
    assert names == [whole.item_name(at) for at in range(1259)]
    assert [*first.labels, *second.labels] == whole.labels.tolist()
    assert second.read(1) == whole.read(len(first) + 1)


def test_parts_by_number():
    whole, part = open_source("digits:test"), open_splits("digits:test[100:200]")["test"]
    assert part.name == "digits:test[100:200]"
    assert [part.item_name(at) for at in (0, 99)] == [whole.item_name(at) for at in (100, 199)]
    assert len(open_source("digits:test[ 350 : ]")) == 9
    for text in ("[", "[]", "[a:b]", "[:90%", "[-3:]", "[::2]", "[:360]", "[5:5]", "[:101%]"):
        with pytest.raises(UserError, match=r"SOURCE:train\[:90%\]"):
            open_source(f"digits:test{text}")


def test_parts_of_class_folders_have_every_class(tmp_path: Path):
    """In the order of the files the last part would lack all classes but the last."""
    make_class_folder(tmp_path, {"ant": 10, "bee": 20, "cat": 30})
    whole = open_source(f"{tmp_path}:train")
    first, second = (open_source(f"{tmp_path}:train{part}") for part in ("[:70%]", "[70%:]"))
    assert np.bincount(first.labels).tolist() == [7, 14, 21]
    assert np.bincount(second.labels).tolist() == [3, 6, 9]
    names = [s.item_name(at) for s in (first, second) for at in range(len(s))]
    assert sorted(names) == sorted(whole.item_name(at) for at in range(60))
    part = open_source(f"{tmp_path}:train[70%:]", labels="any")  # the same images
    assert [part.read(at) for at in range(18)] == [second.read(at) for at in range(18)]


def test_the_split_of_a_file():
    names = ("cifar10_test.npy", "train-00000-of-00004.npy", "imagenet_val_x.npy", "latest.npy")
    found = {"train": [names[3], names[1]], "validation": [names[2]], "test": [names[0]]}
    assert by_split(map(Path, names)) == found
    of_hub = ["cifar10/test/0000.parquet", "cifar10/train/0000.parquet"]
    assert by_split(map(Path, of_hub)) == {"train": of_hub[1:], "test": of_hub[:1]}
    assert by_split([Path("test/0000.parquet")]) == {"train": ["test/0000.parquet"]}
    with pytest.raises(UserError, match=r"train_test\.npy"):
        by_split([Path("train_test.npy")])


def _read(source: Source) -> list[bytes]:
    return [source.read(at) for at in (2, 0, 1, 0)]


@pytest.mark.parametrize("kind", ["files", "zip", "packed", "held", "row groups", "array"])
def test_sources_survive_pickling_and_forking(class_folder: Path, monkeypatch, kind: str):
    whole, name = open_splits(str(class_folder)), str(class_folder)
    if kind == "zip":
        name = shutil.make_archive(str(class_folder / "x"), "zip", class_folder)
    elif kind == "packed":
        pack_splits(whole, class_folder / "packed", shard_bytes=1)
        name = str(class_folder / "packed")
    elif kind in ("held", "row groups"):
        monkeypatch.setattr(parquet, "HELD_BYTES", 2**30 if kind == "held" else 0)
        images = [{"bytes": data, "path": ""} for data in _read(whole["train"])]
        table = pa.table({"image": images, "label": [1, 2, 3, 4]})
        name = str(class_folder / "x.parquet")
        pq.write_table(table, name, row_group_size=2)
    elif kind == "array":
        name = str(class_folder / "x.npy")
        np.save(name, np.arange(12.0).reshape(3, 4))
    source = open_source(f"{name}:train", labels="any")
    expected = _read(source)  # files and row groups are open now
    assert _read(pickle.loads(pickle.dumps(source))) == expected
    assert kind in ("files", "zip", "packed", "held") or len(pickle.dumps(source)) < 2000
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_read, [source] * 4) == [expected] * 4


def test_files_that_cannot_be_read(class_folder: Path):
    folder = class_folder / "train" / "ant"
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (class_folder / "train" / "bee" / "loop").symlink_to("loop")
    (class_folder / "train" / "bee" / "3.png").write_text("<html>")
    os.mkfifo(folder / "pipe.png")
    source = open_splits(str(class_folder))["train"]
    (folder / "0.png").unlink()
    found = check_readable(source, 1.0)
    assert {Path(image.name).name for image in found} == {"loop.jpg", "pipe.png", "3.png", "0.png"}
    assert all(source.item_name(image.index) == image.name for image in found)


# Subset files


def test_parts_of_several_splits_become_one(class_folder: Path, tmp_path: Path):
    file = tmp_path / "some.json"
    parts = {"train": ("train[:8]", "validation[:3]"), "test": ("validation[3:]",)}
    write_subset_file(file, SubsetFile(str(class_folder), parts))
    assert read_subset_file(file) == SubsetFile(str(class_folder), parts)
    splits, whole = open_splits(str(file)), open_splits(str(class_folder))
    train = splits["train"]
    assert (train.name, train.class_names) == (f"{file}:train", ["ant", "bee", "cat"])
    files = {name: {whole[name].item_name(at) for at in range(len(whole[name]))} for name in whole}
    names = [train.item_name(at) for at in range(11)]
    assert set(names[:8]) < files["train"]
    assert set(names[8:]) < files["validation"]
    for at, name in enumerate(names):
        assert train.read(at) == Path(name).read_bytes()
        assert Path(name).parent.name == train.class_names[train.labels[at]]
    test = {splits["test"].item_name(at) for at in range(6)}
    assert test == files["validation"] - set(names)
    assert pickle.loads(pickle.dumps(train)).item_name(10) == names[10]
    assert is_data(str(file))
    assert len(open_source(f"{file}:train[:50%]")) == 5


def test_numbers_become_classes(tmp_path: Path):
    """A distance of the test images need not be one of the training images."""
    draw(0).save(tmp_path / "0.png")
    rows = [("train", 1.5), ("train", 9.25), ("train", 3), ("test", 8.0), ("test", 8.125)]
    rows += [("test", 8), ("train", -1)]
    lines = ["path,distance,split"]
    lines += [f"{at}.png,{number},{split}" for at, (split, number) in enumerate(rows)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    source = f"{tmp_path / 'list.csv'}#label=distance"
    with pytest.raises(UserError, match=r"'8\.0'.*'8'"):  # as classes these are twins
        open_splits(source)
    assert len(open_splits(source, labels="numbers")["test"]) == 3
    file, rule = tmp_path / "near.json", LabelRule("between", (-2.0, 8.0, 100.0))
    write_subset_file(file, SubsetFile(source, {"train": ("train",), "test": ("test",)}, rule))
    splits = open_splits(str(file))
    assert splits["train"].class_names == splits["test"].class_names == ["0", "1"]
    assert splits["train"].labels.tolist() == [0, 1, 0, 0]
    assert splits["test"].labels.tolist() == [0, 1, 0]
    (tmp_path / "list.csv").write_text("path\n0.png\n1.png\n")
    write_subset_file(file, SubsetFile(str(tmp_path / "list.csv"), {"train": ("train[1:]",)}, rule))
    found = open_source(str(file), labels="any")
    assert (found.class_names, found.item_name(0)) == (["unknown"], str(tmp_path / "1.png"))


RULES = (("x", []), ("bins", [8, 16]), ("bins", [8.5, 2]), ("bins", [8]), ("shift", [3, 1]),
         ("between", [0, 1]), ("between", [0, 2, 1]))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"format": "other"}, "not a subset"),
        ({"version": 2}, "version 2"),
        ({"source": None}, "source"),
        ({"source": "other.json:train"}, "source"),
        ({"source": "nowhere"}, "'nowhere'"),
        *(({"splits": splits}, "splits") for splits in ({}, {"train": []}, {"learn": ["train"]})),
        ({"splits": {"train": ["train[:5]x"]}}, "'train[:5]x'"),
        ({"splits": {"train": ["train[:9999]"]}}, "only some images"),
        ({"source": "FOLDER", "splits": {"test": ["test"]}}, "unknown split 'test'"),
        ({"labels": {"rule": "shift", "numbers": [3, 8]}}, "'0'"),
        *(({"labels": {"rule": rule, "numbers": n}}, repr(rule)) for rule, n in RULES),
        ({"labels": "between"}, "labels"),
    ],
)
def test_what_is_no_subset_file(class_folder: Path, changes: dict, value: str):
    file = class_folder.parent / "s.json"
    if changes.get("source") == "FOLDER":
        changes = {**changes, "source": str(class_folder)}
    whole = {"format": "allmlp selection", "version": 1, "source": "digits"}
    file.write_text(json.dumps({**whole, "splits": {"train": ["train"]}, **changes}))
    with pytest.raises(UserError) as error:
        open_splits(str(file))
    assert value in str(error.value)


@pytest.mark.parametrize(
    ("rule", "numbers", "classes"),
    [
        (LabelRule("shift", (3, 8)), [3, 4, 10, 2, 11, 3.5, NAN], [0, 1, 7, -1, -1, -1, -1]),
        (LabelRule("bins", (32, 16)), [0, 1, 2, 15, 16, 30, 31], [0, 0, 1, 7, 8, 15, 15]),
        (LabelRule("bins", (40, 16)), [0, 2, 3, 39, -1, 40, 2.5, NAN], [0, 0, 1, 15, *[-1] * 4]),
        (
            LabelRule("between", (0.0, 8.0, 8.5, 100.0)),
            [0.1, 8.0, 8.0001, 8.5, 100.0, 0.0, 100.1, NAN, np.inf],
            [0, 0, 1, 1, 2, *[-1] * 4],
        ),
    ],
)
def test_the_rules(rule: LabelRule, numbers: list[float], classes: list[int]):
    assert rule.classes_of(np.array(numbers, dtype=float)).tolist() == classes


def test_the_rules_are_those_of_google():
    """floordiv by 40 / 16 in float32, and the last threshold below the number."""
    found = LabelRule("bins", (40, 16)).classes_of(np.arange(40.0))
    assert found.tolist() == np.floor_divide(np.arange(40, dtype=np.float32), 2.5).tolist()
    thresholds = (-100.0, 8.0, 20.0, 999.0, 1e9)
    numbers = np.concatenate([np.random.default_rng(0).uniform(-99, 1500, 300), thresholds[1:]])
    found = LabelRule("between", thresholds).classes_of(numbers)
    expected = [int(np.flatnonzero(np.array(thresholds) < number).max()) for number in numbers]
    assert found.tolist() == expected


def test_where_a_rule_is_applied_already():
    rule = LabelRule("bins", (40, 16))
    assert [is_applied(rule, ["0", last]) for last in ("15", "16", "2.5")] == [True, False, False]
