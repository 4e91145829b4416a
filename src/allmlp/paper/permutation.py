"""Figure 4: how much a network depends on the order of the pixels (section 3.4 of the paper).

The same network is trained three times, with the same initial weights and the same order of images:
on the original images; on images whose patches, and the pixels within each patch, are permuted; and
on images whose pixels are all permuted; each time with one permutation for all images. A Mixer can
absorb the first permutation into its weights and loses nothing; a convolutional network cannot. The
runs are cells/<model>/<permutation>/seed-0 and so on; see `study` for the other files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from allmlp import plots
from allmlp.data.image import decode
from allmlp.data.source import Source
from allmlp.data.transforms import permute, resize_for_evaluation
from allmlp.errors import UserError
from allmlp.models.catalog import model_config
from allmlp.options import assignments, make
from allmlp.paper.figures import save
from allmlp.paper.options import PermutationOptions
from allmlp.paper.study import Experiment, Study, few_shot_options, open_data, train_config
from allmlp.preprocessing import Preprocessing
from allmlp.sweep import Row
from allmlp.training.config import TrainConfig

# The paper's colours.
_COLORS = {"none": "#1c7ed6", "patches": "#2b8a3e", "pixels": "#e8590c"}
TITLES = {"none": "original", "patches": "patches and pixels in them", "pixels": "all pixels"}


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
    given: dict[str, tuple[int | None, int]] = {
        "none": (None, 0),
        "patches": (patch, options.permutation_seed),
        "pixels": (None, options.permutation_seed),
    }
    orders = {kind: dict(zip(own, (kind, *order), strict=True)) for kind, order in given.items()}
    cells: dict[str, tuple[Row, TrainConfig]] = {}
    for model, overrides in networks.items():
        for kind, order in orders.items():
            changes = {**order, "model.name": model, "model.overrides": overrides}
            folder = f"{model.replace(':', '-').replace('/', '-')}/{kind}"
            cells[folder] = {"model": model, "permutation": kind}, config.with_values(changes)
    splits, _ = open_data(config)
    shown = splits.test or splits.validation
    assert shown is not None
    examples = _examples([config for _, config in cells.values()][:3], shown)
    few_shot = None
    columns = {"model": "{model}", "permuted": "{permutation}", "top-1": "{accuracy:.2%}"}
    columns |= {"+-": "{deviation:.2%}", "drop": "{drop:.1%}"}
    if options.few_shot_data is not None:
        few_shot = few_shot_options(config, options.few_shot_data, options.shots)
        columns[f"{options.shots}-shot"] = "{few_shot:.2%}"

    def finish(path: Path, done: Mapping[str, Row], rows: list[Row]) -> None:
        add_drops(rows)
        save(_figure(done, rows, examples, options.data), path)

    return Experiment(
        kind="permutation",
        config=config,
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


def add_drops(rows: list[Row]) -> None:
    """Adds to each row the relative loss in accuracy compared with the original images."""
    plain = {row["model"]: row["accuracy"] for row in rows if row["permutation"] == "none"}
    for row in rows:
        accuracy = plain[row["model"]]
        row["drop"] = 1 - row["accuracy"] / accuracy if accuracy else None


def _examples(configs: list[TrainConfig], source: Source, most: int = 3) -> list[list[np.ndarray]]:
    """Returns example images in the orders of these settings, uint8 (H, W, channels)."""
    rules = []
    for config in configs:
        size, data = config.model.image_size, config.data
        assert size is not None
        order = (data.permutation, data.permutation_patch, data.permutation_seed)
        names = ("permutation", "permutation_patch", "permutation_seed")
        values: dict[str, Any] = dict(zip(names, order, strict=True))
        values["image_size"] = (size, size) if isinstance(size, int) else size
        try:
            rules.append(Preprocessing(resize=data.resize, **values))
        except ValueError as error:
            raise UserError(str(error), where="patch_size") from error
    found: list[list[np.ndarray]] = []
    for index in range(len(source)):
        with contextlib.suppress(UserError):  # bad images are reported by the runs
            pixels = decode(source.read(index), source.item_name(index))
            resized = np.array(resize_for_evaluation(pixels, rules[0]))
            image = torch.from_numpy(resized).movedim(2, 0)[None]
            found.append([permute(image, rule)[0].movedim(0, 2).numpy() for rule in rules])
        if len(found) == most:
            break
    return found


def _figure(
    done: Mapping[str, Row],
    rows: Sequence[Row],
    examples: Sequence[Sequence[np.ndarray]],
    data: str,
) -> Figure:
    """Figure 4: images in the three orders, and a panel of curves per network."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = plots.new_figure(max(8.4, 4.6 * len(models)), 6.6)
    parts: Any = figure.subfigures(2, 1, height_ratios=(0.75, 2.3))
    groups = parts[0].subfigures(1, len(TITLES))
    for at, (group, kind) in enumerate(zip(groups, TITLES, strict=True)):
        group.suptitle(TITLES[kind], fontsize=10, color=_COLORS[kind])
        panels = group.subplots(1, max(1, len(examples)), squeeze=False)[0]
        for axes, example in zip(panels, examples, strict=False):
            plots.show(axes, example[at])
    panels = parts[1].subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, models, strict=True):
        for row in (row for row in rows if row["model"] == model):
            kind = row["permutation"]
            label: str | None = f"{TITLES[kind]}: {row['accuracy']:.1%}"
            if kind != "none" and row["drop"] is not None:
                label = f"{label} (drop {row['drop']:.0%})"
            for name, run in done.items():
                if (run["model"], name.split("/")[2]) == (model, kind):
                    steps, top1 = zip(*run["curve"], strict=True)
                    curve = [100 * accuracy for accuracy in top1]
                    axes.plot(steps, curve, marker="o", ms=3.5, color=_COLORS[kind], label=label)
                    label = None
        axes.set(title=plots.escape(model), xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.legend(loc="lower right", fontsize=8.5)
    panels[0].set(ylabel="validation top-1 (%)", ylim=(0, None))
    measured = f"{rows[0]['measured_on']} accuracy of the best weights in the legends"
    figure.suptitle(plots.escape(f"{plots.shorten(data, 60)}: {measured}"), fontsize=10)
    return figure
