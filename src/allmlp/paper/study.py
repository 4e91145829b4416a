"""Studies that train from random weights: shared options, and the procedure.

The folder of a study holds
  cells/.../seed-0/       the run folder of each run
  KIND.json               the measurement: settings, all runs, the rows
  KIND.png, KIND.svg      the figure, if there is one
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allmlp.console import table_of
from allmlp.data.sources import open_splits
from allmlp.errors import UserError, plural
from allmlp.evaluation.few_shot import FewShotOptions, few_shots, num_images
from allmlp.evaluation.result_file import measurement, save_result
from allmlp.options import assigned, given_settings
from allmlp.paper.options import StudyOptions
from allmlp.runtime.world import join_world
from allmlp.sweep import Row, Sweep, mean_and_deviation, study_folder, summarize
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import Splits, open_training_data
from allmlp.training.recipes import recipe
from allmlp.training.report import TrainResult

# Option of a study -> setting of its runs.
_SAME = ("output", "epochs", "steps", "batch_size", "evaluate_every", "device", "precision")
_SETTINGS = {
    **{name: name for name in _SAME},
    "data": "data.source",
    "holdout": "data.holdout",
    "num_workers": "data.num_workers",
    "image_size": "model.image_size",
    "learning_rate": "optimizer.learning_rate",
}


@dataclass(frozen=True)
class Study:
    """Results of a study: one row per group of runs that differ only in their seeds."""

    folder: Path
    rows: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Defines a study: its runs, and what is done with the results."""

    kind: str  # of the measurement, e.g. "data-scale"; the files are named after it
    config: TrainConfig  # shared by all runs
    cells: Mapping[str, tuple[Row, TrainConfig]]  # folder -> columns of its row, its settings
    seeds: tuple[int, ...]  # one run of each cell for each
    # Draws the figure PATH.png and may add columns: (PATH, rows of the runs by name, of the cells).
    finish: Callable[[Path, Mapping[str, Row], list[Row]], None]
    columns: Mapping[str, str]  # title -> format string, for the printed table
    few_shot: FewShotOptions | None = None  # measures the features of each run's best weights
    settings: Mapping[str, Any] = field(default_factory=dict)  # whatever else is to be recorded

    def run(self, *, quiet: bool = False) -> Study:
        """Trains the missing runs; writes and prints the results of all of them."""
        name = self.kind.replace("-", "_")
        runs = {
            f"cells/{cell}/seed-{seed}": config.with_values(_seeded(config, seed))
            for cell, (_, config) in self.cells.items()
            for seed in self.seeds
        }
        own = ("cells", *(f"{name}.{suffix}" for suffix in ("json", "csv", "png", "svg")))
        inputs = [self.config.data.source, *(self.few_shot.data if self.few_shot else ())]
        folder = study_folder(self.config.output, own, inputs)
        with join_world(self.config.device) as (world, _):
            sweep = Sweep(folder, world, quiet=quiet)
            save = lambda done: self._write(folder / name, runs, done, self._rows(done))  # noqa: E731
            done = sweep.run_all(runs, self._measure, save)
            rows = self._rows(done)
            if world.is_main:
                self.finish(folder / name, done, rows)
                self._write(folder / name, runs, done, rows)
                over = f"{rows[0]['measured_on']} top-1, {plural(len(self.seeds), 'seed')}"
                for line in ["", *formatted(self.columns, rows), over]:
                    sweep.say(line)
                sweep.say(f"written  {folder / name}.json")
            return Study(folder, rows)

    def _measure(self, _: TrainConfig, result: TrainResult) -> Row:
        assert result.validation is not None
        row: Row = {"validation": result.validation.top1}
        if self.few_shot is not None:
            (found,) = few_shots(str(result.run_folder), self.few_shot)
            (shots,) = self.few_shot.shots
            row |= {"few_shot": found.mean(shots), "few_shot_deviation": found.deviation(shots)}
            row["notes"] = found.notes
        return row

    def _rows(self, done: Mapping[str, Row]) -> list[Row]:
        rows = []
        for cell, (own, _) in self.cells.items():
            if runs := [
                row for name, row in done.items() if name.startswith(f"cells/{cell}/seed-")
            ]:
                rows.append(own | _reached(runs) | own)
        return rows

    def _write(
        self, path: Path, runs: Iterable[str], done: Mapping[str, Row], rows: list[Row]
    ) -> None:
        missing = [name for name in runs if name not in done]
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


def _seeded(config: TrainConfig, seed: int) -> dict[str, int]:
    """The seed of a run, which also draws its subset of the images."""
    return {"seed": seed, **({"data.fraction_seed": seed} if config.data.fraction < 1.0 else {})}


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

    return table_of({title: shown(text, row) for title, text in columns.items()} for row in rows)


def train_config(
    options: StudyOptions, own: Collection[str], model: str | None = None
) -> TrainConfig:
    """Returns the settings shared by all runs of a study."""
    for name in assigned(options.settings):
        if name in {*own, "seed", "output", "model.weights"}:
            raise UserError(f"{name} is chosen by the study", where="set", fix="Leave it out")
    config = recipe(options.recipe)
    if config.model.weights is not None:
        what = f"{options.recipe} begins with trained weights; the study trains from random ones"
        raise UserError(what, where="recipe", fix="for example scratch, cifar10 or jft_b32")
    if model is not None:  # first: it resets the sizes of the recipe's model
        config = config.with_value("model.name", model)
    return config.with_values(given_settings(options, _SETTINGS), options.settings)


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
