"""Fine-tuning: a rate chosen on held-out training images, final runs over seeds, mean and spread.

One run is `train` with weights to begin with. A grid or several seeds make a study, whose folder
holds
  grid/lr-0.03/     a run for each rate: trained on a part of the training images, measured on the
                    rest, and never shown a test image
  seed-0/           a run for each seed, at the rate that was best
  finetune.json     what each of them reached
  best/             the model of the first seed: what you ship
The same call again goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from allmlp.console import Reporter, table
from allmlp.data.source_names import parse_name
from allmlp.data.sources import open_splits
from allmlp.data.workers import check_guard
from allmlp.errors import UserError
from allmlp.io import expand
from allmlp.runtime.world import World, join_world
from allmlp.training.config import TrainConfig
from allmlp.training.finetuning_recipes import HOLDOUTS
from allmlp.training.loop import train
from allmlp.training.run_folder import no_results, read_results
from allmlp.training.step import DivergedError
from allmlp.training.study_folder import FinetuneResult, StudyFolder
from allmlp.training.summary import TrainResult


def finetune(
    config: TrainConfig,
    *,
    grid: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    grid_source: str | None = None,
    quiet: bool = False,
) -> FinetuneResult:
    """Fine-tunes with each rate of the grid, then with the best of them for each seed.

    The runs of the grid are trained on a part of the training images and judged by the rest: the
    share is `config.data.holdout`, or that of the recipe in `HOLDOUTS`. The final runs then train
    on all of them, and keep the last weights; but where the data brings validation images, or has
    no test images, they validate and keep the best weights, as any run.

    Args:
        config: with `model.weights` and `output`. Its own rate is taken where there is no grid, and
            its own seed in the grid.
        grid: learning rates to choose from; of equally good ones the lowest is taken.
        seeds: of the final runs.
        grid_source: data with a train and a validation split that the grid's runs take in place of
            a part of the training images and the rest, where a benchmark says which these are.
        quiet: print nothing; the log files are written all the same.

    Raises:
        UserError: as `train`; or the output holds something else. Nothing has been written where it
            is a setting or the data that is wrong.
    """
    check_guard(config.data.num_workers)
    if not config.model.weights:
        what = "fine-tuning begins with trained weights, and none are given"
        raise UserError(what, where="model.weights", fix="mixer finetune CHECKPOINT --data SOURCE")
    if config.output is None:
        what = "a study of several runs needs a folder with a name, so that it can go on"
        raise UserError(what, where="--output", fix="--output runs/NAME")
    for name, values in (("--grid", list(grid)), ("--seeds", list(seeds))):
        if len(set(values)) < len(values):
            listed = " ".join(f"{each:g}" for each in values)
            raise UserError(f"each value counts once, got {listed}", where=name)
    if not seeds:
        raise UserError("the final runs need a seed", where="--seeds", fix="--seeds 0 1 2")
    with join_world(config.device) as (world, _):
        return _Study(config, grid, seeds, world, quiet, grid_source).run()


class _Study:
    def __init__(
        self,
        config: TrainConfig,
        grid: Sequence[float],
        seeds: Sequence[int],
        world: World,
        quiet: bool,
        grid_source: str | None,
    ) -> None:
        assert config.output is not None
        self.config, self.world, self.quiet = config, world, quiet
        self.grid_source = grid_source
        self.splits = open_splits(config.data.source).keys()
        self.measured_on = "test" if "test" in self.splits else "validation"
        self.rates, self.seeds = [float(each) for each in grid], list(seeds)
        # All settings are checked before the first run.
        self.share = config.data.holdout
        if self.share is None:
            self.share = HOLDOUTS.get(config.recipe, 0.1)
        self.check_grid_source()
        self.grid = {f"grid/lr-{rate!r}": self.in_grid(rate) for rate in self.rates}
        self.keeps_last = self.final(self.seeds[0]).data.holdout == 0.0
        for seed in self.seeds:
            self.final(seed)
        self.refuse_what_cannot_be_measured()
        self.report = Reporter(quiet=quiet or not world.is_main)
        path, first = expand(config.output), [*self.grid, f"seed-{self.seeds[0]}"][0]
        self.folder = StudyFolder(path, config, self.rates, self.seeds, grid_source)
        self.done: dict[str, float | None] = world.broadcast_from_rank0(
            lambda: self.folder.done(first)
        )
        if world.is_main and self.done:
            self.report.log_to(path / "log.txt")

    def in_grid(self, rate: float) -> TrainConfig:
        """A run that sees training images alone: a part to learn from, the rest to judge by."""
        source = self.config.data.source
        source = source if parse_name(source).split else f"{source}:train"
        changes: dict[str, Any] = {"data.source": source, "data.holdout": self.share}
        if self.grid_source is not None:
            changes = {"data.source": self.grid_source, "data.holdout": None}
        return self.config.with_values({**changes, "optimizer.learning_rate": rate})

    def final(self, seed: int, rate: float | None = None) -> TrainConfig:
        """A run that is measured on test images; after a grid it trains on all training images."""
        changes: dict[str, Any] = {"seed": seed}
        if rate is not None:
            changes["optimizer.learning_rate"] = rate
        if self.rates and "validation" in self.splits:
            changes["data.holdout"] = None
        elif self.rates and "test" in self.splits:
            changes["data.holdout"] = 0.0
            if self.config.patience is not None:
                what = f"patience={self.config.patience} has no effect in the final runs: after "
                what += "the grid they train on all training images and validate on none"
                raise UserError(what, fix="--set patience=null, or leave --grid out")
        return self.config.with_values(changes)

    def check_grid_source(self) -> None:
        """Refuses data for the grid where there is no grid, or that cannot be judged by."""
        if self.grid_source is None:
            return
        what = f"grid_source={self.grid_source} has no effect "
        if not self.rates:
            raise UserError(f"{what}without a grid", fix="Give learning rates, or leave it out")
        if self.config.data.holdout is not None:
            what = f"data.holdout={self.config.data.holdout} has no effect beside grid_source"
            raise UserError(what, fix="Leave one of them out")
        there = set(open_splits(self.grid_source))
        if there != {"train", "validation"}:
            what = f"the grid needs train and validation images, and has {', '.join(sorted(there))}"
            raise UserError(what, where=self.grid_source)

    def refuse_what_cannot_be_measured(self) -> None:
        if "train" not in self.splits:
            fix = f"Known there: {', '.join(self.splits)}. Give a source that has both"
            raise UserError("the data has no train split", where=self.config.data.source, fix=fix)
        if self.config.data.holdout == 0.0 and (self.rates or "test" not in self.splits):
            what = "holdout 0 leaves no images "
            what += "to choose the rate by" if self.rates else "to measure the accuracy by"
            raise UserError(what, where="--holdout", fix="--holdout 0.1, or leave it out")

    def run(self) -> FinetuneResult:
        try:
            return self.run_cells()
        except (KeyboardInterrupt, SystemExit):
            self.say("the study goes on with the same command as before")
            raise

    def run_cells(self) -> FinetuneResult:
        rate, seeds = self.config.optimizer.learning_rate, self.seeds
        final = self.describe()
        reached: dict[float, float | None] = {}
        for number, each in enumerate(self.rates):
            name = f"grid/lr-{each!r}"
            title = f"rate {each:g}: {number + 1} of {len(self.rates)} in the grid"
            reached[each] = self.cell(name, self.grid[name], title, in_grid=True)
        if reached:
            rate = self.choose(reached)
        accuracies: dict[int, float] = {}
        for number, seed in enumerate(seeds):
            title = f"seed {seed}: final run {number + 1} of {len(seeds)}, {final}"
            accuracy = self.cell(f"seed-{seed}", self.final(seed, rate), title, in_grid=False)
            assert accuracy is not None
            accuracies[seed] = accuracy
        result = FinetuneResult(self.folder.path, reached, rate, self.measured_on, accuracies)
        if self.world.is_main:
            self.folder.keep_first_seed(result)
            self.folder.save(self.done, result)
            self.tell(result)
        return result

    def describe(self) -> str:
        """Says what the study will do; returns what the final runs are trained on."""
        parts = []
        if self.rates:
            rates = ", ".join(f"{each:g}" for each in self.rates)
            by = f"{self.share:.0%} of the training images"
            by = by if self.grid_source is None else "the images that are set apart for it"
            parts.append(f"rates {rates}, judged on {by}")
        parts.append(f"seed{'s' * (len(self.seeds) > 1)} {', '.join(map(str, self.seeds))}")
        self.say(f"study    {'; then '.join(parts)}")
        if "test" not in self.splits:
            self.say("         the data has no test images: the final runs keep validation images,")
            also = self.rates and "validation" not in self.splits
            what = "the rate and the weights" if also else "the weights"
            self.say(f"         and are measured on them, by which {what} are chosen too")
        whole = self.keeps_last or "validation" in self.splits
        return "on all training images" if whole else "on the training images less those held out"

    def cell(self, name: str, config: TrainConfig, title: str, *, in_grid: bool) -> float | None:
        """Runs one training, or takes what it reached before; None: a rate that diverged."""
        if name in self.done:
            accuracy = self.done[name]
            self.say(f"done     {name}: {'diverged' if accuracy is None else f'{accuracy:.2%}'}")
            return accuracy
        self.say(f"\n=== {title}")
        try:
            config = config.with_value("output", str(self.folder.path / name))
            result = train(config, quiet=self.quiet, in_study=True)
            accuracy = self.accuracy_of(result, in_grid)
        except DivergedError as error:
            if not in_grid:
                raise
            self.say(f"diverged {error.what}")
            accuracy = None
        self.done[name] = accuracy
        if self.world.is_main:
            self.report.log_to(self.folder.path / "log.txt")
            self.folder.save(self.done)
        return accuracy

    def accuracy_of(self, result: TrainResult, in_grid: bool) -> float:
        """What a run counts for: where the final runs keep the last weights, so does the grid."""
        if in_grid and self.keeps_last:
            rows = self.world.broadcast_from_rank0(lambda: read_results(result.run_folder))
            if not rows:
                raise no_results(result.run_folder)
            accuracy = float(rows[-1]["validation_top1"])
            self.say(f"reached  {accuracy:.2%} on the held-out images with its last weights")
            return accuracy
        shown = result.test if result.test is not None else result.validation
        assert shown is not None
        return shown.top1

    def choose(self, reached: dict[float, float | None]) -> float:
        """Returns the best rate, of equals the lowest."""
        finite = {rate: accuracy for rate, accuracy in reached.items() if accuracy is not None}
        if not finite:
            rate = min(reached) / 10
            what = "the run of every rate of the grid diverged"
            raise UserError(what, where=self.folder.path, fix=f"Lower rates: --grid {rate:.1g}")
        best = max(finite, key=lambda rate: (finite[rate], -rate))
        self.say(f"\nchosen   rate {best:g}: {finite[best]:.2%} on held-out training images")
        if len(reached) > 1 and best in (min(reached), max(reached)):
            side = "lowest" if best == min(reached) else "highest"
            self.say(f"         it is the {side} of the grid; one beyond it may be better")
        return best

    def tell(self, result: FinetuneResult) -> None:
        rows = [
            [f"rate {rate:g}", "held out", "diverged" if each is None else f"{each:.2%}"]
            for rate, each in result.grid.items()
        ]
        on = result.measured_on
        rows += [[f"seed {seed}", on, f"{each:.2%}"] for seed, each in result.accuracies.items()]
        self.say("")
        for line in table(["run", "images", "accuracy"], rows, left=2):
            self.say(line)
        self.say("")
        text = f"{on} accuracy {result.summary()}, learning rate {result.learning_rate:g}"
        self.report.say(text, style="bold green")
        self.say(f"model    {self.folder.path / 'best'} (of seed {self.seeds[0]})")
        self.say(f"table    {self.folder.results}")

    def say(self, text: str) -> None:
        self.report.say(text)
