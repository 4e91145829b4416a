"""Folders of part files: resumed, checked, shared, killed, on a full disk."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import allmlp as am
from allmlp.data.source import EncodedImages, PackedBytes, Source, subset, unlabelled
from allmlp.deploy.predict import PredictOptions, write_predictions
from allmlp.preprocessing import Preprocessing
from conftest import draw, encode, make_class_folder, tiny_model, user_error
from runs import ended, start, start_two, unix

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
SQUASHED = Preprocessing(image_size=(8, 8), resize="squash")


@pytest.fixture
def model() -> am.ImageClassifier:
    return tiny_model(NAMES)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Twenty images, the eighth of them bad."""
    folder = make_class_folder(tmp_path / "album", {"x": 9, "y": 10})
    (folder / "x" / "6_bad.png").write_text("no image")
    return folder


def parts(model: Any, images: Any, folder: Path, **options: Any) -> list[am.Prediction]:
    """Returns the rows that were missing."""
    values = {"top_k": 2, "part_size": 8, "batch_size": 4, "num_workers": 0, **options}
    return am.predict(model, images, output=folder, **values)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every part, and of nothing else: no file may be left over."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    del found["manifest.json"]
    return found


def test_parts_hold_the_rows_of_one_file(model, album, tmp_path):
    rows = parts(model, album, tmp_path / "out")
    found = contents(tmp_path / "out")
    bad = found.pop("bad-00000-of-00003.csv").decode().splitlines()
    assert bad == ["index,path,error", f"7,{album}/x/6_bad.png,the file is not an image"]
    assert sorted(found) == [f"part-0000{n}-of-00003.csv" for n in range(3)]
    one = am.predict(model, album, top_k=2, num_workers=0, batch_size=4, output=tmp_path / "o.csv")
    assert rows == one
    lines = (tmp_path / "o.csv").read_bytes().splitlines()
    by_part = [found[name].splitlines() for name in sorted(found)]
    assert all(part[0] == lines[0] for part in by_part)
    assert [line for part in by_part for line in part[1:]] == lines[1:]
    assert [len(part) - 1 for part in by_part] == [8, 8, 4]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("batch_size", [4, 3])
def test_a_restart_writes_only_what_is_missing(model, album, tmp_path, kind, batch_size):
    """Batches of 3 do not fit into parts of 8: the bytes must not depend on what was there."""
    options = {"format": kind, "batch_size": batch_size}
    parts(model, album, tmp_path / "out", **options)
    whole, manifest = contents(tmp_path / "out"), (tmp_path / "out/manifest.json").read_bytes()
    for gone in ({0}, {1, 2}, {0, 2}, {0, 1, 2}, set()):
        for number in gone:
            (tmp_path / "out" / f"part-0000{number}-of-00003.{kind}").unlink()
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part*")}
        rows = parts(model, album, tmp_path / "out", **options, part_size=None)
        assert contents(tmp_path / "out") == whole
        assert all(path.stat().st_mtime_ns == at for path, at in times.items())
        assert len(rows) == sum((8, 8, 4)[number] for number in gone)
    assert (tmp_path / "out/manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda *_: {"model": tiny_model(NAMES, channels_mlp_dim=64)}, "model"),
        (lambda model, _: setattr(model.head, "bias", nn.Parameter(torch.ones(7))), "model"),
        (lambda model, _: nn.init.ones_(model.stem.weight) is None, "model"),
        (lambda model, _: setattr(model, "class_names", NAMES[::-1]), "class names"),
        (lambda model, _: setattr(model, "preprocessing", SQUASHED), "preprocessing"),
        (lambda _, album: draw(77).save(album / "x" / "3.png"), "images"),
        (lambda _, album: draw(77).save(album / "x" / "new.png"), "number was 20 and is now 21"),
        (lambda *_: {"top_k": 3}, "top_k was 2 and is now 3"),
        (lambda *_: {"top_k": None, "features": True}, "answer was classes and is now features"),
        (lambda *_: {"precision": "bfloat16"}, "precision was float32 and is now bfloat16"),
        (lambda *_: {"format": "jsonl"}, "format was csv and is now jsonl"),
        (lambda *_: {"part_size": 7}, "part_size was 8 and is now 7"),
    ],
)
def test_another_job_is_an_error(model, album, tmp_path, change, words):
    parts(model, album, tmp_path / "out")
    before = contents(tmp_path / "out")
    values = {"model": model, **(change(model, album) or {})}
    with user_error("another-job") as caught:
        parts(values.pop("model"), album, tmp_path / "out", **values)
    assert words in caught.value.what
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "allmlp predictions", "version": 9}'])
def test_a_damaged_manifest(model, album, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text(text)
    with pytest.raises(am.UserError, match="out"):
        parts(model, album, tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def test_a_folder_that_was_begun_under_the_old_name(model, album, tmp_path):
    parts(model, album, tmp_path / "out")
    whole, manifest = contents(tmp_path / "out"), tmp_path / "out/manifest.json"
    manifest.write_text(manifest.read_text().replace("allmlp predictions", "mlp_mixer predictions"))
    (tmp_path / "out/part-00001-of-00003.csv").unlink()
    assert len(parts(model, album, tmp_path / "out")) == 8
    assert contents(tmp_path / "out") == whole


def test_what_is_a_folder(model, album, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.v2").mkdir()
    for output in ("plain", "some.v2/", "there.v2"):
        parts(model, album / "y" / "0.png", Path(output) if output == "there.v2" else output)
        assert (tmp_path / output / "manifest.json").exists()
    with pytest.raises(am.UserError, match=r"\.v3"):
        parts(model, album, tmp_path / "other.v3")


def test_folders_that_cannot_be(model, album, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.jpg").write_text("x")
    for folder, word in (
        (tmp_path / "file" / "deep", "written"),
        (tmp_path / "mine", "holiday.jpg"),
        (album / "x" / "rows", "rows"),  # in what is read
    ):
        with pytest.raises(am.UserError, match=word):
            parts(model, album, folder)
    with user_error("conflict"):
        parts(model, album, tmp_path / "out", overwrite=True)


def test_a_full_disk_leaves_nothing_half_written(model, album, tmp_path, monkeypatch):
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 2:  # the manifest and the bad images, but no part
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("allmlp.io.os.fsync", full)
        for output in ("out", "one.csv"):
            with pytest.raises(am.UserError, match="No space left"):
                parts(model, album, tmp_path / output, part_size=None if "." in output else 8)
    assert not list(tmp_path.glob("*one.csv*"))
    assert sorted(contents(tmp_path / "out")) == ["bad-00000-of-00003.csv"]
    parts(model, album, tmp_path / "out")
    parts(model, album, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def repeated(times: int) -> Source:
    """Many images, of which only four exist."""
    files = PackedBytes([encode(draw(seed, (8, 8))) for seed in range(4)])
    few = unlabelled(EncodedImages(files, "few"), "few")
    return subset(few, np.arange(times) % 4, "repeated")


@pytest.mark.parametrize(
    "suffix",
    [".csv", *(pytest.param(suffix, marks=pytest.mark.slow) for suffix in (".parquet", ""))],
)
def test_memory_does_not_grow_with_the_images(model, tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("allmlp.deploy.rows._ROW_GROUP", 200)

    def peak(images: int) -> int:
        options = PredictOptions(
            output=tmp_path / f"{images}{suffix}",
            batch_size=50,
            num_workers=0,
            part_size=None if suffix else 100,
        )
        source = repeated(images)
        tracemalloc.start()
        write_predictions(model, source, options)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(100)  # what is imported and compiled once
    few, many = peak(200), peak(1000)
    # Rows held would be 800 times about 1 kB; labels and indices are 16 bytes per image.
    assert many - few < 300_000, (few, many)


@pytest.fixture
def typed(model, album, tmp_path) -> list[object]:
    """The command without its last word, the output."""
    saved, sizes = am.save_model(model, tmp_path / "model"), ["--part-size", 4, "--batch-size", 2]
    return ["predict", saved, album, *sizes, "--device", "cpu", "--output"]


# Ends before the batch of a number; `rows` is where the batches come from.
KILLED = """
from allmlp.deploy import parts
predict_rows = parts.predict_rows
def rows(*arguments, **options):
    for number, batch in enumerate(predict_rows(*arguments, **options)):
        if number == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
patch.setattr(parts, "predict_rows", rows)
"""


@unix
@pytest.mark.slow
def test_killed_and_started_again(typed, tmp_path):
    ended([start([*typed, tmp_path / "straight"], tmp_path / "text")], 3)
    typed.append(tmp_path / "out")
    for number, there in ((0, 0), (3, 1), (1, 1), (2, 2)):
        ended([start(typed, tmp_path / "killed", KILLED.format(number=number))], -9)
        assert len(list((tmp_path / "out").glob("part-*"))) == there, number
    (said,) = ended([start(typed, tmp_path / "again")], 3)
    assert "2 of 5 are there already" in said
    assert "6_bad.png: the file is not an image" in said  # found by another process
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@unix
@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(typed, tmp_path):
    ended([start([*typed, tmp_path / "one"], tmp_path / "text")], 3)
    first, second = ended(start_two([*typed, tmp_path / "two"], tmp_path / "said"), 3, 0)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("part-*-of-00005.csv"))) == 5
    assert second == ""
    assert "6_bad.png: the file is not an image" in first
    assert "5 parts, 20 images" in first
    manifests = [json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("one", "two")]
    for manifest in manifests:
        del manifest["about"]
    assert manifests[0] == manifests[1]


@unix
@pytest.mark.slow
def test_one_of_two_fails_and_both_resume_later(typed, tmp_path):
    typed.append(tmp_path / "out")
    fault = """
if os.environ["RANK"] == "1":
    from allmlp.deploy import parts
    def full(*_, **__):
        raise am.UserError("cannot write the predictions: No space left on device")
    patch.setattr(parts, "write_table", full)
"""
    first, second = ended(start_two(typed, tmp_path / "said", fault), 2, 2)
    assert "rank 1: cannot write the predictions: No space left on device" in second
    assert "error: " not in first  # the cause alone is printed
    assert len(contents(tmp_path / "out")) == 3  # those of rank 0
    ended([start(typed, tmp_path / "text")], 3)
    found = contents(tmp_path / "out")
    assert len(found.pop("bad-00001-of-00005.csv").splitlines()) == 2
    assert len([row for data in found.values() for row in data.splitlines()[1:]]) == 20
