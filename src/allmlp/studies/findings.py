"""What a report is made of: run folders and measurement files, searched for and checked.

Every value comes from a file that a verb of ours has written. A file that cannot be understood is
named in the report, or is an error where it was asked for by name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allmlp.errors import UserError
from allmlp.evaluation.measurement import FORMAT, read_measurement
from allmlp.io import expand, parse_json
from allmlp.models.catalog import architecture_name, config_from_json
from allmlp.training.run_folder import read_metrics, read_results

# Studies with tables and figures of their own in their folders; the report names them.
NAMED_ONLY = ("permutation", "ablations")
_STUDIES = ("data-scale", "vtab", "transfer", *NAMED_ONLY)
_OF_RUN = {"best", "test", "validation", "checkpoints", "plots", "tensorboard"}
_MAKE = (
    "These write what a report reads: mixer evaluate MODEL --data SOURCE --output FOLDER; mixer "
    "few-shot MODEL --data SOURCE --output FILE.json; mixer train --output runs/NAME"
)


@dataclass(frozen=True)
class Measured:
    """One run folder, or one measurement file.

    Attributes:
        number: by which the report's rows refer to it, from 1.
        path: of the folder or the file.
        kind: "run", or that of the measurement.
        values: as the file has them; of a run those of `read_run`.
    """

    number: int
    path: Path
    kind: str
    values: dict[str, Any]


@dataclass
class Findings:
    """What was found: `measured` is understood, `left_out` is (path, reason)."""

    measured: list[Measured] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Measured]:
        """Returns what is of these kinds, in the order in which it was found."""
        return [each for each in self.measured if each.kind in kinds]


def collect(paths: Sequence[str | Path]) -> Findings:
    """Returns what the paths hold.

    Args:
        paths: run folders, measurement files, and folders that are searched for them.

    Raises:
        UserError: a path is not there, a file asked for by name is no measurement, or nothing is
            found.
    """
    if not paths:
        raise UserError("no runs and no measurements to report", fix=f"mixer report runs. {_MAKE}")
    search = _Search()
    for each in paths:
        path = expand(each)
        if path.is_dir():
            search.folder(path)
        elif path.is_file():
            search.file(path, by_name=True)
        else:
            raise UserError("no such file or folder", where=path)
    if not search.findings.measured:
        what = "no run and no measurement found"
        for path, reason in search.findings.left_out[:3]:
            what += f"; {path} is left out: {reason}"
        raise UserError(what, where=", ".join(map(str, paths)), fix=_MAKE)
    return search.findings


class _Search:
    def __init__(self) -> None:
        self.findings, self.seen = Findings(), set[Path]()

    def add(self, path: Path, kind: str, values: dict[str, Any]) -> None:
        number = len(self.findings.measured) + 1
        self.findings.measured.append(Measured(number, path, kind, values))

    def folder(self, top: Path) -> None:
        """Looks for runs and measurements in a folder and all below it."""
        for place, folders, files in os.walk(top):
            here = Path(place)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if is_run(here):
                self.run(here)
                folders[:] = [name for name in folders if name not in _OF_RUN]
            if "finetune.json" in files:  # of its grid only the final runs count
                folders[:] = [name for name in folders if name not in ("grid", "best")]
            kinds = [
                self.file(here / name)
                for name in sorted(files)
                if name.endswith(".json") and not name.startswith(".")
            ]
            if any(kind in _STUDIES for kind in kinds):
                folders.clear()  # its runs are told in its own file

    def run(self, path: Path) -> None:
        if path.resolve() in self.seen:
            return
        self.seen.add(path.resolve())
        try:
            self.add(path, "run", read_run(path))
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.findings.left_out.append((path, f"not a whole run folder: {_short(error)}"))

    def file(self, path: Path, *, by_name: bool = False) -> str | None:
        """Takes a measurement; returns its kind.

        Raises:
            UserError: it was asked for by name, and is none, or is damaged.
        """
        try:
            if not by_name and not _has_header(path):
                return None
            if path.resolve() in self.seen:
                return None
            self.seen.add(path.resolve())
            values = read_measurement(path)
            kind = str(values.get("kind"))
            if kind in _CHECKS:
                check(kind, values)
                self.add(path, kind, values)
            else:
                self.findings.left_out.append((path, f"of the unknown kind {_short(kind)!r}"))
            return kind
        except (UserError, OSError) as error:
            if by_name:
                raise
            self.findings.left_out.append((path, _short(error)))
            return None


def is_run(folder: Path) -> bool:
    """Returns whether a folder is that of a training run."""
    return (folder / "config.json").is_file() and (folder / "environment.json").is_file()


def _has_header(path: Path) -> bool:
    """Whether a file begins as a measurement: one of another kind is not read to its end."""
    with path.open("rb") as file:
        return FORMAT.encode() in file.read(1000)


def _short(error: object) -> str:
    text = error.what if isinstance(error, UserError) else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def check(kind: str, values: dict[str, Any]) -> None:
    """Raises UserError where a measurement lacks what the report shows of its kind."""
    try:
        environment = values["environment"]
        _need(isinstance(environment, dict), "environment")
        _CHECKS[kind](values)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        name = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        what = f"damaged: what a measurement of the kind {kind!r} holds is not all there ({name})"
        raise UserError(what, fix="Measure again") from error


def _need(is_there: bool, name: str) -> None:
    if not is_there:
        raise ValueError(name)


def _share(value: object) -> None:
    _need(isinstance(value, int | float) and 0.0 <= value <= 1.0, f"not a share: {value!r}")


def _positive(value: object) -> None:
    fits = isinstance(value, int | float) and math.isfinite(value) and value > 0
    _need(fits, f"not above 0: {value!r}")


def _check_evaluation(values: dict[str, Any]) -> None:
    _share(values["top1"])
    _positive(values["images"])
    _need(isinstance(values["data"], str), "data")
    if values.get("real") is not None:
        _share(values["real"]["accuracy"])
        _positive(values["real"]["images"])


def _check_few_shot(values: dict[str, Any]) -> None:
    floor = values.get("floor") or {"results": []}
    _need(bool(values["results"]), "results")
    for each in [*values["results"], *floor["results"]]:
        for shots, accuracy in each["mean"].items():
            _need(shots.isdecimal(), f"shots {shots!r}")
            _share(accuracy)
        for spread in each["deviation"].values():
            _need(spread is None or math.isfinite(spread), "deviation")


def _check_throughput(values: dict[str, Any]) -> None:
    for each in values["models"]:
        _need(isinstance(each["model"], dict), "model")
        if each["best"] is not None:
            _positive(each["best"]["images_per_second"])
            _positive(each["best"]["batch_size"])


def _check_suite(values: dict[str, Any]) -> None:
    for name, task in values["tasks"].items():
        _need(isinstance(name, str), "tasks")
        if task.get("accuracy") is not None:
            _share(task["accuracy"])
    if values["mean"] is not None:
        _share(values["mean"])
    _need(isinstance(values["partial"], bool), "partial")
    _need(isinstance(values["missing"], list), "missing")


def _check_data_scale(values: dict[str, Any]) -> None:
    _need(isinstance(values["partial"], bool), "partial")
    for each in values["points"]:
        _share(each["few_shot"])
        _share(each["validation"])
        for name in ("images", "epochs", "steps", "fraction"):
            _positive(each[name])
        _need(each["deviation"] is None or math.isfinite(each["deviation"]), "deviation")
        _need(isinstance(each["label"], str), "label")
        _need({"model", "runs", "deviation_of"} <= each.keys(), "points")
    _positive(values["settings"]["shots"])
    _need(isinstance(values["settings"]["few_shot_data"], str), "few_shot_data")
    _need(isinstance(values["data"]["source"], str), "data")


_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "evaluation": _check_evaluation,
    "few-shot": _check_few_shot,
    "throughput": _check_throughput,
    "vtab": _check_suite,
    "transfer": _check_suite,
    "data-scale": _check_data_scale,
    **{kind: lambda values: None for kind in NAMED_ONLY},
}


def read_run(path: Path) -> dict[str, Any]:
    """Returns what a run folder knows of its training and its own last measurement.

    Returns:
        "config", "environment", "model", "seconds" (wall time of the training so far), "steps",
        "processes", "finished", "split" and "evaluation" (None before the end of the run).

    Raises:
        UserError, ValueError, KeyError, TypeError: the folder is not whole.
    """
    config = parse_json((path / "config.json").read_bytes())
    environment = parse_json((path / "environment.json").read_bytes())
    _need("recipe" in config, "config.json is not that of a run")
    seconds, steps = 0.0, 0
    for last in read_metrics(path)[-1:]:
        seconds, steps = float(last["seconds"]), int(last["step"]) + 1
    for row in read_results(path):  # the last evaluation comes after the last logged step
        seconds = max(seconds, float(row.get("seconds") or 0.0))
    evaluation, split = None, None
    for name in ("test", "validation"):
        file = path / name / "evaluation.json"
        if evaluation is None and file.is_file():
            evaluation, split = parse_json(file.read_bytes()), name
            _check_evaluation(evaluation)
    log = path / "log.txt"
    log_text = log.read_text("utf-8", "replace") if log.is_file() else ""
    processes = re.findall(r"^run      .*?(\d+) processes on ", log_text, re.MULTILINE)
    return {
        "config": config,
        "environment": environment,
        "model": _model_of(path),
        "seconds": seconds,
        "steps": steps,
        "processes": int(processes[-1]) if processes else 1,
        "finished": evaluation is not None,
        "split": split,
        "evaluation": evaluation,
    }


def _model_of(run: Path) -> dict[str, Any]:
    """Returns what best/ says of the model, as `evaluation.measurement.describe` would."""
    file = run / "best" / "config.json"
    if not file.is_file():
        return {}
    values = parse_json(file.read_bytes())
    config = config_from_json(values["architecture"])
    return {
        "name": architecture_name(config) or config.summary(),
        "source": str(run),
        "architecture": values["architecture"],
        "image_size": list(config.image_size),
        "preprocessing": values.get("preprocessing"),
    }
