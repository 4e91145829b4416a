"""Studies that train from random weights: shared options, and the procedure.

The folder of a study holds
  cells/.../seed-0/       the run folder of each run
  KIND.json, KIND.csv     the measurement: settings, all runs, the rows; the rows as a table
  KIND.png, KIND.svg      the figure, if there is one
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allmlp.console import table
from allmlp.data.sources import open_splits
from allmlp.errors import UserError, plural
from allmlp.evaluation.few_shot import FewShotOptions, few_shots, num_images
from allmlp.evaluation.result_file import measurement, save_result
from allmlp.io import atomic_write
from allmlp.paper.options import StudyOptions
from allmlp.runtime.world import join_world
from allmlp.sweep import Row, Sweep, mean_and_deviation, study_folder, summarize
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import Splits, open_training_data
from allmlp.training.recipes import recipe
from allmlp.training.report import TrainResult


@dataclass(frozen=True)
class Study:
    """Results of a study: one row per group of runs that differ only in their seeds."""

    folder: Path
    rows: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Defines a study: its runs, and what is done with the results.

    Attributes:
        kind: of the measurement, e.g. "data-scale"; the files are named after it.
        config: shared by all runs.
        runs: settings of each run by folder name, cells/.../seed-N; runs that differ only in the
            seed form one row.
        row_of: (name of such a group, cells/..., its settings) -> its columns in the row.
        finish: called at the end with the path of the files without suffix, the rows of the runs by
            name, and those of the groups: draws figures, and may add columns.
        columns: title -> format string for the printed table.
        few_shot: options for measuring the features of each run's best weights, if any.
        settings: anything other than the config that the measurement depends on.
    """

    kind: str
    config: TrainConfig
    runs: Mapping[str, TrainConfig]
    row_of: Callable[[str, TrainConfig], Row]
    finish: Callable[[Path, Mapping[str, Row], list[Row]], None]
    columns: Mapping[str, str]
    few_shot: FewShotOptions | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def run(self, *, quiet: bool = False) -> Study:
        """Trains the missing runs; writes and prints the results of all of them."""
        name = self.kind.replace("-", "_")
        own = ("cells", *(f"{name}.{suffix}" for suffix in ("json", "csv", "png", "svg")))
        inputs = [self.config.data.source, *(self.few_shot.data if self.few_shot else ())]
        folder = study_folder(self.config.output, own, inputs)
        with join_world(self.config.device) as (world, _):
            sweep = Sweep(folder, world, quiet=quiet)
            done = sweep.run_all(
                self.runs, self._measure, lambda done: self._write(folder / name, done)
            )
            rows = self._rows(done)
            if world.is_main:
                self.finish(folder / name, done, rows)
                self._write(folder / name, done, rows)
                seeds = len({config.seed for config in self.runs.values()})
                over = f"{rows[0]['measured_on']} top-1, {plural(seeds, 'seed')}"
                for line in ["", *formatted(self.columns, rows), over]:
                    sweep.say(line)
                sweep.say(f"written  {folder / name}.json")
            return Study(folder, rows)

    def _measure(self, _: TrainConfig, result: TrainResult) -> Row:
        assert result.validation is not None
        row: Row = {"validation": result.validation.top1}
        if self.few_shot is not None:
            (found,), (shots,) = (
                few_shots(str(result.run_folder), self.few_shot),
                self.few_shot.shots,
            )
            row |= {"few_shot": found.mean(shots), "few_shot_deviation": found.deviation(shots)}
            row["notes"] = found.notes
        return row

    def _rows(self, done: Mapping[str, Row]) -> list[Row]:
        groups: dict[str, list[str]] = {}
        for name in done:
            groups.setdefault(name.rpartition("/")[0], []).append(name)
        rows = []
        for group, names in groups.items():
            own = self.row_of(group, self.runs[names[0]])
            rows.append(own | _reached([done[name] for name in names]) | own)
        return rows

    def _write(self, path: Path, done: Mapping[str, Row], rows: list[Row] | None = None) -> None:
        rows = self._rows(done) if rows is None else rows
        missing = [name for name in self.runs if name not in done]
        values = {
            "settings": dict(self.settings),
            "rows": rows,
            "partial": bool(missing),
            "missing": missing,
            "cells": dict(done),
            "config": self.config.to_json(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_result(path.with_suffix(".json"), measurement(self.kind, None, values))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(path.with_suffix(".csv"), text.getvalue().encode(errors="surrogateescape"))


def _reached(runs: list[Row]) -> Row:
    """Aggregates runs that differ only in their seeds."""
    found = {**summarize(runs), "seconds": sum(row["seconds"] or 0.0 for row in runs)}
    if runs[0].get("validation") is not None:
        found["validation"] = statistics.fmean(row["validation"] for row in runs)
    if runs[0].get("few_shot") is not None:
        mean, deviation = mean_and_deviation([row["few_shot"] for row in runs])
        if len(runs) == 1:  # then over the draws of the shots
            deviation = runs[0].get("few_shot_deviation")
        found |= {"few_shot": mean, "few_shot_deviation": deviation}
    return found


def formatted(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns a table's lines; `columns` maps titles to format strings. None becomes a dash."""

    def shown(text: str, row: Mapping[str, Any]) -> str:
        try:
            return text.format(**row)
        except TypeError:
            return "-"

    return table(list(columns), [[shown(text, row) for text in columns.values()] for row in rows])


def train_config(
    options: StudyOptions, own: Collection[str], model: str | None = None
) -> TrainConfig:
    """Returns the settings shared by all runs of a study.

    Args:
        own: settings that the study controls, which must not be set by the user.
        model: name of the network, replacing the recipe's.
    """
    for setting in options.settings:
        name = setting.partition("=")[0].strip()
        if name in {*own, "seed", "output", "model.weights"}:
            raise UserError(f"{name} is chosen by the study", where="set", fix="Leave it out")
    config = recipe(options.recipe)
    if config.model.weights is not None:
        what = f"{options.recipe} begins with trained weights; the study trains from random ones"
        raise UserError(what, where="recipe", fix="for example scratch, cifar10 or jft_b32")
    if model is not None:  # first: it resets the sizes of the recipe's model
        config = config.with_value("model.name", model)
    names = {"learning_rate": "optimizer.learning_rate", "image_size": "model.image_size"}
    names |= {name: f"data.{name}" for name in ("holdout", "num_workers")} | {"data": "data.source"}
    same = ("output", "epochs", "steps", "batch_size", "evaluate_every", "device", "precision")
    names |= {name: name for name in same}
    given = {key: getattr(options, name) for name, key in names.items()}
    given = {key: value for key, value in given.items() if value is not None}
    return config.with_values(given, options.settings)


def open_data(config: TrainConfig) -> tuple[Splits, int]:
    """Returns a study's images, which must include validation, and the number to train on."""
    splits = open_training_data(config.data)
    if splits.validation is None:
        what = "the best weights are chosen by validation images, and the data has none"
        raise UserError(what, where="holdout", fix="holdout: 0.1, or leave it out")
    return splits, len(splits.train)


def few_shot_options(
    config: TrainConfig, data: str, shots: int, seeds: tuple[int, ...] = (0, 1, 2)
) -> FewShotOptions:
    """Returns options for measuring each run's weights on other data, which is checked here."""
    found = FewShotOptions(
        data=(data,),
        shots=(shots,),
        seeds=seeds,
        device=config.device,
        num_workers=config.data.num_workers,
    )
    num_images(open_splits(data), found)
    return found
