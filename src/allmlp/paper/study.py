"""What the experiments share: options, and the file that a study writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allmlp.errors import UserError
from allmlp.evaluation.result_file import measurement, write_measurement
from allmlp.io import atomic_write
from allmlp.options import ImageSize, Options, Precision, Repeated
from allmlp.sweep import Row
from allmlp.training.config import TrainConfig
from allmlp.training.recipes import recipe


@dataclass(frozen=True, kw_only=True)
class PaperOptions(Options):
    """What all experiments have in common; what is not given is the recipe's or the protocol's."""

    output: str | None = field(default=None, metadata={"metavar": "FOLDER"})
    """The folder of the study; required."""
    image_size: ImageSize | None = None
    """Of the networks."""
    steps: int | None = None
    """Updates of the weights in every run."""
    batch_size: int | None = None
    """Images per step."""
    seeds: tuple[int, ...] = field(default=(), metadata={"metavar": "N ..."})
    """Of the weights and the order of images; a run for each."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N."""
    num_workers: int | None = None
    """Processes that decode images; chosen by the size of the data if not given."""
    settings: Repeated = field(default=(), metadata={"flag": "set", "metavar": "KEY=VALUE"})
    """Any other setting, as config.json of a run names it; may be given many times."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions(PaperOptions):
    """What the studies that train from random weights have in common."""

    data: str = field(metadata={"metavar": "SOURCE"})
    """Images to train on: any source that `mixer train` reads."""
    recipe: str = "cifar10_compare"
    """The settings of all runs; a name of docs/recipes.md."""
    seeds: tuple[int, ...] = field(default=(0,), metadata={"metavar": "N ..."})
    """Of the weights and the order of images; a run for each."""
    epochs: int | None = None
    """Passes over the training images, in place of steps."""
    learning_rate: float | None = None
    """The highest, after the warm-up."""
    holdout: float | None = None
    """Fraction of the training images to validate on, if the data has no val/."""
    evaluate_every: int | None = None
    """Epochs, or steps with --steps, between evaluations."""
    precision: Precision | None = None
    """Of the matrix products."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise UserError("a study needs a seed", where="seeds", fix="seeds: 0 1 2")


@dataclass(frozen=True)
class Study:
    """What the runs of a study reached: a row for each group of runs that differ in their seeds."""

    folder: Path
    rows: list[dict[str, Any]]


def train_config(
    options: StudyOptions, own: Collection[str], model: str | None = None
) -> TrainConfig:
    """Returns the settings that all runs of a study share.

    Args:
        own: settings that the study chooses for each run, which must not be set.
        model: the name of the network; None takes the recipe's.
    """
    for setting in options.settings:
        name = setting.partition("=")[0].strip()
        if name in {*own, "seed", "output", "model.weights"}:
            raise UserError(f"{name} is chosen by the study", where="set", fix="Leave it out")
    config = recipe(options.recipe)
    if config.model.weights is not None:
        what = f"{options.recipe} begins with trained weights; the study trains from random ones"
        raise UserError(what, where="recipe", fix="for example scratch, cifar10 or jft_b32")
    if model is not None:  # before the settings: it takes the sizes of the recipe's own model away
        config = config.with_value("model.name", model)
    names = {"learning_rate": "optimizer.learning_rate", "image_size": "model.image_size"}
    names |= {name: f"data.{name}" for name in ("holdout", "num_workers")} | {"data": "data.source"}
    same = ("output", "epochs", "steps", "batch_size", "evaluate_every", "device", "precision")
    names |= {name: name for name in same}
    given = {key: getattr(options, name) for name, key in names.items()}
    given = {key: value for key, value in given.items() if value is not None}
    return config.with_values(given, options.settings)


def write_study(
    path: Path,
    config: TrainConfig,
    settings: Mapping[str, Any],
    runs: Iterable[str],
    done: Mapping[str, Row],
    **figures: Any,
) -> None:
    """Writes the measurement of a study.

    Args:
        path: of the file; its name is the kind, as "data_scale.json".
        config: what the runs share.
        settings: what else the study depends on.
        runs: the names of all runs.
        done: what the finished ones have reached.
        figures: what they come to together.
    """
    missing = [name for name in runs if name not in done]
    values = {
        "settings": dict(settings),
        **figures,
        "partial": bool(missing),
        "missing": missing,
        "cells": dict(done),
        "config": config.to_json(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_measurement(path, measurement(path.stem.replace("_", "-"), None, values))


def write_csv(path: Path, rows: Sequence[Row], exclude: Collection[str] = ()) -> None:
    """Writes rows with the columns of the first, but for the excluded ones."""
    text = io.StringIO()
    columns = [key for key in rows[0] if key not in exclude]
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode())
