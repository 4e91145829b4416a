"""Appendix A.1: the token-mixing variants of a Mixer compared under the same budget.

The variants differ only in token mixing, and are trained with the same settings, steps and seeds.
The runs are cells/<variant>/seed-0 and so on; see `study` for the other files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allmlp.benchmark import benchmark
from allmlp.errors import UserError, one_of
from allmlp.models.catalog import create_model, model_config
from allmlp.models.mixer import MixerConfig
from allmlp.options import make
from allmlp.paper.options import AblationsOptions
from allmlp.paper.study import Experiment, Study, train_config
from allmlp.sweep import Row


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
