"""A run from its config to its folder: what it writes, that it repeats, and how it stops."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp as am
from allmlp.training import train as loop
from conftest import TINY, best_of, tiny_config, tiny_run
from runs import steps_of

PLOTS = [*("confusion", "curves", "predictions", "reliability", "train_batch", "worst_mistakes")]


def test_the_run_folder(trained: am.TrainResult):
    run = trained.run_folder
    assert sorted(path.name for path in run.iterdir()) == [
        *("best", "checkpoints", "config.json", "environment.json", "log.txt", "metrics.jsonl"),
        *("plots", "report.html", "results.csv", "test", "training_images.txt"),
    ]
    best = sorted(path.name for path in (run / "best").iterdir())
    assert best == ["README.md", "config.json", "model.safetensors"]
    config = am.TrainConfig.from_json(json.loads((run / "config.json").read_text()))
    assert (config.recipe, config.epochs) == ("digits", 3)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == version("torch")
    assert environment["data"]["training_images"] == 1259
    steps = steps_of(run)
    assert [step["step"] for step in steps] == list(range(59))  # of a short run, every one
    assert steps[0]["loss"] == pytest.approx(np.log(10), rel=1e-5)  # a zero head knows nothing
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.slow
def test_its_plots(real_figures: None, class_folder: Path, tmp_path: Path):
    run = tiny_run(class_folder, tmp_path / "run").run_folder
    for name in PLOTS:
        pixels = np.asarray(Image.open(run / "plots" / f"{name}.png").convert("L"))
        assert pixels.std() > 5, name


def test_the_same_seed_gives_the_same_bits(class_folder: Path, tmp_path: Path):
    changes = {
        "augment__mixup": 0.5,
        "augment__rotate": 10.0,
        "model__overrides": {**TINY, "dropout": 0.1},
    }
    runs = []
    for number, workers in enumerate((0, 0, 2)):
        torch.manual_seed(number)  # the caller's own random numbers play no part
        config = tiny_config(
            str(class_folder), tmp_path / str(number), data__num_workers=workers, **changes
        )
        runs.append(am.train(config, quiet=True).run_folder)
    keep = ("step", "loss", "learning_rate", "gradient_norm")
    losses = [[[step[key] for key in keep] for step in steps_of(run)] for run in runs]
    assert losses[0] == losses[1] == losses[2]
    assert best_of(runs[0]) == best_of(runs[1]) == best_of(runs[2])
    other = tiny_run(class_folder, tmp_path / "other", seed=1, **changes)
    assert [step["loss"] for step in steps_of(other.run_folder)] != [row[1] for row in losses[0]]


def test_the_average_is_what_is_kept(class_folder, tmp_path, monkeypatch):
    kept: list[loop.Trainer] = []
    train = loop.Trainer.train
    monkeypatch.setattr(loop.Trainer, "train", lambda self: (kept.append(self), train(self)))
    config = tiny_config(
        str(class_folder), tmp_path / "run", optimizer__ema_decay=0.9, evaluate_every=2
    )
    saved = am.load_model(am.train(config, quiet=True).run_folder).state_dict()
    for name, value in kept[0].average.items():
        assert torch.equal(saved[name], value)
    assert not torch.equal(saved["stem.weight"], kept[0].model.stem.weight)


def test_a_diverged_model_is_never_best(class_folder, tmp_path, monkeypatch):
    measure = loop.measure

    def diverged(*args, **kwargs):
        result = measure(*args, **kwargs)
        result.logits[:] = np.nan
        return result

    monkeypatch.setattr(loop, "measure", diverged)
    with pytest.raises(am.UserError, match="the validation loss is nan"):
        tiny_run(class_folder, tmp_path / "run")
    assert not (tmp_path / "run" / "best").exists()


def test_a_run_never_writes_over_another(class_folder, tmp_path):
    config = tiny_config(str(class_folder), tmp_path / "run")
    first = am.train(config, quiet=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = am.train(config, quiet=True)  # the same: nothing to do but to measure
    assert again.validation.top1 == first.validation.top1
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(am.UserError, match="exists and is not empty"):
        tiny_run(class_folder, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(am.UserError, match="the run folder is a file"):
        tiny_run(class_folder, tmp_path / "file")
