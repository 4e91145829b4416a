"""The study of appendix A.1: which variants, the table, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import allmlp as am
from allmlp.cli.main import main
from allmlp.models.catalog import create_model, model_config
from allmlp.models.mixer import MixerConfig
from allmlp.studies import ablations as ablations_module
from allmlp.studies.ablations import ablations, variants_of
from allmlp.training.config import TrainConfig
from conftest import TINY


def tiny_config(folder: Path, **changes: Any) -> TrainConfig:
    sizes = {f"model.overrides.{k}": v for k, v in {**TINY, "patch_size": 2}.items()}
    values = {
        **sizes,
        "epochs": None,
        "steps": 3,
        "evaluate_every": 3,
        "batch_size": 16,
        "data.num_workers": 0,
        "output": str(folder),
    }
    return am.recipe("digits").with_values({**values, **changes})


def mixer(**settings: Any) -> MixerConfig:
    config = model_config("mixer_s16", **settings)
    assert isinstance(config, MixerConfig)
    return config


def test_the_variants_are_those_that_a_model_can_have():
    full = variants_of(mixer(image_size=32, patch_size=4))
    names = ["shared", "untied", "grouped-2", "grouped-4", "views-2", "views-4", "pyramid"]
    assert list(full) == names
    assert full["pyramid"] == {"pyramid": ((4, 16),)}
    for settings in full.values():
        create_model("mixer_s16", 32, 2, **{**TINY, "patch_size": 4, "num_blocks": 6, **settings})
    odd = variants_of(mixer(image_size=16, patch_size=16, hidden_dim=50))
    assert list(odd) == ["shared", "untied", "grouped-2", "views-2"]


@pytest.mark.slow
def test_the_study_measures_accuracy_and_cost(tmp_path: Path, capsys):
    config = tiny_config(tmp_path / "study")
    names = ["shared", "untied", "pyramid"]
    found = ablations(config, variants=names, seeds=(0, 1), seconds=0.05)
    assert [row["variant"] for row in found.rows] == names
    shared, untied, pyramid = found.rows
    for row in found.rows:
        assert row["runs"] == 2
        assert row["deviation"] is not None
        assert row["images_per_second"] > 0
    # 16 channels: a token-mixing MLP of their own each, in 2 blocks of 16 tokens, 8 hidden units
    assert untied["parameters"] - shared["parameters"] == 15 * 2 * (17 * 8 + 9 * 16)
    assert untied["flops"] == shared["flops"]
    assert pyramid["flops"] < shared["flops"]
    with (tmp_path / "study" / "ablations.csv").open(newline="") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == names
    values = json.loads((tmp_path / "study" / "ablations.json").read_text())
    assert values["partial"] is False
    assert values["rows"] == found.rows
    loaded = am.load_model(tmp_path / "study" / "cells" / "pyramid" / "seed-1")
    assert loaded.config.pyramid == ((1, 4),)
    said = capsys.readouterr().out
    assert "mean and standard deviation of 2 seeds" in said
    again = ablations(config, variants=names, seeds=(0, 1), seconds=0.05, quiet=True)
    assert [row["accuracy"] for row in again.rows] == [row["accuracy"] for row in found.rows]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--variants", "untide"], "untied"),
        (["--variants", "shared", "shared"], "each variant once"),
        (["--model", "vip_s7", "--image-size", "14"], "plain Mixer"),
        (["--set", "model.overrides.token_mixing=untied"], "plain Mixer"),
        (["--seeds", "1", "1"], "each seed once"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path: Path, capsys, flags, words):
    command = ["study", "ablations", "--data", "digits", "--recipe", "digits", "--output"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, str(tmp_path / "study"), *flags])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_costs_do_not_depend_on_the_runs():
    config = tiny_config(Path("unused"))
    known = {"shared": {}, "grouped-4": {"token_mixing": "grouped", "token_groups": 4}}
    found = ablations_module._costs(config, known, 10, seconds=0.02)
    assert found["shared"]["flops"] == found["grouped-4"]["flops"]
    assert found["shared"]["parameters"] < found["grouped-4"]["parameters"]
