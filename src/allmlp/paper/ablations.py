"""Appendix A.1 under one budget: the token-mixing variants of a Mixer, side by side.

Every variant is the same Mixer but for its token mixing, and is trained with the same settings,
steps and seeds. The folder holds
  cells/<variant>/seed-0/    the run of one of them
  ablations.json, .csv       a measurement: accuracy, parameters, operations, images per second
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from allmlp.benchmark import benchmark
from allmlp.console import table
from allmlp.errors import UserError, one_of
from allmlp.models.catalog import create_model, model_config
from allmlp.models.layers import count_parameters
from allmlp.models.mixer import MixerConfig
from allmlp.options import make
from allmlp.paper.study import Study, StudyOptions, train_config, write_csv, write_study
from allmlp.runtime.world import join_world
from allmlp.sweep import Row, Sweep, study_folder, summarize
from allmlp.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class AblationsOptions(StudyOptions):
    """Train the variants of appendix A.1 under one budget: accuracy, parameters, FLOPs, images/s.

    Examples of use:
        mixer paper ablations --data 'cifar10_*.parquet' --output runs/ablations --steps 2000
        mixer paper ablations --data FOLDER --output runs/a --variants shared untied --seeds 0 1 2

    The variants: shared (the paper's Mixer), untied (weights for each channel), grouped-2 and
    grouped-4 (2 or 4 channels at once), views-2 and views-4 (learned views), pyramid (a quarter of
    the tokens from the middle on). The same command resumes an interrupted study.
    """

    variants: tuple[str, ...] = field(default=(), metadata={"metavar": "NAME ..."})
    """Which variants; all if not given."""
    model: str | None = None
    """A Mixer; the recipe's if not given."""
    seconds: float = 2.0
    """Time to measure each variant's images per second."""


def variants_of(config: MixerConfig) -> dict[str, dict[str, Any]]:
    """Returns the variants of appendix A.1 that a Mixer can have: name -> its settings.

    The groups must divide its channels; the pyramid brings its tokens down to a quarter in the
    middle of its blocks.
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
    """Trains the variants of a Mixer under one budget and measures what they cost.

    Args:
        options, fields: see `AblationsOptions`.
        quiet: print nothing.

    Returns:
        a row for each variant: "variant", "accuracy" (mean over the seeds), "deviation" (None for
        one seed), "parameters", "flops", "images_per_second" (inference).
    """
    options = make(AblationsOptions, options, fields)
    config = train_config(options, ["model.name"], options.model)
    base = model_config(config.model.name, config.model.image_size, 2, **config.model.overrides)
    if not isinstance(base, MixerConfig) or not base.is_plain:
        what = f"the variants are those of a plain Mixer, and the model is {base.summary()}"
        raise UserError(what, where="model", fix="model: mixer_s16")
    known = variants_of(base)
    for name in options.variants:
        one_of("variant", name, known)
    variants = {name: known[name] for name in options.variants or known}
    runs = {
        f"cells/{name}/seed-{seed}": config.with_values(
            {"model.overrides": {**config.model.overrides, **settings}, "seed": seed}
        )
        for name, settings in variants.items()
        for seed in options.seeds
    }
    path = study_folder(
        options.output, ("cells", "ablations.json", "ablations.csv"), [options.data]
    )
    with join_world(config.device) as (world, _):
        sweep = Sweep(path, world, quiet=quiet)

        def save(done: Mapping[str, Row], costs: Mapping[str, Any]) -> list[dict[str, Any]]:
            rows = []
            for name in variants:
                own = [row for run, row in done.items() if run.split("/")[1] == name]
                rows += [{"variant": name, **summarize(own), **costs.get(name, {})}] if own else []
            write_study(path / "ablations.json", config, {}, runs, done, rows=rows)
            return rows

        done = sweep.run_all(runs, None, lambda done: save(done, {}))
        rows = []
        if world.is_main:
            classes = int(next(iter(done.values()))["classes"])
            rows = save(done, _costs(config, variants, classes, options.seconds))
            write_csv(path / "ablations.csv", rows)
            _report(sweep, rows)
        return Study(path, rows)


def _costs(
    config: TrainConfig, variants: Mapping[str, dict[str, Any]], classes: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Parameters, operations and images per second of the variants, which take turns."""
    models: dict[str, Any] = {}
    for name, settings in variants.items():
        overrides = {**config.model.overrides, **settings}
        models[name] = create_model(
            config.model.name, config.model.image_size, classes, **overrides
        ).eval()
    measured = benchmark(models, device=config.device, batch_sizes=(64,), seconds=seconds)
    return {
        row.name: {
            "parameters": count_parameters(models[row.name]),
            "flops": models[row.name].config.flops,
            "images_per_second": row.images_per_second,
            "precision": row.precision,
        }
        for row in measured.models
    }


def _report(sweep: Sweep, rows: list[dict[str, Any]]) -> None:
    cells = [
        [
            row["variant"],
            f"{row['accuracy']:.2%}"
            + ("" if row["deviation"] is None else f" +- {row['deviation']:.2%}"),
            f"{row['parameters']:,}",
            f"{row['flops'] / 1e6:,.1f}",
            "-" if row["images_per_second"] is None else f"{row['images_per_second']:,.0f}",
        ]
        for row in rows
    ]
    headers = ["variant", f"{rows[0]['measured_on']} top-1", "parameters", "MFLOPs", "images/s"]
    for line in ["", *table(headers, cells)]:
        sweep.say(line)
    seeds = rows[0]["runs"]
    sweep.say(f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed")
    sweep.say(f"table    {sweep.path / 'ablations.csv'}")
