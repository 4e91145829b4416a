"""Files written under the old name, mlp_mixer, still load (see tests/golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import allmlp as am
from allmlp.data.fingerprint import read_exclude_list
from allmlp.data.sources.subset_file import read_subset_file

OLD = Path(__file__).parent / "golden" / "old_name"
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
LOGITS = [
    [-0.8210096955299377, -3.2950961589813232, 4.005010604858398],
    [0.03246641159057617, -0.010967135429382324, -2.9798407554626465],
]


@pytest.mark.parametrize("name", ["folder", "model.safetensors"])
def test_weights(name: str):
    model = am.load_model(OLD / name)
    assert model.class_names == ["a", "b", "c"]
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), torch.tensor(LOGITS), atol=1e-5, rtol=1e-5)


def test_an_exported_file():
    pytest.importorskip("onnxruntime")
    model = am.open_exported(OLD / "model.onnx")
    assert model.class_names == ["a", "b", "c"]
    np.testing.assert_allclose(model(IMAGES).numpy(), LOGITS, atol=1e-5, rtol=1e-5)


def test_weights_are_saved_over_old_ones(tmp_path: Path):
    (tmp_path / "config.json").write_bytes((OLD / "folder" / "config.json").read_bytes())
    am.save_model(am.load_model(OLD / "folder"), tmp_path, overwrite=True)
    assert json.loads((tmp_path / "config.json").read_text())["format"] == "allmlp"


def test_a_selection(tmp_path: Path):
    path = tmp_path / "s.json"
    splits = {"train": ["test[:5]"]}
    text = {"format": "mlp_mixer selection", "version": 1, "source": "digits", "splits": splits}
    path.write_text(json.dumps(text))
    assert read_subset_file(path).source == "digits"


def test_a_drop_list(tmp_path: Path):
    path = tmp_path / "drop.txt"
    title, source = "# mlp_mixer drop list 1", "# source\tdigits"
    path.write_text(f"{title}\n{source}\n# split\ttrain\t5\tabc\n")
    assert read_exclude_list(path).splits
