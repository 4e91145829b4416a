"""Many training runs in one folder: finished ones are skipped, interrupted ones resume.

results.jsonl has a line per finished run, keyed by the hash of its config, images and first
weights. Repeating the command trains the missing runs; a changed setting makes a new run.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from allmlp.console import Reporter
from allmlp.data.fingerprint import fingerprint
from allmlp.data.source import FOLD, GROUP, values_of
from allmlp.data.sources import open_splits, read_from
from allmlp.errors import UserError
from allmlp.evaluation.metrics import METRICS, main_of
from allmlp.io import (
    atomic_write,
    check_not_inputs,
    check_output_folder,
    expand,
    parse_json,
    sha256_of,
)
from allmlp.runtime.world import World
from allmlp.training.config import TrainConfig
from allmlp.training.report import TrainResult
from allmlp.training.run_folder import config_of, first_weights, identity, read_results
from allmlp.training.train import DivergedError, train
from allmlp.weights.load import weights_fingerprint

Row = dict[str, Any]  # a run's result as JSON values
Measure = Callable[[TrainResult], Row]
RESULTS = "results.jsonl"


def study_folder(output: str | None, own: Iterable[str], inputs: Iterable[str]) -> Path:
    """Returns a study's folder, new or with only the names in `own`, outside of its inputs."""
    if output is None:
        what = "a study of several runs needs a named folder, so that it can resume"
        raise UserError(what, where="output", fix="output: runs/NAME")
    path = expand(output)
    check_output_folder(path)
    there = [item.name for item in path.iterdir()] if path.is_dir() else []
    if not there:
        check_not_inputs([path], (place for source in inputs for place in read_from(source)))
    own = [*own, "log.txt", RESULTS]
    others = {name for name in there if not name.endswith(".partial")} - {*own}
    others = {name for name in others if not name.startswith(tuple(f"{run}-" for run in own))}
    if others and RESULTS not in there:
        what = f"the folder holds something else: {', '.join(sorted(others)[:4])}"
        raise UserError(what, where=path, fix="Give another output")
    return path


class Sweep:
    """The runs in a `study_folder` and their results; every process of `world` creates one."""

    def __init__(self, path: Path, world: World, *, quiet: bool = False) -> None:
        self.path, self.world, self.quiet = path, world, quiet
        self.report = Reporter(quiet=quiet or not world.is_main)
        self.say = self.report.say
        self.rows: dict[str, Row] = world.broadcast_from_rank0(self._read)
        self._data: dict[tuple[str, str | None], str] = {}
        self._weights: dict[str, str] = {}
        self._log()

    def table(self, rows: Iterable[Mapping[str, str]]) -> None:
        """Prints a table of runs: name, images, metrics."""
        self.say()
        self.report.table(rows, left=2)
        self.say()

    def run(
        self,
        name: str,
        config: TrainConfig,
        measure: Measure | None = None,
        *,
        title: str | None = None,
        may_diverge: bool = False,
    ) -> Row:
        """Trains or resumes a run unless it is finished; returns its result.

        `name` is the run's folder. `measure`, called on the main process only, adds to the result.
        With `may_diverge`, the accuracy of a diverged run is None.
        """
        key = self.key(config)
        if key in self.rows:
            accuracy = self.rows[key]["accuracy"]
            self.say(f"done     {name}: {'diverged' if accuracy is None else f'{accuracy:.2%}'}")
            return self.rows[key]
        folder = self.world.broadcast_from_rank0(lambda: self._folder(name, key, config))
        config = config.with_value("output", str(self.path / folder))
        self.say(f"\n=== {title or name}")
        try:
            result = train(config, quiet=self.quiet, in_study=True)
            row = self.world.broadcast_from_rank0(lambda: _reached(config, result, measure))
        except DivergedError as error:
            if not may_diverge:
                raise
            self.say(f"diverged {error.what}")
            row = {"accuracy": None}
        except (KeyboardInterrupt, SystemExit):
            self.say("the study resumes with the same command")
            raise
        data = self._data_of(config)
        self.rows[key] = {"key": key, "name": name, "folder": folder, "data": data, **row}
        if self.world.is_main:
            lines = "".join(f"{json.dumps(row)}\n" for row in self.rows.values())
            atomic_write(self.path / RESULTS, lines)
            self._log()
        return self.rows[key]

    def run_all(
        self,
        runs: Mapping[str, TrainConfig],
        measure: Measure | None,
        save: Callable[[dict[str, Row]], object] = lambda _: None,
    ) -> dict[str, Row]:
        """Returns the results of all runs; the main process calls `save` after each."""
        done: dict[str, Row] = {}
        for number, (name, config) in enumerate(runs.items(), 1):
            title = f"{name}: run {number} of {len(runs)}"
            done[name] = self.run(name, config, measure, title=title)
            if self.world.is_main:
                save(done)
        return done

    def key(self, config: TrainConfig) -> str:
        """Returns the hash of a run's settings, images and first weights, wherever these are."""
        values = identity(config) | {"model.weights": self._weights_of(config)}
        return _short_hash(json.dumps([values, self._data_of(config)], sort_keys=True))

    def _data_of(self, config: TrainConfig) -> str:
        place = config.data.source, config.data.exclude
        if place not in self._data:
            self._data[place] = self.world.broadcast_from_rank0(lambda: hash_of_data(*place))
        return self._data[place]

    def _weights_of(self, config: TrainConfig) -> str | None:
        source = config.model.weights
        if source and source not in self._weights:
            self._weights[source] = self.world.broadcast_from_rank0(
                lambda: self._fingerprint(source)
            )
        return self._weights[source] if source else None

    def _fingerprint(self, source: str) -> str:
        try:
            return weights_fingerprint(source, quiet=self.quiet)
        except UserError:  # they may be gone, and the runs that began with them finished
            for file in self.path.rglob("environment.json"):
                known = first_weights(file.parent)
                if known and config_of(file.parent).model.weights == source:
                    return known
            raise

    def _read(self) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        file = self.path / RESULTS
        for line in file.read_bytes().splitlines() if file.is_file() else ():
            # The run of a damaged line is measured again, not retrained.
            with contextlib.suppress(ValueError, LookupError, TypeError):
                row = parse_json(line)
                rows[row["key"]] = row
        return rows

    def _folder(self, name: str, key: str, config: TrainConfig) -> str:
        """Returns the run's folder name, a different one if another run has taken it."""
        file = self.path / name / "config.json"
        data, weights = self._data_of(config), self._weights_of(config)
        owners = [row for row in self.rows.values() if row.get("folder") == name]
        if not owners and not file.is_file():
            return name
        differ = any(row.get("data") != data for row in owners)
        differ |= first_weights(file.parent) not in (None, weights)  # None: of an older version
        # Another version may have computed its key.
        is_known = file.is_file() and not differ
        is_own = is_known and identity(config_of(file.parent)) == identity(config)
        return name if is_own else f"{name}-{key[:8]}"

    def _log(self) -> None:
        if self.world.is_main and self.path.is_dir():
            self.report.log_to(self.path / "log.txt")


def hash_of_data(source: str, excluded: str | None) -> str:
    """Returns a hash of the images, their groups and folds, and the list of what is left out."""
    parts = []
    for name, images in open_splits(source).items():
        parts += [name, fingerprint(images, moved=True)]
        columns = [values_of(images, role) for role in (GROUP, FOLD)]
        parts += [json.dumps(columns)] if any(columns) else []
    parts += [sha256_of(expand(excluded))] if excluded else []
    return _short_hash(" ".join(parts))


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _reached(config: TrainConfig, result: TrainResult, measure: Measure | None) -> Row:
    shown = result.validation if result.test is None else result.test
    rows = read_results(result.run_folder)
    if shown is None or (result.validation is not None and not rows):
        what, fix = "the results of this run are damaged", "Remove its folder: it is trained anew"
        raise UserError(what, where=result.run_folder / "results.csv", fix=fix)
    metrics = dict(shown.figures())
    main, prefix, last = main_of(metrics).name, "validation_", rows[-1] if rows else {}
    return {
        "model": config.model.name,
        "seed": config.seed,
        "accuracy": metrics[main],
        "metrics": metrics,
        "last": {k.removeprefix(prefix): float(last[k]) for k in last if k.startswith(prefix)},
        "measured_on": "validation" if result.test is None else "test",
        "images": len(shown.labels),
        "classes": len(shown.class_names),
        "curve": [
            [int(float(row["step"])), float(row[f"{prefix}{main}"])]
            for row in rows
            if f"{prefix}{main}" in row  # no validation image has a label
        ],
        "seconds": float(last["seconds"]) if rows else None,
        **(measure(result) if measure else {}),
    }


def metrics_row(metrics: Mapping[str, float], also: str = "") -> dict[str, str]:
    """Returns the main metrics of a run and one more, by title, for a table."""
    shown = [m for m in METRICS if m.name in metrics and (m.in_summary or m.name == also)]
    return {m.title: f"{metrics[m.name]:{m.format}}" for m in shown}


def spreads(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Returns the values, mean and deviation of the metrics that all rows have: a fitted
    temperature adds some to single runs."""
    found = {}
    for name in [name for name in rows[0] if all(name in row for row in rows)] if rows else ():
        values = [row[name] for row in rows]
        mean, deviation = mean_and_deviation(values)
        found[name] = {"values": values, "mean": mean, "deviation": deviation}
    return found


def save_study(study: Path, name: str, values: Row, run: Path, section: str) -> None:
    """Writes the study's JSON file, and copies best/ of a run, with a section for its card."""
    source, best, staged = run / "best", study / "best", study / ".best.partial"
    weights = "model.safetensors"
    if not (best / weights).is_file() or not filecmp.cmp(source / weights, best / weights):
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(source, staged)
        shutil.rmtree(best, ignore_errors=True)
        os.rename(staged, best)
    atomic_write(best / "README.md", (source / "README.md").read_text("utf-8") + section)
    atomic_write(study / name, json.dumps({**values, "run": run.name}, indent=2) + "\n")


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and the sample standard deviation, None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
