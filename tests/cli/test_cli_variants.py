"""The variants of appendix A.1 on the command line: the table of models, a run, mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import allmlp as am
from conftest import TINY, mixer


def flags(*settings: str, section: str = "") -> list[str]:
    return [word for setting in settings for word in ("--set", section + setting)]


def test_the_table_of_models(capsys):
    settings = flags("token_mixing=views", "token_groups=2")
    lines = mixer(capsys, "models", *settings)[1].splitlines()
    with torch.device("meta"):
        model = am.create_model("mixer_b16", token_mixing="views", token_groups=2)
    row = next(line for line in lines if line.startswith("mixer_b16")).split()
    assert row[3:5] == [f"{model.num_parameters:,}", f"{model.config.flops / 1e9:.2f}"]
    assert not any(line.startswith("vip_s7") for line in lines)
    assert lines[-1].startswith("left out, without such a setting: resmlp_12, ")
    lines = mixer(capsys, "models", *flags("pyramid=[[2,49]]"))[1].splitlines()
    assert next(line for line in lines if line.startswith("mixer_s16")).endswith("196 to 49")


def test_a_variant_is_trained_and_goes_everywhere(tmp_path: Path, capsys):
    small = [f"{name}={value}" for name, value in TINY.items() if name != "patch_size"]
    variant = ("token_mixing=grouped", "token_groups=4", "pyramid=[[1,4]]", *small)
    settings = [*flags(*variant, section="model.overrides."), "--set", "evaluate_every=2"]
    run, fine, quick = tmp_path / "run", tmp_path / "fine", ("--num-workers", 0)
    code, _, err = mixer(
        capsys, "train", "digits", *settings, "--steps", 4, *quick, "--output", run
    )
    assert code == 0, err
    assert am.load_model(run).config.pyramid == ((1, 4),)
    assert "groups of 4, pyramid 16 > 4" in mixer(capsys, "models", "--inspect", run)[1]
    assert mixer(capsys, "evaluate", run, "--data", "digits:test", *quick)[0] == 0
    tuned = ("--steps", 2, "--set", "optimizer.warmup=1", "--batch-size", 16, *quick)
    line = ("finetune", run, "--data", "digits", *tuned, "--output", fine)
    assert mixer(capsys, *line)[0] == 0
    assert am.load_model(fine).config.token_groups == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("models --set token_groups", "KEY=VALUE"),
        ("models --set groups=4", "no setting 'groups'"),
        ("models --set token_groups=4", "no effect"),
        ("models --weights --set num_blocks=2", "do not go together"),
        ("benchmark mixer_b16.i1k --set num_blocks=2", "its weights say what it is"),
        ("benchmark --recipe digits --set num_blocks=2", "brings its own model"),
    ],
)
def test_settings_that_have_no_effect(line, words, capsys):
    code, _, err = mixer(capsys, *line.split())
    assert (code, words in err) == (2, True)
