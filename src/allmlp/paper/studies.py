"""The studies that train from random weights: data scale, shuffled pixels, token-mixing variants.

A study has cells/.../seed-0/ of each run, KIND.json and, if there is a figure, KIND.png and .svg;
see docs/studies.md and docs/ablations.md.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allmlp.benchmark import benchmark
from allmlp.console import table_of
from allmlp.data.image import decode
from allmlp.data.source import Source
from allmlp.data.sources import open_splits
from allmlp.data.transforms import permute, resize_for_evaluation
from allmlp.errors import UserError, one_of, plural
from allmlp.evaluation.few_shot import FewShotOptions, few_shots, num_images
from allmlp.evaluation.result_file import measurement, save_result
from allmlp.io import expand
from allmlp.models.catalog import create_model, model_config
from allmlp.models.mixer import MixerConfig
from allmlp.options import assigned, assignments, given_settings, make
from allmlp.paper.figures import data_scale_figure, permutation_figure, save
from allmlp.paper.options import (
    STUDY,
    AblationsOptions,
    DataScaleOptions,
    PermutationOptions,
    StudyOptions,
)
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.world import join_world
from allmlp.sweep import Row, Sweep, hash_of_data, mean_and_deviation, study_folder
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import Splits, open_training_data, splits_with_train
from allmlp.training.optim import check_warmup
from allmlp.training.recipes import for_data, recipe
from allmlp.training.report import TrainResult


@dataclass(frozen=True)
class Study:
    """Results of a study: one row per group of runs that differ only in their seeds."""

    folder: Path
    rows: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Defines a study: its runs, and what is done with the results."""

    kind: str  # of the measurement, e.g. "data-scale"; the files are named after it
    config: TrainConfig  # shared by all runs
    images: Source  # for training; settings depend on their kind
    cells: Mapping[str, tuple[Row, TrainConfig]]  # folder -> columns of its row, its settings
    seeds: tuple[int, ...]  # one run of each cell for each
    # Draws the figure PATH.png and may add columns: (PATH, rows of the runs by name, of the cells).
    finish: Callable[[Path, Mapping[str, Row], list[Row]], None]
    columns: Mapping[str, str]  # title -> format string, for the printed table
    few_shot: FewShotOptions | None = None  # measures the features of each run's best weights
    settings: Mapping[str, Any] = field(default_factory=dict)  # whatever else is to be recorded

    def run(self, *, quiet: bool) -> Study:
        """Trains the missing runs; writes and prints the results of all of them."""
        runs: dict[str, TrainConfig] = {}
        for cell, (_, own) in self.cells.items():
            own = for_data(own, self.images)
            if own.steps is not None and own.model.train_only != "probe":
                check_warmup(own.optimizer, own.steps)
            for seed in self.seeds:
                subset = {"data.fraction_seed": seed} if own.data.fraction < 1.0 else {}
                runs[f"cells/{cell}/seed-{seed}"] = own.with_values({"seed": seed, **subset})
        name = self.kind.replace("-", "_")
        names = ("cells", *(f"{name}.{suffix}" for suffix in ("json", "csv", "png", "svg")))
        few_shot_data = self.few_shot.data if self.few_shot else ()
        folder = study_folder(self.config.output, names, [self.config.data.source, *few_shot_data])

        def measure(result: TrainResult) -> Row:
            assert result.validation is not None
            row: Row = {"validation": result.validation.top1}
            if self.few_shot is not None:
                (found,) = few_shots(str(result.run_folder), self.few_shot)
                (shots,) = self.few_shot.shots
                row |= {"few_shot": found.mean(shots), "few_shot_deviation": found.deviation(shots)}
                row |= {"notes": found.notes, "few_shot_by": by}
            return row

        def rows_of(done: Mapping[str, Row]) -> list[Row]:
            """Returns a row for each cell of which a run is finished."""
            rows = []
            for cell, (own, _) in self.cells.items():
                found = [
                    row for name, row in done.items() if name.startswith(f"cells/{cell}/seed-")
                ]
                if found:
                    rows.append(own | _reached(found) | own)
            return rows

        def save(done: Mapping[str, Row], rows: list[Row]) -> None:
            missing = [name for name in runs if name not in done]
            values = {
                "settings": dict(self.settings),
                "rows": rows,
                "partial": bool(missing),
                "missing": missing,
                "cells": dict(done),
                "config": self.config.to_json(),
            }
            save_result(folder / f"{name}.json", measurement(self.kind, None, values))

        with join_world(self.config.device) as (world, _):
            sweep = Sweep(folder, world, quiet=quiet)
            # What the few-shot accuracies depend on beside the runs.
            hashes = world.broadcast_from_rank0(
                lambda: [hash_of_data(source, None) for source in few_shot_data]
            )
            by = [*hashes, *self.few_shot.shots, *self.few_shot.seeds] if self.few_shot else None
            for key in map(sweep.key, runs.values()):
                if key in sweep.rows and sweep.rows[key].get("few_shot_by") != by:
                    del sweep.rows[key]  # is measured again, not trained again
            done = sweep.run_all(runs, measure, lambda done: save(done, rows_of(done)))
            rows = rows_of(done)
            if world.is_main:
                self.finish(folder / name, done, rows)
                save(done, rows)
                over = f"{rows[0]['measured_on']} top-1, {plural(len(self.seeds), 'seed')}"
                for line in ["", *formatted(self.columns, rows), over]:
                    sweep.say(line)
                sweep.say(f"written  {folder / name}.json")
            return Study(folder, rows)


def _reached(runs: list[Row]) -> Row:
    """Aggregates runs that differ only in their seeds."""
    accuracy, deviation = mean_and_deviation([row["accuracy"] for row in runs])
    found = {
        "runs": len(runs),
        "measured_on": runs[0]["measured_on"],
        "images": runs[0]["images"],
        "accuracy": accuracy,
        "deviation": deviation,
        "validation": statistics.fmean(row["validation"] for row in runs),
        "seconds": sum(row["seconds"] or 0.0 for row in runs),
    }
    if "few_shot" in runs[0]:
        mean, deviation = mean_and_deviation([row["few_shot"] for row in runs])
        if len(runs) == 1:  # then over the draws of the shots
            deviation = runs[0]["few_shot_deviation"]
        found |= {"few_shot": mean, "few_shot_deviation": deviation}
    return found


def formatted(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns a table's lines; `columns` maps titles to format strings. None becomes a dash."""

    def shown(text: str, row: Mapping[str, Any]) -> str:
        try:
            return text.format(**row)
        except TypeError:
            return "-"

    return table_of({title: shown(text, row) for title, text in columns.items()} for row in rows)


def train_config(
    options: StudyOptions, own: Collection[str], model: str | None = None
) -> TrainConfig:
    """Returns the settings shared by all runs of a study."""
    for name in assigned(options.settings):
        if name in {*own, "seed", "output", "model.weights"}:
            raise UserError(f"{name} is chosen by the study", where="set", fix="Leave it out")
    config = recipe(options.recipe)
    if config.model.weights is not None:
        what = f"{options.recipe} begins with trained weights; the study trains from random ones"
        raise UserError(what, where="recipe", fix="for example scratch, cifar10 or jft_b32")
    if model is not None:  # first: it resets the sizes of the recipe's model
        config = config.with_value("model.name", "any").with_value("model.name", model)
    values = given_settings(options, {"output": "output", **STUDY})
    return config.with_values(values, options.settings)


def open_data(config: TrainConfig) -> Splits:
    """Returns a study's images, which must include validation."""
    splits = open_training_data(config.data)
    if splits.validation is None:
        what = "the best weights are chosen by validation images, and the data has none"
        raise UserError(what, where="holdout", fix="holdout: 0.1, or leave it out")
    return splits


def few_shot_options(
    config: TrainConfig, data: str, shots: int, seeds: tuple[int, ...] = (0, 1, 2)
) -> FewShotOptions:
    """Returns options for measuring each run's weights on other data, which is checked here."""
    found = FewShotOptions(
        data=(data,),
        shots=(shots,),
        seeds=seeds,
        device=config.device,
        num_workers=config.data.num_workers,
    )
    num_images(open_splits(data), found)
    return found


def folder_of(model: str, config: TrainConfig) -> str:
    """Returns the name of a model's folder; one with a colon only if an older version made it."""
    is_older = ":" in model and (expand(config.output or "") / "cells" / model).is_dir()
    return model if is_older else model.replace(":", "-").replace("/", "-")


# Figure 2, right: the effect of more training images


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
    data, seeds = options.few_shot_data, options.few_shot_seeds
    few_shot = few_shot_options(config, data, options.shots, seeds)
    splits = open_data(config)
    total, overrides = len(splits.train), config.model.overrides
    cells: dict[str, tuple[Row, TrainConfig]] = {}
    for model in options.models:
        changed = model_config(model, config.model.image_size, **overrides).summary()
        is_named = not overrides.keys() - {"dropout", "stochastic_depth"}
        label = model if is_named else f"{model} changed to {changed}"
        for fraction in sorted(set(options.fractions)):
            changes = {"data.fraction": fraction, "model.name": model}  # resets the sizes
            own = config.with_values({**changes, "model.overrides": overrides})
            images = max(1, round(fraction * total))
            epochs = round((config.steps or 0) * config.batch_size / images, 3)
            row: Row = {"model": model, "label": label, "fraction": fraction}
            row |= {"images": images, "epochs": epochs, "steps": config.steps}
            cells[f"{folder_of(model, config)}/{fraction!r}"] = row, own

    def finish(path: Path, _: Mapping[str, Row], points: list[Row]) -> None:
        label = f"linear {options.shots}-shot top-1 (%)"
        save(data_scale_figure(points, label, options.few_shot_data, options.data), path)

    return Experiment(
        kind="data-scale",
        config=config,
        images=splits.train,
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


# Figure 4: how much a network depends on the order of the pixels


def permutation(
    options: PermutationOptions | None = None, *, quiet: bool = False, **fields: Any
) -> Study:
    """Trains two networks on the original images and on two permutations of them."""
    options = make(PermutationOptions, options, fields)
    own = [f"data.{name}" for name in ("permutation", "permutation_patch", "permutation_seed")]
    config = train_config(options, [*own, "model.name"], options.model)
    networks = {config.model.name: config.model.overrides}
    if options.comparison == config.model.name:
        what = f"{options.comparison} is the model itself"
        raise UserError(what, where="comparison", fix="comparison: small_resnet")
    if options.comparison != "none":
        networks[options.comparison] = assignments(options.comparison_set, "comparison_set")
    size = config.model.image_size
    sizes = [model_config(name, size, 2, **overrides) for name, overrides in networks.items()]
    patch = options.patch_size or getattr(sizes[0], "patch_size", None)
    if patch is None:
        what = f"{config.model.name} has no patches of its own"
        raise UserError(what, where="patch_size", fix="patch_size: 16")
    seed = options.permutation_seed
    orders: dict[str, dict[str, Any]] = {
        "none": {"permutation": "none"},
        "patches": {"permutation": "patches", "permutation_patch": patch, "permutation_seed": seed},
        "pixels": {"permutation": "pixels", "permutation_seed": seed},
    }
    cells: dict[str, tuple[Row, TrainConfig]] = {}
    for model, overrides in networks.items():
        for kind, order in orders.items():
            changes = {f"data.{name}": value for name, value in order.items()}
            changes |= {"model.name": model, "model.overrides": overrides}
            row: Row = {"model": model, "permutation": kind}
            cells[f"{folder_of(model, config)}/{kind}"] = row, config.with_values(changes)
    splits = open_data(config)
    shown = splits.test or splits.validation
    assert shown is not None
    examples = _examples(config, [*orders.values()], shown)
    few_shot = None
    columns = {"model": "{model}", "permuted": "{permutation}", "top-1": "{accuracy:.2%}"}
    columns |= {"+-": "{deviation:.2%}", "drop": "{drop:.1%}"}
    if options.few_shot_data is not None:
        few_shot = few_shot_options(config, options.few_shot_data, options.shots)
        columns[f"{options.shots}-shot"] = "{few_shot:.2%}"

    def finish(path: Path, done: Mapping[str, Row], rows: list[Row]) -> None:
        plain = {row["model"]: row["accuracy"] for row in rows if row["permutation"] == "none"}
        for row in rows:
            accuracy = plain[row["model"]]
            row["drop"] = 1 - row["accuracy"] / accuracy if accuracy else None
        save(permutation_figure(done, rows, examples, options.data), path)

    return Experiment(
        kind="permutation",
        config=config,
        images=splits.train,
        cells=cells,
        seeds=options.seeds,
        finish=finish,
        columns=columns,
        few_shot=few_shot,
        settings={
            "comparison": options.comparison,
            "patch_size": patch,
            "permutation_seed": options.permutation_seed,
            "few_shot_data": options.few_shot_data,
            "shots": options.shots if options.few_shot_data else None,
        },
    ).run(quiet=quiet)


def _examples(
    config: TrainConfig, orders: list[dict[str, Any]], source: Source
) -> list[list[np.ndarray]]:
    """Returns three images in these orders, uint8 (H, W, channels)."""
    side = config.model.image_size
    size = (side, side) if isinstance(side, int) else side
    assert size is not None
    try:
        given: Any = {"image_size": size, "resize": config.data.resize}
        rules = [Preprocessing(**given, **order) for order in orders]
    except ValueError as error:
        raise UserError(str(error), where="patch_size") from error
    found: list[list[np.ndarray]] = []
    for index in range(len(source)):
        with contextlib.suppress(UserError):  # bad images are reported by the runs
            pixels = decode(source.read(index), source.item_name(index))
            resized = np.array(resize_for_evaluation(pixels, rules[0]))
            image = torch.from_numpy(resized).movedim(2, 0)[None]
            found.append([permute(image, rule)[0].movedim(0, 2).numpy() for rule in rules])
        if len(found) == 3:
            break
    return found


# Appendix A.1: the token-mixing variants of a Mixer


def variants_of(config: MixerConfig) -> dict[str, dict[str, Any]]:
    """Returns the variants of appendix A.1 available for a Mixer: name -> its settings.

    Groups must divide the channels; the pyramid reduces the tokens to a quarter half-way.
    """
    found: dict[str, dict[str, Any]] = {"shared": {}, "untied": {"token_mixing": "untied"}}
    for kind in ("grouped", "views"):
        for groups in (2, 4):
            if config.hidden_dim % groups == 0:
                settings = {"token_mixing": kind, "token_groups": groups}
                found[f"{kind}-{groups}"] = settings
    fewer = config.num_tokens // 4
    if fewer >= 1 and config.num_blocks >= 2:
        found["pyramid"] = {"pyramid": ((config.num_blocks // 2, fewer),)}
    return found


def ablations(
    options: AblationsOptions | None = None, *, quiet: bool = False, **fields: Any
) -> Study:
    """Trains the variants of a Mixer under one budget and measures their cost."""
    options = make(AblationsOptions, options, fields)
    config = train_config(options, ["model.name"], options.model)
    images = splits_with_train(config.data.source)["train"]
    config = for_data(config, images)
    base = model_config(config.model.name, config.model.image_size, 2, **config.model.overrides)
    if not isinstance(base, MixerConfig) or not base.is_plain:
        what = f"the variants are those of a plain Mixer, and the model is {base.summary()}"
        raise UserError(what, where="model", fix="model: mixer_s16")
    known = variants_of(base)
    for name in options.variants:
        one_of("variant", name, known)
    overrides = {
        name: {**config.model.overrides, **known[name]} for name in options.variants or known
    }

    def finish(_: Path, done: Mapping[str, Row], rows: list[Row]) -> None:
        classes, given = next(iter(done.values()))["classes"], config.model
        models = {
            name: create_model(given.name, given.image_size, classes, **own).eval()
            for name, own in overrides.items()
        }
        device, seconds = config.device, options.seconds
        measured = benchmark(models, device=device, batch_sizes=(64,), seconds=seconds)
        for row, speed in zip(rows, measured.models, strict=True):
            row |= {"parameters": models[speed.name].num_parameters, "flops": speed.flops}
            rate = None if speed.best is None else speed.best.images_per_second
            row |= {"images_per_second": rate, "precision": speed.precision}

    return Experiment(
        kind="ablations",
        config=config,
        images=images,
        cells={
            name: ({"variant": name}, config.with_values({"model.overrides": own}))
            for name, own in overrides.items()
        },
        seeds=options.seeds,
        finish=finish,
        columns={
            "variant": "{variant}",
            "top-1": "{accuracy:.2%}",
            "+-": "{deviation:.2%}",
            "parameters": "{parameters:,}",
            "FLOPs": "{flops:,}",
            "images/s": "{images_per_second:,.0f}",
        },
    ).run(quiet=quiet)
