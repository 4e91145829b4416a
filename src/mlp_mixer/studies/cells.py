"""A study that trains a list of runs under one budget: its folder, and how it goes on.

cells/<name>/     the run of one of them
<kind>.json       a measurement: settings, what every run reached, and what they make together
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlp_mixer.console import Reporter
from mlp_mixer.disk import expand
from mlp_mixer.errors import UserError
from mlp_mixer.evaluation.measurement import measurement, read_measurement, write_measurement
from mlp_mixer.training.config import TrainConfig
from mlp_mixer.training.distributed import joined
from mlp_mixer.training.loop import train
from mlp_mixer.training.resume import differences
from mlp_mixer.training.summary import TrainResult

Cell = dict[str, Any]  # what one run has reached, as JSON values


class CellStudy:
    """The runs of a study; the same call again goes on where it was stopped.

    Args:
        kind: of the measurement, and the name of its file: "permutation", "ablations".
        config: what the runs share, with `output`.
        cells: name -> settings of its run.
        settings: what else the study depends on.
        measure: a finished run, and its settings -> more of what it reached. One process calls it.
        quiet: print nothing.

    Attributes:
        path, file: the folder, and its measurement.
        is_first: whether this is the process that writes and speaks, known once `run` was called.

    Raises:
        UserError: there is no output.
    """

    def __init__(
        self,
        kind: str,
        config: TrainConfig,
        cells: dict[str, TrainConfig],
        settings: dict[str, Any],
        measure: Callable[[TrainConfig, TrainResult], Cell],
        *,
        quiet: bool = False,
    ) -> None:
        if config.output is None:
            what = "a study of several runs needs a folder with a name, so that it can go on"
            raise UserError(what, where="--output", fix="--output runs/NAME")
        self.kind, self.config, self.cells = kind, config, cells
        self.settings, self.measure, self.quiet = settings, measure, quiet
        self.path = expand(config.output)
        self.file = self.path / f"{kind}.json"
        self.report, self.is_first = Reporter(quiet=quiet), True

    def run(self, summarize: Callable[[dict[str, Cell]], dict[str, Any]]) -> dict[str, Cell]:
        """Trains what is missing, and returns what every run has reached.

        Args:
            summarize: what the finished cells make together, for the file; after every run.
        """
        with joined(self.config.device) as (world, _):
            self.is_first = world.is_first
            self.report = Reporter(quiet=self.quiet or not world.is_first)
            done: dict[str, Cell] = world.from_first(self.done)
            if world.is_first:
                self.path.mkdir(parents=True, exist_ok=True)
                self.report.log_to(self.path / "log.txt")
                self.save(done, summarize)
            try:
                for number, (name, config) in enumerate(self.cells.items()):
                    if name in done:
                        self.report.say(f"done     {name}: {done[name]['accuracy']:.2%}")
                        continue
                    self.report.say(f"\n=== {name}: run {number + 1} of {len(self.cells)}")
                    output = str(self.path / "cells" / name)
                    result = train(
                        config.with_value("output", output), quiet=self.quiet, in_study=True
                    )
                    done[name] = world.from_first(
                        lambda config=config, result=result: self.of_run(config, result)
                    )
                    if world.is_first:
                        self.save(done, summarize)
            except (KeyboardInterrupt, SystemExit):
                self.report.say("the study goes on with the same command as before")
                raise
        return {name: done[name] for name in self.cells}

    def of_run(self, config: TrainConfig, result: TrainResult) -> Cell:
        """Returns what a finished run counts for."""
        shown, on = result.test, "test"
        if shown is None:
            shown, on = result.validation, "validation"
        assert shown is not None
        rows = _rows(result.run_folder / "results.csv")
        return {
            "model": config.model.name,
            "seed": config.seed,
            "accuracy": shown.top1,
            "measured_on": on,
            "images": len(shown.labels),
            "classes": len(shown.class_names),
            "curve": [[int(float(row["step"])), float(row["validation_top1"])] for row in rows],
            "seconds": float(rows[-1]["seconds"]),
            **self.measure(config, result),
        }

    def done(self) -> dict[str, Cell]:
        """Returns what the runs of this very study have reached so far.

        Raises:
            UserError: the folder holds something else, or another study.
        """
        if self.path.is_file():
            raise UserError("the output is a file", where=self.path, fix="Give another --output")
        if not self.file.is_file():
            there = {each.name for each in self.path.iterdir()} if self.path.is_dir() else set()
            others = sorted(name for name in there - {"log.txt"} if not name.endswith(".partial"))
            if others:
                what = f"the folder holds something else: {', '.join(others[:4])}"
                raise UserError(what, where=self.path, fix="Give another --output")
            return {}
        values = read_measurement(self.file)
        try:
            if values["kind"] != self.kind:
                raise ValueError(f"it is of the kind {values['kind']!r}")
            old, before = TrainConfig.from_json(values["config"]), dict(values["settings"])
            done = {str(name): dict(cell) for name, cell in values["cells"].items()}
            for cell in done.values():
                float(cell["accuracy"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"not the results of such a study: {error}"
            raise UserError(what, where=self.file, fix="Give another --output") from error
        if not done and not (self.path / "cells").is_dir():
            return {}  # it was stopped before its first run: nothing depends on its settings
        changes = differences(old, self.config)
        changes += [
            f"{key} is {before.get(key)!r} there and {value!r} here"
            for key, value in self.settings.items()
            if before.get(key) != value
        ]
        changes += [f"{name} is there and not asked for" for name in done if name not in self.cells]
        if changes:
            what = f"the folder holds another study: {'; '.join(changes[:6])}"
            fix = "Give another --output; runs may be added to those there"
            raise UserError(what, where=self.path, fix=fix)
        return done

    def save(
        self, done: dict[str, Cell], summarize: Callable[[dict[str, Cell]], dict[str, Any]]
    ) -> None:
        """Writes the measurement."""
        missing = [name for name in self.cells if name not in done]
        figures = {
            "data": self.config.data.source,
            "settings": self.settings,
            **summarize(done),
            "partial": bool(missing),
            "missing": missing,
            "cells": done,
            "config": self.config.to_json(),
        }
        write_measurement(self.file, measurement(self.kind, None, figures))


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
