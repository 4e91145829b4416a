"""Appendix A.1 under one budget: the token-mixing variants of a Mixer, side by side.

Every variant is the same Mixer but for its token mixing, and is trained with the same settings,
steps and seeds. The folder holds
  cells/<variant>/seed-0/    the run of one of them
  ablations.json, .csv       a measurement: accuracy, parameters, operations, images a second
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allmlp.console import table
from allmlp.errors import UserError, near_names
from allmlp.evaluation.throughput import throughput
from allmlp.models.catalog import create_model, model_config
from allmlp.models.mixer import MixerConfig
from allmlp.studies.cells import CellStudy
from allmlp.studies.study_file import Cell, check_random_weights, check_seeds, write_csv
from allmlp.training.config import TrainConfig
from allmlp.training.summary import TrainResult


@dataclass(frozen=True)
class Ablations:
    """What the variants reached.

    Attributes:
        folder: where everything lies.
        rows: one for each variant: "variant", "accuracy" (mean over the seeds), "deviation" (None
            for one seed), "parameters", "flops", "images_per_second" (inference), ...
    """

    folder: Path
    rows: list[dict[str, Any]]


def variants_of(config: MixerConfig) -> dict[str, dict[str, Any]]:
    """Returns the variants of appendix A.1 that a Mixer can have: name -> its settings.

    Args:
        config: of the plain Mixer; the groups must divide its channels, and the pyramid brings its
            tokens down to a quarter in the middle of its blocks.
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
    config: TrainConfig,
    *,
    variants: Iterable[str] | None = None,
    seeds: Sequence[int] = (0,),
    seconds: float = 2.0,
    quiet: bool = False,
) -> Ablations:
    """Trains the variants of a Mixer under one budget and measures what they cost.

    Args:
        config: of the runs, with a plain Mixer and `output`.
        variants: names of `variants_of`; None takes all.
        seeds: of the weights and of the order of images; a run for each variant and seed.
        seconds: timed for each variant's images a second.
        quiet: print nothing.

    Raises:
        UserError: as `train`; an unknown variant; the model is no plain Mixer; or the output holds
            something else. Nothing has been written where it is a setting or the data that is
            wrong.
    """
    check_random_weights(config)
    check_seeds(seeds)
    base = model_config(config.model.name, config.model.image_size, 2, **config.model.overrides)
    if not isinstance(base, MixerConfig) or not base.is_plain:
        what = f"the variants are those of a plain Mixer, and the model is {base.summary()}"
        raise UserError(what, where="--model", fix="--model mixer_s16")
    known = variants_of(base)
    chosen = list(known) if variants is None else list(variants)
    for name in chosen:
        if name not in known:
            fix = f"{near_names(name, known)}Known for this model: {', '.join(known)}"
            raise UserError(f"unknown variant {name!r}", where="--variants", fix=fix)
    if not chosen or len(set(chosen)) < len(chosen):
        listed = " ".join(chosen) or "none"
        raise UserError(f"give each variant once, got {listed}", where="--variants")
    cells = {
        f"{name}/seed-{seed}": config.with_values(
            {"model.overrides": {**config.model.overrides, **known[name]}, "seed": seed}
        )
        for name in chosen
        for seed in seeds
    }

    def measure(_: TrainConfig, result: TrainResult) -> Cell:
        return {"variant": result.run_folder.parent.name}

    study = CellStudy("ablations", config, cells, {}, measure, quiet=quiet)
    done = study.run(lambda found: {"rows": _accuracies(found)})
    rows = _accuracies(done)
    if study.is_first:
        classes = int(next(iter(done.values()))["classes"])
        costs = _costs(config, {name: known[name] for name in chosen}, classes, seconds)
        rows = [{**row, **costs[row["variant"]]} for row in rows]
        study.save(done, lambda _: {"rows": rows})
        write_csv(study.path / "ablations.csv", rows)
        _tell(study, rows)
    return Ablations(study.path, rows)


def _accuracies(done: dict[str, Cell]) -> list[dict[str, Any]]:
    groups: dict[str, list[Cell]] = {}
    for cell in done.values():
        groups.setdefault(cell["variant"], []).append(cell)
    rows = []
    for variant, cells in groups.items():
        values = [cell["accuracy"] for cell in cells]
        rows.append(
            {
                "variant": variant,
                "accuracy": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "runs": len(values),
                "measured_on": cells[0]["measured_on"],
                "images": cells[0]["images"],
            }
        )
    return rows


def _costs(
    config: TrainConfig, variants: dict[str, dict[str, Any]], classes: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Parameters, operations and images a second of the variants, which take turns."""
    size = config.model.image_size

    def build(settings: dict[str, Any]) -> Any:
        return create_model(
            config.model.name, size, classes, **{**config.model.overrides, **settings}
        ).eval()

    models = {name: build(settings) for name, settings in variants.items()}
    measured = throughput(models, device=config.device, batch_sizes=(64,), seconds=seconds)
    found = {}
    for row in measured.models:
        own = models[row.name].config
        found[row.name] = {
            "parameters": own.num_parameters,
            "flops": own.flops,
            "images_per_second": row.images_per_second,
            "precision": row.precision,
        }
    return found


def _tell(study: CellStudy, rows: list[dict[str, Any]]) -> None:
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
    study.report.say("")
    accuracy = f"{rows[0]['measured_on']} top-1"
    headers = ["variant", accuracy, "parameters", "MFLOPs", "images/s"]
    for line in table(headers, cells):
        study.report.say(line)
    seeds = rows[0]["runs"]
    study.report.say(
        f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed, no deviation"
    )
    study.report.say(f"table    {study.path / 'ablations.csv'}")
