"""A run from its config to its folder: what it writes, that it repeats, how it stops, and what it
takes back when it resumes from an earlier step."""

import errno
import json
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp as am
from allmlp import plots
from allmlp.training import train as loop
from allmlp.training.run_folder import RunFolder
from conftest import REAL, TINY, best_of, tiny_config, tiny_model, tiny_run
from runs import results_of, steps_of, unix

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


# The folder alone


def begun(path: Path) -> RunFolder:
    return RunFolder(path, am.recipe("digits").with_value("output", str(path)))


def test_going_back_takes_out_what_came_later(tmp_path: Path):
    run = begun(tmp_path / "run")
    for step in range(0, 40, 10):
        run.log_step({"step": step, "loss": 1.0 / (step + 1)})
    for step in (15, 30):
        run.log_evaluation({"epoch": step / 10, "step": step, "best": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')  # cut off by a kill
    run.rewind(20)
    assert [line["step"] for line in steps_of(run.path)] == [0, 10]
    run.log_step({"step": 20, "loss": 0.5})
    run.log_evaluation({"epoch": 3.0, "step": 30, "best": 0})
    rows = [(row["step"], row["best"]) for row in results_of(run.path)]
    assert rows == [("15", "1"), ("30", "0")]
    run.rewind(0)
    assert (run.path / "metrics.jsonl").read_text() == ""
    assert not (run.path / "results.csv").exists()
    run.log_evaluation({"epoch": 1.0, "step": 10, "best": 1})
    assert (run.path / "results.csv").read_text().splitlines()[0] == "epoch,step,best"
    run.close()


DAMAGE = {
    "empty": lambda data: b"",
    "all NUL": lambda data: bytes(len(data)),
    "much NUL": lambda data: bytes(300_000),
    "cut in its first line": lambda data: data[:7],
    "NUL at the end": lambda data: data[:-9] + bytes(9),
    "not UTF-8": lambda data: b"\xff\xfe" + data,
    "not UTF-8 in a line": lambda data: data.replace(b"1", b"\xff", 2),
    "other values": lambda data: data.replace(b"\n", b'\n[1]\n"step"\n{"step": []}\n1,2\n', 1),
    "no last line end": lambda data: data.rstrip(),
    "deep": lambda data: data + b"[" * 100_000,
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damaged_logs_do_not_stop_a_run(tmp_path, monkeypatch, damage):
    """A log is not the state: what can be read of it is kept."""
    monkeypatch.setattr(plots, "curves", REAL["curves"])
    run = begun(tmp_path / "run")
    for step in range(4):
        values = {"step": step, "epoch": step / 2, "loss": 2.0, "learning_rate": 0.1}
        run.log_step(values)
    evaluation = {"validation_loss": 1.0, "validation_top1": 0.5, "best": 1}
    for step in (2, 4):
        run.log_evaluation({"epoch": step / 2, "step": step, **evaluation})
    for name in ("metrics.jsonl", "results.csv"):
        path = run.path / name
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    run.draw_curves()
    run.rewind(4)
    run.log_step({"step": 4, "epoch": 2.0, "loss": 1.0, "learning_rate": 0.1})
    run.log_evaluation({"epoch": 3.0, "step": 6, **evaluation})
    metrics = [line["step"] for line in steps_of(run.path)]
    results = [int(row["step"]) for row in results_of(run.path)]
    assert metrics[-1] == 4
    assert results[-1] == 6
    assert metrics == sorted(set(metrics))
    if damage in ("other values", "no last line end"):
        assert (metrics, results) == ([0, 1, 2, 3, 4], [2, 4, 6])
    run.draw_curves()
    run.close()


@unix
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Lustre without flock: a run says so; a killed one leaves nothing that blocks the next."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    path = tmp_path / "run"
    killed = begun(path)
    assert killed.is_unlocked
    again = begun(path)
    am.save_model(tiny_model(), again.best)
    again.close()
    assert {file.name for file in again.best.iterdir()} == {"model.safetensors", "config.json"}
