"""Studies of several runs, each in a folder that resumes: fine-tuning, and cross-validation.

docs/training.md lists the files. The out_of_fold.npz of a fold has indices, labels and logits of
its images; for logits above 512 MiB what the metrics need of each image.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.source import MARK, Source
from allmlp.data.source_spec import parse_name
from allmlp.data.workers import check_guard
from allmlp.decision import Decision
from allmlp.errors import UserError, plural
from allmlp.evaluation.metrics import Evaluation, Metric, main_of, metric_of
from allmlp.io import atomic_write, csv_text
from allmlp.plots import save_evaluation
from allmlp.runtime.world import join_world
from allmlp.sweep import (
    Row,
    Sweep,
    mean_and_deviation,
    metrics_row,
    save_study,
    spreads,
    study_folder,
)
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import open_folds, splits_with_train
from allmlp.training.fit import finetune_config
from allmlp.training.recipes import HOLDOUTS, for_data
from allmlp.training.report import TrainResult

_LOGITS = "out_of_fold.npz"


@dataclass(frozen=True)
class FinetuneResult:
    """Results of a fine-tuning study.

    Attributes:
        folder: the study's folder.
        best_by: metric by which the learning rate was chosen.
        grid_metrics: learning rate -> metrics on the held-out training images, None if the run
            diverged; empty without a grid.
        learning_rate: used in the final runs.
        measured_on: "test", or "validation" if the data has no test images.
        metrics: seed -> metrics of its final run.
    """

    folder: Path
    best_by: str
    grid_metrics: dict[float, dict[str, float] | None]
    learning_rate: float
    measured_on: str
    metrics: dict[int, dict[str, float]]

    @property
    def grid(self) -> dict[float, float | None]:
        """Learning rate -> `best_by` on the held-out training images."""
        found = self.grid_metrics.items()
        return {rate: (metrics or {}).get(self.best_by) for rate, metrics in found}

    @property
    def accuracies(self) -> dict[int, float]:
        """Seed -> accuracy of its final run; mean average precision of multi-label data."""
        return {seed: metrics[main_of(metrics).name] for seed, metrics in self.metrics.items()}

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return mean_and_deviation(list(self.accuracies.values()))[0]

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the accuracies; None for one seed."""
        return mean_and_deviation(list(self.accuracies.values()))[1]

    def summary(self) -> str:
        """Returns "97.14% +- 0.16% (mean and standard deviation of seeds 0, 1, 2)"."""
        seeds = ", ".join(map(str, self.accuracies))
        if self.deviation is None:
            return f"{self.mean:.2%} (seed {seeds})"
        spread = f"{self.mean:.2%} +- {self.deviation:.2%}"
        return f"{spread} (mean and standard deviation of seeds {seeds})"


def finetune(
    config: TrainConfig | str,
    data: str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    grid: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    grid_source: str | None = None,
    quiet: bool = False,
) -> FinetuneResult:
    """Fine-tunes with each learning rate of the grid, then with the best one for each seed.

    Grid runs hold out a fraction of the training images for scoring: `config.data.holdout`, or the
    recipe's in `HOLDOUTS`. Final runs train on all training images and keep the last weights; if
    the data has validation images, or no test images, they validate and keep the best weights, as
    usual. Calling it again resumes an interrupted study.

    Args:
        config: with `model.weights` and `output` set, or weights, for whose settings see
            `finetune_config`. Its learning rate is used without a grid, its seed in the grid runs.
        data: the source of the images, with weights only.
        settings: path of a setting -> value, such as "output", with weights only.
        grid: candidate learning rates; the lowest wins a tie.
        seeds: seeds of the final runs.
        grid_source: data with train and validation splits for the grid runs, if a benchmark
            prescribes them.
        quiet: print nothing; log files are still written.

    Raises:
        UserError: as `train`; or the output folder contains something else. Nothing is written if
            a setting or the data is wrong.
    """
    if isinstance(config, str):
        in_grid = bool(grid) and grid_source is None
        config = finetune_config(config, data or "", settings, in_grid=in_grid)
    check_guard(config.data.num_workers)
    if config.model.train_only == "probe":
        what = "a probe has no learning rate to choose and draws no random numbers"
        raise UserError(what, where="model.train_only", fix="Leave out grid and seeds")
    if not config.model.weights:
        what = "fine-tuning begins with trained weights, and none are given"
        raise UserError(what, where="model.weights", fix="mixer finetune CHECKPOINT --data SOURCE")
    if not seeds:
        raise UserError("the final runs need a seed", where="seeds", fix="seeds: 0 1 2")
    source = config.data.source
    splits = splits_with_train(source)
    config = for_data(config, splits["train"])
    holdout = config.data.holdout
    if holdout == 0.0 and (grid or "test" not in splits):
        what = f"holdout 0 leaves no images to {'choose the rate' if grid else 'measure'} by"
        raise UserError(what, where="data.holdout", fix="holdout: 0.1, or leave it out")
    # All configs are checked before the first run. Those of the grid see training images only.
    rates = list(dict.fromkeys(float(rate) for rate in grid))
    holdout = HOLDOUTS.get(config.recipe, 0.1) if holdout is None else holdout
    own: dict[str, Any] = {"data.source": source if parse_name(source).split else f"{source}:train"}
    own["data.holdout"], inputs, by = holdout, [source], f"{holdout:.0%} of the training images"
    if grid_source is not None:
        own, by = {"data.source": grid_source, "data.holdout": None}, "the images set apart for it"
        inputs.append(grid_source)
    trials = {rate: config.with_values({**own, "optimizer.learning_rate": rate}) for rate in rates}
    changes: dict[str, Any] = {}
    if rates and "validation" in splits:
        changes["data.holdout"] = None
    elif rates and "test" in splits:  # final runs are tested: train on everything else
        changes |= {"data.holdout": 0.0, "best_by": "top1"}
    finals = {seed: config.with_values({"seed": seed, **changes}) for seed in seeds}
    keeps_last = finals[seeds[0]].data.holdout == 0.0
    names = ("grid", "best", "finetune.json", *(f"seed-{seed}" for seed in seeds))
    path = study_folder(config.output, names, inputs)
    with join_world(config.device) as (world, _):
        sweep = Sweep(path, world, quiet=quiet)
        text = f"rates {', '.join(f'{rate:g}' for rate in rates)}, judged on {by}; then "
        of = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        sweep.say(f"study    {text if rates else ''}{of}")
        if "test" not in splits:
            sweep.say("         the data has no test images: the final runs are measured on the")
            sweep.say("         validation images, by which the weights are chosen too")
        reached: dict[float, dict[str, float] | None] = {}
        for rate, run in trials.items():
            title = f"grid: rate {rate:g}"
            row = sweep.run(f"grid/lr-{rate!r}", run, title=title, may_diverge=True)
            # Select by the last metrics if the final runs keep the last weights.
            reached[rate] = row.get("last" if keeps_last else "metrics")
        best = _choose(sweep, config.best_by, reached) if rates else config.optimizer.learning_rate
        runs = {
            f"seed-{seed}": run.with_value("optimizer.learning_rate", best)
            for seed, run in finals.items()
        }
        rows = list(sweep.run_all(runs, None).values())
        metrics = {seed: row["metrics"] for seed, row in zip(finals, rows, strict=True)}
        on = rows[0]["measured_on"]
        result = FinetuneResult(path, config.best_by, reached, best, on, metrics)
        if world.is_main:
            _finish(sweep, config, result, path / rows[0]["folder"])
        return result


def _choose(sweep: Sweep, by: str, reached: Mapping[float, dict[str, float] | None]) -> float:
    """Returns the best learning rate; the lowest wins a tie."""
    metric = metric_of(by)
    finite = {rate: metrics[by] for rate, metrics in reached.items() if metrics and by in metrics}
    if not finite:
        what, lower = "the run of every rate of the grid diverged", min(reached) / 10
        raise UserError(what, where=sweep.path, fix=f"Lower rates, grid: {lower:.1g}")
    best = max(finite, key=lambda rate: (metric.score(finite[rate]), -rate))
    sweep.say(f"\nchosen   rate {best:g}: {metric.text(finite[best])} on held-out training images")
    if len(reached) > 1 and best in (min(reached), max(reached)):
        side = "lowest" if best == min(reached) else "highest"
        sweep.say(f"         the {side} of the grid; one beyond it may be better")
    return best


def _finish(sweep: Sweep, config: TrainConfig, result: FinetuneResult, run: Path) -> None:
    """Writes finetune.json and the first seed's model, with a card for all seeds; prints both."""
    first, on = next(iter(result.metrics)), result.measured_on
    section = f"\n## The study\n\nThis is the run with seed {first}. "
    section += f"Accuracy on the {on} images: {result.summary()}.\n"
    if result.grid:
        section += f"The learning rate {result.learning_rate:g} was chosen on held-out training "
        section += f"images from {', '.join(f'{rate:g}' for rate in result.grid)}.\n"
    values = {
        "config": config.to_json(),
        "best_by": result.best_by,
        "grid": [[rate, value] for rate, value in result.grid.items()],
        "seeds": list(result.accuracies),
        "accuracies": list(result.accuracies.values()),
        "learning_rate": result.learning_rate,
        "measured_on": on,
        "mean": result.mean,
        "deviation": result.deviation,
        "metrics": spreads(list(result.metrics.values())),
    }
    save_study(result.folder, "finetune.json", values, run, section)
    runs = [(f"rate {rate:g}", "held out", found) for rate, found in result.grid_metrics.items()]
    runs += [(f"seed {seed}", on, metrics) for seed, metrics in result.metrics.items()]
    main = main_of(result.metrics[first])
    rows = []
    for name, images, metrics in runs:
        cells = metrics_row(metrics, result.best_by) if metrics else {main.title: "diverged"}
        rows.append({"run": name, "images": images, **cells})
    sweep.table(rows)
    text = f"{on} {_title(main)} {result.summary()}, learning rate {result.learning_rate:g}"
    sweep.say(text, style="bold green")
    sweep.say(f"model    {result.folder / 'best'} (of seed {first})")
    sweep.say(f"table    {result.folder / 'finetune.json'}")


def _title(metric: Metric) -> str:
    return "accuracy" if metric.name == "top1" else metric.title


# Cross-validation


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

    @property
    def main(self) -> str:
        """The metric that says which fold is best: top1 or mean_average_precision, or micro_f1 if a
        fold has no labels."""
        return _shared_main(self.folds).name

    def spread(self, name: str, *, test: bool = False) -> tuple[float, float | None]:
        """Returns mean and sample standard deviation of a metric, such as "top1"."""
        return mean_and_deviation([values[name] for values in (self.tests if test else self.folds)])

    def to_json(self) -> dict[str, Any]:
        """Returns all metrics as JSON values."""
        return {
            "folds": self.folds,
            "best": self.best,
            "held_out": spreads(self.folds),
            "test": spreads(self.tests),
            "tests": self.tests,
            "out_of_fold": dict(self.out_of_fold.figures()),
        }


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
    configs = {at: config.with_value("data.fold", (at, folds)) for at in range(1, folds + 1)}
    runs = {f"fold-{at}": for_data(fold, whole) for at, fold in configs.items()}
    names = (*runs, "best", "folds.json", "out_of_fold")
    path = study_folder(config.output, names, [config.data.source])
    with join_world(config.device) as (world, _):
        sweep = Sweep(path, world, quiet=quiet)
        sweep.say(f"study    {folds} folds of {plural(len(whole), 'image')}: {how}")
        sweep.say("         each is held out in turn; the last weights are measured on it")
        for label, name in enumerate(whole.class_names):
            where = np.unique(dealt[whole.of_class(label)])
            if len(where) == 1:
                text = f"all images of {name!r} are in fold {where[0] + 1}, trained without them"
                sweep.say(f"warning  {text}", style="yellow")
        for name, run in runs.items():
            if not (path / name / _LOGITS).is_file():
                sweep.rows.pop(sweep.key(run), None)  # measured again, not trained again
        rows = list(sweep.run_all(runs, _measure).values())
        result = _joined(path, whole, dealt, rows)
        if world.is_main:
            run = path / rows[result.best - 1]["folder"]
            _finish_folds(sweep, config, result, whole, dealt, run)
        return result


def _measure(result: TrainResult) -> Row:
    """Keeps a fold's logits in its run folder, and its metrics in the study's results."""
    held_out, file = result.validation, io.BytesIO()
    assert held_out is not None
    np.savez(file, **_columns(held_out))
    atomic_write(result.run_folder / _LOGITS, file.getvalue())
    test = None if result.test is None else dict(result.test.figures())
    return {"held_out": dict(held_out.figures()), "test": test}


def _columns(part: Evaluation) -> dict[str, Any]:
    """Returns what is kept of each image, by name; the first axis counts images."""
    kept = {name: getattr(part, name) for name in ("indices", "labels", "logits")}
    return {**kept, **(part.rows or {})}


def _joined(path: Path, whole: Source, dealt: np.ndarray, rows: list[Row]) -> CrossValidation:
    about: dict[str, Any] = {"data": whole.name, "class_names": whole.class_names}
    about["decision"] = Decision(labels="multi" if whole.is_multi_label else "single")
    parts: list[Evaluation] = []
    for fold, row in enumerate(rows):
        file = path / row["folder"] / _LOGITS
        try:
            with np.load(file, allow_pickle=False) as found:
                columns = dict(found)
            places = np.flatnonzero(dealt == fold)[columns.pop("indices")]
            about |= {name: columns.pop(name) for name in ("labels", "logits")}
        except (OSError, ValueError, LookupError) as error:
            fix = "Remove the file: the fold is measured again"
            raise UserError(f"the logits are damaged: {error}", where=file, fix=fix) from error
        parts.append(Evaluation(**about, indices=places, rows=columns or None))
    if any(part.rows is not None for part in parts):  # the logits of a fold were too large to keep
        parts = [part.without_logits() if part.rows is None else part for part in parts]
    kept = [_columns(part) for part in parts]
    order = np.argsort(np.concatenate([part.indices for part in parts]), kind="stable")
    joined = {name: np.concatenate([own[name] for own in kept])[order] for name in kept[0]}
    about |= {name: joined.pop(name) for name in ("indices", "labels", "logits")}
    out_of_fold = Evaluation(**about, rows=joined or None, are_held_out=True, trained_on=0)
    folds = [row["held_out"] for row in rows]
    main = _shared_main(folds).name
    best = max(range(len(folds)), key=lambda at: (folds[at][main], -folds[at]["loss"], -at))
    tests = [row["test"] for row in rows if row["test"] is not None]
    return CrossValidation(path, folds, tests, out_of_fold, best + 1)


def _shared_main(folds: list[dict[str, float]]) -> Metric:
    """Returns the main metric of those that all folds have."""
    return main_of(set.intersection(*map(set, folds)))


def _finish_folds(
    sweep: Sweep,
    config: TrainConfig,
    result: CrossValidation,
    whole: Source,
    dealt: np.ndarray,
    run: Path,
) -> None:
    """Writes folds.json, out_of_fold/ and the best fold's model with its card; prints them."""
    found, folder = result.out_of_fold, result.folder / "out_of_fold"
    found.save(folder, overwrite=True)
    save_evaluation(found, whole, folder)
    rows: list[list[Any]] = [["image", "fold", "class", "predicted", "probability"]]
    for number, index in enumerate(found.indices.tolist()):
        names, values = [*zip(*found.predicted(number), strict=True)] or ((), ())
        row = [whole.item_name(index), dealt[index] + 1, whole.label_text(index), MARK.join(names)]
        rows.append([*row, MARK.join(f"{value:.6f}" for value in values)])
    atomic_write(folder / "predictions.csv", csv_text(rows))
    main = _shared_main(result.folds)
    name, (mean, deviation) = _title(main), result.spread(main.name)
    over, out = f"{mean:.2%} +- {deviation:.2%}", f"{getattr(found, main.name):.2%}"
    section = (
        f"\n## Cross-validation\n\nThis is the model of fold {result.best} of {len(result.folds)}, "
        f"which had the highest {name} on its held-out images. Over the folds it is "
        f"{over} (mean and standard deviation); out of fold, each image "
        f"predicted by the model that had not seen it, {out}.\n"
    )
    values = {"config": config.to_json(), **result.to_json()}
    save_study(result.folder, "folds.json", values, run, section)
    folds = enumerate(zip(np.bincount(dealt), result.folds, strict=True), 1)
    shown = [(f"fold {at}", f"{number:,}", metrics) for at, (number, metrics) in folds]
    for part in ("mean", "deviation"):
        spread = values["held_out"].items()
        shown.append((part, "", {metric: of_folds[part] for metric, of_folds in spread}))
    shown.append(("out of fold", f"{len(found.labels):,}", values["out_of_fold"]))
    sweep.table(
        {"held out": held_out, "images": images, **metrics_row(metrics)}
        for held_out, images, metrics in shown
    )
    right = f"{found.correct.sum():,} of {plural(len(found.labels), 'image')}"
    text = f"{name} {over} (mean and standard deviation of the folds), {out} out of fold ({right})"
    sweep.say(text, style="bold green")
    for line in found.warnings():
        sweep.say(f"warning  {line}", style="yellow")
    if main.name in values["test"]:
        mean, deviation = result.spread(main.name, test=True)
        sweep.say(f"test     {name} {mean:.2%} +- {deviation:.2%}")
    text = f"{result.folder / 'best'} (of fold {result.best}, the highest {name} of the folds; "
    sweep.say(f"model    {text}expect the mean from it)")
    sweep.say(f"tables   {result.folder / 'folds.json'}, {result.folder / 'out_of_fold'}")
