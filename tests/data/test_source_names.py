"""What the name of a source says: options, splits and parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from allmlp.data.folders import split_of_file
from allmlp.data.source_names import SourceName, parse_name
from allmlp.data.sources import open_source, open_splits
from allmlp.errors import UserError
from conftest import make_class_folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x", SourceName("x")),
        ("x:val", SourceName("x", {}, "validation")),
        ("x:train[:90%]", SourceName("x", {}, "train", "[:90%]")),
        ("x#label=a,image=b", SourceName("x", {"label": "a", "image": "b"})),
        ("x#label=a:test[1:2]", SourceName("x", {"label": "a"}, "test", "[1:2]")),
        ("x:test[1:2]#label=a", SourceName("x", {"label": "a"}, "test", "[1:2]")),
        ("C:\\data:train", SourceName("C:\\data", {}, "train")),
        ("C:\\data", SourceName("C:\\data")),
        ("hf:a/b@main#config=c", SourceName("hf:a/b@main", {"config": "c"})),
        ("hf:a/b:test", SourceName("hf:a/b", {}, "test")),
        ("a#b", SourceName("a#b")),
        ("d/x_[ab].parquet:test", SourceName("d/x_[ab].parquet", {}, "test")),
    ],
)
def test_what_a_name_says(name, expected):
    assert parse_name(name) == expected


def test_names_of_files_that_exist_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:train", "b#label=x", "c:test[1:2]", "d"):
        make_class_folder(tmp_path / name, {"ant": 1, "bee": 1})
        assert parse_name(name) == SourceName(name)
        assert len(open_source(name)) == 2
        assert parse_name(f"{name}:train[:1]") == SourceName(name, {}, "train", "[:1]")
        assert parse_name(f"{name}#label=y").options == {"label": "y"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x#label", None),
        ("x#label=", "not an option: 'label='"),
        ("x#lable=y", "not an option: 'lable=y'[\\s\\S]*Did you mean label"),
        ("x#label=y,label=z", "not an option: 'label=z'"),
        ("x:holdout[:3]", "no split is called 'holdout'"),
        ("digits[:90%]", "a part of no split: 'digits.:90%.'[\\s\\S]*SOURCE:train.:90%"),
        ("digits#label=y", "the option 'label' means nothing for digits"),
    ],
)
def test_names_that_say_nothing(name, message):
    with pytest.raises(UserError, match=message or "no such data"):
        open_source(name)


def test_options_mean_nothing_for_class_folders(class_folder: Path):
    with pytest.raises(UserError, match="the option 'label' means nothing for class folders"):
        open_splits(f"{class_folder}#label=x")
    with pytest.raises(UserError, match="not an option: 'x'"):
        open_splits(f"{class_folder}#x")


@pytest.mark.parametrize("percent", ["0.5", "1", "10", "33", "33.3", "50", "90", "99", "99.9"])
def test_two_parts_are_disjoint_and_complete(percent):
    whole = open_source("digits:train")
    first = open_source(f"digits:train[:{percent}%]")
    second = open_source(f"digits:train[{percent}%:]")
    assert len(first) == int(1259 * float(percent) / 100)
    names = [s.item_name(at) for s in (first, second) for at in range(len(s))]
    assert names == [whole.item_name(at) for at in range(1259)]
    assert first.class_names == second.class_names == whole.class_names
    assert [*first.labels, *second.labels] == whole.labels.tolist()
    assert second.read(1) == whole.read(len(first) + 1)


def test_parts_by_number():
    whole, part = open_source("digits:test"), open_splits("digits:test[100:200]")
    assert list(part) == ["test"]
    assert part["test"].name == "digits:test[100:200]"
    assert [part["test"].item_name(at) for at in (0, 99)] == [
        whole.item_name(at) for at in (100, 199)
    ]
    assert len(open_source("digits:test[ 350 : ]")) == 9
    assert len(open_source("digits:test[:]")) == 359
    assert list(open_splits("digits:val")) == ["validation"]


@pytest.mark.parametrize(
    "part",
    [*("[", "[]", "[5]", "[a:b]", "[:90%", "[-3:]", "[::2]", "[:5.5]", "[:1e2]"),
     *("[:360]", "[400:500]", "[5:5]", "[9:3]", "[:0%]", "[50%:50%]", "[:101%]", "[:" + "9" * 99)],
)  # fmt: skip
def test_parts_that_are_none(part):
    with pytest.raises(UserError, match=r"SOURCE:train\[:90%\]"):
        open_source(f"digits:test{part}")


def test_parts_of_class_folders_have_every_class(tmp_path: Path):
    """In the order of the files the last part would lack all classes but the last."""
    make_class_folder(tmp_path, {"ant": 10, "bee": 20, "cat": 30})
    whole = open_source(f"{tmp_path}:train")
    first, second = (open_source(f"{tmp_path}:train{part}") for part in ("[:70%]", "[70%:]"))
    assert np.bincount(first.labels).tolist() == [7, 14, 21]
    assert np.bincount(second.labels).tolist() == [3, 6, 9]
    names = [s.item_name(at) for s in (first, second) for at in range(len(s))]
    assert sorted(names) == sorted(whole.item_name(at) for at in range(60))
    for at in range(len(second)):
        assert Path(second.item_name(at)).parent.name == second.class_names[second.labels[at]]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("cifar10_test.parquet", "test"),
        ("train-00000-of-00004.parquet", "train"),
        ("x.valid.parquet", "validation"),
        ("imagenet_val_sample.parquet", "validation"),
        ("latest.parquet", "train"),
        ("a_train_training.tar", "train"),
    ],
)
def test_the_split_of_a_file(name, split):
    assert split_of_file(Path(name)) == split


def test_a_file_of_two_splits():
    with pytest.raises(UserError, match="words for several splits: train_test.parquet"):
        split_of_file(Path("train_test.parquet"))
