"""Which folder is a split, a class or neither; what a scan takes, skips and reports."""

from pathlib import Path

import pytest

import allmlp as am
from allmlp.data.image import HAS_HEIC, SUFFIXES
from allmlp.data.sources import notes_of, open_source, open_splits
from allmlp.errors import UserError
from conftest import draw, encode, make_class_folder, mixer, tiny_model


@pytest.mark.skipif(HAS_HEIC, reason="HEIC is read here")
def test_files_that_are_passed_over_are_counted(tmp_path: Path, capsys):
    folder = make_class_folder(tmp_path / "photos", {"cat": 5, "dog": 5, "dog/deep": 0})
    names = [f"cat/{at}{end}" for at in range(2) for end in (".heic", ".DNG", ".txt")]
    for name in (*names, "cat/x.jpg_large", "dog/deep/x.jp2", "dog/.hidden.heic"):
        (folder / name).write_bytes(b"x")
    said = "6 files passed over in photos: .dng 2, .heic 2, .jpg_large 1, .jp2 1"
    (note,) = notes_of(open_splits(str(folder)))
    assert note.startswith(said)
    assert "allmlp[heic]" in note
    assert notes_of({"x": open_source(f"{folder}:train", labels="any")})[0].startswith(said)
    code, out, _ = mixer(capsys, "data", "check", folder)
    assert (code, said in out) == (0, True)
    weights = am.save_model(tiny_model(num_classes=2), tmp_path / "m.safetensors")
    code, _, err = mixer(capsys, "predict", weights, folder, "--output", tmp_path / "x.csv")
    assert (code, "6 files passed over" in err) == (0, True)


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "@Recycle"])
def test_folders_of_the_system_are_skipped(tmp_path: Path, name: str):
    folder = make_class_folder(tmp_path / "data", {"cat": 2, "dog": 2, f"dog/{name}": 1, name: 1})
    (source,) = open_splits(str(folder)).values()
    assert source.class_names == ["cat", "dog"]
    assert len(source) == 4
    assert notes_of({"train": source}) == []


@pytest.mark.skipif(HAS_HEIC, reason="HEIC is read here")
def test_classes_and_folders_without_images(tmp_path: Path):
    folder = make_class_folder(tmp_path / "data", {"cat": 0, "dog": 2})
    for at in range(3):
        (folder / "cat" / f"{at}.heic").write_bytes(b"x")
    (folder / "cat" / "list.txt").write_text("x")
    there = r"\.heic 3, other files 1"
    with pytest.raises(UserError, match=rf"class 'cat' has no images.*{there}"):
        open_splits(str(folder))
    with pytest.raises(UserError, match=there):
        am.predict(tiny_model(), [folder / "cat"])
    with pytest.raises(UserError, match=there):
        open_source(f"{folder / 'cat'}:train", labels="any")
    draw(1).save(folder / "cat" / "0.png")
    assert open_source(str(folder / "cat"), labels="any").class_names == ["unknown"]
    with pytest.raises(UserError, match="no class folders found"):
        open_splits(str(folder / "cat"))


def test_every_ending_is_found_and_read(tmp_path: Path):
    kinds = {".avif": "AVIF", ".mpo": "MPO", ".dib": "DIB", ".pnm": "PPM", ".apng": "PNG"}
    for ending in SUFFIXES:
        kind = kinds.get(ending, "JPEG")
        (tmp_path / f"x{ending.upper()}").write_bytes(encode(draw(1), kind))
    found = am.predict(tiny_model(), [tmp_path], num_workers=0)
    assert len(found) == len(SUFFIXES)
    assert [image.path for image in found if image.error] == []


def test_hidden_files_and_links_deep_inside(tmp_path: Path):
    folder = tmp_path / "data"
    make_class_folder(folder, {"a": 1, "a/.cache": 1, "a/z": 1, "a/b": 1, "a.b": 1})
    for name in ("a/Thumbs.db", "a/._0.png"):
        (folder / name).write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / "a" / "folder.jpg").mkdir()
    (folder / "a" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "linked").symlink_to(folder / "a" / "b")
    (tmp_path / "elsewhere").mkdir()
    draw(1).save(tmp_path / "elsewhere" / "1.png")
    (folder / "a" / "z" / "more").symlink_to(tmp_path / "elsewhere")
    source = open_source(str(folder))
    assert source.class_names == ["a", "a.b", "linked"]
    found = [source.item_name(at).removeprefix(f"{folder}/") for at in range(len(source))]
    of_a = ["a/0.png", "a/b/0.png", "a/z/0.png", "a/z/more/1.png"]
    assert found == [*of_a, "a.b/0.png", "linked/0.png"]
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 2]
    assert all(source.read(at) == (folder / name).read_bytes() for at, name in enumerate(found))


@pytest.mark.parametrize(
    "names", [("Train", "TEST"), ("train_set", "test_set"), ("Training-Data", "Testing")]
)
@pytest.mark.parametrize("doubled", [False, True])
def test_names_of_splits(tmp_path: Path, names: tuple[str, str], doubled: bool):
    for name in names:
        folder = tmp_path / name / (name if doubled else "")
        make_class_folder(folder, {"cat": 2, "dog": 1})
    (tmp_path / "predictions").mkdir()
    splits = open_splits(str(tmp_path))
    assert list(splits) == ["train", "test"]
    assert {tuple(source.class_names) for source in splits.values()} == {("cat", "dog")}
    assert {len(source) for source in splits.values()} == {3}
    assert notes_of(splits) == []


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["train", "test"], ["train", "test"]),
        (["train"], ["train"]),
        (["fold0", "fold_1", "Fold 2"], ["fold0", "fold_1", "Fold 2"]),
        (["ok", "nok", "test"], ["'test'", "ok", "train/<class>"]),
        (["fold0/train", "fold0/val", "fold1/train", "fold1/val"], ["fold0", "train, val"]),
        (["photos/train/cat", "photos/test/cat"], ["photos", "test, train"]),
        (["bottle/train/good", "bottle/test/bad", "cable/train/good"], ["bottle", "train"]),
        (["train/site1/cat", "train/site1/dog", "train/site2/cat", "train/site2/dog"], ["site1"]),
        (["seg_train/seg_train/sea", "seg_test/seg_test/sea"], ["seg_train", "seg_test"]),
        (["train/ant", "val/ant", "valid/ant"], ["val and valid"]),
        (["train/ant", "val/ant", "holdout/ant"], ["'holdout'"]),
        (["bus", "train", "train/old"], ["'train'", "'0.png'"]),
    ],
)
def test_folders_that_are_no_classes(tmp_path: Path, folders: list[str], named: list[str]):
    for folder in folders:
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        for at in range(2):
            draw(at).save(tmp_path / "data" / folder / f"{at}.png")
    with pytest.raises(UserError) as error:
        open_splits(str(tmp_path / "data"))
    assert all(name in str(error.value) for name in named)
    assert error.value.fix


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["cat/images", "dog/images"], ["cat", "dog"]),
        (["cat", "cat/old", "cat/new", "dog", "dog/old", "dog/new"], ["cat", "dog"]),
        (["test tube", "train station"], ["test tube", "train station"]),
        (["fold1", "plain"], ["fold1", "plain"]),
        (["train/dev", "train/ops", "test/dev"], ["dev", "ops"]),
        (["train/bus", "train/train", "test/bus", "test/train"], ["bus", "train"]),
    ],
)
def test_folders_that_are_classes(tmp_path: Path, folders: list[str], classes: list[str]):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        draw(1).save(tmp_path / folder / "0.png")
    assert open_splits(str(tmp_path))["train"].class_names == classes


def test_folders_beside_the_splits_are_reported(tmp_path: Path):
    make_class_folder(tmp_path, {"train/day": 2, "train/night": 2, "bus": 1, "test": 1})
    (tmp_path / "docs").mkdir()
    splits = open_splits(str(tmp_path))
    assert list(splits) == ["train"]
    (note,) = notes_of(splits)
    assert "bus, test" in note
    assert "docs" not in note
