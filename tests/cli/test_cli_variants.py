"""The variants of appendix A.1 on the command line: the table of models, throughput, a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import allmlp as am
from allmlp.cli.main import main

SMALL = ["hidden_dim=16", "num_blocks=2", "tokens_mlp_dim=8", "channels_mlp_dim=32"]


def mixer(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def flags(*settings: str, name: str = "--set", section: str = "") -> list[str]:
    return [word for setting in settings for word in (name, section + setting)]


def test_the_table_of_models(capsys):
    assert mixer("models", *flags("token_mixing=views", "token_groups=2")) == 0
    lines = capsys.readouterr().out.splitlines()
    with torch.device("meta"):
        model = am.create_model("mixer_b16", token_mixing="views", token_groups=2)
    row = next(line for line in lines if line.startswith("mixer_b16")).split()
    assert row[3] == f"{model.num_parameters:,}"
    assert row[4] == f"{model.config.flops / 1e9:.2f}"
    assert not any(line.startswith("vip_s7") for line in lines)
    assert lines[-1].startswith("left out, without such a setting: cycle_mlp_b1")
    assert mixer("models", *flags("pyramid=[[2,49]]")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("mixer_s16")).endswith("196 to 49")


@pytest.mark.slow
def test_throughput_of_a_variant(tmp_path: Path, capsys):
    settings = flags("token_mixing=grouped", "token_groups=4", *SMALL)
    size = ["--image-size", "32", "--batch-sizes", "1", "--seconds", "0.02", "--rounds", "1"]
    target = tmp_path / "t.json"
    assert mixer("benchmark", "mixer_s16", *settings, *size, "--output", target) == 0
    (found,) = json.loads(target.read_text())["models"]
    assert found["model"]["architecture"]["token_groups"] == 4
    assert found["flops"]["counted"] == found["flops"]["formula"]


def test_a_variant_is_trained_and_goes_everywhere(tmp_path: Path, capsys):
    settings = flags(
        *("token_mixing=grouped", "token_groups=4", "pyramid=[[1,4]]", *SMALL),
        section="model.overrides.",
    )
    run = tmp_path / "run"
    steps = ["--steps", "4", "--set", "evaluate_every=2", "--num-workers", "0"]
    assert mixer("train", "digits", *settings, *steps, "--output", run) == 0
    model = am.load_model(run)
    assert model.config.pyramid == ((1, 4),)
    assert mixer("models", "--inspect", run) == 0
    assert "channels in groups of 4, pyramid 16 > 4" in capsys.readouterr().out
    assert mixer("evaluate", run, "--data", "digits:test", "--num-workers", "0") == 0
    tuned = [
        "--steps",
        "2",
        "--set",
        "optimizer.warmup=1",
        "--batch-size",
        "16",
        "--num-workers",
        "0",
    ]
    fine = tmp_path / "fine"
    assert mixer("finetune", run, "--data", "digits", *tuned, "--output", fine) == 0
    assert am.load_model(fine).config.token_groups == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["models", "--set", "token_groups"], "KEY=VALUE"),
        (["models", "--set", "groups=4"], "no setting 'groups'"),
        (["models", "--set", "token_groups=4"], "no effect"),
        (["models", "--weights", "--set", "num_blocks=2"], "do not go together"),
        (["benchmark", "mixer_b16.i1k", "--set", "num_blocks=2"], "its weights say what it is"),
        (["benchmark", "--recipe", "digits", "--set", "num_blocks=2"], "brings its own model"),
    ],
)
def test_settings_that_have_no_effect(arguments, words, capsys):
    assert mixer(*arguments) == 2
    assert words in capsys.readouterr().err
