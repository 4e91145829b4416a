"""Where images come from: splits, classes by name, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from allmlp.data.image import decode
from allmlp.data.items import relabel, split_by_class, subset, unreadable
from allmlp.data.sources import names_source, open_source, open_splits
from allmlp.errors import UserError
from conftest import draw, make_class_folder


def test_the_digits_are_split_once_and_for_all():
    splits = open_splits("digits")
    assert {split: len(source) for split, source in splits.items()} == {
        "train": 1259,
        "validation": 179,
        "test": 359,
    }
    names = [s.item_name(i) for s in splits.values() for i in range(len(s))]
    assert len(set(names)) == 1797  # disjoint and complete
    again = open_splits("digits")
    for split, source in splits.items():
        assert source.class_names == [str(digit) for digit in range(10)]
        assert (source.labels == again[split].labels).all()
        counts = np.bincount(source.labels)
        assert counts.max() - counts.min() <= 7  # stratified; the data itself differs by 9
    assert open_splits("digits")["test"].item_name(0) == "digits[5]"


def test_other_splits_of_the_digits():
    first, second = open_splits("digits@1"), open_splits("digits@2")
    assert open_source("digits@1:val").name == "digits@1:validation"
    names = [{s["test"].item_name(i) for i in range(len(s["test"]))} for s in (first, second)]
    assert len(names[0] | names[1]) > 500
    everything = [s.item_name(i) for s in first.values() for i in range(len(s))]
    assert len(set(everything)) == 1797
    assert (open_splits("digits@0")["test"].labels == open_splits("digits")["test"].labels).all()
    with pytest.raises(UserError, match="unknown data 'digits@x'"):
        open_splits("digits@x")


def test_the_digits_are_the_real_pixels():
    from sklearn.datasets import load_digits

    source = open_splits("digits")["test"]
    at = int(source.item_name(5).removeprefix("digits[").removesuffix("]"))
    pixels = decode(source.read(5), "x", 1)[..., 0]
    assert (np.round(pixels / 255 * 16) == load_digits().images[at]).all()
    assert source.labels[5] == load_digits().target[at]


@pytest.mark.parametrize("counts", [(10, 10), (2, 7), (1, 5), (100, 3)])
def test_split_by_class(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    kept, held_out = split_by_class(labels, 0.3, seed=0)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        assert (labels[kept] == label).sum() >= 1
        expected = 0 if count == 1 else min(max(round(0.3 * count), 1), count - 1)
        assert (labels[held_out] == label).sum() == expected
    assert (split_by_class(labels, 0.3, seed=0)[1] == held_out).all()


def test_class_folders(class_folder: Path):
    splits = open_splits(str(class_folder))
    assert list(splits) == ["train", "validation"]
    train = splits["train"]
    assert train.class_names == ["ant", "bee", "cat"]
    assert np.bincount(train.labels).tolist() == [6, 8, 6]
    for index in range(len(train)):
        name = train.item_name(index)
        assert Path(name).parent.name == train.class_names[train.labels[index]]
        assert train.read(index) == Path(name).read_bytes()


def test_classes_directly_in_the_folder(class_folder: Path):
    splits = open_splits(str(class_folder / "train"))
    assert list(splits) == ["train"]
    assert len(open_source(str(class_folder / "train"))) == 20


def test_which_split_a_name_means(class_folder: Path):
    assert open_source(str(class_folder)).name.endswith(":validation")
    assert len(open_source(f"{class_folder}:train")) == 20
    assert len(open_source(f"{class_folder}:val")) == len(open_source(f"{class_folder}:validation"))
    make_class_folder(class_folder / "test", {"ant": 1, "bee": 1, "cat": 1})
    assert len(open_source(str(class_folder))) == 3
    with pytest.raises(UserError, match=r"no validation split[\s\S]*Known there: train"):
        open_source(f"{class_folder / 'train'}:validation")


def test_a_split_is_matched_by_name_not_by_position(class_folder: Path, tmp_path: Path):
    """An empty or missing class in val/ must not shift the labels of those behind it."""
    for path in (class_folder / "val" / "ant").iterdir():
        path.unlink()
    (class_folder / "val" / "ant").rmdir()
    validation = open_splits(str(class_folder))["validation"]
    assert validation.class_names == ["ant", "bee", "cat"]
    assert np.bincount(validation.labels, minlength=3).tolist() == [0, 3, 3]
    for index in range(6):
        folder = Path(validation.item_name(index)).parent.name
        assert folder == validation.class_names[validation.labels[index]]


def test_an_extra_class_in_a_split_is_refused(class_folder: Path):
    make_class_folder(class_folder / "val", {"dog": 1})
    with pytest.raises(UserError, match=r"train/ knows 3 classes[\s\S]*unknown to train/: 'dog'"):
        open_splits(str(class_folder))


def test_a_missing_folder():
    with pytest.raises(UserError, match=r"no such data: 'nowhere/at/all'[\s\S]*where: /"):
        open_splits("nowhere/at/all")


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "x.doc").write_text("x")
    with pytest.raises(UserError, match="not a folder"):
        open_splits(str(tmp_path / "x.doc"))


def test_a_folder_without_classes(tmp_path: Path):
    draw(1).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="no class folders found"):
        open_splits(str(tmp_path))


def test_an_empty_class(class_folder: Path):
    (class_folder / "train" / "dog").mkdir()
    with pytest.raises(UserError, match=r"class 'dog' has no images[\s\S]*train/dog"):
        open_splits(str(class_folder))


def test_subset_and_relabel_keep_names_and_bytes(class_folder: Path):
    source = open_splits(str(class_folder))["train"]
    part = subset(source, np.array([3, 1, 19]), "part")
    assert (len(part), part.name) == (3, "part")
    assert [part.item_name(i) for i in range(3)] == [source.item_name(i) for i in (3, 1, 19)]
    assert part.labels.tolist() == [0, 0, 2]
    assert relabel(part, ["cat", "bee", "ant"]).labels.tolist() == [2, 2, 0]


def test_unreadable_headers_are_named(class_folder: Path):
    (class_folder / "train" / "bee" / "3.png").write_text("<html>")
    source = open_splits(str(class_folder))["train"]
    bad = unreadable(source)
    assert [Path(each.name).name for each in bad] == ["3.png"]
    assert bad[0].what.startswith("the file is not an image")
    assert source.item_name(bad[0].index) == bad[0].name


def test_a_file_that_vanished(class_folder: Path):
    source = open_splits(str(class_folder))["train"]
    Path(source.item_name(0)).unlink()
    with pytest.raises(UserError, match="cannot read the file: No such file"):
        source.read(0)


def test_names_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert names_source("digits:test")
    assert names_source("digits@1:test")
    assert not names_source("photo.jpg")
    (tmp_path / "digits").mkdir()
    assert not names_source("digits")


def test_a_near_name_of_a_folder(class_folder: Path):
    with pytest.raises(UserError, match="Did you mean data"):
        open_splits(str(class_folder.parent / "dta"))


def test_links_to_themselves_and_pipes_are_bad_images(class_folder: Path):
    folder = class_folder / "train" / "ant"
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (class_folder / "train" / "bee" / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe.png")
    source = open_splits(str(class_folder))["train"]
    found = {Path(each.name).name: each.what for each in unreadable(source)}
    assert set(found) == {"loop.jpg", "pipe.png"}
    assert "not a regular file" in found["pipe.png"]


def test_an_unknown_home_and_no_name_at_all():
    with pytest.raises(UserError, match="no such data: '~nosuchuser/x'"):
        open_splits("~nosuchuser/x")
    with pytest.raises(UserError, match="no data is named"):
        open_splits("")
