"""am.inspect and `mixer inspect`: the numbers, the files, wrong options, what does not apply."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_attribution import OnePatch

import allmlp as am
from conftest import draw, encode, ran, tiny_model, user_error


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(encode(draw(3)))
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    am.save_model(tiny_model(["ant", "bee"], (16, 24)), tmp_path / "model")
    return tmp_path / "model"


def test_numbers_without_a_folder():
    model = tiny_model(image_size=(8, 12))
    with torch.no_grad():
        weight = model.blocks[0].token_mixing.dense_0.weight
        weight[4:] = -weight[:4]
    found = am.inspect(model, compare=am.random_weights(model, 5))
    assert found.files == []
    values = found.to_json()
    assert values["model"]["architecture"]["patch_size"] == 4
    assert [layer["layer"] for layer in values["model"]["layers"]] == [1, 2]
    layer = values["model"]["layers"][0]
    assert layer["incoming"]["units"] == 8
    assert layer["incoming"]["locality_of_a_constant"] == pytest.approx(2 / 6)
    assert values["model"]["stem"]["units"] == 16
    assert layer["incoming"]["opposite_share"] == 1.0
    assert values["compared"]["layers"][0]["incoming"]["opposite_share"] < 1.0
    assert set(values["weights_correlation"]) == {"1", "2", "stem"}
    same = am.inspect(model, compare=model).to_json()
    assert same["weights_correlation"]["2"] == pytest.approx(1)
    larger = am.inspect(model, compare=tiny_model(image_size=16)).to_json()
    assert set(larger["weights_correlation"]) == {"stem"}


def test_everything_is_written(tmp_path, photo):
    model = tiny_model(image_size=(16, 24), num_blocks=4)
    folder = tmp_path / "out" / "inside"
    found = am.inspect(model, output=folder, compare="random", layers=[4, 1], image=photo)
    drawn = {"figure5", "figure5_compared", "figure6_layer1", "figure6_layer4"}
    drawn |= {"figure7", "figure7_compared", "occlusion", "responses"}
    expected = {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    expected |= {"inspection.json"}
    assert {path.name for path in folder.iterdir()} == expected == set(found.files)
    for name in drawn:
        assert np.asarray(Image.open(folder / f"{name}.png").convert("L")).std() > 10, name
    values = json.loads((folder / "inspection.json").read_text())
    assert values == found.to_json()
    responses = values["responses"]
    assert [one["layer"] for one in responses] == [1] * 4 + [2] * 4 + [3] * 4
    assert np.array(responses[0]["read"]).shape == (4, 6)
    assert np.array(values["occlusion"]["patch_drop"]).shape == (4, 6)


def test_models_of_other_kinds(tmp_path, photo):
    found = am.inspect(OnePatch(1, 1), output=tmp_path / "a", image=photo)
    drawn = {name for name in found.files if name.endswith(".png")}
    assert drawn == {"figure7.png", "occlusion.png"}
    assert (found.responses, len(found.notes)) == ([], 1)
    model = tiny_model(token_mixing="untied")
    other = tiny_model(image_size=16)
    found = am.inspect(model, output=tmp_path / "b", compare=other)
    assert {"figure7.png", "figure5_compared.png"} <= set(found.files)
    assert "figure5.png" not in found.files
    both = am.inspect(model, compare="random")
    assert both.notes == found.notes  # what is true of both is named once
    with pytest.raises(am.UserError, match="layer 1"):
        am.inspect(model, output=tmp_path, layers=[1])


@pytest.mark.parametrize(
    ("name", "mixing"),
    [("resmlp_12", "token_mixing.weight"), ("gmlp_ti16", "mlp.gate.token_mixing.weight")],
)
def test_one_matrix_over_the_tokens(tmp_path, photo, name, mixing):
    """Its rows are drawn as maps of what each token reads."""
    torch.manual_seed(0)
    model = am.create_model(name, (32, 48), 3, num_blocks=2, hidden_dim=16)
    torch.nn.init.normal_(model.head.weight)
    weight = model.get_parameter(f"blocks.1.{mixing}")
    torch.nn.init.normal_(weight)
    found = am.inspect(model, output=tmp_path / "a", image=photo)
    assert {f"tokens_layer{number}.png" for number in (1, 2)} <= set(found.files)
    assert "figure5.png" not in found.files
    assert found.responses == []
    assert np.array_equal(found.model.layer(2).incoming[4, 1, 2], weight[4, 1 * 3 + 2].item())


@pytest.mark.parametrize(
    ("settings", "code", "named"),
    [
        ({"output": "file"}, "invalid", "file"),
        ({"output": "out", "layers": [3]}, "unknown-name", "3"),
        ({"layers": [1]}, "needs", "output"),
        ({"image": Path("file")}, "invalid", "file"),
        ({"compare": "nothing"}, "unknown-name", "nothing"),
    ],
)
def test_wrong_options(tmp_path, monkeypatch, settings, code, named):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    with user_error(code, named):
        am.inspect(tiny_model(), **settings)
    assert not list(tmp_path.glob("out/*"))  # nothing half-written


def test_the_command_prints_the_numbers(capsys, saved):
    out, _ = ran(capsys, "inspect", saved)
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[5:8]] == [["1", "8"], ["2", "8"], ["stem", "16"]]
    out, _ = ran(capsys, "inspect", saved, "--compare", "random", "--seed", 3)
    rows = [line for line in out.splitlines() if line.startswith("1 ")]
    found = am.inspect(saved, compare="random", seed=3)
    for units, row in zip((found.model, found.compared), rows, strict=True):
        assert f" {units.measures['1'].frequency.mean():.3f} " in row
