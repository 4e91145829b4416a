"""What a scan of folders takes, passes over and says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mlp_mixer as mm
from conftest import draw, encode, make_class_folder, mixer, tiny_model
from mlp_mixer.data.image import SUFFIXES
from mlp_mixer.data.sources import notes_of, open_images, open_splits
from mlp_mixer.errors import UserError


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
    weights = mm.save_model(model, tmp_path / "m.safetensors")
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
        mm.predict(tiny_model(), [folder / "cat"])
    with pytest.raises(UserError, match=r"the folder has no images.*\.heic 3"):
        open_images(f"{folder / 'cat'}:train")


def test_every_ending_is_found_and_read(tmp_path: Path):
    kinds = {".avif": "AVIF", ".mpo": "MPO", ".dib": "DIB", ".pnm": "PPM", ".apng": "PNG"}
    for ending in SUFFIXES:
        kind = kinds.get(ending, "JPEG")
        (tmp_path / f"x{ending.upper()}").write_bytes(encode(draw(1), kind))
    found = mm.predict(tiny_model(), [tmp_path], num_workers=0)
    assert len(found) == len(SUFFIXES)
    assert [each.path for each in found if each.error] == []
