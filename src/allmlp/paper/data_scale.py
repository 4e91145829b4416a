"""Figure 2, right: the effect of more training images at a fixed number of steps.

Each combination of model, fraction of the training images and seed is one run,
cells/mixer_b32/0.03/seed-0 and so on, plus a few-shot measurement of its best weights. See `study`
for the other files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allmlp.models.catalog import model_config
from allmlp.options import make
from allmlp.paper.figures import data_scale_figure, save
from allmlp.paper.options import DataScaleOptions
from allmlp.paper.study import Experiment, Study, few_shot_options, open_data, train_config
from allmlp.sweep import Row
from allmlp.training.config import TrainConfig


def data_scale(
    options: DataScaleOptions | None = None, *, quiet: bool = False, **fields: Any
) -> Study:
    """Trains models on growing fractions of the images and measures their features.

    All runs have the same `steps`, so smaller subsets are repeated more often. Validation images
    are held out before subsampling, the same for all runs; the weights with the best validation
    accuracy are measured.
    """
    options = make(DataScaleOptions, options, fields)
    own = ("model.name", "data.fraction", "data.fraction_seed", "epochs", "steps")
    config = train_config(options, own, "any")
    few_shot = few_shot_options(
        config, options.few_shot_data, options.shots, options.few_shot_seeds
    )
    splits, total = open_data(config)
    cells: dict[str, tuple[Row, TrainConfig]] = {}
    for model in options.models:
        for fraction in sorted(set(options.fractions)):
            changes = {"data.fraction": fraction, "model.name": model}  # resets the sizes
            own = config.with_values({**changes, "model.overrides": config.model.overrides})
            images = max(1, round(fraction * total))
            row: Row = {"model": model, "label": _label(model, config), "fraction": fraction}
            epochs = round((config.steps or 0) * config.batch_size / images, 3)
            row |= {"images": images, "epochs": epochs, "steps": config.steps}
            cells[f"{model}/{fraction!r}"] = row, own

    def finish(path: Path, _: Mapping[str, Row], points: list[Row]) -> None:
        label = f"linear {options.shots}-shot top-1 (%)"
        save(data_scale_figure(points, label, options.few_shot_data, options.data), path)

    return Experiment(
        kind="data-scale",
        config=config,
        cells=cells,
        seeds=options.seeds,
        finish=finish,
        columns={
            "model": "{label}",
            "fraction": "{fraction:.4g}",
            "images": "{images:,}",
            "epochs": "{epochs:,.4g}",
            "validation": "{validation:.2%}",
            f"{options.shots}-shot": "{few_shot:.2%}",
            "+-": "{few_shot_deviation:.2%}",
        },
        few_shot=few_shot,
        settings={
            "source": options.data,
            "training_images": total,
            "validation_images": len(splits.validation or ()),
            "few_shot_data": options.few_shot_data,
            "shots": options.shots,
            "few_shot_seeds": list(options.few_shot_seeds),
        },
    ).run(quiet=quiet)


def _label(model: str, config: TrainConfig) -> str:
    """Returns the model's name, plus its sizes if they are not the default."""
    overrides = config.model.overrides
    changed = model_config(model, config.model.image_size, **overrides)
    is_named = not overrides.keys() - {"dropout", "stochastic_depth"}
    return model if is_named else f"{model} changed to {changed.summary()}"
