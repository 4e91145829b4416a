"""am.inspect: the numbers, the files, what is refused, and what does not apply."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_attribution import OnePatch

import allmlp as am
from allmlp.inspection.report import random_weights
from conftest import draw, encode, tiny_model


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(encode(draw(3)))
    return path


def test_numbers_without_a_folder():
    model = tiny_model(image_size=(8, 12))
    found = am.inspect(model)
    assert found.files == []
    assert found.compared is None
    said = found.to_json()
    assert said["definitions"]["frequency"].startswith("spectral centroid")
    assert "is kept" in said["definitions"]["frequency"]
    assert said["definitions"]["histogram_edges"][-1] == 0.75
    assert said["model"]["architecture"]["patch_size"] == 4
    assert [layer["layer"] for layer in said["model"]["layers"]] == [1, 2]
    incoming = said["model"]["layers"][0]["incoming"]
    assert incoming["units"] == 8
    assert sum(incoming["frequency"]["histogram"]) == 8
    assert len(incoming["frequency"]["histogram"]) == 15
    assert 0 <= incoming["opposite_share"] <= 1
    assert incoming["locality_of_a_constant"] == pytest.approx(2 / 6)
    assert "outgoing" not in said["model"]["layers"][0]
    assert said["model"]["stem"]["units"] == 16


def test_units_with_opposites_are_counted():
    model = tiny_model(image_size=16)
    with torch.no_grad():
        weight = model.blocks[0].token_mixing.dense_0.weight
        weight[4:] = -weight[:4]
    found = am.inspect(model, compare=random_weights(model, 5)).to_json()
    assert found["model"]["layers"][0]["incoming"]["opposite_share"] == 1.0
    assert found["compared"]["layers"][0]["incoming"]["opposite_share"] < 1.0
    assert set(found["weights_correlation"]) == {"1", "2", "stem"}


def test_random_weights_say_their_seed_and_leave_torchs():
    model = tiny_model()
    before = torch.random.get_rng_state()
    first, again, other = (random_weights(model, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not first.training
    assert torch.equal(first.stem.weight, again.stem.weight)
    assert not torch.equal(first.stem.weight, other.stem.weight)


def test_everything_is_written(tmp_path, photo):
    model = tiny_model(image_size=(16, 24), num_blocks=4)
    found = am.inspect(
        model,
        output=tmp_path / "out" / "inside",
        compare=random_weights(model),
        layers=[4, 1],
        outgoing=True,
        image=photo,
        units=[(2, 8), (4, 1), (2, 1)],
        vector="none",
        batch_size=5,
    )
    folder = tmp_path / "out" / "inside"
    pictures = {
        *("figure5", "figure5_outgoing", "figure7", "layers", "occlusion", "responses"),
        *("figure6_layer1", "figure6_layer1_outgoing", "figure6_layer4", "figure6_layer4_outgoing"),
        *("figure5_compared", "figure5_outgoing_compared", "figure7_compared"),
    }
    expected = {f"{name}.png" for name in pictures} | {"inspection.json", "units.csv"}
    assert {path.name for path in folder.iterdir()} == expected == set(found.files)
    for name in pictures:
        assert np.asarray(Image.open(folder / f"{name}.png").convert("L")).std() > 10, name
    said = json.loads((folder / "inspection.json").read_text())
    assert said == json.loads(json.dumps(found.to_json(), default=np.ndarray.tolist))
    # Of four chosen the order is the given one; layers and units count from 1.
    assert [(each["layer"], each["unit"]) for each in said["responses"]] == [(2, 8), (4, 1), (2, 1)]
    assert np.array(said["responses"][0]["read"]).shape == (4, 6)
    assert np.array(said["occlusion"]["patch_drop"]).shape == (4, 6)
    assert said["occlusion"]["class"] == f"class {said['occlusion']['class_index']}"
    with (folder / "units.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (4 * 2 * 8 + 16)  # models; layers, directions and units; the stem
    measured = found.model.incoming[1]
    row = next(r for r in rows if (r["layer"], r["unit"], r["weights"]) == ("2", "3", "incoming"))
    assert float(row["frequency"]) == pytest.approx(measured.frequency[2], abs=1e-6)
    assert int(row["opposite"]) == measured.partner[2] + 1


def test_the_default_is_the_first_three_layers(tmp_path, photo):
    found = am.inspect(tiny_model(num_blocks=5), output=tmp_path / "a", image=photo, vector="none")
    drawn = {name for name in found.files if name.startswith("figure6")}
    assert drawn == {f"figure6_layer{number}.png" for number in (1, 2, 3)}
    assert not any(name.endswith(("svg", "pdf")) for name in found.files)
    assert [each.layer for each in found.responses] == [1] * 4 + [2] * 4 + [3] * 4


@pytest.mark.slow
def test_pdf(tmp_path):
    am.inspect(tiny_model(), output=tmp_path, layers=[2], vector="pdf")
    assert (tmp_path / "figure6_layer2.pdf").read_bytes().startswith(b"%PDF")
    assert not list(tmp_path.glob("*.svg"))


@pytest.mark.slow
def test_the_same_again_gives_the_same_files(tmp_path):
    for folder in ("a", "b"):
        am.inspect(tiny_model(), output=tmp_path / folder, layers=[1])
    files = sorted((tmp_path / "a").iterdir())
    assert [path.name for path in files if path.suffix == ".svg"] == [
        "figure5.svg",
        "figure6_layer1.svg",
        "figure7.svg",
        "layers.svg",
    ]
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_model_of_another_kind(tmp_path, photo):
    """Figure 7 and the occlusion map of what has no token-mixing MLP."""
    found = am.inspect(OnePatch(1, 1), output=tmp_path / "a", image=photo, vector="none")
    assert sorted(found.files) == ["figure7.png", "inspection.json", "occlusion.png", "units.csv"]
    assert found.responses == []
    assert found.notes == [
        "a OnePatch has no token-mixing MLP, whose hidden units read every patch: "
        "figures 5 and 6 do not apply"
    ]
    assert "responses" in found.to_json()


def test_a_variant_is_said_and_the_rest_is_drawn(tmp_path):
    model = tiny_model(token_mixing="untied")
    found = am.inspect(model, output=tmp_path, compare=tiny_model(), vector="none")
    assert {"figure7.png", "figure5_compared.png"} <= set(found.files)
    assert "figure5.png" not in found.files
    assert len(found.notes) == 1
    both = am.inspect(model, compare=random_weights(model))
    assert both.notes == found.notes  # what is true of both is said once
    with pytest.raises(am.UserError, match="no token-mixing layer 1 that can be drawn"):
        am.inspect(model, output=tmp_path, layers=[1], overwrite=True)


def test_different_shapes_can_be_compared(tmp_path):
    found = am.inspect(
        tiny_model(num_blocks=1), output=tmp_path, compare=tiny_model(image_size=16), vector="none"
    )
    assert found.compared is not None
    assert len(found.compared.incoming) == 2
    assert (tmp_path / "layers.png").exists()


def test_what_is_refused(tmp_path, photo):
    model, folder = tiny_model(), tmp_path / "folder"
    file = tmp_path / "file"
    file.write_text("x")
    wrong = [
        ({"output": file}, "the output is a file"),
        ({"output": folder, "layers": [3]}, "no layer 3: the model has 2"),
        ({"output": folder, "layers": []}, "--layers names none"),
        ({"layers": [1]}, "--layers is for the pictures"),
        ({"vector": "svg"}, "--vector is for the pictures"),
        ({"image": photo}, "--image is for the pictures"),
        ({"output": folder, "vector": "eps"}, "unknown vector format 'eps'"),
        ({"output": folder, "units": [(1, 1)]}, "--units is for what one image excites"),
        ({"output": folder, "window": 1}, "--window is for what one image excites"),
        ({"output": folder, "stride": 1}, "--stride is for what one image excites"),
        ({"output": folder, "image": photo, "units": [(1, 9)]}, "no unit 9 in layer 1"),
        ({"output": folder, "image": photo, "units": [(1, 0)]}, "no unit 0 in layer 1"),
        ({"output": folder, "image": photo, "units": [(4, 1)]}, "no layer 4"),
        ({"output": folder, "image": photo, "window": 7}, "a window of 7 patches does not fit"),
        ({"output": folder, "image": file}, "not an image"),
        ({"output": folder, "image": photo, "batch_size": 0}, "the batch size must be at least 1"),
    ]
    for settings, message in wrong:
        with pytest.raises(am.UserError, match=message):
            am.inspect(model, **settings)
    assert not list(folder.glob("*"))  # nothing half-written
    with pytest.raises(am.UserError, match="inspect takes a model"):
        am.inspect("runs/mine")  # pyright: ignore[reportArgumentType]
