"""Which folder is a split, a class or neither; what a scan takes, passes over and says of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import allmlp as am
from allmlp.data.folders import class_folder as read_class_folder
from allmlp.data.folders import image_files
from allmlp.data.image import SUFFIXES
from allmlp.data.sources import notes_of, open_images, open_source, open_splits
from allmlp.errors import UserError
from conftest import draw, encode, make_class_folder, mixer, tiny_model


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A class folder with files of photographs that are not read, and others that are no images."""
    folder = make_class_folder(tmp_path / "photos", {"cat": 5, "dog": 5})
    for ending, count in ((".heic", 4), (".HEIC", 1), (".dng", 2), (".jpg_large", 1), (".txt", 3)):
        for at in range(count):
            (folder / "cat" / f"{at}{ending}").write_bytes(b"x")
    (folder / "dog" / "deep").mkdir()
    (folder / "dog" / "deep" / "x.jp2").write_bytes(b"x")
    (folder / "dog" / ".hidden.heic").write_bytes(b"x")
    return folder


SAID = "9 files passed over in photos: .heic 5, .dng 2, .jpg_large 1, .jp2 1"


def test_files_that_are_passed_over_are_counted(mixed: Path):
    splits = open_splits(str(mixed))
    assert {len(source) for source in splits.values()} == {10}
    assert len(notes_of(splits)) == 1
    assert notes_of(splits)[0].startswith(SAID)
    assert notes_of({"x": open_images(f"{mixed}:train")})[0].startswith(SAID)
    assert notes_of(open_splits(f"{mixed}:train[:50%]"))[0].startswith(SAID)


def test_each_split_counts_its_own(class_folder: Path):
    assert notes_of(open_splits(str(class_folder))) == []
    for split in ("train", "val"):
        (class_folder / split / "ant" / "x.heif").write_bytes(b"x")
    train, val = notes_of(open_splits(str(class_folder)))
    assert train.startswith("1 file passed over in train: .heif 1")
    assert val.startswith("1 file passed over in val: .heif 1")


def test_commands_say_what_was_passed_over(mixed: Path, tmp_path: Path, capsys):
    code, out, _ = mixer(capsys, "data", "check", mixed, "--output", tmp_path / "report")
    assert code == 0
    assert SAID in out
    assert SAID in json.loads((tmp_path / "report" / "check.json").read_text())["notes"][0]
    model = tiny_model(num_classes=2)
    model.class_names = ["cat", "dog"]
    weights = am.save_model(model, tmp_path / "m.safetensors")
    output = tmp_path / "x.csv"
    code, _, err = mixer(capsys, "predict", weights, mixed, "--output", output)
    assert code == 0
    assert "9 files passed over" in err
    code, _, err = mixer(capsys, "evaluate", weights, "--data", mixed)
    assert code == 0
    assert SAID in err


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "@Recycle"])
def test_folders_of_the_system_are_none_of_ours(tmp_path: Path, name: str):
    folder = make_class_folder(tmp_path / "data", {"cat": 2, "dog": 2, f"dog/{name}": 1, name: 1})
    (source,) = open_splits(str(folder)).values()
    assert source.class_names == ["cat", "dog"]
    assert len(source) == 4
    assert notes_of({"train": source}) == []


def test_a_class_of_files_that_are_not_read_says_what_lies_there(tmp_path: Path, capsys):
    folder = make_class_folder(tmp_path / "data", {"cat": 0, "dog": 2})
    for at in range(3):
        (folder / "cat" / f"{at}.heic").write_bytes(b"x")
    (folder / "cat" / "list.txt").write_text("x")
    with pytest.raises(
        UserError, match=r"class 'cat' has no images.*\.heic 3, other files 1"
    ) as no:
        open_splits(str(folder))
    assert "Convert" in str(no.value.fix)
    with pytest.raises(UserError, match=r"the folder has no images.*\.heic 3"):
        am.predict(tiny_model(), [folder / "cat"])
    with pytest.raises(UserError, match=r"the folder has no images.*\.heic 3"):
        open_images(f"{folder / 'cat'}:train")


def test_every_ending_is_found_and_read(tmp_path: Path):
    kinds = {".avif": "AVIF", ".mpo": "MPO", ".dib": "DIB", ".pnm": "PPM", ".apng": "PNG"}
    for ending in SUFFIXES:
        kind = kinds.get(ending, "JPEG")
        (tmp_path / f"x{ending.upper()}").write_bytes(encode(draw(1), kind))
    found = am.predict(tiny_model(), [tmp_path], num_workers=0)
    assert len(found) == len(SUFFIXES)
    assert [each.path for each in found if each.error] == []


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


def test_two_folders_for_one_split(class_folder: Path):
    make_class_folder(class_folder / "valid", {"ant": 1})
    with pytest.raises(UserError, match="two folders for one split: val and valid"):
        open_splits(str(class_folder))


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


def test_a_class_named_like_a_split_loses_no_images(tmp_path: Path):
    make_class_folder(tmp_path, {"train": 3, "bus": 3})
    make_class_folder(tmp_path / "train", {"old": 1})
    with pytest.raises(UserError, match="'train' has both folders and images, such as '0.png'"):
        open_splits(str(tmp_path))
