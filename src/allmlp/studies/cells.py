"""A study that trains a list of runs under one budget: its folder, and how it goes on.

cells/<name>/     the run of one of them
<kind>.json       a measurement: settings, what every run reached, and what they make together
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from allmlp.console import Reporter
from allmlp.runtime.world import join_world
from allmlp.studies.study_file import Cell, StudyFile, check_output
from allmlp.training.config import TrainConfig
from allmlp.training.loop import train
from allmlp.training.run_folder import no_results, read_results
from allmlp.training.summary import TrainResult


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
        self.path = check_output(config)
        self.file = self.path / f"{kind}.json"
        self.config, self.cells, self.measure, self.quiet = config, cells, measure, quiet
        self.results = StudyFile(
            self.file, kind, config, settings, cells, lambda cell: float(cell["accuracy"])
        )
        self.report, self.is_first = Reporter(quiet=quiet), True

    def run(self, summarize: Callable[[dict[str, Cell]], dict[str, Any]]) -> dict[str, Cell]:
        """Trains what is missing, and returns what every run has reached.

        Args:
            summarize: what the finished cells make together, for the file; after every run.
        """
        with join_world(self.config.device) as (world, _):
            self.is_first = world.is_main
            self.report = Reporter(quiet=self.quiet or not world.is_main)
            done: dict[str, Cell] = world.broadcast_from_rank0(self.results.done)
            if world.is_main:
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
                    done[name] = world.broadcast_from_rank0(
                        lambda config=config, result=result: self.of_run(config, result)
                    )
                    if world.is_main:
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
        rows = read_results(result.run_folder)
        if not rows:
            raise no_results(result.run_folder)
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

    def save(
        self, done: dict[str, Cell], summarize: Callable[[dict[str, Cell]], dict[str, Any]]
    ) -> None:
        """Writes the measurement."""
        self.results.save(self.config.data.source, done, summarize(done))
