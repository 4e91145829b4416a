"""`mixer train` and `mixer finetune`, with flags for the most common settings.

A flag sets a field of `TrainConfig` and takes its type and help from it; `--set` sets all others.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any, get_type_hints

from allmlp.errors import UserError, needs
from allmlp.options import Options, Repeated, documentation
from allmlp.training.config import AdamW, DataSettings, ModelSettings, TrainConfig
from allmlp.training.recipes import LEARNING_RATES
from allmlp.training.recipes import recipe as named_recipe

# Flag -> setting.
_SHARED = {
    "data": "data.source",
    "output": "output",
    "image_size": "model.image_size",
    "epochs": "epochs",
    "steps": "steps",
    "batch_size": "batch_size",
    "learning_rate": "optimizer.learning_rate",
    "holdout": "data.holdout",
    "balance": "data.balance",
    "best_by": "best_by",
    "device": "device",
    "num_workers": "data.num_workers",
    "precision": "precision",
    "compile": "compile",
    "sharding": "sharding",
    "log": "log",
}
TRAIN = {
    **_SHARED,
    "model": "model.name",
    "fraction": "data.fraction",
    "exclude": "data.exclude",
    "max_bad": "data.max_bad",
    "seed": "seed",
}
FINETUNE = {**_SHARED, "resize_weights": "model.resize_weights"}
_SECTIONS = {"": TrainConfig, "model": ModelSettings, "data": DataSettings, "optimizer": AdamW}


def _flag(name: str, hint: Any, default: Any, doc: str, **metadata: str) -> tuple[str, Any, Any]:
    return name, hint, dataclasses.field(default=default, metadata={"doc": doc, **metadata})


_DRY_RUN = """Check settings, data and model, time a few steps, say how long the run would take, and
stop there; nothing is written."""


def _options(name: str, settings: dict[str, str], *more: tuple[str, Any, Any]) -> Any:
    """Returns a dataclass with a field per flag, None by default."""
    fields = []
    for flag, key in settings.items():
        section, _, field = key.rpartition(".")
        kind = _SECTIONS[section]
        hint = get_type_hints(kind)[field] | None
        fields.append(_flag(flag, hint, None, documentation(kind)[field]))
    base = dataclasses.field(default=None, metadata={"hidden": True})  # config.json of a run
    fields.append(("base", dict[str, Any] | None, base))
    doc = "Any other setting, as config.json of a run names it; may be given many times."
    fields.append(_flag("settings", Repeated, (), doc, flag="set", metavar="KEY=VALUE"))
    fields.append(_flag("dry_run", bool, False, _DRY_RUN))
    fields += more
    return dataclasses.make_dataclass(name, fields, bases=(Options,), kw_only=True, frozen=True)


_FOLDS = """Cross-validate: train this many models, each measured on the fold that it has not seen.
Groups (#group=COLUMN) stay whole; a column `fold` of the data is used."""
_FOLDS_FLAG = _flag("folds", int | None, None, _FOLDS, metavar="N")
_RESUME = "The folder of a run to resume; its own settings are used."
TrainOptions = _options(
    *("TrainOptions", TRAIN, _FOLDS_FLAG),
    _flag("resume", str | None, None, _RESUME, metavar="FOLDER"),
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
    """Runs `mixer train`."""
    from allmlp.data.sources import are_arrays, names_source  # slow imports not needed by --help
    from allmlp.training.run_folder import check_same, config_of
    from allmlp.training.train import train

    if options.resume is None:
        if options.base is not None:
            if recipe is not None:
                raise UserError(f"config and the recipe {recipe} exclude each other")
            return _train_or_fold(changed(base_of(options), TRAIN, options), options)
        source = options.data
        own = "digits" if source is None or names_source(source) else "scratch"
        name = recipe or ("arrays" if source is not None and are_arrays(source) else own)
        return _train_or_fold(changed(named_recipe(name), TRAIN, options), options)
    if options.base is not None:
        raise UserError("config and resume exclude each other", fix="Leave out one of them")
    if options.folds is not None:
        what = "resume continues one run, and folds makes a study"
        raise UserError(what, where="folds", fix="Repeat the command with the same output")
    if options.output is not None or recipe is not None:
        given = "output" if options.output is not None else f"the recipe {recipe}"
        raise UserError(f"resume continues a run unchanged; {given} cannot be given as well")
    old = config_of(options.resume)
    config = changed(old, TRAIN, options)
    check_same(old, config)
    return train(replace(config, output=options.resume), dry_run=options.dry_run)


def base_of(options: Any) -> TrainConfig:
    """Returns the settings of another run; they write to a folder of their own."""
    return replace(TrainConfig.from_json(options.base), output=None)


def given_settings(settings: dict[str, str], options: Any) -> dict[str, Any]:
    """Returns the settings that flags change."""
    given = {key: getattr(options, flag) for flag, key in settings.items()}
    return {key: value for key, value in given.items() if value is not None}


def _train_or_fold(config: TrainConfig, options: Any) -> Any:
    from allmlp.cross_validation import cross_validate
    from allmlp.training.report import duration
    from allmlp.training.train import train

    folds = options.folds
    if folds is None:
        return train(config, dry_run=options.dry_run)
    if options.dry_run:
        one = config.with_value("data.fold", (1, folds))
        seconds = train(one, dry_run=True, in_study=True).expected_seconds or 0.0
        print(f"study    {folds} such runs: about {duration(folds * seconds)}")
        return {"expected_seconds": folds * seconds}
    return cross_validate(config, folds)


def changed(config: TrainConfig, settings: dict[str, str], options: Any) -> TrainConfig:
    """Returns the config updated by the flags and by every --set."""
    return config.with_values(given_settings(settings, options), options.settings)


_RECIPE = """finetune_imagenet, finetune_cifar, finetune_pets, finetune_flowers or finetune_vtab;
without it batch size, length and warm-up follow from the number of training images."""
_PROBE = """Fit only the head, by logistic regression on frozen features of images without
augmentation: seconds to minutes on a CPU."""
_GRID = "Learning rates to choose from; without values those of the recipe."
FinetuneOptions = _options(
    "FinetuneOptions",
    FINETUNE,
    _flag("probe", bool, False, _PROBE),
    _flag("recipe", str | None, None, _RECIPE, metavar="TEXT"),
    _flag("grid", tuple[float, ...] | None, None, _GRID, metavar="[LR ...]"),
    _flag("seeds", tuple[int, ...], (), "Of the final runs (0).", metavar="N ..."),
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
    """Runs `mixer finetune`."""
    from allmlp.finetuning import finetune
    from allmlp.training.fit import finetune_config
    from allmlp.training.report import duration
    from allmlp.training.train import train

    if options.data is None and options.base is None:
        raise UserError("fine-tuning needs data", where="data", code="missing")
    needs({"resize_weights": options.resize_weights}, "image_size", options.image_size)
    grid, seeds = options.grid, options.seeds
    if options.probe and (grid is not None or len(seeds) > 1):
        what = "a probe has no learning rate to choose and draws no random numbers"
        raise UserError(what, where="probe", fix="Leave out grid and seeds")
    typed = {text.partition("=")[0].strip() for text in options.settings}
    typed |= {"optimizer.learning_rate"} if options.learning_rate is not None else set()
    for given, key in ((grid is not None, "optimizer.learning_rate"), (seeds, "seed")):
        if given and key in typed:
            pair = "seed and seeds" if key == "seed" else "learning_rate and grid"
            raise UserError(f"{pair} exclude each other", fix="Leave one of them out")
    given = {"model.train_only": "probe", "epochs": 1} if options.probe else {}
    given |= given_settings(FINETUNE, options)
    if options.base is not None:
        if options.recipe is not None:
            raise UserError(f"config and the recipe {options.recipe} exclude each other")
        given["model.weights"] = checkpoint
        config = base_of(options).with_values(given, options.settings)
    else:
        config = finetune_config(
            *(checkpoint, options.data or "", given, options.settings),
            recipe_name=options.recipe,
            in_grid=grid is not None,
        )
    if seeds:
        config = config.with_value("seed", seeds[0])
    if grid is None and len(seeds) < 2:
        return _train_or_fold(config, options)
    if options.folds is not None:
        what = "folds is a study of its own: it takes no grid, and one seed"
        raise UserError(what, where="folds", fix="Choose the learning rate first")
    rates = () if grid is None else grid or LEARNING_RATES[config.recipe]
    seeds = seeds or (config.seed,)
    if options.dry_run:
        runs = len(rates) + len(seeds)
        seconds = train(config, dry_run=True, in_study=True).expected_seconds or 0.0
        print(f"study    {runs} such runs: about {duration(runs * seconds)}")
        return {"expected_seconds": runs * seconds}
    return finetune(config, grid=rates, seeds=seeds)
