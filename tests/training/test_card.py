"""The model card: true of every family, read by hubs, and of use to whoever gets the folder."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import allmlp as am
from allmlp.data.sources import open_splits
from allmlp.decision import Decision
from allmlp.evaluation.metrics import Evaluation
from allmlp.preprocessing import Preprocessing
from allmlp.training.card import Outcome, model_card
from allmlp.training.dataset import Splits
from conftest import draw, mixer, tiny_config, tiny_model


def header_of(card: str) -> dict[str, Any]:
    """The hub's fields: JSON values, which YAML reads alike."""
    _, head, _ = card.split("---\n", 2)
    lines = [line for line in head.splitlines() if not line.startswith("#")]
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in lines)}


LOGITS = np.log(np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]], dtype=np.float32))
TEST = Evaluation("digits:test", ["a", "b"], np.array([0, 1, 1]), np.arange(3), LOGITS)


def card_of(
    model: Any, tmp_path: Path, validation: Any = None, test: Any = TEST, **changes: Any
) -> str:
    model.preprocessing = Preprocessing(image_size=model.config.image_size)
    config = tiny_config(changes.pop("source", "digits"), tmp_path / "run", **changes)
    splits = Splits(open_splits("digits")["train"], None, None, False, [])
    test = test and replace(test, data=f"{config.data.source}:test")
    return model_card(Outcome(config, splits, model, validation, test))


@pytest.mark.parametrize(
    ("name", "overrides", "called", "paper", "tag"),
    [
        ("mixer_s32", {}, "MLP-Mixer mixer_s32", "2105.01601", "mlp-mixer"),
        ("mixer_s32", {"token_mixing": "untied", "num_blocks": 1}, "MLP-Mixer variant",
         "untied token mixing", "mlp-mixer"),
        ("cycle_mlp_b1", {}, "CycleMLP cycle_mlp_b1", "2107.10224", "cyclemlp"),
        ("vip_s7", {}, "Vision Permutator vip_s7", "2106.12368", "vision-permutator"),
        ("small_resnet", {}, "Small ResNet", "1603.05027", "small-resnet"),
    ],
)  # fmt: skip
def test_every_family(tmp_path: Path, name, overrides, called, paper, tag):
    size = None if name == "vip_s7" else 32
    with torch.device("meta"):
        model = am.create_model(name, size, 2, **overrides)
    card = card_of(model, tmp_path)
    line = next(line for line in card.splitlines() if line.startswith("Architecture: "))
    assert called in line
    assert paper in line
    assert ("2105.01601" in card) == name.startswith("mixer")
    assert f"# {called}" in card
    assert tag in header_of(card)["tags"]


def test_the_fields_of_the_hub(tmp_path: Path):
    header = header_of(card_of(tiny_model(), tmp_path, model__weights="mixer_b16.timm_i21k"))
    assert header["library_name"] == "allmlp"
    assert header["pipeline_tag"] == "image-classification"
    assert header["metrics"] == ["accuracy"]
    assert header["base_model"].startswith("timm/mixer_b16")
    [entry] = header["model-index"]
    [result] = entry["results"]
    assert result["dataset"]["name"] == "digits:test"
    assert result["metrics"] == [
        {"type": "accuracy", "name": "top-1", "value": 0.666667},
        {"type": "balanced_accuracy", "name": "balanced", "value": 0.75},
        {"type": "f1", "name": "macro F1", "value": 0.666667},
    ]
    assert header["license"] == "apache-2.0"  # of the weights that it began with
    assert "datasets" not in header  # not on the hub
    nothing = header_of(card_of(tiny_model(), tmp_path, test=None))
    assert not {"model-index", "metrics", "base_model", "license"} & nothing.keys()
    of_hub = header_of(card_of(tiny_model(), tmp_path, source="hf:owner/name@v1"))
    assert of_hub["datasets"] == ["owner/name"]
    other = header_of(card_of(tiny_model(), tmp_path, model__weights="hf:owner/model@v2"))
    assert other["base_model"] == "owner/model"


def test_a_test_set_whose_logits_were_not_kept(tmp_path: Path):
    validation = replace(TEST, data="digits:validation", decision=Decision(temperature=2.0))
    card = card_of(tiny_model(), tmp_path, validation, TEST.without_logits())
    assert "digits:validation" in card
    assert "digits:test" in card


def test_no_path_of_this_machine(tmp_path: Path):
    source, weights = tmp_path / "secret" / "photos", tmp_path / "secret" / "runs" / "best"
    card = card_of(tiny_model(), tmp_path, source=str(source), model__weights=str(weights))
    assert "secret" not in card
    assert "photos:test" in card
    assert "weights runs" in card


def test_the_code_works_where_the_folder_is(capsys, trained, tmp_path, monkeypatch):
    folder = trained.run_folder / "best"
    card = (folder / "README.md").read_text()
    assert str(trained.run_folder) not in card
    moved = shutil.copytree(folder, tmp_path / "given away")
    draw(0).save(moved / "photo.jpg")
    monkeypatch.chdir(moved)
    [code] = re.findall(r"```python\n(.+?)```", card, flags=re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.startswith("photo.jpg [")
    [line] = re.findall(r"```\nmixer (.+)\n```", card)
    assert mixer(capsys, *line.split())[0] == 0
