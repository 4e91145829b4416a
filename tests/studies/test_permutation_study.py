"""Figure 4: the identity behind it, the runs, the table, the picture, and going on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp as am
from allmlp.cli.main import main
from allmlp.data.permutation import permute
from allmlp.evaluation.accuracy import Evaluation
from allmlp.studies import cells as cells_module
from allmlp.studies.permutation import permutation, permuted_twin, rows_of
from allmlp.training.config import TrainConfig
from allmlp.training.summary import TrainResult
from conftest import TINY


def rules(patch: int = 2) -> am.Preprocessing:
    return am.Preprocessing(
        image_size=(8, 8), permutation="patches", permutation_patch=patch, permutation_seed=5
    )


def digits_mixer(seed: int = 0) -> am.MlpMixer:
    torch.manual_seed(seed)
    model = am.create_model("mixer_s16", 8, 10, **{**TINY, "patch_size": 2})
    assert isinstance(model, am.MlpMixer)
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight, std=0.1)
    model.class_names = [str(each) for each in range(10)]
    return model.eval()


def tiny_config(folder: Path, **changes: Any) -> TrainConfig:
    sizes = {f"model.overrides.{k}": v for k, v in {**TINY, "patch_size": 2}.items()}
    values = {
        **sizes,
        "epochs": None,
        "steps": 4,
        "evaluate_every": 2,
        "batch_size": 16,
        "data.num_workers": 0,
        "output": str(folder),
    }
    return am.recipe("digits").with_values({**values, **changes})


def test_a_permuted_twin_makes_the_same_of_permuted_pictures():
    model, settings = digits_mixer(), rules()
    twin = permuted_twin(model, settings)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert (twin(permute(images, settings)) - model(images)).abs().max() < 1e-5
    assert (twin(images) - model(images)).abs().max() > 1e-2  # and not of others
    assert (model(permute(images, settings)) - model(images)).abs().max() > 1e-2


def test_both_training_runs_have_the_same_losses(tmp_path: Path):
    """From permuted initial weights, on permuted pictures: the curves of figure 4 coincide."""
    model, settings = digits_mixer(), rules()
    model.preprocessing = dataclasses.replace(
        settings, permutation="none", permutation_patch=None, permutation_seed=0
    )
    am.save_model(model, tmp_path / "plain")
    am.save_model(permuted_twin(model, settings), tmp_path / "twin")
    common = {
        "model.name": "",
        "model.image_size": None,
        "model.overrides": {},
        "steps": 12,
        "epochs": None,
        "evaluate_every": 6,
        "batch_size": 16,
        "data.num_workers": 0,
        "precision": "float32",
    }
    losses, tests = {}, {}
    for name, kind in (("plain", "none"), ("twin", "patches")):
        changes = {
            "model.weights": str(tmp_path / name),
            "data.permutation": kind,
            "data.permutation_patch": 2 if kind == "patches" else None,
            "data.permutation_seed": 5 if kind == "patches" else 0,
            "output": str(tmp_path / f"run-{name}"),
        }
        result = am.train(am.recipe("digits").with_values(common | changes), quiet=True)
        lines = (tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
        assert result.test is not None
        tests[name] = result.test.probabilities
    assert len(losses["plain"]) > 2
    assert losses["plain"] == pytest.approx(losses["twin"], abs=2e-5)
    assert np.abs(tests["plain"] - tests["twin"]).max() < 1e-3


@pytest.mark.slow
def test_the_study_from_start_to_table_and_picture(tmp_path: Path, capsys):
    found = permutation(
        tiny_config(tmp_path / "study"),
        comparison_overrides={"width": 8, "num_stages": 1, "num_blocks": 1},
        few_shot_data="digits",
        shots=1,
    )
    kinds = [(row["model"], row["permutation"]) for row in found.rows]
    names = ("none", "patches", "pixels")
    assert kinds == [(model, kind) for model in ("mixer_s16", "small_resnet") for kind in names]
    for row in found.rows:
        assert 0.0 <= row["accuracy"] <= 1.0
        assert row["measured_on"] == "test"
        assert row["images"] == 359
        assert row["few_shot"] > 0.0
        plain = next(r for r in found.rows if r["model"] == row["model"])["accuracy"]
        assert row["drop"] == pytest.approx(1 - row["accuracy"] / plain)
    said = capsys.readouterr().out
    assert "1-shot, digits" in said
    assert "patches and pixels in them" in said
    values = json.loads((tmp_path / "study" / "permutation.json").read_text())
    assert values["kind"] == "permutation"
    assert values["partial"] is False
    cell = values["cells"]["small_resnet/pixels/seed-0"]
    assert [step for step, _ in cell["curve"]] == [2, 4]
    with Image.open(tmp_path / "study" / "permutation.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    assert (tmp_path / "study" / "permutation.svg").read_text().startswith("<?xml")
    # The runs have the same weights and images to begin with, and the permutation they say.
    runs = tmp_path / "study" / "cells" / "mixer_s16"
    configs = {kind: json.loads((runs / kind / "seed-0/config.json").read_text()) for kind in names}
    assert {each["seed"] for each in configs.values()} == {0}
    kept = {kind: am.load_model(runs / kind / "seed-0").preprocessing for kind in names}
    for kind, each in kept.items():
        assert each is not None
        assert each.permutation == kind
        assert each.permutation_patch == (2 if kind == "patches" else None)


def pretended_run(config: TrainConfig, **_: Any) -> TrainResult:
    """A run that reaches what its permutation and seed say, without training."""
    assert config.output is not None
    folder = Path(config.output)
    folder.mkdir(parents=True)
    (folder / "results.csv").write_text(
        "epoch,step,validation_top1,seconds,best\n0.1,2,0.5,1.0,0\n0.2,4,0.6,2.0,1\n"
    )
    right = {"none": 8, "patches": 7, "pixels": 4}[config.data.permutation or "none"]
    labels = np.arange(10)
    logits = np.eye(10, dtype=np.float32)
    logits[right:] = np.roll(logits[right:], 1, axis=1)
    evaluation = Evaluation("digits:test", [str(n) for n in labels], labels, labels, logits)
    return TrainResult(folder, None, evaluation)


def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, trained = tiny_config(tmp_path / "a"), []

    def train(config: TrainConfig, **options: Any) -> TrainResult:
        trained.append(config.data.permutation)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return pretended_run(config, **options)

    monkeypatch.setattr(cells_module, "train", train)
    with pytest.raises(KeyboardInterrupt):
        permutation(config, comparison=None, quiet=True)
    values = json.loads((tmp_path / "a" / "permutation.json").read_text())
    assert values["missing"] == ["mixer_s16/patches/seed-0", "mixer_s16/pixels/seed-0"]
    assert values["partial"] is True
    stopped = permutation(config, comparison=None, quiet=True)
    assert trained == ["none", "patches", "patches", "pixels"]
    assert [row["accuracy"] for row in stopped.rows] == [0.8, 0.7, 0.4]
    assert [row["drop"] for row in stopped.rows] == pytest.approx([0.0, 1 / 8, 1 / 2])


def test_another_study_in_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cells_module, "train", pretended_run)
    permutation(tiny_config(tmp_path / "a"), comparison=None, quiet=True)
    with pytest.raises(am.UserError, match="another study"):
        permutation(tiny_config(tmp_path / "a", steps=3), comparison=None, quiet=True)
    with pytest.raises(am.UserError, match="permutation_seed is 0 there and 1 here"):
        permutation(tiny_config(tmp_path / "a"), comparison=None, permutation_seed=1, quiet=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("mine")
    with pytest.raises(am.UserError, match=r"something else: thesis.tex"):
        permutation(tiny_config(tmp_path / "b"), comparison=None, quiet=True)


def test_drops_are_relative_and_need_the_plain_run():
    def cell(model: str, accuracy: float) -> dict[str, Any]:
        return {"model": model, "accuracy": accuracy, "measured_on": "test", "images": 9}

    done = {
        "m/none/seed-0": cell("m", 0.8),
        "m/none/seed-1": cell("m", 0.6),
        "m/pixels/seed-0": cell("m", 0.4),
        "m/pixels/seed-1": cell("m", 0.2),
        "r/pixels/seed-0": cell("r", 0.5),
    }
    rows = {(row["model"], row["permutation"]): row for row in rows_of(done)}
    assert rows["m", "pixels"]["drop"] == pytest.approx(1 - 0.3 / 0.7)
    assert rows["m", "pixels"]["deviation"] == pytest.approx(0.2 / 2**0.5)
    assert rows["r", "pixels"]["drop"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--patch-size", "3"], "must divide 8x8"),
        (["--comparison", "small_resnet", "--comparison-set", "width=9"], "multiple of 8"),
        (["--comparison", "small_resnet", "--comparison-set", "width"], "KEY=VALUE"),
        (["--comparison", "none", "--comparison-set", "width=8"], "without one"),
        (["--comparison", "mixer_s16"], "the model itself"),
        (["--comparison", "resnet"], "unknown model"),
        (["--seeds", "1", "1"], "each seed once"),
        (["--shots", "2"], "no effect without --few-shot-data"),
        (["--set", "data.permutation=pixels"], "the study has its own"),
        (["--few-shot-data", "nowhere"], "no such data"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path: Path, capsys, flags, words):
    command = ["permute", "--data", "digits", "--recipe", "digits", "--output"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, str(tmp_path / "study"), *flags])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
