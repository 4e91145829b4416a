"""Where images come from: splits, classes by name, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from conftest import draw, make_class_folder
from mlp_mixer.data.classes import in_class_order, match_classes, natural_order
from mlp_mixer.data.folders import class_folder as read_class_folder
from mlp_mixer.data.folders import image_files
from mlp_mixer.data.image import decode
from mlp_mixer.data.items import relabel, split_by_class, subset, unreadable
from mlp_mixer.data.sources import names_source, notes_of, open_source, open_splits
from mlp_mixer.errors import UserError


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


def test_natural_order_of_classes(tmp_path: Path):
    make_class_folder(tmp_path, {"10": 1, "9": 1, "a2": 1, "a10": 1, "B1": 1})
    names = read_class_folder(tmp_path, "x").class_names
    assert names == ["9", "10", "a2", "a10", "B1"]
    assert sorted(["2", "x", "x\u00b2", "10"], key=natural_order) == ["2", "10", "x", "x\u00b2"]


def test_other_files_are_passed_over(tmp_path: Path):
    make_class_folder(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "a" / "._0.png").write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a" / "deep").mkdir()
    draw(1).save(tmp_path / "a" / "deep" / "NINE.JPG")
    source = read_class_folder(tmp_path, "x")
    assert source.class_names == ["a", "b"]
    assert np.bincount(source.labels).tolist() == [3, 2]


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


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        ("Cat", "cat", ["Cat", "cat"]),
        ("caf\u00e9", "cafe\u0301", [r"'caf\u00e9'", r"'cafe\u0301'"]),
        ("cat", "cat ", ["'cat'", "'cat '"]),
        ("cat", "cat\u200b", ["'cat'", r"'cat\u200b'"]),
        ("sea blue", "sea\u00a0blue", ["'sea blue'", r"'sea\u00a0blue'"]),
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
    rows = "".join(f"{at}.png,{label}\n" for at, label in enumerate([one, "dog", f"{other}_"]))
    (tmp_path / "list.csv").write_text(f"path,label\n{rows}".replace("_", ""))
    (tmp_path / "0.png").write_bytes(b"x")
    if one.strip() == other.strip():  # blanks around a label are no part of it
        assert open_splits(str(tmp_path / "list.csv"))["train"].class_names == [one, "dog"]
        return
    with pytest.raises(UserError, match="line 2") as refused:
        open_splits(str(tmp_path / "list.csv"))
    assert refused.value.where == f"{tmp_path / 'list.csv'}, line 4"


@pytest.mark.parametrize("names", [("1.1", "1.10"), ("a b", "ab"), ("x2", "x\u00b2"), ("1", "1e0")])
def test_names_that_are_different(tmp_path: Path, names: tuple[str, str]):
    make_class_folder(tmp_path, dict.fromkeys(names, 1))
    assert set(open_splits(str(tmp_path))["train"].class_names) == set(names)


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
            with pytest.raises(UserError, match="unknown to x: 'cat'"):
                match_classes(source, known, owner="x", allow_missing=True)
    with pytest.raises(UserError, match="unknown to x: 'ant'"):
        match_classes(source, ["Ant", "bee", "cat"], owner="x", allow_missing=True)


@pytest.mark.parametrize(
    ("names", "combined"),
    [
        (["cat", "dog", "cat dog"], ["cat dog"]),
        (["cat", "dog", "cat, dog", "cow", "cow|dog"], ["cat, dog", "cow|dog"]),
        (["blue", "blue big", "red", "red big", "red big round"], None),
        (["great white shark", "tiger shark", "shark"], []),
        (["sea lion", "lion", "seal"], []),
        (["n01440764 tench", "n01443537 goldfish"], []),
    ],
)
def test_names_that_read_like_several_labels(tmp_path: Path, names, combined):
    make_class_folder(tmp_path, dict.fromkeys(names, 1))
    notes = notes_of(open_splits(str(tmp_path)))
    expected = [name for name in names if " " in name] if combined is None else combined
    assert len(notes) == bool(expected)
    assert all(repr(name) in notes[0] for name in expected)


def test_two_folders_for_one_split(class_folder: Path):
    make_class_folder(class_folder / "valid", {"ant": 1})
    with pytest.raises(UserError, match="two folders for one split: val and valid"):
        open_splits(str(class_folder))


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
    with pytest.raises(
        UserError, match=r"missing in the data: 'dog'[\s\S]*--allow-missing-classes"
    ):
        match_classes(source, ["cat", "dog", "ant", "bee"], owner="the model", allow_missing=False)
    with pytest.raises(UserError, match="unknown to the model: 'ant', 'bee'"):
        match_classes(source, ["cat"], owner="the model", allow_missing=True)


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


@pytest.mark.parametrize("names", [("Train", "Val", "TEST"), ("training", "valid", "Testing")])
def test_split_folders_in_other_spellings(tmp_path: Path, names: tuple[str, str, str]):
    for seed, name in enumerate(names):
        make_class_folder(tmp_path / name, {"ant": 2, "bee": 2}, start=10 * seed)
    splits = open_splits(str(tmp_path))
    assert list(splits) == ["train", "validation", "test"]
    assert splits["test"].class_names == ["ant", "bee"]


def test_a_class_may_be_called_train(tmp_path: Path):
    make_class_folder(tmp_path / "train", {"bus": 2, "car": 2, "train": 2})
    make_class_folder(tmp_path / "test", {"bus": 1, "car": 1, "train": 1}, start=9)
    for source in (open_source(str(tmp_path)), open_source(str(tmp_path / "train"))):
        assert source.class_names == ["bus", "car", "train"]


@pytest.mark.parametrize("names", [("train_set", "test_set"), ("Training-Data", "val_images")])
@pytest.mark.parametrize("doubled", [False, True])
def test_names_of_splits_with_more_words(tmp_path: Path, names: tuple[str, str], doubled: bool):
    for name in names:
        folder = tmp_path / name / (name if doubled else "")
        make_class_folder(folder, {"cat": 2, "dog": 1})
    (tmp_path / "predictions").mkdir()
    splits = open_splits(str(tmp_path))
    assert list(splits) == ["train", "test" if "test_set" in names else "validation"]
    assert {tuple(source.class_names) for source in splits.values()} == {("cat", "dog")}
    assert {len(source) for source in splits.values()} == {3}
    assert notes_of(splits) == []


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["train", "test"], ["train", "test"]),
        (["train"], ["train"]),
        (["train_images", "test_images"], ["train_images", "test_images"]),
        (["fold0", "fold_1", "Fold 2"], ["fold0", "fold_1", "Fold 2"]),
        (["ok", "nok", "test"], ["'test'", "ok", "train/<class>"]),
        (["ok", "nok", "test_set"], ["'test_set'", "ok"]),
        (["fold0/train", "fold0/val", "fold1/train", "fold1/val"], ["fold0", "train, val"]),
        (["fold0/cat", "fold0/dog", "fold1/cat", "fold1/dog", "fold1/cow"], ["fold0", "cat, dog"]),
        (["photos/train/cat", "photos/test/cat"], ["photos", "test, train"]),
        (["bottle/train/good", "bottle/test/bad", "cable/train/good"], ["bottle", "train"]),
        (["train/site1/cat", "train/site1/dog", "train/site2/cat", "train/site2/dog"], ["site1"]),
        (["seg_train/seg_train/sea", "seg_test/seg_test/sea"], ["seg_train", "seg_test"]),
        (["train/train", "train/test"], ["test, train"]),
    ],
)
def test_folders_that_are_no_classes(tmp_path: Path, folders: list[str], named: list[str]):
    make_class_folder(tmp_path / "data", dict.fromkeys(folders, 2))
    with pytest.raises(UserError) as refused:
        open_splits(str(tmp_path / "data"))
    for each in named:
        assert each in str(refused.value)
    assert refused.value.fix


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["cat/images", "dog/images"], ["cat", "dog"]),
        (["animal/dog", "animal/cat", "plant/rose"], ["animal", "plant"]),
        (["cat", "cat/old", "cat/new", "dog", "dog/old", "dog/new"], ["cat", "dog"]),
        (["test tube", "train station"], ["test tube", "train station"]),
        (["fold1", "plain"], ["fold1", "plain"]),
        (["train/dev", "train/ops", "test/dev"], ["dev", "ops"]),
    ],
)
def test_folders_that_are_classes(tmp_path: Path, folders: list[str], classes: list[str]):
    make_class_folder(tmp_path / "data", {})
    for folder in folders:
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        draw(1).save(tmp_path / "data" / folder / "0.png")
    assert open_splits(str(tmp_path / "data"))["train"].class_names == classes


def test_folders_beside_the_splits_are_named(tmp_path: Path):
    make_class_folder(tmp_path, {"train/day": 2, "train/night": 2, "bus": 1, "test": 1})
    (tmp_path / "docs").mkdir()
    splits = open_splits(str(tmp_path))
    assert list(splits) == ["train"]
    (note,) = notes_of(splits)
    assert "bus" in note
    assert "test" in note
    assert "docs" not in note


def test_a_folder_that_looks_like_a_split(class_folder: Path):
    make_class_folder(class_folder / "holdout", {"ant": 1, "bee": 1})
    with pytest.raises(UserError, match="'holdout' has the same classes, but its name is no split"):
        open_splits(str(class_folder))


def test_image_files_are_files(tmp_path: Path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "._x.jpg").write_bytes(b"x")
    (tmp_path / "x.jpg").write_bytes(b"x")
    assert image_files(tmp_path) == [tmp_path / "x.jpg"]


def test_a_near_name_of_a_folder(class_folder: Path):
    with pytest.raises(UserError, match="Did you mean data"):
        open_splits(str(class_folder.parent / "dta"))


def test_hidden_folders_and_links_deep_inside(tmp_path: Path):
    make_class_folder(tmp_path / "data", {"a": 1, "a/.cache": 1, "a/z": 1, "a/b": 1, "a.b": 1})
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "data" / "a" / "b")
    source = read_class_folder(tmp_path / "data", "x")
    assert source.class_names == ["a", "a.b", "linked"]
    found = [source.item_name(at).removeprefix(f"{tmp_path}/data/") for at in range(len(source))]
    assert found == ["a/0.png", "a/b/0.png", "a/z/0.png", "a.b/0.png", "linked/0.png"]
    assert source.labels.tolist() == [0, 0, 0, 1, 2]


def test_the_order_of_files_is_that_of_sorted_paths(tmp_path: Path):
    make_class_folder(tmp_path, {"a": 12, "a/b": 2, "a/0": 2})
    (tmp_path / "a" / "b.png").write_bytes(b"x")
    assert image_files(tmp_path) == sorted(tmp_path.rglob("*.png"))


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


def test_a_class_named_like_a_split_loses_no_images(tmp_path: Path):
    make_class_folder(tmp_path, {"train": 3, "bus": 3})
    make_class_folder(tmp_path / "train", {"old": 1})
    with pytest.raises(UserError, match="'train' has both folders and images, such as '0.png'"):
        open_splits(str(tmp_path))


def test_links_to_themselves_and_pipes_are_bad_images(class_folder: Path):
    folder = class_folder / "train" / "ant"
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (class_folder / "train" / "bee" / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe.png")
    source = open_splits(str(class_folder))["train"]
    found = {Path(each.name).name: each.what for each in unreadable(source)}
    assert set(found) == {"loop.jpg", "pipe.png"}
    assert "not a regular file" in found["pipe.png"]


def test_numbers_of_any_length_are_ordered():
    names = ["9" * 5000, "1" + "0" * 5000, "007", "7", "30", "x" + "1" * 5000]
    assert [len(name) for name in in_class_order(names)] == [3, 1, 2, 5000, 5001, 5001]


def test_an_unknown_home_and_no_name_at_all():
    with pytest.raises(UserError, match="no such data: '~nosuchuser/x'"):
        open_splits("~nosuchuser/x")
    with pytest.raises(UserError, match="no data is named"):
        open_splits("")
