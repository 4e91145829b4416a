"""`mixer inspect` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import allmlp as am
from conftest import draw, mixer, tiny_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny_model(image_size=(16, 24), num_classes=2)
    model.class_names = ["ant", "bee"]
    am.save_model(model, tmp_path / "model")
    return tmp_path / "model"


def test_the_numbers_are_printed(capsys, saved):
    code, out, _ = mixer(capsys, "inspect", saved)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"model    {saved}: 16x24 pixels, 2 layers, patch 4, 16 channels"
    header = lines.index(
        next(line for line in lines if line.startswith("layer")),
    )
    assert lines[header].split("  ")[0] == "layer"
    assert [line.split()[0] for line in lines[header + 2 : header + 5]] == ["1", "2", "stem"]
    assert lines[header + 2].split()[1] == "8"
    assert "|" not in out
    assert "written" not in out


def test_random_weights_beside_it(capsys, saved):
    code, out, _ = mixer(capsys, "inspect", saved, "--compare", "random", "--seed", 3)
    assert code == 0
    assert "compared random weights, seed 3" in out
    row = next(line for line in out.splitlines() if line.startswith("1 "))
    found = am.inspect(am.load_model(saved, quiet=True))
    other = am.inspect(am.random_weights(am.load_model(saved, quiet=True), 3))
    means = [each.model.incoming[0].frequency.mean() for each in (found, other)]
    assert f"{means[0]:.3f} | {means[1]:.3f}" in row
    assert "Correlation of the two models' weights" in out


def test_another_model_beside_it(capsys, saved, tmp_path):
    am.save_model(tiny_model(num_blocks=3), tmp_path / "other")
    code, out, _ = mixer(capsys, "inspect", saved, "--compare", tmp_path / "other", "--outgoing")
    assert code == 0
    assert f"compared {tmp_path / 'other'}" in out
    row = next(line for line in out.splitlines() if line.startswith("3 outgoing"))
    assert row.split()[2:5] == ["-", "|", "8"]


def test_pictures_of_an_image(capsys, saved, tmp_path):
    draw(2).save(tmp_path / "a.png")
    folder = tmp_path / "inside"
    code, out, _ = mixer(
        capsys, "inspect", saved, "--output", folder, "--layers", "all", "--vector", "none",
        "--image", tmp_path / "a.png", "--units", "1:2", "2:8", "--window", 2, "--stride", 2,
    )  # fmt: skip
    assert code == 0
    said = json.loads((folder / "inspection.json").read_text())
    assert said["model"]["name"] == str(saved)
    share = f"{said['occlusion']['class']} {said['occlusion']['probability']:.1%}"
    assert f"image    {tmp_path / 'a.png'}: {share}" in out
    assert "2x2 patches, 6 places" in out
    assert "units    1:2, 2:8 (layer:unit)" in out
    pictures = list(folder.glob("*.png"))
    assert {"figure6_layer1.png", "figure6_layer2.png"} <= {path.name for path in pictures}
    assert f"written  {folder}: inspection.json, units.csv, {len(pictures)} pictures" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "1"], "--seed is of the random weights"),
        (["--compare", "nothing"], "no such model: 'nothing'"),
        (["--output", "OUT", "--layers", "one"], "not a layer: 'one'"),
        (["--output", "OUT", "--layers", "0"], "no layer 0: the model has 2"),
        (["--units", "3"], "not a unit: '3'"),
        (["--units", "1:2"], "--units is for what one image excites"),
        (["--batch-size", "3"], "--batch-size is for what one image excites"),
        (["--device", "cpu"], "--device is for what one image excites"),
        (["--image", "x.png"], "--image is for the pictures"),
        (["--output", "OUT", "--image", "x.png"], "cannot read the image: No such file"),
        (["--layers", "1"], "--layers is for the pictures"),
        (["--output", "OUT", "--vector", "eps"], "unknown vector format 'eps'"),
        (["--resize-weights", "auto"], "--resize-weights says how to reach another image size"),
    ],
)
def test_mistakes_are_one_message(capsys, saved, tmp_path, arguments, message):
    given = [str(tmp_path / "out") if each == "OUT" else each for each in arguments]
    code, out, err = mixer(capsys, "inspect", saved, *given)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert "to fix: " in err
    assert out == ""


def test_the_output_is_a_file(capsys, saved, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = mixer(capsys, "inspect", saved, "--output", tmp_path / "file")
    assert code == 2
    assert "error: the output is a file, it must be a folder" in err


def test_another_size(capsys, saved):
    code, out, err = mixer(capsys, "inspect", saved, "--image-size", "32x48")
    assert code == 0
    assert "32x48 pixels" in out
    assert "grown" in out + err
    row = next(line for line in out.splitlines() if line.startswith("1 "))
    assert row.split()[1] == "32"  # four tiles of eight units
