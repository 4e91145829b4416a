"""`mixer evaluate`: protocols, ReaL and several processes; and `mixer few-shot`."""

import json
from pathlib import Path

import pytest
import torch

import allmlp as am
from allmlp.evaluation.imagenet_real import IMAGES
from allmlp.evaluation.result_file import read_measurement
from allmlp.weights.checkpoints import CHECKPOINTS
from conftest import draw, make_class_folder, mixer, ran, tiny_model
from runs import start, start_two, unix


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of three classes with random weights, saved."""
    net = tiny_model(["ant", "bee", "cat"], image_size=16)
    am.save_model(net, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("flags", "protocol"),
    [
        ((), {}),
        (("--resize", "resize-crop"), {"resize": "resize-crop"}),
        (("--resize", "squash"), {"resize": "squash"}),
        (("--crop", 0.5), {"crop": 0.5, "crop_small": True}),
        (
            ("--crop", 1, "--image-size", 48, "--ignore-exif"),
            {"crop": 1.0, "crop_small": True, "exif_orientation": False, "image_size": (48, 48)},
        ),
    ],
)
def test_protocols(capsys, class_folder: Path, model: Path, tmp_path: Path, flags, protocol):
    """Each gives the figures of a model that has it as its own, also for images that are small."""
    line = ("evaluate", model, "--data", class_folder, "--output", tmp_path / "out")
    said, err = ran(capsys, *line, *flags)
    preprocessing = am.Preprocessing(**{"image_size": (16, 16), **protocol})
    height, width = preprocessing.image_size
    assert err.startswith("resized  16x16 -> 48x48 pixels" if height == 48 else "")
    turned = "turned upright by EXIF" if preprocessing.exif_orientation else "EXIF ignored"
    assert said.startswith(f"protocol {height}x{width} pixels, {preprocessing.summary()}, {turned}")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("confusion.csv", "confusion.png", "evaluation.json", "per_class.csv"),
        *("predictions.png", "reliability.png", "report.html", "worst_mistakes.png"),
    ]
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert f"top-1    {written['top1']:.2%}" in said
    own = am.load_model(model, preprocessing.image_size, quiet=True)
    own.preprocessing = preprocessing
    assert am.evaluate(own, str(class_folder), num_workers=0).loss == written["loss"]
    known = json.loads(json.dumps(preprocessing.to_json()))
    assert all(known[name] == value for name, value in written["protocol"].items())


@pytest.mark.slow  # it draws a confusion matrix of 1,000 classes
def test_real(capsys, tmp_path: Path):
    names = CHECKPOINTS["mixer_b16.i1k"].class_names() or []
    am.save_model(tiny_model(names), tmp_path / "net")
    lists = [[number % 1000] for number in range(IMAGES)]
    for number in range(1, 7):
        folder = tmp_path / "val" / names[number % 2][:9]
        folder.mkdir(parents=True, exist_ok=True)
        draw(number).save(folder / f"ILSVRC2012_val_{number:08d}.png")
        lists[number - 1] = list(range(1000)) if number < 4 else []  # any answer is right, or none
    (tmp_path / "real.json").write_text(json.dumps(lists))
    flags = ("--real", tmp_path / "real.json", "--allow-missing-classes")
    line = (tmp_path / "net", "--data", tmp_path / "val", "--output", tmp_path / "out")
    said, err = ran(capsys, "evaluate", *line, *flags)
    assert err == ""
    words = "(3 of 3 scored images correct; 3 without a ReaL label are not scored)"
    assert f"ReaL     100.00% {words}" in said
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["real"] == {"accuracy": 1.0, "images": 3, "correct": 3, "unlabelled": 3}
    assert written["top1"] < 1.0


@unix
@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(model: Path, tmp_path: Path):
    data = make_class_folder(tmp_path / "data", {"ant": 6, "bee": 8, "cat": 7})
    (data / "cat" / "3.png").write_bytes(b"x")
    typed = ["evaluate", model, "--data", data, "--batch-size", 4, "--device", "cpu"]
    one = start([*typed, "--output", tmp_path / "one"], tmp_path / "text")
    assert one.wait() == 3, one.said()
    first, second = start_two([*typed, "--output", tmp_path / "two"], tmp_path / "said")
    assert (first.wait(), second.wait()) == (3, 0), first.said() + second.said()
    assert second.said() == ""
    assert first.said().replace("/two", "/one") == one.said()
    assert "20 images" in first.said()
    written = [json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("one", "two")]
    for values in written:
        del values["environment"]
    assert written[0] == written[1]  # all metrics to the last bit
    assert written[0]["images"] == 20
    names = [{path.name for path in (tmp_path / n).iterdir()} for n in ("one", "two")]
    assert names[0] == names[1]


def test_few_shot(capsys, class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MIXER_CACHE", str(tmp_path / "cache"))
    model = tiny_model(3)
    for parameter in model.parameters():  # not the baseline's, which are drawn with the same seed
        torch.nn.init.normal_(parameter, std=0.3)
    am.save_model(model, tmp_path / "weights")
    bad, target = class_folder / "val" / "bee" / "1.png", tmp_path / "out" / "fs.json"
    bad.write_bytes(b"damaged")
    line = ("few-shot", tmp_path / "weights", "--data", class_folder, "--shots", 1, 7)
    flags = ("--num-workers", 0, "--device", "cpu", "--random-baseline", "--output", target)
    for more in ((), ("--overwrite",)):  # from the cache as well
        code, out, err = mixer(capsys, *line, *flags, *more)
        assert (code, len(err.splitlines())) == (3, 1)
        assert err.startswith(f"bad image: {bad}: ")
        assert "8 validation images" in out
        assert "note      7 shots: 2 of 3 classes have fewer training images ('ant' has 6)" in out
    values = read_measurement(target)
    assert values["kind"] == "few-shot"
    assert values["model"]["source"] == str(tmp_path / "weights")
    (result,), (baseline,) = values["results"], values["random_baseline"]["results"]
    direct = am.few_shot(tmp_path / "weights", class_folder, shots=(1, 7), num_workers=0)
    assert result["accuracies"] == json.loads(json.dumps(direct.accuracies))
    assert result["accuracies"] != baseline["accuracies"]
