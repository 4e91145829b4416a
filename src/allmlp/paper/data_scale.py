"""Figure 2, right: what more training images bring, at the same number of steps.

For each model, each fraction of the training images and each seed there is one run and one few-shot
measurement of its best weights. The folder holds
  cells/mixer_b32/0.03/seed-0/    the run of one of them
  data_scale.json                 a measurement: every run, and the points of the figure
  data_scale.csv                  a line for each run
  data_scale.png, .svg            accuracy against the number of images
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from allmlp.console import table
from allmlp.data.sources import open_splits
from allmlp.errors import UserError, plural
from allmlp.evaluation.few_shot import FewShotOptions, few_shot, num_images
from allmlp.models.catalog import model_config
from allmlp.options import make
from allmlp.paper.figures import data_scale_figure, save
from allmlp.paper.published import DATA_SCALE
from allmlp.paper.study import Study, StudyOptions, train_config, write_csv, write_study
from allmlp.runtime.world import join_world
from allmlp.sweep import Row, Sweep, study_folder
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import open_training_data
from allmlp.training.report import TrainResult
from allmlp.training.run_folder import no_results, read_results
from allmlp.weights.load import load_model

_NOT_IN_CSV = {"label", "few_shot_accuracies", "few_shot_test", "notes", "curve", "key", "name"}


@dataclass(frozen=True, kw_only=True)
class DataScaleOptions(StudyOptions):
    """Train models on growing fractions of the images, equally long, and compare their features.

    Examples of use:
        mixer paper data-scale --data A --few-shot-data B --models mixer_s16 --steps 9000 --output C

    The paper's figure 2, right. Each model is trained on 3, 10, 30 and 100 % of the images for the
    same number of steps; a smaller subset is part of a larger one. Of each run the weights with the
    best accuracy on held-out images, the same for all, are measured by linear few-shot accuracy on
    other data. The same command resumes an interrupted study; models, fractions and seeds may be
    added.
    """

    few_shot_data: str = field(metadata={"metavar": "SOURCE"})
    """Images to measure on, with some to train and others to test."""
    models: tuple[str, ...] = field(metadata={"metavar": "NAME ..."})
    """Names of `mixer models`."""
    fractions: tuple[float, ...] = field(default=tuple(DATA_SCALE), metadata={"metavar": "X ..."})
    """Of the training images."""
    shots: int = 5
    """Images per class of the few-shot measurement."""
    few_shot_seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"metavar": "N ..."})
    """Of the draws of these."""
    recipe: str = "scratch"
    """All other settings, but not the sizes of its model; a name of docs/recipes.md."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is None:
            what = "every run of the study has the same number of steps, and none is given"
            raise UserError(what, where="steps", fix="steps: 10000", code="missing")
        if not self.models or not self.fractions:
            raise UserError("the study needs a model and a fraction", where="models, fractions")


def data_scale(
    options: DataScaleOptions | None = None, *, quiet: bool = False, **fields: Any
) -> Study:
    """Trains models on growing fractions of the images and measures their features.

    Every run has `steps` steps, so that a smaller subset is seen more often. Validation images are
    held out before the subset is drawn, the same for all; the weights with the best validation
    accuracy are measured.

    Args:
        options, fields: see `DataScaleOptions`.
        quiet: print nothing.

    Returns:
        the points of the figure, each with "model", "fraction", "images", "epochs", "steps",
        "runs", "validation" and "few_shot" (means over the runs), "deviation", "deviation_of".
    """
    options = make(DataScaleOptions, options, fields)
    own = ("model.name", "data.fraction", "data.fraction_seed", "epochs", "steps")
    config = train_config(options, own, "any")
    fractions = sorted(set(options.fractions))
    runs: dict[str, TrainConfig] = {}
    for model in options.models:
        for fraction in fractions:
            for seed in options.seeds:
                changes: dict[str, Any] = {"data.fraction": fraction, "seed": seed}
                changes["data.fraction_seed"] = seed if fraction < 1.0 else 0
                changes["model.name"] = model  # which would take the sizes of all models away
                changes["model.overrides"] = config.model.overrides
                runs[f"cells/{model}/{fraction!r}/seed-{seed}"] = config.with_values(changes)
    labels = {model: _label(model, config) for model in options.models}
    measured = FewShotOptions(
        data=(options.few_shot_data,), shots=(options.shots,), seeds=options.few_shot_seeds
    )
    num_images(open_splits(options.few_shot_data), measured)  # it has what the measurement needs
    splits = open_training_data(config.data)
    if splits.validation is None:
        what = "the best weights are chosen by validation images, and there are none"
        raise UserError(what, where="holdout", fix="holdout: 0.1, or leave it out")
    written = ("cells", *(f"data_scale.{kind}" for kind in ("json", "csv", "png", "svg")))
    path = study_folder(options.output, written, [options.data, options.few_shot_data])
    data = {
        "source": options.data,
        "training_images": len(splits.train),
        "validation_images": len(splits.validation),
    }
    settings = {
        "few_shot_data": options.few_shot_data,
        "shots": options.shots,
        "few_shot_seeds": list(options.few_shot_seeds),
    }
    with join_world(config.device) as (world, device):
        sweep = Sweep(path, world, quiet=quiet)

        def measure(config: TrainConfig, result: TrainResult) -> Row:
            assert config.steps is not None
            images = max(1, round(config.data.fraction * len(splits.train)))
            return {
                "label": labels[config.model.name],
                "fraction": config.data.fraction,
                "images": images,
                "epochs": round(config.steps * config.batch_size / images, 3),
                "steps": config.steps,
                **_best_weights(result, options, config, str(device), sweep),
            }

        def save_rows(done: Mapping[str, Row]) -> None:
            found = points(done.values(), options.models, fractions)
            file = path / "data_scale.json"
            write_study(file, config, settings, runs, done, data=data, points=found)
            write_csv(path / "data_scale.csv", list(done.values()), _NOT_IN_CSV)

        for fraction in fractions:
            images = max(1, round(fraction * len(splits.train)))
            epochs = (options.steps or 0) * config.batch_size / images
            of_paper = f" (the paper: {DATA_SCALE[fraction]})" if fraction in DATA_SCALE else ""
            text = f"{plural(images, 'image')}, {epochs:,.4g} epochs{of_paper}"
            sweep.say(f"subset   {100 * fraction:.4g} %: {text}")
        done = sweep.run_all(runs, measure, save_rows)
        found = points(done.values(), options.models, fractions)
        if world.is_main:
            label = f"linear {options.shots}-shot top-1 (%)"
            figure = data_scale_figure(found, label, options.few_shot_data, options.data)
            save(figure, path / "data_scale")
            _report(sweep, found, labels, options.shots)
        return Study(path, found)


def _label(model: str, config: TrainConfig) -> str:
    """Returns the model's name, with its sizes if they are not those of the name."""
    settings = config.model
    changed = model_config(model, settings.image_size, **settings.overrides)
    is_named = not settings.overrides.keys() - {"dropout", "stochastic_depth"}
    return model if is_named else f"{model} changed to {changed.summary()}"


def _best_weights(
    result: TrainResult, options: DataScaleOptions, config: TrainConfig, device: str, sweep: Sweep
) -> Row:
    """Returns at which step the best weights were reached, and the accuracy of their features."""
    assert result.validation is not None
    rows = [row for row in read_results(result.run_folder) if row["best"] == "1"]
    if not rows:
        raise no_results(result.run_folder)
    found = few_shot(
        load_model(result.run_folder),
        options.few_shot_data,
        shots=(options.shots,),
        seeds=options.few_shot_seeds,
        num_workers=config.data.num_workers,
        device=device,
    )
    for note in found.notes:
        sweep.say(f"note     {note}")
    return {
        "validation": result.validation.top1,
        "best_step": int(float(rows[-1]["step"])),
        "few_shot": found.mean(options.shots),
        "few_shot_deviation": found.deviation(options.shots),
        "few_shot_accuracies": {str(k): v for k, v in found.accuracies[options.shots].items()},
        "few_shot_test": [found.test_split, found.num_test, found.num_classes],
        "notes": found.notes,
    }


def points(
    rows: Iterable[Row], models: Sequence[str], fractions: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns a point of the figure for each model and fraction that has a finished run."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["fraction"]), []).append(row)
    order = [(model, fraction) for model in models for fraction in fractions]
    return [_point(groups[place]) for place in order if place in groups]


def _point(runs: list[Row]) -> dict[str, Any]:
    kept = ("model", "label", "fraction", "images", "epochs", "steps")
    means = [row["few_shot"] for row in runs]
    deviation, of = runs[0]["few_shot_deviation"], "draws of the shots, one run"
    if len(runs) > 1:
        deviation, of = statistics.stdev(means), f"{len(runs)} runs"
    return {
        **{key: runs[0][key] for key in kept},
        "runs": len(runs),
        "validation": statistics.fmean(row["validation"] for row in runs),
        "few_shot": statistics.fmean(means),
        "deviation": deviation,
        "deviation_of": None if deviation is None else of,
        "seconds": sum(row["seconds"] for row in runs),
    }


def _report(
    sweep: Sweep, found: list[dict[str, Any]], labels: Mapping[str, str], shots: int
) -> None:
    rows = [
        [
            point["model"],
            f"{100 * point['fraction']:.4g} %",
            f"{point['images']:,}",
            f"{point['epochs']:.4g}",
            f"{point['validation']:.2%}",
            f"{point['few_shot']:.2%}",
            "-" if point["deviation"] is None else f"{point['deviation']:.2%}",
        ]
        for point in found
    ]
    headers = ["model", "fraction", "images", "epochs", "validation", f"{shots}-shot", "deviation"]
    changed = [label for name, label in labels.items() if label != name]
    for line in ["", *changed, *table(headers, rows)]:
        sweep.say(line)
    sweep.say(f"\nfigure   {sweep.path / 'data_scale.png'}")
    sweep.say(f"table    {sweep.path / 'data_scale.csv'}")
