"""Cross-validation: trains once per fold and measures each model on the fold it has not seen.

A study is a folder with
  fold-1/           a run per fold, with out_of_fold.npz: indices, labels and logits of its images
  results.jsonl     the result of each run, see `sweep`
  folds.json        metrics of each fold, their mean and deviation, and those out of fold
  out_of_fold/      evaluation.json, per_class.csv, confusion.csv, predictions.csv, figures
  best/             the model of the fold with the highest accuracy
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.console import table
from allmlp.data.source import Source, check_one_label
from allmlp.data.workers import check_guard
from allmlp.errors import UserError, plural
from allmlp.evaluation.metrics import METRICS, Evaluation
from allmlp.io import atomic_write
from allmlp.plots import save_evaluation
from allmlp.runtime.world import join_world
from allmlp.sweep import (
    Row,
    Sweep,
    copy_best,
    mean_and_deviation,
    shared_metrics,
    study_folder,
)
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import open_folds
from allmlp.training.report import TrainResult

_LOGITS = "out_of_fold.npz"
_PREDICTIONS = ("image", "fold", "class", "predicted", "probability")


@dataclass(frozen=True)
class CrossValidation:
    """Results of cross-validation.

    Attributes:
        folder: the study's folder.
        folds: the metrics of each model on its held-out fold, by name.
        tests: the metrics of each model on the test images; empty if the data has none.
        out_of_fold: the metrics over all images, each predicted once, by the model that has not
            seen it; its `indices` count the training and then the validation images.
        best: the fold, from 1, whose model is in best/.
    """

    folder: Path
    folds: list[dict[str, float]]
    tests: list[dict[str, float]]
    out_of_fold: Evaluation
    best: int

    def spread(self, name: str, *, test: bool = False) -> tuple[float, float | None]:
        """Returns mean and sample standard deviation of a metric, such as "top1"."""
        return mean_and_deviation([values[name] for values in (self.tests if test else self.folds)])

    def to_json(self) -> dict[str, Any]:
        """Returns all metrics as JSON values."""
        values: dict[str, Any] = {"folds": self.folds, "best": self.best}
        for name, rows in (("held_out", self.folds), ("test", self.tests)):
            known = shared_metrics(rows) if rows else []
            spread = {key: self.spread(key, test=name == "test") for key in known}
            values[name] = {
                key: dict(zip(("mean", "deviation"), spread[key], strict=True)) for key in spread
            }
        return {**values, "tests": self.tests, "out_of_fold": dict(self.out_of_fold.figures())}


def cross_validate(config: TrainConfig, folds: int = 5, *, quiet: bool = False) -> CrossValidation:
    """Trains a model per fold and measures it on that fold; calling it again resumes.

    The folds are those of a column `fold` if the data has one; otherwise every fold has its share
    of each class, and groups (SOURCE#group=COLUMN) stay whole. Training and validation images are
    folded, test images are measured by every model. Each run keeps its last weights, so that its
    fold has no part in choosing them.

    Args:
        config: with `output` set, and with `model.weights` to fine-tune.
        folds: number of folds.
        quiet: print nothing; log files are still written.

    Raises:
        UserError: as `train`; the data has other folds of its own, or too few images or groups; or
            the output folder contains something else. Nothing is written then.
    """
    check_guard(config.data.num_workers)
    if config.data.holdout is not None or config.data.fold is not None:
        what = "cross-validation holds out the folds, so holdout and fold have no meaning"
        raise UserError(what, where="data.holdout, data.fold", fix="Leave them out")
    whole, dealt, how = open_folds(config.data, folds)
    check_one_label((whole,), "cross-validation")
    names = [f"fold-{number}" for number in range(1, folds + 1)]
    runs = {
        name: config.with_value("data.fold", (number, folds))
        for number, name in enumerate(names, 1)
    }
    own = (*names, "best", "folds.json", "out_of_fold")
    path = study_folder(config.output, own, [config.data.source])
    with join_world(config.device) as (world, _):
        sweep = Sweep(path, world, quiet=quiet)
        sweep.say(f"study    {folds} folds of {plural(len(whole), 'image')}: {how}")
        sweep.say("         each is held out in turn; the last weights are measured on it")
        for line in _unseen(whole, dealt, folds):
            sweep.say(f"warning  {line}", style="yellow")
        rows: list[Row] = []
        for number, (name, run) in enumerate(runs.items(), 1):
            if not (path / name / _LOGITS).is_file():
                sweep.rows.pop(sweep.key(run), None)  # measured again, not trained again
            title = f"fold {number} of {folds}"
            rows.append(sweep.run(name, run, _measure, title=title))
        found = [_read(path / row["folder"] / _LOGITS) for row in rows]
        result = _joined(path, whole, dealt, rows, found)
        if world.is_main:
            _save(config, result, whole, dealt, path / rows[result.best - 1]["folder"])
            _report(sweep, result, [len(logits["labels"]) for logits in found])
        return result


def _unseen(whole: Source, dealt: np.ndarray, folds: int) -> list[str]:
    """Classes whose images are all in one fold: its model is trained without them."""
    lines: list[str] = []
    for label, name in enumerate(whole.class_names):
        own = np.unique(dealt[whole.of_class(label)])
        if len(own) == 1:
            lines.append(f"all images of {name!r} are in fold {own[0] + 1}, trained without them")
    return lines


def _measure(config: TrainConfig, result: TrainResult) -> Row:
    """Keeps a fold's logits in its run folder, and its metrics in the study's results."""
    held_out, file = result.validation, io.BytesIO()
    assert held_out is not None
    values = {name: getattr(held_out, name) for name in ("indices", "labels", "logits")}
    np.savez(file, **values)
    atomic_write(result.run_folder / _LOGITS, file.getvalue())
    test = None if result.test is None else dict(result.test.figures())
    return {"held_out": dict(held_out.figures()), "test": test}


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in ("indices", "labels", "logits")}
    except (OSError, ValueError, KeyError) as error:
        fix = "Remove the file: the fold is measured again"
        raise UserError(f"the logits are damaged: {error}", where=path, fix=fix) from error


def _joined(
    path: Path,
    whole: Source,
    dealt: np.ndarray,
    rows: list[Row],
    found: list[dict[str, np.ndarray]],
) -> CrossValidation:
    places = [np.flatnonzero(dealt == fold)[own["indices"]] for fold, own in enumerate(found)]
    indices = np.concatenate(places)
    order = np.argsort(indices, kind="stable")
    labels, logits = (
        np.concatenate([own[name] for own in found])[order] for name in ("labels", "logits")
    )
    out_of_fold = Evaluation(whole.name, whole.class_names, labels, indices[order], logits)
    out_of_fold.are_held_out, out_of_fold.trained_on = True, 0
    folds = [row["held_out"] for row in rows]
    best = max(range(len(folds)), key=lambda at: (folds[at]["top1"], -folds[at]["loss"], -at))
    tests = [row["test"] for row in rows if row["test"] is not None]
    return CrossValidation(path, folds, tests, out_of_fold, best + 1)


def _save(
    config: TrainConfig, result: CrossValidation, whole: Source, dealt: np.ndarray, run: Path
) -> None:
    """Writes folds.json, out_of_fold/ and the best fold's model with its card."""
    found, folder = result.out_of_fold, result.folder / "out_of_fold"
    found.save(folder, overwrite=True)
    save_evaluation(found, whole, folder)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_PREDICTIONS)
    names = found.class_names
    columns = (found.indices, found.labels, found.predictions, found.confidences)
    for index, label, predicted, probability in zip(*columns, strict=True):
        row = [whole.item_name(int(index)), dealt[index] + 1, names[label], names[predicted]]
        writer.writerow([*row, f"{probability:.6f}"])
    atomic_write(folder / "predictions.csv", text.getvalue().encode(errors="surrogateescape"))
    best = copy_best(run, result.folder)
    mean, deviation = result.spread("top1")
    card = (run / "best" / "README.md").read_text("utf-8")
    card += (
        f"\n## Cross-validation\n\nThis is the model of fold {result.best} of {len(result.folds)}, "
    )
    card += "which had the highest accuracy on its held-out images. Over the folds it is "
    card += f"{mean:.2%} +- {deviation:.2%} (mean and standard deviation); out of fold, each image "
    card += f"predicted by the model that had not seen it, {found.top1:.2%}.\n"
    atomic_write(best / "README.md", card.encode(errors="surrogateescape"))
    values = {"config": config.to_json(), **result.to_json()}
    text = json.dumps(values, indent=2) + "\n"
    atomic_write(result.folder / "folds.json", text.encode(errors="surrogateescape"))


def _report(sweep: Sweep, result: CrossValidation, images: list[int]) -> None:
    """Prints the metrics of all folds, their mean and deviation, and those out of fold."""
    known = shared_metrics([*result.folds, dict(result.out_of_fold.figures())])
    shown = [metric for metric in METRICS if metric.name in known]

    def row(name: str, number: str, values: dict[str, float]) -> list[str]:
        return [name, number, *(f"{values[metric.name]:{metric.format}}" for metric in shown)]

    rows = [
        row(f"fold {at}", f"{images[at - 1]:,}", values)
        for at, values in enumerate(result.folds, 1)
    ]
    for part, name in enumerate(("mean", "deviation")):
        spread = {metric.name: result.spread(metric.name)[part] or 0.0 for metric in shown}
        rows.append(row(name, "", spread))
    found = result.out_of_fold
    rows.append(row("out of fold", f"{len(found.labels):,}", dict(found.figures())))
    for line in ["", *table(["held out", "images", *(metric.title for metric in shown)], rows), ""]:
        sweep.say(line)
    mean, deviation = result.spread("top1")
    text = f"accuracy {mean:.2%} +- {deviation:.2%} (mean and standard deviation of the folds), "
    right = f"{found.correct.sum():,} of {plural(len(found.labels), 'image')}"
    sweep.say(f"{text}{found.top1:.2%} out of fold ({right})", style="bold green")
    for line in found.warnings():
        sweep.say(f"warning  {line}", style="yellow")
    if result.tests:
        mean, deviation = result.spread("top1", test=True)
        sweep.say(f"test     accuracy {mean:.2%} +- {deviation:.2%}")
    text = f"{result.folder / 'best'} (of fold {result.best}, the highest accuracy of the folds; "
    sweep.say(f"model    {text}expect the mean from it)")
    sweep.say(f"tables   {result.folder / 'folds.json'}, {result.folder / 'out_of_fold'}")
