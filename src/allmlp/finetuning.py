"""Fine-tuning: selects a learning rate on held-out training images, then trains several seeds.

A single run is `train` with pretrained weights. A grid or several seeds make a study, a folder with
  grid/lr-0.03/     a run per learning rate: trained on part of the training images, scored on the
                    rest, never on test images
  seed-0/           a run per seed, at the best learning rate
  results.jsonl     the result of each run, see `sweep`
  finetune.json     the mean over the seeds
  best/             the model of the first seed, for deployment
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allmlp.console import table
from allmlp.data.source_spec import parse_name
from allmlp.data.workers import check_guard
from allmlp.errors import UserError
from allmlp.evaluation.metrics import METRICS, Metric, main_of, metric_of
from allmlp.io import atomic_write
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
from allmlp.training.dataset import splits_with_train
from allmlp.training.fit import finetune_config
from allmlp.training.recipes import HOLDOUTS, for_multi_label


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
        return {rate: None if metrics is None else metrics[self.best_by] for rate, metrics in found}

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
    splits = splits_with_train(config.data.source)
    if splits["train"].is_multi_label:
        config = for_multi_label(config)
    if config.data.holdout == 0.0 and (grid or "test" not in splits):
        what = f"holdout 0 leaves no images to {'choose the rate' if grid else 'measure'} by"
        raise UserError(what, where="data.holdout", fix="holdout: 0.1, or leave it out")
    rates = list(dict.fromkeys(float(rate) for rate in grid))
    # Check all configs before the first run.
    for_grid = {rate: _in_grid(config, rate, grid_source) for rate in rates}
    changes: dict[str, Any] = {}
    if rates and "validation" in splits:
        changes["data.holdout"] = None
    elif rates and "test" in splits:  # final runs are tested: train on everything else
        changes |= {"data.holdout": 0.0, "best_by": "top1"}
    finals = {seed: config.with_values({"seed": seed, **changes}) for seed in seeds}
    keeps_last = finals[seeds[0]].data.holdout == 0.0
    own = ("grid", "best", "finetune.json", *(f"seed-{seed}" for seed in seeds))
    inputs = [config.data.source] if grid_source is None else [config.data.source, grid_source]
    path = study_folder(config.output, own, inputs)
    with join_world(config.device) as (world, _):
        sweep = Sweep(path, world, quiet=quiet)
        text = ""
        if rates:
            held_out = f"{for_grid[rates[0]].data.holdout or 0:.0%} of the training images"
            by = held_out if grid_source is None else "the images set apart for it"
            text = f"rates {', '.join(f'{rate:g}' for rate in rates)}, judged on {by}; then "
        sweep.say(f"study    {text}seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
        if "test" not in splits:
            sweep.say("         the data has no test images: the final runs are measured on the")
            sweep.say("         validation images, by which the weights are chosen too")
        metric = metric_of(config.best_by)
        reached: dict[float, dict[str, float] | None] = {}
        for rate, run in for_grid.items():
            title = f"grid: rate {rate:g}"
            row = sweep.run(f"grid/lr-{rate!r}", run, title=title, may_diverge=True)
            # Select by the last metrics if the final runs keep the last weights.
            reached[rate] = row.get("last" if keeps_last else "metrics")
        best = _choose(sweep, metric, reached) if reached else config.optimizer.learning_rate
        rows: dict[int, Row] = {}
        for number, (seed, run) in enumerate(finals.items(), 1):
            title = f"seed {seed}: final run {number} of {len(finals)}"
            run = run.with_value("optimizer.learning_rate", best)
            rows[seed] = sweep.run(f"seed-{seed}", run, title=title)
        first = rows[seeds[0]]
        metrics = {seed: row["metrics"] for seed, row in rows.items()}
        result = FinetuneResult(path, metric.name, reached, best, first["measured_on"], metrics)
        if world.is_main:
            _save(config, result, path / first["folder"] / "best")
            _report(sweep, result)
        return result


def _in_grid(config: TrainConfig, rate: float, grid_source: str | None) -> TrainConfig:
    """Returns the config of a grid run, which sees training images only."""
    source, holdout = config.data.source, config.data.holdout
    if grid_source is not None:
        source, holdout = grid_source, None
    else:
        source = source if parse_name(source).split else f"{source}:train"
        holdout = HOLDOUTS.get(config.recipe, 0.1) if holdout is None else holdout
    changes = {"data.source": source, "data.holdout": holdout, "optimizer.learning_rate": rate}
    return config.with_values(changes)


def _choose(sweep: Sweep, metric: Metric, reached: dict[float, dict[str, float] | None]) -> float:
    """Returns the best learning rate; the lowest wins a tie."""
    finite = {rate: metrics[metric.name] for rate, metrics in reached.items() if metrics}
    if not finite:
        what, lower = "the run of every rate of the grid diverged", min(reached) / 10
        raise UserError(what, where=sweep.path, fix=f"Lower rates, grid: {lower:.1g}")
    best = max(finite, key=lambda rate: (metric.score(finite[rate]), -rate))
    sweep.say(f"\nchosen   rate {best:g}: {metric.text(finite[best])} on held-out training images")
    if len(reached) > 1 and best in (min(reached), max(reached)):
        side = "lowest" if best == min(reached) else "highest"
        sweep.say(f"         the {side} of the grid; one beyond it may be better")
    return best


def _save(config: TrainConfig, result: FinetuneResult, source: Path) -> None:
    """Writes finetune.json and the first seed's model, with a model card for all seeds."""
    best = copy_best(source.parent, result.folder)
    seed = next(iter(result.accuracies))
    card = (source / "README.md").read_text("utf-8")
    card += f"\n## The study\n\nThis is the run with seed {seed}. "
    card += f"Accuracy on the {result.measured_on} images: {result.summary()}.\n"
    if result.grid:
        card += f"The learning rate {result.learning_rate:g} was chosen on held-out training "
        card += f"images from {', '.join(f'{rate:g}' for rate in result.grid)}.\n"
    atomic_write(best / "README.md", card.encode(errors="surrogateescape"))
    known = shared_metrics(result.metrics.values())
    values = {
        "config": config.to_json(),
        "best_by": result.best_by,
        "grid": [[rate, value] for rate, value in result.grid.items()],
        "seeds": list(result.accuracies),
        "accuracies": list(result.accuracies.values()),
        "learning_rate": result.learning_rate,
        "measured_on": result.measured_on,
        "mean": result.mean,
        "deviation": result.deviation,
        "metrics": {name: _spread(result, name) for name in known},
    }
    text = json.dumps(values, indent=2) + "\n"
    atomic_write(result.folder / "finetune.json", text.encode(errors="surrogateescape"))


def _spread(result: FinetuneResult, name: str) -> dict[str, Any]:
    """A metric of the final runs."""
    values = [metrics[name] for metrics in result.metrics.values()]
    mean, deviation = mean_and_deviation(values)
    return {"values": values, "mean": mean, "deviation": deviation}


def _cell(metric: Metric, found: dict[str, float] | None) -> str:
    if found is None:
        return "diverged"
    return f"{found[metric.name]:{metric.format}}" if metric.name in found else "-"


def _report(sweep: Sweep, result: FinetuneResult) -> None:
    """Prints a table of all runs."""
    on, known = result.measured_on, shared_metrics(result.metrics.values())
    shown = [m for m in METRICS if m.name in known and (m.in_summary or m.name == result.best_by)]
    runs = [(f"rate {rate:g}", "held out", found) for rate, found in result.grid_metrics.items()]
    runs += [(f"seed {seed}", on, metrics) for seed, metrics in result.metrics.items()]
    rows = [
        [run, images, *(_cell(metric, found) for metric in shown)] for run, images, found in runs
    ]
    headers = ["run", "images", *(metric.title for metric in shown)]
    for line in ["", *table(headers, rows, left=2), ""]:
        sweep.say(line)
    main = main_of(known)
    name = "accuracy" if main.name == "top1" else main.title
    text = f"{on} {name} {result.summary()}, learning rate {result.learning_rate:g}"
    sweep.say(text, style="bold green")
    sweep.say(f"model    {result.folder / 'best'} (of seed {next(iter(result.accuracies))})")
    sweep.say(f"table    {result.folder / 'finetune.json'}")
