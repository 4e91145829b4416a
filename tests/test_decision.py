"""From logits to probabilities and answers, wherever a model's answers are computed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import allmlp as am
from allmlp.inspection.attribution import occlusion
from conftest import mixer, tiny_model

SINGLE = am.Decision(temperature=2.5, unsure_below=0.6, measured={"temperature": {"images": 9}})
MULTI = am.Decision(labels="multi", temperature=0.5, thresholds=(0.1, 0.5, 0.9))


def model_with(decision: am.Decision) -> am.ImageClassifier:
    model = tiny_model(["ant", "bee", "cat"]).eval()
    model.decision = decision
    return model


def test_probabilities_and_answers():
    logits = torch.tensor([[4.0, 1.0, -2.0], [1.0, 1.0, 0.9]])
    assert torch.equal(am.Decision().probabilities(logits), logits.softmax(dim=1))
    single, multi = SINGLE.probabilities(logits), MULTI.probabilities(logits)
    assert torch.equal(single, (logits / 2.5).softmax(dim=1))
    assert torch.equal(multi, (logits / 0.5).sigmoid())
    assert SINGLE.answers(single).tolist() == [[True, False, False], [False, False, False]]
    assert am.Decision().answers(single).tolist() == [[True, False, False]] * 2  # ties: the first
    assert MULTI.answers(multi).tolist() == [[True, True, False], [True, True, False]]
    assert (SINGLE.text([]), MULTI.text([]), MULTI.text(["a", "b"])) == ("unsure", "", "a|b")


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels": "many"},
        {"temperature": 0},
        {"temperature": float("nan")},
        {"unsure_below": 1.5},
        {"unsure_below": 0.5, "labels": "multi"},
        {"thresholds": (0.5,)},
        {"labels": "multi", "thresholds": (0.5, "x")},
        {"measured": {"accuracy": {}}},
    ],
)
def test_values_out_of_range(wrong: dict[str, object]):
    with pytest.raises(ValueError, match=r"Decision"):
        am.Decision(**wrong)


@pytest.mark.parametrize("decision", [am.Decision(), SINGLE, MULTI])
def test_it_travels_with_the_weights(decision: am.Decision, tmp_path: Path, capsys):
    model = model_with(decision)
    folder = am.save_model(model, tmp_path / "model").parent
    values = json.loads((folder / "config.json").read_text())
    assert ("decision" in values) is (decision != am.Decision())
    for source, target, options in (
        (folder, "b.safetensors", []),
        (folder, "c.npz", ["--format", "google"]),
        ("c.npz", "d", ["--format", "timm"]),
    ):
        assert mixer(capsys, "convert", tmp_path / source, tmp_path / target, *options)[0] == 0
        assert am.load_model(tmp_path / target).decision == decision
    assert am.load_model(folder, image_size=16, quiet=True).decision == decision
    assert am.load_model(folder, num_classes=5, quiet=True).decision == am.Decision()


@pytest.mark.parametrize("decision", [SINGLE, MULTI])
def test_every_command_uses_it(decision: am.Decision):
    model, pixels = model_with(decision), torch.arange(192).reshape(1, 3, 8, 8).byte()
    with torch.no_grad():
        logits = model(pixels / 127.5 - 1)
    expected = decision.probabilities(logits)[0].tolist()
    image = pixels[0].permute(1, 2, 0).numpy()
    (prediction,) = am.predict(model, image, precision="float32")
    named = dict(zip(["ant", "bee", "cat"], expected, strict=True))
    assert dict(prediction.classes) == pytest.approx(named, abs=1e-5)
    assert occlusion(model, pixels / 127.5 - 1).probability == pytest.approx(max(expected))
    one = ("", ["ant", "bee", "cat"], np.array([0]), np.array([0]), logits.numpy())
    evaluation = am.Evaluation(*one, decision=decision)
    assert evaluation.probabilities[0].tolist() == pytest.approx(expected)


def test_an_exported_file_has_it(tmp_path: Path):
    am.export(model_with(MULTI), tmp_path / "m.pt2")  # needs no optional package
    entries = {"decision": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=entries)
    assert am.Decision(**json.loads(entries["decision"])) == MULTI
