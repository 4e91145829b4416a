"""What tests of studies share: weights and data, and runs that only pretend."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import allmlp as am
from allmlp import sweep
from allmlp.training.report import TrainResult
from conftest import make_class_folder, tiny_model

COUNTS = {"ant": 10, "bee": 12, "cat": 10}


def six_steps(weights: object, data: str, output: str | None, **changes: object) -> am.TrainConfig:
    """The settings of a fine-tuning of six steps of eight images."""
    values = {"model.weights": str(weights), "data.source": data, "output": output, "steps": 6}
    values |= {"batch_size": 8, "evaluate_every": 3, "optimizer.warmup": 1}
    values |= {"device": "cpu", "data.num_workers": 0}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return am.recipe("finetune").with_values(values)


def settings(folder: Path, output: str | None = "study", **changes: object) -> am.TrainConfig:
    """Six steps of eight images, from `folder`/weights on `folder`/data."""
    output = None if output is None else str(folder / output)
    return six_steps(folder / "weights", str(folder / "data"), output, **changes)


def make_place(folder: Path) -> Path:
    """A folder with weights of other classes, and data with train/ and test/."""
    torch.manual_seed(0)
    model = tiny_model(["w", "x", "y", "z"])
    am.save_model(model, folder / "weights")
    make_class_folder(folder / "data" / "train", COUNTS)
    make_class_folder(folder / "data" / "test", {"ant": 3, "bee": 3, "cat": 4}, start=200)
    return folder


def note_runs(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[str], object] = lambda name: None
) -> list[str]:
    """Returns the runs that are trained from now on, as "grid/lr-0.1" by their last two folders."""
    names, train = [], sweep.train

    def noted(config: am.TrainConfig, **options: bool) -> TrainResult:
        name = "/".join(Path(str(config.output)).parts[-2:])
        before(name)
        names.append(name)
        return train(config, **options)

    monkeypatch.setattr(sweep, "train", noted)
    return names


def pretend(
    monkeypatch: pytest.MonkeyPatch, reached: Callable[[am.TrainConfig], float]
) -> list[am.TrainConfig]:
    """Runs reach what the function says, without training; returns those that were asked for.

    The best weights have 0.9 on validation images, the last ones what was reached.
    """
    asked: list[am.TrainConfig] = []

    def train(config: am.TrainConfig, *, quiet: bool, in_study: bool) -> TrainResult:
        asked.append(config)
        accuracy = reached(config)
        run = Path(str(config.output))
        (run / "best").mkdir(parents=True, exist_ok=True)
        (run / "best" / "README.md").write_text(f"# card\nmixer predict {run / 'best'} x.jpg\n")
        (run / "best" / "model.safetensors").write_text(str(accuracy))
        text = f"step,seconds,best,validation_top1\n3,1.0,1,0.9\n6,3.5,0,{accuracy}\n"
        (run / "results.csv").write_text(text)

        def measured(top1: float) -> SimpleNamespace:
            figures = {"top1": top1, "balanced_accuracy": top1 / 2, "macro_f1": top1 / 4}
            if "seed-0" in str(run):  # its temperature, which other runs may not have
                figures["uncalibrated_error"] = 0.1
            shown = {"labels": range(10), "class_names": ["a", "b"], "main_metric": top1}
            return SimpleNamespace(top1=top1, figures=figures.items, **shown)

        test = None if "/grid/" in str(run) else measured(accuracy)
        return TrainResult(run, measured(0.9), test)

    monkeypatch.setattr(sweep, "train", train)
    return asked
