"""`mixer evaluate`: protocols, ReaL, several processes, and what it refuses."""

import json
from pathlib import Path

import pytest

import allmlp as am
from allmlp.evaluation.imagenet_real import IMAGES
from allmlp.weights.checkpoints import CHECKPOINTS
from conftest import draw, make_class_folder, mixer, ran, tiny_model
from runs import start, start_two, unix

IMAGENET = CHECKPOINTS["mixer_b16.i1k"].class_names() or []


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of three classes with random weights, saved."""
    net = tiny_model(["ant", "bee", "cat"], image_size=16)
    am.save_model(net, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def imagenet(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model of ImageNet's classes, six validation images, and their ReaL labels."""
    net = tiny_model(IMAGENET)
    am.save_model(net, tmp_path / "net")
    lists = [[number % 1000] for number in range(IMAGES)]
    for number in range(1, 7):
        folder = tmp_path / "val" / IMAGENET[number % 2][:9]
        folder.mkdir(parents=True, exist_ok=True)
        draw(number).save(folder / f"ILSVRC2012_val_{number:08d}.png")
        lists[number - 1] = list(range(1000)) if number < 4 else []  # any answer is right, or none
    (tmp_path / "real.json").write_text(json.dumps(lists))
    return tmp_path / "net", tmp_path / "val", tmp_path / "real.json"


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
def test_real(capsys, imagenet: tuple[Path, Path, Path], tmp_path: Path):
    net, images, real = imagenet
    flags = ("--real", real, "--allow-missing-classes", "--output", tmp_path / "out")
    code, said, err = mixer(capsys, "evaluate", net, "--data", images, *flags)
    assert (code, err) == (0, "")
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
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
