"""`mixer few-shot` as a user types it: what is said, written and refused."""

import json
from pathlib import Path

import pytest
import torch

import allmlp as am
from allmlp.evaluation.result_file import read_measurement
from conftest import mixer, tiny_model

SHORT = ("--num-workers", 0, "--device", "cpu")


@pytest.fixture
def place(class_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with weights, and data with train/ and val/; the cache lies there too."""
    model = tiny_model(3)
    for parameter in model.parameters():  # not the baseline's, which are drawn with the same seed
        torch.nn.init.normal_(parameter, std=0.3)
    am.save_model(model, class_folder.parent / "weights")
    monkeypatch.setenv("MIXER_CACHE", str(class_folder.parent / "cache"))
    return class_folder.parent


def test_a_measurement(capsys, place):
    bad = place / "data" / "val" / "bee" / "1.png"
    bad.write_bytes(b"damaged")
    line = ("few-shot", place / "weights", "--data", place / "data", "--shots", 1, 7, *SHORT)
    target = place / "out" / "fs.json"
    for flags in ((), ("--overwrite",)):  # from the cache as well
        flags = ("--random-baseline", "--output", target, *flags)
        code, out, err = mixer(capsys, *line, *flags)
        assert (code, len(err.splitlines())) == (3, 1)
        assert err.startswith(f"bad image: {bad}: ")
        assert "8 validation images" in out
        assert "note      7 shots: 2 of 3 classes have fewer training images ('ant' has 6)" in out
    values = read_measurement(target)
    assert values["kind"] == "few-shot"
    assert values["model"]["source"] == str(place / "weights")
    (result,), (baseline,) = values["results"], values["random_baseline"]["results"]
    model = am.load_model(place / "weights", quiet=True)
    direct = am.few_shot(model, place / "data", shots=(1, 7), num_workers=0)
    assert result["accuracies"] == json.loads(json.dumps(direct.accuracies))
    assert result["accuracies"] != baseline["accuracies"]
