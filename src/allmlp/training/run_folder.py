"""What a run writes.

runs/<date>_<recipe>/
  config.json  environment.json  log.txt
  metrics.jsonl     a line per logged step
  results.csv       a line per evaluation
  training_images.txt  a key for each of up to 5,000 training images, see `image_key`
  bad_files.txt     images that could not be decoded, if there were any
  checkpoints/      step-00012000/: the full state, from which the run resumes
  best/             model.safetensors + config.json + README.md: what you ship
  test/             evaluation.json, per_class.csv, confusion.csv of best/
  plots/            curves, confusion, a training batch, predictions, worst mistakes
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from allmlp import plots
from allmlp.data.fingerprint import fingerprint
from allmlp.data.source import BadImage
from allmlp.environment import environment_info
from allmlp.errors import UserError
from allmlp.io import atomic_write, parse_json, path_in_errors, remove_stale
from allmlp.names import extra
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import Splits

TRAINING_IMAGES = "training_images.txt"


class RunFolder:
    """The folder of one run, locked while this object is open; of several processes one writes."""

    def __init__(self, path: Path, config: TrainConfig, *, writes: bool = True) -> None:
        self.writes = writes
        try:
            self.path = _claimed(path, config) if config.output is None else path
            self.plots, self.best = self.path / "plots", self.path / "best"
            self.checkpoints = self.path / "checkpoints"
            self._results_header: list[str] | None = None
            self._events: Any = None
            self._lock = FileLock(self.path / ".lock", timeout=0)
            if not writes:
                return
            self.plots.mkdir(parents=True, exist_ok=True)
            if config.keep_checkpoints:
                self.checkpoints.mkdir(exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            if isinstance(error, Timeout):
                what = "another process is training in this run folder"
                fix = "Wait for it or stop it; or choose another output folder"
                raise UserError(what, where=path, fix=fix) from error
            what = f"cannot make the run folder: {error.strerror}"
            raise UserError(what, where=path, fix="Choose another output folder") from error
        for folder in (self.path, self.plots, self.best, self.path / "test"):  # of a killed run
            for left in folder.glob(".*.partial"):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
            remove_stale(folder)
        self.write_json("config.json", config.to_json())

    def close(self) -> None:
        """Lets another process have the folder."""
        if self._events is not None:
            self._events.close()
        if self.writes:
            (self.path / ".lock").unlink(missing_ok=True)  # while it is still ours
            self._lock.release()

    def rewind(self, step: int) -> list[str]:
        """Removes what the logs say of later steps; returns notes on damaged lines."""
        if not self.writes:
            return []
        metrics, results, notes = self.path / "metrics.jsonl", self.path / "results.csv", []
        if metrics.exists():
            lines, dropped = _metrics_in(metrics)
            kept = [line for line, values in lines if values["step"] < step]
            atomic_write(metrics, b"".join(kept))
            notes += _dropped_from(metrics, dropped)
        if results.exists():
            header, rows, dropped = _results_in(results)
            rows = [row for row in rows if float(row[header.index("step")]) <= step]
            text = io.StringIO()
            csv.writer(text).writerows([header, *rows] if rows else [])
            self._results_header = header if rows else None
            atomic_write(results, text.getvalue().encode())
            if not rows:
                results.unlink()
            notes += _dropped_from(results, dropped)
        return notes

    def named_bad_files(self) -> list[BadImage]:
        """Returns what bad_files.txt names already."""
        try:
            text = (self.path / "bad_files.txt").read_text("utf-8", "surrogateescape")
        except FileNotFoundError:
            return []
        parts = (line.partition("\t") for line in text.splitlines())
        return [BadImage(-1, name, what) for name, _, what in parts]

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Writes a JSON file into the folder."""
        self._write(self.path / name, json.dumps(values, indent=2) + "\n")

    def write_keys(self, keys: list[str]) -> None:
        """Writes what identifies the training images."""
        self._write(self.path / TRAINING_IMAGES, "".join(f"{key}\n" for key in keys))

    def write_card(self, text: str) -> None:
        """Writes the model card, best/README.md, beside the weights."""
        self._write(self.best / "README.md", text)

    def log_step(self, values: dict[str, float]) -> None:
        """Adds a line to metrics.jsonl."""
        self._append("metrics.jsonl", json.dumps(values) + "\n")
        self._log_events("training", values)

    def log_evaluation(self, values: dict[str, float]) -> None:
        """Adds a line to results.csv; every line has the columns of the first."""
        text = io.StringIO()
        if self._results_header is None:
            self._results_header = list(values)
            csv.writer(text).writerow(values)
        csv.DictWriter(text, fieldnames=self._results_header).writerow(values)
        self._append("results.csv", text.getvalue())
        self._log_events("evaluation", values)

    def log_bad_file(self, bad: BadImage) -> None:
        """Adds a line to bad_files.txt."""
        self._append("bad_files.txt", f"{bad.name}\t{bad.what}\n")

    def open_events(self, step: int) -> None:
        """Writes TensorBoard's event files too, from this step on; see `check_tensorboard`."""
        from torch.utils.tensorboard import SummaryWriter

        if self.writes:
            self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)

    def _log_events(self, group: str, values: dict[str, float]) -> None:
        if self._events is not None:
            for name in values.keys() - {"step"}:
                self._events.add_scalar(f"{group}/{name}", values[name], int(values["step"]))

    def _write(self, path: Path, text: str) -> None:
        if self.writes:
            atomic_write(path, text.encode(errors="backslashreplace"))

    def _append(self, name: str, text: str) -> None:
        if self.writes:
            with path_in_errors(self.path / name), (self.path / name).open("ab") as file:
                file.write(text.encode(errors="surrogateescape"))

    def draw_curves(self) -> None:
        """Draws the loss, accuracy and learning rate so far."""
        figure = plots.curves(read_metrics(self.path), read_results(self.path))
        plots.save(figure, self.plots / "curves.png")


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
    path, number = Path("runs") / stem, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}_{number}"
    return path


def check_tensorboard() -> None:
    """Raises UserError where the package that writes TensorBoard's files is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        what = "tensorboard=true needs the package tensorboard"
        raise UserError(what, fix=extra("tensorboard")) from error


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Returns the lines of a run's metrics.jsonl that can be read."""
    path = run / "metrics.jsonl"
    return [values for _, values in _metrics_in(path)[0]] if path.is_file() else []


def read_results(run: Path) -> list[dict[str, str]]:
    """Returns the lines of a run's results.csv by their columns; none where there is no file."""
    path = run / "results.csv"
    if not path.is_file():
        return []
    header, rows, _ = _results_in(path)
    return [dict(zip(header, row, strict=True)) for row in rows]


def no_results(run: Path) -> UserError:
    """Returns the error for a finished run whose results.csv lacks what is needed of it."""
    what, fix = "the results of this run are damaged", "Remove the run's folder: it is trained anew"
    return UserError(what, where=run / "results.csv", fix=fix)


# Logs are not synced to disk: a kill may cut the last line, and a power cut may leave anything.


def _metrics_in(path: Path) -> tuple[list[tuple[bytes, dict[str, float]]], int]:
    """Returns the lines that can be read with their values, and the number of others."""
    lines, found = path.read_bytes().splitlines(), []
    for line in lines:
        try:
            values = parse_json(line)
            if "step" in values and all(
                isinstance(value, int | float) for value in values.values()
            ):
                found.append((line + b"\n", values))
        except (ValueError, TypeError, AttributeError):
            pass
    return found, len(lines) - len(found)


def _results_in(path: Path) -> tuple[list[str], list[list[str]], int]:
    """Returns the columns, the lines that have a number in each, and the number of others."""
    lines = [line.split(",") for line in path.read_text("utf-8", "replace").splitlines()]
    if not lines or "step" not in lines[0] or not all(map(str.isidentifier, lines[0])):
        return [], [], len(lines)
    header, *rows = lines
    whole = [row for row in rows if len(row) == len(header) and all(map(_is_number, row))]
    return header, whole, len(rows) - len(whole)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _dropped_from(path: Path, count: int) -> list[str]:
    lines = "a damaged line is" if count == 1 else f"{count:,} damaged lines are"
    return [f"{path.name}: {lines} left out"] if count else []


def _claimed(path: Path, config: TrainConfig) -> Path:
    """Makes the folder that was planned, or the next where a run beside this one was faster."""
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            path = planned_path(config)


def environment(config: TrainConfig, splits: Splits, device: torch.device) -> dict[str, Any]:
    """Returns what environment.json holds: versions, hardware, command, seed, fingerprints."""
    data: dict[str, Any] = {
        "training_images": len(splits.train),
        "fingerprint": fingerprint(splits.train, moved=True),
    }
    for name, source in (("validation", splits.validation), ("test", splits.test)):
        data[name] = None if source is None else fingerprint(source, moved=True)
    return {**environment_info(device), "seed": config.seed, "data": data}
