"""Images from anywhere to a table: order, bad files, formats."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import allmlp as am
from conftest import draw, make_class_folder, tiny_model

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture
def model() -> am.ImageClassifier:
    model = tiny_model(num_classes=7)
    model.class_names = NAMES
    return model


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Two good images with a bad one between them, deeper ones, and a file that is none."""
    folder = make_class_folder(tmp_path / "album", {"x": 2, "y": 1})
    (folder / "x" / "00_bad.png").write_text("no image")
    (folder / "notes.txt").write_text("hello")
    draw(9).convert("L").save(folder / "grey.JPG")
    return folder


def test_a_folder_to_any_depth_in_order(model, album):
    found = am.predict(model, album, num_workers=0, batch_size=2, device="cpu")
    names = [Path(each.path).name for each in found]
    assert names == ["grey.JPG", "0.png", "00_bad.png", "1.png", "0.png"]
    assert [each.error for each in found] == [None, None, "the file is not an image", None, None]
    assert found[2].classes == []
    for each in found:
        if each.error is None:
            shares = [share for _, share in each.classes]
            assert len(shares) == 5
            assert shares == sorted(shares, reverse=True)
            assert {name for name, _ in each.classes} <= set(NAMES)


def test_the_same_answer_alone_and_among_others(model, album):
    among = am.predict(model, album, top_k=7, num_workers=0)[3]
    alone = am.predict(model, among.path, top_k=7, num_workers=0)[0]
    assert [name for name, _ in alone.classes] == [name for name, _ in among.classes]
    for (_, a), (_, b) in zip(alone.classes, among.classes, strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    assert sum(share for _, share in alone.classes) == pytest.approx(1.0, abs=1e-5)


def test_files_folders_and_patterns_together(model, album):
    inputs = [album / "grey.JPG", str(album / "x" / "[01].png"), album / "y"]
    found = am.predict(model, inputs, top_k=1, num_workers=0)
    assert [Path(each.path).name for each in found] == ["grey.JPG", "0.png", "1.png", "0.png"]
    assert all(len(each.classes) == 1 for each in found)


def test_the_digits_by_name(trained: am.TrainResult):
    found = am.predict(trained.run_folder, "digits:test", top_k=20)
    assert len(found) == 359
    assert len(found[0].classes) == 10  # at most as many as there are
    right = sum(
        each.classes[0][0] == trained.test.class_names[label]
        for each, label in zip(found, trained.test.labels, strict=True)
    )
    assert right / 359 == pytest.approx(trained.test.top1)


def test_csv(model, album, tmp_path):
    found = am.predict(model, album, top_k=2, output=tmp_path / "out.csv", num_workers=0)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "path",
        "class_1",
        "probability_1",
        "class_2",
        "probability_2",
        "error",
    ]
    assert [row["path"] for row in rows] == [each.path for each in found]
    assert rows[0]["class_1"] == found[0].classes[0][0]
    assert float(rows[0]["probability_2"]) == pytest.approx(found[0].classes[1][1], abs=1e-6)
    assert (rows[2]["class_1"], rows[2]["error"]) == ("", "the file is not an image")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json(model, album, tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    found = am.predict(model, album, top_k=2, output=path, num_workers=0)
    text = path.read_text()
    rows = json.loads(text) if suffix == ".json" else [json.loads(x) for x in text.splitlines()]
    assert [row["path"] for row in rows] == [each.path for each in found]
    assert rows[0]["classes"][0]["class"] == found[0].classes[0][0]
    assert "error" not in rows[0]
    assert rows[2] == {"path": found[2].path, "classes": [], "error": "the file is not an image"}
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_but_bad_files(model, album):
    found = am.predict(model, album / "x" / "00_bad.png", num_workers=0)
    assert [each.error for each in found] == ["the file is not an image"]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([], {}, "no images given"),
        (["nowhere.jpg"], {}, "no such file or folder: 'nowhere.jpg'"),
        (["*.nothing"], {}, "no such file or folder"),
        (["EMPTY"], {}, "the folder has no images"),
        (["GREY"], {"top_k": 0}, "top_k must be at least 1, got 0"),
        (["GREY"], {"output": "out.xml"}, "unknown output format '.xml'"),
        (["GREY"], {"output": "no/such/folder/out.csv"}, "the output's folder does not exist"),
    ],
)
def test_mistakes(model, album, tmp_path, inputs, options, message):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "GREY": album / "grey.JPG"}
    with pytest.raises(am.UserError, match=message):
        am.predict(model, [places.get(each, each) for each in inputs], num_workers=0, **options)


def test_a_model_without_class_names_has_numbers(model, album):
    named = am.predict(model, album, num_workers=0)
    found = am.predict(tiny_model(), album, num_workers=0)
    for ours, theirs in zip(found, named, strict=True):
        numbers = [(str(NAMES.index(name)), share) for name, share in theirs.classes]
        assert ours.classes == numbers


def test_an_output_that_cannot_be_written(model, album, tmp_path, monkeypatch):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(am.UserError, match="the output is a folder"):
        am.predict(model, album, output=tmp_path / "folder.csv", num_workers=0)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("allmlp.io.os.fsync", full)
    with pytest.raises(am.UserError, match="cannot write the predictions: No space left"):
        am.predict(model, album, output=tmp_path / "out.csv", num_workers=0)
    assert not list(tmp_path.glob("*out.csv*"))
