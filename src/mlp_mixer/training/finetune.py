"""Fine-tuning: a rate chosen on held-out training images, final runs over seeds, mean and spread.

One run is `train` with weights to begin with. With a grid or several seeds the output holds
  grid/lr-0.03/     a run for each rate: trained on a part of the training images, measured on the
                    rest, and never shown a test image
  seed-0/           a run for each seed at the rate that was best, on all training images
  finetune.json     what each of them reached
  best/             the model of the first seed: what you ship
The same call again goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlp_mixer.console import Reporter, table
from mlp_mixer.data.source_names import parse_name
from mlp_mixer.data.sources import open_splits
from mlp_mixer.errors import UserError
from mlp_mixer.training.config import TrainConfig
from mlp_mixer.training.distributed import World, joined
from mlp_mixer.training.finetuning_recipes import HOLDOUTS
from mlp_mixer.training.loop import train
from mlp_mixer.training.resume import check_same
from mlp_mixer.training.summary import TrainResult
from mlp_mixer.weights.files import expand, write_aside

_RESULTS = "finetune.json"


@dataclass(frozen=True)
class FinetuneResult:
    """What the runs of a fine-tuning reached.

    Attributes:
        folder: where everything lies.
        grid: rate -> accuracy on the held-out training images; empty without a grid.
        learning_rate: of the final runs.
        measured_on: "test", or "validation" where the data has no test images.
        accuracies: seed -> accuracy of its final run.
        mean, deviation: of these; the deviation is the sample's, None for one seed.
    """

    folder: Path
    grid: dict[float, float]
    learning_rate: float
    measured_on: str
    accuracies: dict[int, float]
    mean: float = field(init=False)
    deviation: float | None = field(init=False)

    def __post_init__(self) -> None:
        values = list(self.accuracies.values())
        spread = statistics.stdev(values) if len(values) > 1 else None
        object.__setattr__(self, "mean", statistics.fmean(values))
        object.__setattr__(self, "deviation", spread)


def finetune(
    config: TrainConfig,
    *,
    grid: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    quiet: bool = False,
) -> FinetuneResult:
    """Fine-tunes with each rate of the grid, then with the best of them for each seed.

    Args:
        config: with `model.weights` and `output`; its own rate is taken where there is no grid, its
            own seed in the grid.
        grid: learning rates to choose from, on held-out training images; the share is that of
            `HOLDOUTS`, or `config.data.holdout`.
        seeds: of the final runs.
        quiet: print nothing.

    Raises:
        UserError: as `train`; or the output holds something else.
    """
    if not config.model.weights:
        what = "fine-tuning begins with trained weights, and none are given"
        raise UserError(what, where="model.weights", fix="mixer finetune CHECKPOINT --data SOURCE")
    if config.output is None:
        what = "several runs need a folder with a name, so that they can go on"
        raise UserError(what, where="--output", fix="--output runs/NAME")
    if not seeds or len(set(seeds)) < len(seeds) or len(set(grid)) < len(grid):
        what = f"each seed and each rate counts once, got seeds {[*seeds]} and rates {[*grid]}"
        raise UserError(what, fix="--seeds 0 1 2")
    with joined(config.device) as (world, _):
        folder = expand(config.output)
        study = _Study(config, grid, seeds, folder, world, quiet)
        return study.run()


class _Study:
    def __init__(
        self,
        config: TrainConfig,
        grid: Sequence[float],
        seeds: Sequence[int],
        folder: Path,
        world: World,
        quiet: bool,
    ) -> None:
        self.config, self.grid, self.seeds = config, list(grid), list(seeds)
        self.folder, self.world, self.quiet = folder, world, quiet
        self.report = Reporter(quiet=quiet or not world.is_first)
        self.splits = set(open_splits(config.data.source))
        self.done: dict[str, float] = world.from_first(self.found)
        if world.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            self.report.log_to(folder / "log.txt")
            self.save()

    def run(self) -> FinetuneResult:
        rate, reached = self.config.optimizer.learning_rate, {}
        for number, each in enumerate(self.grid, 1):
            self.say(f"--- rate {each:g}, {number} of {len(self.grid)}, on held-out images")
            reached[each] = self.cell(f"grid/lr-{each:g}", self.in_grid(each))
        if reached:
            rate = max(reached, key=lambda each: (reached[each], -each))  # of equals the lowest
            self.say(f"\nchosen   rate {rate:g}, {reached[rate]:.2%} on held-out training images")
        accuracies = {}
        for number, seed in enumerate(self.seeds, 1):
            self.say(f"--- seed {seed}, {number} of {len(self.seeds)}, rate {rate:g}")
            accuracies[seed] = self.cell(f"seed-{seed}", self.final(rate, seed))
        on = self.measured_on()
        result = FinetuneResult(self.folder, reached, rate, on, accuracies)
        if self.world.is_first:
            self.keep_first_seed()
            self.save(result)
            self.tell(result)
        return result

    def in_grid(self, rate: float) -> TrainConfig:
        """A run that sees training images alone: a part to learn from, the rest to judge by."""
        data = self.config.data
        source = data.source if parse_name(data.source).split else f"{data.source}:train"
        share = data.holdout or HOLDOUTS.get(self.config.recipe, 0.1)
        changes = {"data.source": source, "data.holdout": share}
        return self.config.with_values({**changes, "optimizer.learning_rate": rate})

    def final(self, rate: float, seed: int) -> TrainConfig:
        """A run on all training images; only where there is no test split is one held out."""
        holdout = 0.0 if "test" in self.splits else None
        changes = {"optimizer.learning_rate": rate, "seed": seed, "data.holdout": holdout}
        if holdout == 0.0:
            changes["patience"] = None
        return self.config.with_values(changes)

    def measured_on(self) -> str:
        return "test" if "test" in self.splits else "validation"

    def cell(self, name: str, config: TrainConfig) -> float:
        """Runs one training, or takes what it reached before."""
        if name in self.done:
            self.say(f"done     {name}: {self.done[name]:.2%}")
            return self.done[name]
        result = train(config.with_value("output", str(self.folder / name)), quiet=self.quiet)
        self.done[name] = _accuracy(result)
        if self.world.is_first:
            self.save()
        return self.done[name]

    def keep_first_seed(self) -> None:
        """Copies the first seed's model, aside and then under its name."""
        best, aside = self.folder / "best", self.folder / ".best.partial"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(self.folder / f"seed-{self.seeds[0]}" / "best", aside)
        shutil.rmtree(best, ignore_errors=True)
        os.rename(aside, best)

    def found(self) -> dict[str, float]:
        """What the folder holds of this very study."""
        path = self.folder / _RESULTS
        if self.folder.is_file():
            raise UserError("the output is a file", where=self.folder, fix="Give another --output")
        if not path.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                what = "the folder exists and holds something else"
                raise UserError(what, where=self.folder, fix="Give another --output")
            return {}
        try:
            values = json.loads(path.read_bytes())
            old = TrainConfig.from_json(values["config"])
            grid, seeds, done = values["grid"], values["seeds"], dict(values["done"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"not the results of a fine-tuning: {error}", where=path) from error
        check_same(old, self.config)
        if grid != self.grid or seeds != self.seeds:
            what = f"the folder holds a study with rates {grid} and seeds {seeds}"
            raise UserError(what, where=self.folder, fix="Give another --output, or the same again")
        return done

    def save(self, result: FinetuneResult | None = None) -> None:
        values: dict[str, Any] = {
            "config": self.config.to_json(),
            "grid": self.grid,
            "seeds": self.seeds,
            "done": self.done,
        }
        if result is not None:
            values["learning_rate"], values["measured_on"] = (
                result.learning_rate,
                self.measured_on(),
            )
            values["mean"], values["deviation"] = result.mean, result.deviation
        write_aside(self.folder / _RESULTS, (json.dumps(values, indent=2) + "\n").encode())

    def tell(self, result: FinetuneResult) -> None:
        rows = [[f"rate {rate:g}", "held out", f"{each:.2%}"] for rate, each in result.grid.items()]
        on = result.measured_on
        rows += [[f"seed {seed}", on, f"{each:.2%}"] for seed, each in result.accuracies.items()]
        self.say("")
        for line in table(["run", "images", "accuracy"], rows, left=2):
            self.say(line)
        spread = "" if result.deviation is None else f" +- {result.deviation:.2%}"
        runs = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        text = f"{on} accuracy {result.mean:.2%}{spread} ({runs}, rate {result.learning_rate:g})"
        self.report.say(text, style="bold green")
        self.say(f"model    {self.folder / 'best'} (that of seed {self.seeds[0]})")

    def say(self, text: str) -> None:
        self.report.say(text)


def _accuracy(result: TrainResult) -> float:
    shown = result.test or result.validation
    assert shown is not None
    return shown.top1
