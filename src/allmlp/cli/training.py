"""`mixer train` and `mixer finetune`, with flags for the most common settings of `TrainConfig`."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from allmlp.errors import UserError, exclusive, needs
from allmlp.options import assigned, given_settings
from allmlp.training.config import TrainConfig
from allmlp.training.flags import OTHER_SETTINGS, by_last_part, flag, setting_options
from allmlp.training.recipes import LEARNING_RATES
from allmlp.training.recipes import recipe as named_recipe

# Flag -> setting.
_SHARED = {"data": "data.source"} | by_last_part(
    *("output", "model.image_size", "epochs", "steps", "batch_size", "optimizer.learning_rate"),
    *("seed", "data.fraction", "data.holdout", "data.exclude", "data.max_bad", "data.balance"),
    *("best_by", "device", "data.num_workers", "precision", "compile", "sharding", "log"),
)
TRAIN = {**_SHARED, "model": "model.name"}
FINETUNE = _SHARED | by_last_part("model.resize_weights")
_DRY_RUN = """Check settings, data and model, time a few steps, say how long the run would take, and
stop there; nothing is written."""
_EVERY_RUN = (
    ("base", dict[str, Any] | None, dataclasses.field(default=None, metadata={"hidden": True})),
    OTHER_SETTINGS,
    flag("dry_run", bool, False, _DRY_RUN),
)
_FOLDS = """Cross-validate: train this many models, each measured on the fold that it has not seen.
Groups (#group=COLUMN) stay whole; a column `fold` of the data is used."""
_FOLDS_FLAG = flag("folds", int | None, None, _FOLDS, metavar="N")
_RESUME = "The folder of a run to resume; its own settings are used."
TrainOptions = setting_options(
    *("TrainOptions", TRAIN, *_EVERY_RUN, _FOLDS_FLAG),
    flag("resume", str | None, None, _RESUME, metavar="FOLDER"),
)
TrainOptions.__doc__ = """Train a model from random weights; writes a run folder with the best ones.

Examples:
    mixer train
    mixer train --data FOLDER --image-size 64
    mixer train --data FOLDER --model mixer_s16 --epochs 100 --output runs/flowers
    mixer train digits --seed 1 --set optimizer.weight_decay=0.05
    mixer train cifar10 --data 'cifar10_*.parquet' --output runs/cifar10
    mixer train --resume runs/cifar10
    mixer train --data 'list.csv#group=patient' --folds 5 --output runs/folds

A run that was stopped continues with --resume, or with the same command and --output, bit for bit
as if it had never stopped.

FOLDER has train/<class>/*.jpg, with val/ and test/ if you have them, or just <class>/*.jpg. RECIPE
is a name of docs/recipes.md; without it digits, or scratch where --data is given.
"""


def train_command(recipe: str | None, options: Any) -> Any:
    from allmlp.data.sources import are_arrays, names_source  # slow imports not needed by --help
    from allmlp.training.run_folder import config_of
    from allmlp.training.train import train

    exclusive(recipe=recipe, config=options.base, resume=options.resume)
    exclusive(resume=options.resume, output=options.output)
    exclusive(resume=options.resume, folds=options.folds)
    if options.resume is not None:
        config = config_of(options.resume)
        config = config.with_values(given_settings(options, TRAIN), options.settings)
        return train(replace(config, output=options.resume), dry_run=options.dry_run)
    if options.base is not None:
        config = base_of(options)
    else:
        source = options.data
        own = "digits" if source is None or names_source(source) else "scratch"
        own = "arrays" if source is not None and are_arrays(source) else own
        config = named_recipe(recipe or own)
        if options.model and config.model.weights is None:
            config = config.with_value("model.name", "any")  # drops the sizes of the recipe's own
    config = config.with_values(given_settings(options, TRAIN), options.settings)
    return _train_or_fold(config, options)


def base_of(options: Any) -> TrainConfig:
    """Returns the settings of another run; they write to a folder of their own."""
    return replace(TrainConfig.from_json(options.base), output=None)


def _train_or_fold(config: TrainConfig, options: Any, splits: Any = None) -> Any:
    from allmlp.studies import cross_validate
    from allmlp.training.train import train

    if options.folds is None:
        return train(config, dry_run=options.dry_run, splits=splits)
    if options.dry_run:
        return _dry_study(config.with_value("data.fold", (1, options.folds)), options.folds)
    return cross_validate(config, options.folds)


def _dry_study(config: TrainConfig, runs: int) -> dict[str, float]:
    """Prints and returns the time that this number of such runs takes."""
    from allmlp.training.report import duration
    from allmlp.training.train import train

    seconds = train(config, dry_run=True, in_study=True).expected_seconds or 0.0
    print(f"study    {runs} such runs: about {duration(runs * seconds)}")
    return {"expected_seconds": runs * seconds}


_RECIPE = """finetune_imagenet, finetune_cifar, finetune_pets, finetune_flowers or finetune_vtab;
without it batch size, length and warm-up follow from the number of training images."""
_PROBE = """Fit only the head, by logistic regression on frozen features of images without
augmentation: seconds to minutes on a CPU."""
_GRID = "Learning rates to choose from; without values those of the recipe."
FinetuneOptions = setting_options(
    *("FinetuneOptions", FINETUNE, *_EVERY_RUN),
    flag("probe", bool, False, _PROBE),
    flag("recipe", str | None, None, _RECIPE, metavar="TEXT"),
    flag("grid", tuple[float, ...] | None, None, _GRID, metavar="[LR ...]"),
    flag("seeds", tuple[int, ...], (), "Of the final runs (0).", metavar="N ..."),
    _FOLDS_FLAG,
)
FinetuneOptions.__doc__ = """Continue training from a checkpoint on your own images.

Examples:
    mixer finetune mixer_b16.i21k --data FOLDER --output runs/mine
    mixer finetune mixer_b16.i21k --data FOLDER --image-size 448 --steps 200 --batch-size 32
    mixer finetune runs/cifar10 --data FLOWERS --image-size 64 --grid --seeds 0 1 2
    mixer finetune mixer_b16.i21k --data FOLDER --probe --output runs/probe
    mixer finetune runs/probe --data FOLDER --output runs/all

The rows of the head are kept for classes that the checkpoint knows by name; other classes begin
with zeros. With --grid the learning rate is chosen on held-out training images, and the final run,
one for each of --seeds, takes the best; their mean and standard deviation are reported. The same
command with the same --output resumes what was stopped.
"""


def finetune_command(checkpoint: str, options: Any) -> Any:
    from allmlp.studies import finetune
    from allmlp.training.fit import fitted_config

    if options.data is None and options.base is None:
        raise UserError("fine-tuning needs data", where="data", code="missing")
    needs({"resize_weights": options.resize_weights}, "image_size", options.image_size)
    grid, seeds, has_grid = options.grid, options.seeds, options.grid is not None
    exclusive(recipe=options.recipe, config=options.base)
    exclusive(probe=options.probe, grid=has_grid, folds=options.folds)
    exclusive(probe=options.probe, seeds=len(seeds) > 1, folds=options.folds)
    typed = assigned(options.settings)
    rate = options.learning_rate or typed.get("optimizer.learning_rate")
    exclusive(learning_rate=rate, grid=has_grid)
    exclusive(seed=typed.get("seed", options.seed), seeds=seeds)
    given = {"model.train_only": "probe", "epochs": 1} if options.probe else {}
    given |= {**given_settings(options, FINETUNE), "model.weights": checkpoint}
    splits = None
    if options.base is not None:
        config = base_of(options).with_values(given, options.settings)
    else:
        config, splits = fitted_config(given, options.settings, options.recipe, has_grid)
    if seeds:
        config = config.with_value("seed", seeds[0])
    if not has_grid and len(seeds) < 2:
        return _train_or_fold(config, options, splits)
    own = LEARNING_RATES.get(config.recipe, LEARNING_RATES["finetune"])
    rates = (grid or own) if has_grid else ()
    seeds = seeds or (config.seed,)
    if options.dry_run:
        return _dry_study(config, len(rates) + len(seeds))
    return finetune(config, grid=rates, seeds=seeds)
