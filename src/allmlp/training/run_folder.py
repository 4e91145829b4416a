"""The run folder, whose files docs/training.md lists, and the identity of the run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from allmlp import plots
from allmlp.data.source import BadImage
from allmlp.environment import environment_info
from allmlp.errors import UserError
from allmlp.io import (
    atomic_write,
    csv_text,
    expand,
    locked,
    parse_json,
    path_in_errors,
    read_json,
    remove_stale,
)
from allmlp.training.config import TrainConfig, flat
from allmlp.training.dataset import Splits
from allmlp.training.loggers import Loggers
from allmlp.weights.description import WEIGHTS
from allmlp.weights.load import weights_fingerprint

TRAINING_IMAGES = "training_images.txt"
# Settings that affect where and how fast a run computes, but not what: they may change on resume.
# The images may move; they are compared by themselves.
_FREE = {
    *("output", "device", "num_threads", "micro_batch_size", "compile", "sharding"),
    *("log", "keep_checkpoints", "checkpoint_every", "data.num_workers", "data.timeout"),
    *("data.max_bad", "data.source"),
}
# Files left by a run that ended before its first step.
_BEGUN = {"plots", "checkpoints", ".lock", "config.json", "environment.json", "log.txt"}
_BEGUN |= {TRAINING_IMAGES}
_OTHER_OUTPUT = "Choose another output folder, or remove this one"


# Identity of a run


def config_of(run: str | Path) -> TrainConfig:
    """Returns the settings of a run folder, with that folder as the output."""
    folder = Path(run).expanduser()
    path = folder / "config.json"
    if not path.is_file():
        what = "there is no such run folder" if not folder.exists() else "not a run folder"
        fix = "Give a folder that mixer train or mixer finetune wrote"
        if (folder / "results.jsonl").exists():
            fix = "It holds a study, which the command that began it resumes"
        raise UserError(f"{what}: it has no config.json", where=folder, fix=fix, code="no-run")
    values = read_json(path, "not valid JSON")
    if not isinstance(values, dict) or "recipe" not in values:
        what = "this config.json is not that of a training run"
        raise UserError(what, where=path, fix="Give the run folder, not best/", code="no-run")
    try:
        return replace(TrainConfig.from_json(values), output=str(run))
    except UserError as error:
        where = error.where or path
        raise UserError(error.what, where=where, fix=error.fix, code=error.code) from error


def can_resume(path: Path) -> bool:
    """Whether the folder holds a run; False if it is unused, else UserError."""
    if path.is_file():
        raise UserError("the run folder is a file", where=path, fix=_OTHER_OUTPUT)
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    found = {name for name in names if not name.endswith(".partial")}
    has_begun = any((path / "checkpoints").glob("*")) or not found <= _BEGUN
    if not found or ("plots" in found and not has_begun):
        return False
    if "config.json" not in found:
        what = "the run folder exists and is not empty; a run never overwrites another"
        raise UserError(what, where=path, fix=_OTHER_OUTPUT)
    config_of(path)
    if "best" in found and not (path / "checkpoints").is_dir():
        what = "the run folder holds a run without checkpoints, which cannot be resumed"
        raise UserError(what, where=path, fix=_OTHER_OUTPUT)
    return True


def best_of(path: Path) -> Path | None:
    """Returns best/ if it can stand in for the first weights, as there is a checkpoint to read."""
    has_checkpoint = any((path / "checkpoints").glob("step-*"))
    return path / "best" if has_checkpoint and (path / "best" / WEIGHTS).is_file() else None


def identity(config: TrainConfig) -> dict[str, Any]:
    return {key: value for key, value in flat(config.to_json()).items() if key not in _FREE}


def environment_of(run: Path) -> dict[str, Any]:
    """Returns a run's environment.json; empty if an older version, or damage, left none."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return {"data": {}, **parse_json((run / "environment.json").read_bytes())}
    return {"data": {}}


def first_weights(run: Path) -> str | None:
    """Returns the fingerprint of the weights that a run began with; None if it is not known."""
    return environment_of(run).get("weights")


def check_same(path: Path, config: TrainConfig, splits: Splits) -> None:
    """Raises UserError if the folder's run has other images, or settings that must not change."""
    old = config_of(path)
    before, after = identity(old), identity(config)
    keys = sorted(before.keys() | after.keys())
    changed = [key for key in keys if before.get(key) != after.get(key)]
    if changed:
        lines = [f"{k} is {before.get(k)!r} there and {after.get(k)!r} here" for k in changed[:6]]
        what = f"the run folder holds a run with other settings: {'; '.join(lines)}"
        fix = f"Choose another output folder, or resume that run: mixer train --resume {path}"
        if {"epochs", "steps"} & {*changed}:
            fix += f". To train its weights for longer: mixer finetune {path} --data SOURCE"
        raise UserError(what, where=path, fix=fix, code="other-run")
    there, here, known = old.data.source, config.data.source, environment_of(path)["data"]
    prints = {"train": known.get("fingerprint"), "validation": known.get("validation")}
    prints |= {"test": known.get("test")} if there != here else {}
    is_same = there == here or prints["train"] is not None  # else compared with the checkpoints'
    for name, found in prints.items():
        is_same &= found is None or splits.has_fingerprint(found, name)
    if not is_same:
        raise other_images(path, "" if there == here else f": {there!r} there, {here!r} here")


def other_images(path: Path, moved: str = "") -> UserError:
    what = f"the images differ from those that the run began with{moved}"
    fix = "Restore them, or begin a new run in another output folder"
    return UserError(what, where=path, fix=fix, code="other-data")


# Files of a run


def planned_path(config: TrainConfig) -> Path:
    """Returns `config.output`, or the first unused runs/<date>_<recipe>."""
    if config.output is not None:
        try:
            config.output.encode()
        except UnicodeEncodeError as error:
            what = f"the name {config.output!r} is not valid UTF-8"
            raise UserError(what, where="output", fix="Choose another") from error
        return Path(os.path.expanduser(config.output))
    stem = f"{datetime.now():%Y-%m-%d_%H%M}_{config.recipe}"
    names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
    return next(path for path in map(Path("runs").joinpath, names) if not path.exists())


def environment(
    config: TrainConfig, splits: Splits, device: torch.device, best: Path | None
) -> dict[str, Any]:
    """Returns the contents of environment.json; "weights" is None if `best` stands in for them."""
    found, source, weights = splits.fingerprints, config.model.weights, None
    data = {"training_images": len(splits.train), "fingerprint": found["train"]}
    data |= {name: found[name] for name in ("validation", "test")}
    if source and (best is None or expand(source).exists()):
        try:
            weights = weights_fingerprint(source)
        except UserError:
            if best is None:
                raise
    return {**environment_info(device), "seed": config.seed, "data": data, "weights": weights}


class RunFolder:
    """The folder of a run, locked while open; only one process writes."""

    def __init__(self, path: Path, config: TrainConfig, *, writes: bool = True) -> None:
        self.writes, self.loggers = writes, Loggers()
        self._lock: FileLock | None = None  # or the file system has none
        try:
            while writes and config.output is None:  # a concurrent run may have taken the name
                try:
                    path.mkdir(parents=True)
                    break
                except FileExistsError:
                    path = planned_path(config)
            self.path, self.plots, self.best = path, path / "plots", path / "best"
            self.checkpoints = path / "checkpoints"
            if not writes:
                return
            self.plots.mkdir(parents=True, exist_ok=True)
            if config.keep_checkpoints:
                self.checkpoints.mkdir(exist_ok=True)
            self._lock = locked(path / ".lock")
        except Timeout as error:
            what = "another process is training in this run folder"
            fix = "Wait for it or stop it; or choose another output folder"
            raise UserError(what, where=path, fix=fix) from error
        except OSError as error:
            what = f"cannot make the run folder: {error.strerror}"
            raise UserError(what, where=path, fix="Choose another output folder") from error
        for folder in (path, self.plots, self.best, path / "test"):  # from a killed run
            for left in folder.glob(".*.partial"):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
            remove_stale(folder)
        self.write("config.json", config.to_json())

    def close(self) -> None:
        self.loggers.finish(None)
        if self.writes:
            (self.path / ".lock").unlink(missing_ok=True)  # while we still hold it
            if self._lock is not None:
                self._lock.release()

    @property
    def is_unlocked(self) -> bool:
        """Whether nothing refuses a second run, as the file system has no locks."""
        return self.writes and self._lock is None

    def rewind(self, step: int) -> None:
        """Removes log entries of later steps, and unreadable lines."""
        if (self.path / "metrics.jsonl").exists():
            kept = [values for values in read_metrics(self.path) if values["step"] < step]
            self.write("metrics.jsonl", "".join(f"{json.dumps(values)}\n" for values in kept))
        rows = [row for row in read_results(self.path) if float(row["step"]) <= step]
        if rows:
            self.write("results.csv", csv_text([rows[0].keys(), *(row.values() for row in rows)]))
        elif self.writes:
            (self.path / "results.csv").unlink(missing_ok=True)

    def bad_files(self) -> set[str]:
        path = self.path / "bad_files.txt"
        text = path.read_text("utf-8", "surrogateescape") if path.is_file() else ""
        return {line.partition("\t")[0] for line in text.splitlines()}

    def write(self, name: str, content: str | dict[str, Any]) -> None:
        if self.writes:
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            atomic_write(self.path / name, text.encode(errors="backslashreplace"))

    def log_step(self, values: dict[str, float]) -> None:
        self._log("metrics.jsonl", json.dumps(values) + "\n", "training", values)

    def log_evaluation(self, values: dict[str, float]) -> None:
        """Appends a line to results.csv; all lines have the columns of the first."""
        if not self.writes:
            return
        rows = read_results(self.path)
        names = list(rows[0] if rows else values)  # an older version may have had fewer
        row = [values.get(name, "") for name in names]
        self._log("results.csv", csv_text([row] if rows else [names, row]), "evaluation", values)

    def log_bad_file(self, bad: BadImage) -> None:
        self._log("bad_files.txt", f"{bad.name}\t{bad.what}\n")

    def _log(self, name: str, text: str, group: str = "", values: Any = None) -> None:
        if self.writes:
            with path_in_errors(self.path / name), (self.path / name).open("ab") as file:
                file.write(text.encode(errors="surrogateescape"))
        if values is not None:
            named = {f"{group}/{name}": value for name, value in values.items() if name != "step"}
            self.loggers.tell("log", int(values["step"]), named)

    def draw_curves(self) -> None:
        figure = plots.curves(read_metrics(self.path), read_results(self.path))
        plots.save(figure, self.plots / "curves.png")


# Logs are not synced to disk: a kill may truncate the last line, a power loss may corrupt any.


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Returns the readable lines of a run's metrics.jsonl."""
    path, found = run / "metrics.jsonl", []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            values = parse_json(line)
            if "step" in values and all(isinstance(v, int | float) for v in values.values()):
                found.append(values)
    return found


def read_results(run: Path) -> list[dict[str, str]]:
    """Returns the readable lines of a run's results.csv, by column."""
    path = run / "results.csv"
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    header, *rows = [line.split(",") for line in text.splitlines()] or [[""]]
    if "step" not in header or not all(map(str.isidentifier, header)):
        return []
    found = []
    for row in rows:
        with contextlib.suppress(ValueError):
            _ = [float(value) for value in row]
            found.append(dict(zip(header, row, strict=True)))
    return found
