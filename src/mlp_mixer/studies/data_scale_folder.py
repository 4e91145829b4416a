"""The folder of a data-scale study: what its runs have reached so far, and the points they make.

data_scale.json     a measurement of the kind "data-scale": settings, every cell, the points
data_scale.csv      a line for each cell
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlp_mixer.disk import write_aside
from mlp_mixer.errors import UserError
from mlp_mixer.evaluation.measurement import measurement, read_measurement, write_measurement
from mlp_mixer.training.config import TrainConfig
from mlp_mixer.training.resume import differences

KIND = "data-scale"
Cell = dict[str, Any]  # what one run has reached, as JSON values

_OF_CELL = {"model.name", "seed"}  # each run has its own
_NOT_IN_CSV = {"label", "few_shot_accuracies", "few_shot_test", "notes"}


class DataScaleFolder:
    """The folder of one study; only the process that writes calls its methods.

    Args:
        path: of the folder.
        config: of the runs.
        settings: of the measurement.
        cells: the names of all runs.

    Attributes:
        data: what the file says of the training data.
    """

    def __init__(
        self, path: Path, config: TrainConfig, settings: dict[str, Any], cells: list[str]
    ) -> None:
        self.path, self.file = path, path / "data_scale.json"
        self.config, self.settings, self.cells = config, settings, cells
        self.data: dict[str, Any] = {}

    def done(self) -> dict[str, Cell]:
        """Returns what the cells of this very study have reached so far, by their names.

        Raises:
            UserError: the folder holds something else, or another study.
        """
        if self.path.is_file():
            raise UserError("the output is a file", where=self.path, fix="Give another --output")
        if not self.file.is_file():
            there = {each.name for each in self.path.iterdir()} if self.path.is_dir() else set()
            there = {name for name in there if not name.endswith(".partial")} - {"log.txt"}
            if there:
                what = f"the folder holds something else: {', '.join(sorted(there)[:4])}"
                raise UserError(what, where=self.path, fix="Give another --output")
            return {}
        values = read_measurement(self.file)
        try:
            if values["kind"] != KIND:
                raise ValueError(f"it is of the kind {values['kind']!r}")
            old, before = TrainConfig.from_json(values["config"]), dict(values["settings"])
            done = {str(name): dict(cell) for name, cell in values["cells"].items()}
            points(done.values(), [], [])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"not the results of a data-scale study: {error}"
            raise UserError(what, where=self.file, fix="Give another --output") from error
        if not done and not (self.path / "cells").is_dir():
            return {}  # it was stopped before its first run: nothing depends on its settings
        changes = [
            each for each in differences(old, self.config) if each.split(" is ")[0] not in _OF_CELL
        ]
        changes += [
            f"{key} is {before.get(key)!r} there and {value!r} here"
            for key, value in self.settings.items()
            if before.get(key) != value
        ]
        changes += [f"{name} is there and not asked for" for name in done if name not in self.cells]
        if changes:
            what = f"the folder holds another study: {'; '.join(changes[:6])}"
            fix = "Give another --output; models, fractions and seeds may be added to those there"
            raise UserError(what, where=self.path, fix=fix)
        return done

    def save(self, done: dict[str, Cell], found: list[dict[str, Any]]) -> None:
        """Writes data_scale.json and, where there is a finished cell, data_scale.csv."""
        missing = [name for name in self.cells if name not in done]
        figures = {
            "data": self.data,
            "settings": self.settings,
            "points": found,
            "partial": bool(missing),
            "missing": missing,
            "cells": done,
            "config": self.config.to_json(),
        }
        write_measurement(self.file, measurement(KIND, None, figures))
        if done:
            text = io.StringIO()
            columns = [key for key in next(iter(done.values())) if key not in _NOT_IN_CSV]
            writer = csv.DictWriter(text, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(done[name] for name in self.cells if name in done)
            write_aside(self.file.with_suffix(".csv"), text.getvalue().encode())


def points(
    cells: Iterable[Cell], models: Sequence[str], fractions: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns a point of the figure for each model and share that has a finished run.

    Args:
        cells: of any models and shares.
        models, fractions: in the order of the points.
    """
    runs: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        runs.setdefault((cell["model"], cell["fraction"]), []).append(cell)
    order = [(model, fraction) for model in models for fraction in fractions]
    return [_point(runs[each]) for each in order if each in runs]


def _point(runs: list[Cell]) -> dict[str, Any]:
    """Returns the point that the runs of one model and share, one a seed, make."""
    kept = ("model", "label", "fraction", "images", "epochs", "steps")
    means = [each["few_shot"] for each in runs]
    deviation, of = runs[0]["few_shot_deviation"], "draws of the shots, one run"
    if len(runs) > 1:
        deviation, of = statistics.stdev(means), f"{len(runs)} runs"
    return {
        **{key: runs[0][key] for key in kept},
        "runs": len(runs),
        "validation": statistics.fmean(each["validation"] for each in runs),
        "few_shot": statistics.fmean(means),
        "deviation": deviation,
        "deviation_of": None if deviation is None else of,
        "seconds": sum(each["seconds"] for each in runs),
    }
