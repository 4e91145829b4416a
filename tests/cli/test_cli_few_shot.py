"""`mixer few-shot` as a user types it: what is said, written and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import allmlp as am
from allmlp.evaluation.few_shot import FewShotOptions, command, show
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
    code, out, err = mixer(
        capsys, *line, "--random-baseline", "--output", place / "out" / "fs.json"
    )
    assert (code, err) == (0, "")
    assert "protocol  big_vision: seeds 0 1 2, l2 1024\n" in out
    assert "images    8x8 pixels, resize-crop 0.875, bilinear, values in [-1, 1]\n" in out
    assert "baseline  the same architecture with random weights, seed 0\n" in out
    said = "3 classes (chance 33.33%), 20 training images, 9 validation images"
    assert f"data      {place / 'data'}: {said}\n" in out
    assert "note      7 shots: 2 of 3 classes have fewer training images ('ant' has 6)" in out
    lines = out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.lstrip().startswith("shots"))
    assert " ".join(lines[at].split()) == "shots accuracy seed 0 seed 1 seed 2 baseline"
    values = read_measurement(place / "out" / "fs.json")
    assert values["kind"] == "few-shot"
    assert values["model"]["source"] == str(place / "weights")
    (result,), (floor,) = values["results"], values["floor"]["results"]
    one = result["accuracies"]["1"]
    assert lines[at + 2].split() == [
        "1",
        *(f"{result['mean']['1']:.2%}", "+-", f"{result['deviation']['1']:.2%}"),
        *(f"{one[seed]:.2%}" for seed in "012"),
        *(f"{floor['mean']['1']:.2%}", "+-", f"{floor['deviation']['1']:.2%}"),
    ]
    model = am.load_model(place / "weights", quiet=True)
    direct = am.few_shot(model, place / "data", shots=(1, 7), num_workers=0)
    assert direct.to_json()["accuracies"] == result["accuracies"]
    assert result["accuracies"] == direct.to_json()["accuracies"]
    assert floor["accuracies"] != result["accuracies"]
    assert values["floor"]["seed"] == 0


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
    make_class_folder(place / "second" / "train", {"x": 4, "y": 4}, start=30)
    make_class_folder(place / "second" / "test", {"x": 4, "y": 4}, start=60)
    line = (
        "few-shot",
        place / "weights",
        "--protocol",
        "scenic",
        "--shots",
        1,
        3,
        "--random-baseline",
    )
    line += ("--data", place / "data", place / "second", "--output", place / "fs.json", *SHORT)
    code, out, err = mixer(capsys, *line)
    assert (code, err) == (0, "")
    assert "protocol  scenic: the first images of each class; the l2 that is best on the" in out
    assert "by mean rank over the data\n" in out
    assert out.count("shots") == 2
    assert "seed 1" not in out
    first, second = read_measurement(place / "fs.json")["results"]
    assert first["l2"] == second["l2"]
    assert (first["data"], second["data"]) == (str(place / "data"), str(place / "second"))
    shots = "3"
    at_best = second["sweep"][shots][f"{second['l2'][shots]:g}"]
    assert second["accuracies"][shots] == {"0": at_best}


def test_bad_images_end_with_code_3(capsys, place):
    bad = place / "data" / "val" / "bee" / "1.png"
    bad.write_bytes(b"damaged")
    line = (
        "few-shot",
        place / "weights",
        "--data",
        place / "data",
        "--shots",
        2,
        "--random-baseline",
    )
    for _ in range(2):  # from the cache as well
        code, out, err = mixer(capsys, *line, *SHORT)
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
    ("flags", "said"),
    [
        (("--shots", 0), "shots"),
        (("--l2", "nan"), "l2"),
        (("--protocol", "x"), "protocol"),
        (("--resize", "x"), "resize"),
        (("--output", "figures.csv"), "not a .json file: 'figures.csv'"),
        (("--device", "tpu"), "unknown device 'tpu'"),
        (("--batch-size", 0), "batch_size must be at least 1"),
    ],
)
def test_mistakes(capsys, place, monkeypatch, flags, said):
    monkeypatch.chdir(place)
    line = ("few-shot", place / "weights", "--data", place / "data", *SHORT[:2], *flags)
    code, out, err = mixer(capsys, *line)
    assert (code, out) == (2, "")
    assert said in err


def test_wrong_data(capsys, place):
    line = ("few-shot", place / "weights", *SHORT, "--data")
    data = place / "data"
    for given, said in (
        ([f"{data}:train"], "no test and no validation split"),
        ([f"{data}:val"], "no train split"),
        ([place / "nowhere"], "no such data"),
        ([data, data], "data needs one value or more, each once"),
    ):
        code, _, err = mixer(capsys, *line, *given)
        assert code == 2
        assert said in err


def test_the_figures_are_written_before_they_are_told(place, monkeypatch):
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("allmlp.console.Reporter.say", gone)
    given = {"data": (str(place / "data"),), "shots": (1,), "output": str(place / "fs.json")}
    options = FewShotOptions(**given, device="cpu", num_workers=0)
    results = command(str(place / "weights"), options)
    with pytest.raises(BrokenPipeError):
        show(results, options)
    assert read_measurement(place / "fs.json")["results"][0]["shots"] == [1]
