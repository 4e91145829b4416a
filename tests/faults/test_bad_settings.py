"""A mistake in the command: exit code 2, one message, nothing made or changed (fault test 24)."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import allmlp as am
from allmlp.errors import named_memory_errors
from allmlp.runtime import device as compute
from allmlp.training import train as loop
from conftest import make_data, mixer, refused
from runs import run_config, train, typed_settings


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a finished run, which nothing here may change."""
    folder = tmp_path_factory.mktemp("old")
    train(run_config(make_data(folder / "data"), folder / "run", steps=4, evaluate_every=4))
    return folder


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("--learning-rate inf", "learning_rate .* inf"),
        ("--batch-size=-8", "batch_size .* -8"),
        ("--set optimizer.warmup=900 --steps 30", "optimizer.warmup=900"),
        ("--set num_threads=100000", "100000"),
        ("--set model.overrides.hidden_dim=99999999999", "weights needs [0-9,]+ GiB"),
        ("--set model.overrides.num_blocks=1000000000000", "1,000,000,0"),
        ("--image-size 960000", "weights needs [0-9,]+ GiB, the machine has"),
        ("--model cycle_mlp_b1 --set model.overrides.dims=[64,128,320,999999]", "GiB"),
    ],
)
def test_settings(old, tmp_path, capsys, monkeypatch, typed, named):
    monkeypatch.setattr(loop, "announce", lambda *_: pytest.fail("the run began"))
    run = tmp_path / "run"
    given = ["train", "--data", old / "data", "--output", run, *typed.split()]
    text = refused(capsys, tmp_path, *given)
    assert re.search(named, text), text


def test_what_the_optimizer_needs_is_counted_before_the_run(old, tmp_path, capsys, monkeypatch):
    """A model's weights fit; with gradients and both moments they do not."""
    weights = 4 * am.create_model("mixer_s32", 32, 3, num_blocks=1).num_parameters
    monkeypatch.setattr(compute, "total_memory", lambda _: 3 * weights)
    typed = ["--image-size", 32, "--model", "mixer_s32", "--set", "model.overrides.num_blocks=1"]
    given = ["train", "--data", old / "data", "--output", tmp_path / "run", *typed]
    text = refused(capsys, tmp_path, *given)
    assert re.search(r"training [0-9,]+ weights with adamw needs", text)


@pytest.mark.parametrize(
    "ask", [lambda: torch.empty(2**50), lambda: np.empty(2**60, np.uint8), lambda: bytearray(2**60)]
)
def test_memory_that_cannot_be_had(capsys, monkeypatch, ask):
    with pytest.raises(am.UserError, match="not enough memory") as caught, named_memory_errors():
        ask()
    assert "batch_size" in str(caught.value.fix)
    monkeypatch.setattr("allmlp.cli.main.parse", lambda *_: ask())
    code, out, err = mixer(capsys, "models")
    assert (code, out, err.count("error: "), err.count("Traceback")) == (2, "", 1, 0)


def test_another_run_is_there(old, capsys):
    config = run_config(old / "data", old / "run", steps=5, evaluate_every=4, seed=3)
    config = config.with_values({"model.image_size": 16, "model.overrides.hidden_dim": 32})
    text = refused(capsys, old, *typed_settings(config))
    assert text.startswith("error: the run folder holds a run with other settings: ")
    for words in (
        "model.overrides.hidden_dim is 16 there and 32 here",
        "model.image_size is 8 there and 16 here",
        "steps is 4 there and 5 here",
        "seed is 0 there and 3 here",
    ):
        assert words in text
    assert f"mixer train --resume {old / 'run'}" in text
    assert f"mixer finetune {old / 'run'} --data SOURCE" in text  # for longer training
    text = refused(capsys, old, "train", "--resume", old / "run", "--seed", 3)
    assert "with other settings: seed is 0 there and 3 here" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"optimizer": {"name": "sgd", "learning_rate": "1e-3"}},
            "optimizer.learning_rate .* '1e-3'",
        ),
        ({"batch_size": "8"}, "batch_size .* '8'"),
        ({"batch_size": -8}, "batch_size .* -8"),
        ({"optimizer": 3}, "unknown optimizer 3"),
        ([], "this config.json is not that of a training run"),
        ("{", "not valid JSON"),
    ],
)
def test_a_config_that_is_not_ours(tmp_path, capsys, change, message):
    run = tmp_path / "run"
    run.mkdir()
    if isinstance(change, dict):
        change = {**run_config(tmp_path / "data", run).to_json(), **change}
    (run / "config.json").write_text(change if change == "{" else json.dumps(change))
    text = refused(capsys, tmp_path, "train", "--resume", run)
    assert re.search(message, text.splitlines()[0]), text
    assert f"where: {run / 'config.json'}" in text


def test_resume_of_what_is_no_run(old, tmp_path, capsys):
    text = refused(capsys, old, "train", "--resume", old / "run" / "best")
    assert "not that of a training run" in text
    assert "to fix: Give the run folder, not best/" in text
    (tmp_path / "empty").mkdir()
    for folder, what in ((tmp_path / "empty", "not a run folder"), (tmp_path / "no", "no such")):
        text = refused(capsys, tmp_path, "train", "--resume", folder)
        assert what in text
        assert f"where: {folder}" in text
    for extra in (["--output", tmp_path / "new"], ["digits"]):
        text = refused(capsys, tmp_path, "train", *extra, "--resume", old / "run")
        assert "resume" in text


@pytest.mark.parametrize("place", ["file/run", "locked/run", "nowhere"])
def test_a_run_folder_that_cannot_be_made(old, tmp_path, capsys, place: str):
    run = tmp_path / place
    if place == "file/run":
        (tmp_path / "file").write_text("x")
    elif place == "locked/run":
        if os.name == "nt" or os.geteuid() == 0:
            pytest.skip("the superuser may write everywhere")
        (tmp_path / "locked").mkdir(mode=0o500)
    else:  # where even the superuser cannot write
        if not Path("/proc/self").exists():
            pytest.skip("there is no /proc")
        run = Path("/proc/nowhere/run")
    err = refused(capsys, tmp_path, *typed_settings(run_config(old / "data", run)))
    assert f"where: {run}" in err or f"where: {run.parent}\n" in err
    assert not run.exists()
