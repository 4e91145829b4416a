"""`mixer finetune` as a user types it: what it prints, and what is a mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

import allmlp as am
from allmlp import studies as study
from allmlp.training import train as loop
from conftest import mixer, ran, tiny_model

SHORT = ("--steps", 4, "--batch-size", 8, "--num-workers", 0, "--device", "cpu")
SHORT += ("--set", "optimizer.warmup=1", "--set", "evaluate_every=2")


@pytest.fixture
def place(class_folder: Path) -> Path:
    """A folder with weights of ant, bee and cat, and data of these with train/ and val/."""
    am.save_model(tiny_model(["ant", "bee", "cat"]), class_folder.parent / "weights")
    return class_folder.parent


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[tuple[am.TrainConfig, dict[str, Any]]]:
    """Nothing is trained; what would be."""
    calls: list[tuple[am.TrainConfig, dict[str, Any]]] = []
    monkeypatch.setattr(loop, "train", lambda config, **_: calls.append((config, {})))
    monkeypatch.setattr(study, "finetune", lambda config, **given: calls.append((config, given)))
    return calls


def test_one_run(capsys, place):
    run = place / "run"
    line = ("finetune", place / "weights", "--data", place / "data", "--output", run, *SHORT)
    out, err = ran(capsys, *line, "--image-size", 16, "--seeds", 7)
    assert f"mixer evaluate {run} --data {place / 'data'}:validation" in out
    assert err.splitlines() == [
        "resized  8x8 -> 16x16 pixels: block-diagonal, 2x2 tiles",
        "head     kept 3 of 3 rows, for 3 classes",
    ]
    assert am.load_model(run).config.image_size == (16, 16)
    out, _ = ran(capsys, "train", "--resume", run)
    assert "resumed  after step 4 of 4" in out


@pytest.mark.parametrize(
    ("flags", "rates", "seeds"),
    [
        (["--grid"], (0.003, 0.01, 0.03, 0.06), (0,)),
        (["--grid", "--recipe", "finetune_vtab"], (0.003, 0.01, 0.03), (0,)),
        (["--grid", "0.5", "--seeds", "3"], (0.5,), (3,)),
        (["--seeds", "3", "4"], (), (3, 4)),
        (["--grid", "--set", "seed=9"], (0.003, 0.01, 0.03, 0.06), (9,)),
        (["--grid", "0.5", "--seed", "9", "--fraction", "1", "--max-bad", "0"], (0.5,), (9,)),
    ],
)
def test_the_grid_and_the_seeds(capsys, handed_over, flags, rates, seeds):
    assert mixer(capsys, "finetune", "w", "--data", "digits", "--output", "o", *flags)[0] == 0
    ((config, given),) = handed_over
    assert given == {"grid": rates, "seeds": seeds}
    assert (config.model.weights, config.output, config.seed) == ("w", "o", seeds[0])


def test_a_grid_beside_the_settings_of_another_kind_of_run(capsys, handed_over, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(am.recipe("digits").to_json()))
    line = ("finetune", "w", "--config", tmp_path / "c.json", "--output", "o", "--grid")
    assert mixer(capsys, *line)[0] == 0
    assert handed_over[0][1]["grid"] == (0.003, 0.01, 0.03, 0.06)


def test_the_time_is_estimated_by_the_cores_of_the_process(capsys, place, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(loop, "cores_of_process", lambda: asked.append(1) or 2)
    line = ("finetune", place / "weights", "--data", place / "data", "--dry-run", *SHORT)
    assert mixer(capsys, *line)[0] == 0
    assert asked
