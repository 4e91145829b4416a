"""Figure 2, right: what more pre-training images bring, at the same number of steps.

For each model, each share of the training images and each seed there is one run and one few-shot
measurement of its best weights. The folder holds
  cells/mixer_b32/0.03/seed-0/    the run of one of them
  data_scale.json                 a measurement: every cell, and the points of the figure
  data_scale.csv                  a line for each cell
  data_scale.png, .svg            accuracy against the number of images
The same call again goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allmlp.console import Reporter, table
from allmlp.data.sources import open_splits
from allmlp.errors import UserError, plural
from allmlp.evaluation.draws import check_settings
from allmlp.evaluation.few_shot import few_shot, num_images
from allmlp.models.catalog import model_config
from allmlp.runtime.world import World, join_world
from allmlp.studies.data_scale_folder import data_scale_file, points, write_cells
from allmlp.studies.figures import data_scale_figure, save_picture
from allmlp.studies.paper import DATA_SCALE
from allmlp.studies.study_file import Cell, check_output, check_random_weights
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import open_training_data
from allmlp.training.loop import train
from allmlp.training.run_folder import no_results, read_results
from allmlp.training.schedule import check_warmup
from allmlp.weights.store import load_model

FRACTIONS = tuple(DATA_SCALE)


@dataclass(frozen=True)
class DataScale:
    """What the runs of a data-scale study reached.

    Attributes:
        folder: where everything lies.
        points: of the figure, each with "model", "fraction", "images", "epochs", "steps", "runs",
            "validation" and "few_shot" (means over the runs), "deviation" and "deviation_of".
    """

    folder: Path
    points: list[dict[str, Any]]


def data_scale(
    config: TrainConfig,
    few_shot_data: str,
    *,
    models: Sequence[str],
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = (0,),
    shots: int = 5,
    few_shot_seeds: Sequence[int] = (0, 1, 2),
    quiet: bool = False,
) -> DataScale:
    """Trains each model on growing shares of the images and measures what their features are worth.

    Every run has `config.steps` steps, so that a smaller share is seen more often. Validation
    images are held out before the share is drawn, the same for all; a smaller share is part of a
    larger one; the weights with the best validation accuracy are measured.

    Args:
        config: of the runs, with `steps` and `output`; its own model and share have no effect.
        few_shot_data: labelled images for the linear few-shot measurement.
        models: names of `list_models()`.
        fractions: shares of the training images, each above 0, at most 1.
        seeds: of the draw, the weights and the order of images; a run for each.
        shots: training images a class of the few-shot measurement.
        few_shot_seeds: of the draws of these.
        quiet: print nothing.

    Raises:
        UserError: as `train`; or the output holds something else. Nothing has been written where it
            is a setting or the data that is wrong.
    """
    check_output(config)
    if config.steps is None:
        what = "every run of the study has the same number of steps, and none is given"
        raise UserError(what, where="--steps", fix="--steps 10000")
    check_random_weights(config)
    lists: dict[str, Sequence[Any]] = {"--models": models, "--fractions": fractions}
    lists |= {"--seeds": seeds, "--few-shot-seeds": few_shot_seeds}
    if config.data.fraction < 1.0:
        what = f"data.fraction={config.data.fraction} has no effect beside the study's own shares"
        raise UserError(what, fix="Leave it out, or name it among --fractions")
    for name, values in lists.items():
        if not values:
            raise UserError("at least one value is needed", where=name)
        if len(set(values)) < len(values):
            listed = " ".join(str(each) for each in values)
            raise UserError(f"each value counts once, got {listed}", where=name)
    measure = check_settings(shots=(shots,), seeds=few_shot_seeds)
    num_images(open_splits(few_shot_data), measure)  # it has what the measurement needs
    settings = {"few_shot_data": few_shot_data, "shots": shots}
    settings["few_shot_seeds"] = list(few_shot_seeds)
    with join_world(config.device) as joint:
        return _Study(config, settings, models, fractions, seeds, joint, quiet).run()


class _Study:
    def __init__(
        self,
        config: TrainConfig,
        settings: dict[str, Any],
        models: Sequence[str],
        fractions: Sequence[float],
        seeds: Sequence[int],
        joint: tuple[World, torch.device],
        quiet: bool,
    ) -> None:
        assert config.steps is not None
        self.config, self.settings, self.quiet = config, settings, quiet
        self.world, self.device = joint
        self.models, self.fractions = list(models), sorted(float(each) for each in fractions)
        self.steps = config.steps
        # All settings and the data are checked before the first run.
        self.cells = {
            f"cells/{model}/{fraction!r}/seed-{seed}": self.of_cell(model, fraction, seed)
            for model in self.models
            for fraction in self.fractions
            for seed in seeds
        }
        first = self.cells[f"cells/{self.models[0]}/{self.fractions[-1]!r}/seed-{seeds[0]}"]
        check_warmup(config.optimizer, self.steps)
        self.labels = {name: self.label(name) for name in self.models}
        splits = open_training_data(first.with_value("data.fraction", 1.0).data)
        if splits.validation is None:
            what = "the best weights are chosen by validation images, and there are none"
            raise UserError(what, where="--holdout", fix="--holdout 0.1, or leave it out")
        self.images = len(splits.train)
        self.path = check_output(config)
        self.file = data_scale_file(self.path, config, settings, list(self.cells))
        self.data = {
            "source": config.data.source,
            "training_images": self.images,
            "validation_images": len(splits.validation),
        }
        self.done: dict[str, Cell] = self.world.broadcast_from_rank0(self.file.done)
        self.report = Reporter(quiet=quiet or not self.world.is_main)

    def of_cell(self, model: str, fraction: float, seed: int) -> TrainConfig:
        """Returns the settings of one run."""
        changes: dict[str, Any] = {"data.fraction": fraction, "seed": seed}
        changes["data.fraction_seed"] = seed if fraction < 1.0 else 0
        overrides = self.config.model.overrides  # another name would take them away
        changes |= {"model.name": model, "model.overrides": overrides}
        return self.config.with_values(changes)

    def label(self, model: str) -> str:
        """Returns the model's name, with its sizes where they are not those of the name.

        Raises:
            UserError: there is no such model, or it cannot have these sizes.
        """
        settings = self.config.model
        changed = model_config(model, settings.image_size, **settings.overrides)
        is_named = not settings.overrides.keys() - {"dropout", "stochastic_depth"}
        return model if is_named else f"{model} changed to {changed.summary()}"

    def num_images(self, fraction: float) -> int:
        """Returns how many training images a share has, as `random_subset` counts them."""
        return max(1, round(fraction * self.images))

    def epochs(self, fraction: float) -> float:
        """Returns how often each of them is seen."""
        return self.steps * self.config.batch_size / self.num_images(fraction)

    def run(self) -> DataScale:
        try:
            self.describe()
            if self.world.is_main:
                self.path.mkdir(parents=True, exist_ok=True)
                self.report.log_to(self.path / "log.txt")
            self.save()
            for number, (name, config) in enumerate(self.cells.items()):
                if name in self.done:
                    self.say(f"done     {name}: {_reached(self.done[name])}")
                    continue
                self.say(f"\n=== {name}: run {number + 1} of {len(self.cells)}")
                self.done[name] = self.measure_cell(name, config)
                self.say(f"reached  {_reached(self.done[name])}")
                self.save()
        except (KeyboardInterrupt, SystemExit):
            self.say("the study goes on with the same command as before")
            raise
        found = self.save()
        if self.world.is_main:
            self.draw(found)
            self.tell(found)
        return DataScale(self.path, found)

    def measure_cell(self, name: str, config: TrainConfig) -> Cell:
        """Trains one cell, or goes on with it, and measures its best weights."""
        path = self.path / name
        result = train(config.with_value("output", str(path)), quiet=self.quiet, in_study=True)
        assert result.validation is not None
        reached = {
            "model": config.model.name,
            "label": self.labels[config.model.name],
            "fraction": config.data.fraction,
            "seed": config.seed,
            "images": self.num_images(config.data.fraction),
            "epochs": round(self.epochs(config.data.fraction), 3),
            "steps": self.steps,
            "validation": result.validation.top1,
        }
        return self.world.broadcast_from_rank0(lambda: {**reached, **self.of_best(path)})

    def of_best(self, run: Path) -> Cell:
        """Returns at which step the best weights were reached, and what their features are worth.

        Raises:
            UserError: the few-shot data is unusable.
        """
        rows = read_results(run)
        best = next((row for row in reversed(rows) if row["best"] == "1"), None)
        if best is None:
            raise no_results(run)
        shots = self.settings["shots"]
        found = few_shot(
            load_model(run),
            self.settings["few_shot_data"],
            shots=(shots,),
            seeds=self.settings["few_shot_seeds"],
            num_workers=self.config.data.num_workers,
            device=str(self.device),
        )
        for note in found.notes:
            self.say(f"note     {note}")
        return {
            "best_step": int(float(best["step"])),
            "few_shot": found.mean(shots),
            "few_shot_deviation": found.deviation(shots),
            "few_shot_accuracies": {str(k): v for k, v in found.accuracies[shots].items()},
            "few_shot_test": [found.test_split, found.num_test, found.num_classes],
            "notes": found.notes,
            "seconds": float(rows[-1]["seconds"]),
        }

    def save(self) -> list[dict[str, Any]]:
        """Writes data_scale.json and data_scale.csv; returns the points."""
        found = points(self.done.values(), self.models, self.fractions)
        if self.world.is_main:
            self.file.save(self.data, self.done, {"points": found})
            write_cells(self.path, [self.done[name] for name in self.cells if name in self.done])
        return found

    def describe(self) -> None:
        """Says what the study will do."""
        seeds = sorted({config.seed for config in self.cells.values()})
        self.say(
            f"study    {plural(len(self.cells), 'run')} of {plural(self.steps, 'step')}, "
            f"{plural(self.config.batch_size, 'image')} each; "
            f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        )
        self.say(
            f"data     {self.config.data.source}: {plural(self.images, 'image')} to train, "
            f"{self.data['validation_images']:,} to validate, the same for every share"
        )
        for fraction in self.fractions:
            images = plural(self.num_images(fraction), "image")
            line = f"         {100 * fraction:.4g} %: {images}, {self.epochs(fraction):,.4g} epochs"
            of_paper = DATA_SCALE.get(fraction)
            self.say(line + (f" (the paper, on JFT-300M: {of_paper})" if of_paper else ""))
        settings = self.settings
        seeds = ", ".join(map(str, settings["few_shot_seeds"]))
        self.say(
            f"measured {settings['shots']}-shot linear accuracy on {settings['few_shot_data']}, "
            f"draws {seeds}, of the weights with the best validation accuracy"
        )

    def draw(self, found: list[dict[str, Any]]) -> None:
        settings = self.settings
        label = f"linear {settings['shots']}-shot top-1 (%)"
        figure = data_scale_figure(
            found, label, settings["few_shot_data"], self.config.data.source, self.steps
        )
        for kind in ("png", "svg"):
            save_picture(figure, self.path / f"data_scale.{kind}")

    def tell(self, found: list[dict[str, Any]]) -> None:
        shots = f"{self.settings['shots']}-shot"
        rows = [
            [
                each["model"],
                f"{100 * each['fraction']:.4g} %",
                f"{each['images']:,}",
                f"{each['epochs']:.4g}",
                f"{each['validation']:.2%}",
                f"{each['few_shot']:.2%}",
                "-" if each["deviation"] is None else f"{each['deviation']:.2%}",
            ]
            for each in found
        ]
        self.say("")
        headers = ["model", "share", "images", "epochs", "validation", shots, "deviation"]
        for name, label in self.labels.items():
            if label != name:
                self.say(label)
        for line in table(headers, rows):
            self.say(line)
        self.say(f"\nfigure   {self.path / 'data_scale.png'}")
        self.say(f"table    {self.path / 'data_scale.csv'}")

    def say(self, text: str) -> None:
        self.report.say(text)


def _reached(cell: Cell) -> str:
    spread = cell["few_shot_deviation"]
    text = f"validation {cell['validation']:.2%}, few-shot {cell['few_shot']:.2%}"
    return text + ("" if spread is None else f" +- {spread:.2%}")
