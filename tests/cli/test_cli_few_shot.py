"""`mixer few-shot` as a user types it: what is said, written and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import allmlp as am
from allmlp.evaluation.result_file import read_measurement
from conftest import make_class_folder, mixer, tiny_model

SHORT = ("--num-workers", 0, "--device", "cpu")


@pytest.fixture
def place(class_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with weights, and data with train/ and val/; the cache lies there too."""
    model = tiny_model(3)
    for parameter in model.parameters():  # not the floor's, which are drawn with the same seed
        torch.nn.init.normal_(parameter, std=0.3)
    am.save_model(model, class_folder.parent / "weights")
    monkeypatch.setenv("MIXER_CACHE", str(class_folder.parent / "cache"))
    return class_folder.parent


def test_a_measurement(capsys, place):
    line = ("few-shot", place / "weights", "--data", place / "data", "--shots", 1, 7, *SHORT)
    target = place / "out" / "fs.json"
    code, out, err = mixer(capsys, *line, "--random-baseline", "--output", target)
    assert (code, err) == (0, "")
    assert "protocol  big_vision: seeds 0 1 2, l2 1024\n" in out
    assert "images    8x8 pixels, resize-crop 0.875, bilinear, values in [-1, 1]\n" in out
    said = "3 classes (chance 33.33%), 20 training images, 9 validation images"
    assert f"data      {place / 'data'}: {said}\n" in out
    assert "note      7 shots: 2 of 3 classes have fewer training images ('ant' has 6)" in out
    values = read_measurement(target)
    assert values["kind"] == "few-shot"
    assert values["model"]["source"] == str(place / "weights")
    (result,), (floor,) = values["results"], values["floor"]["results"]
    lines = [line.split() for line in out.splitlines()]
    at = next(number for number, words in enumerate(lines) if words[:1] == ["shots"])
    assert " ".join(lines[at]) == "shots accuracy seed 0 seed 1 seed 2 baseline"
    assert lines[at + 2] == [
        "1",
        *(f"{result['mean']['1']:.2%}", "+-", f"{result['deviation']['1']:.2%}"),
        *(f"{result['accuracies']['1'][seed]:.2%}" for seed in "012"),
        *(f"{floor['mean']['1']:.2%}", "+-", f"{floor['deviation']['1']:.2%}"),
    ]
    model = am.load_model(place / "weights", quiet=True)
    direct = am.few_shot(model, place / "data", shots=(1, 7), num_workers=0)
    assert result["accuracies"] == json.loads(json.dumps(direct.accuracies))
    assert result["accuracies"] != floor["accuracies"]


def test_the_cache(capsys, place):
    line = ("few-shot", place / "weights", "--data", place / "data", "--shots", 2, *SHORT)
    kept = place / "cache" / "features"
    code, out, _ = mixer(capsys, *line, "--no-cache")
    assert code == 0
    assert "images computed now; no cache\n" in out
    assert not kept.exists()
    for is_first in (True, False):
        code, out, err = mixer(capsys, *line)
        assert (code, err) == (0, "")
        assert ("of 0 images computed now" in out) != is_first
        assert f"; cache {kept}\n" in out
    files = list(kept.iterdir())
    assert len(files) == 2  # of the training and of the validation images
    files[0].write_bytes(b"damaged")
    code, out, _ = mixer(capsys, *line)
    assert code == 0
    assert f"note      the cached features {files[0]} are not used: " in out
    code, out, _ = mixer(capsys, *line, "--cache", place / "mine")
    assert code == 0
    assert len(list((place / "mine").iterdir())) == 2


def test_the_older_protocol_over_two_sources(capsys, place):
    for split, start in (("train", 30), ("test", 60)):
        make_class_folder(place / "second" / split, {"x": 4, "y": 4}, start=start)
    line = ("few-shot", place / "weights", "--protocol", "scenic", "--shots", 1, 3, *SHORT)
    line += ("--data", place / "data", place / "second", "--output", place / "fs.json")
    code, out, err = mixer(capsys, *line, "--random-baseline")
    assert (code, err) == (0, "")
    assert "the l2 that is best on the test images, by mean rank over the data\n" in out
    assert "seed 1" not in out
    first, second = read_measurement(place / "fs.json")["results"]
    assert first["l2"] == second["l2"]
    assert (first["data"], second["data"]) == (str(place / "data"), str(place / "second"))
    at_best = second["sweep"]["3"][f"{second['l2']['3']:g}"]
    assert second["accuracies"]["3"] == {"0": at_best}


def test_bad_images_end_with_code_3(capsys, place):
    bad = place / "data" / "val" / "bee" / "1.png"
    bad.write_bytes(b"damaged")
    line = ("few-shot", place / "weights", "--data", place / "data", "--shots", 2, *SHORT)
    for _ in range(2):  # from the cache as well
        code, out, err = mixer(capsys, *line, "--random-baseline")
        assert code == 3
        assert "8 validation images" in out
        assert err.startswith(f"bad image: {bad}: ")
        assert len(err.splitlines()) == 1


def test_another_size_and_resize(capsys, place):
    line = ("few-shot", place / "weights", "--data", place / "data", "--shots", 2, *SHORT)
    code, out, err = mixer(capsys, *line, "--image-size", 16, "--resize", "squash", "--l2", 0.5)
    assert code == 0
    assert "images    16x16 pixels, squash, bilinear" in out
    assert "seeds 0 1 2, l2 0.5\n" in out
    assert "resized  8x8 -> 16x16" in err


@pytest.mark.parametrize(
    ("data", "flags", "said"),
    [
        (["data"], ("--output", "figures.csv"), "not a .json file: 'figures.csv'"),
        (["data:train"], (), "no test and no validation split"),
        (["nowhere"], (), "no such data"),
        (["data", "data"], (), "data needs one value or more, each once"),
    ],
)
def test_mistakes(capsys, place, monkeypatch, data, flags, said):
    monkeypatch.chdir(place)
    line = ("few-shot", place / "weights", *SHORT, *flags, "--data", *data)
    code, out, err = mixer(capsys, *line)
    assert (code, out) == (2, "")
    assert said in err
