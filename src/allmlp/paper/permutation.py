"""Figure 4: how much a network depends on the order of the pixels (section 3.4 of the paper).

The same network is trained three times, with the same initial weights and the same order of images:
on images as they are; on images whose patches, and pixels within each patch, are shuffled by one
permutation for all images; and on images whose pixels are all shuffled by one permutation. A Mixer
can undo the first by its weights, so that nothing is lost; a convolutional network cannot.
The folder holds
  cells/<model>/<permutation>/seed-0/   the run of one of them
  permutation.json                      a measurement: every run, and the drops
  permutation.png, .svg                 the curves, with examples of the images above them
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from allmlp import plots
from allmlp.console import table
from allmlp.data.image import decode
from allmlp.data.permutation import permute
from allmlp.data.sources import open_splits
from allmlp.data.transforms import resize_for_evaluation
from allmlp.errors import UserError
from allmlp.evaluation.few_shot import FewShotOptions, few_shot, num_images
from allmlp.models.catalog import model_config
from allmlp.options import Repeated, assignments, make
from allmlp.paper.figures import save
from allmlp.paper.study import Study, StudyOptions, train_config, write_study
from allmlp.preprocessing import PERMUTATIONS, Preprocessing
from allmlp.runtime.world import join_world
from allmlp.sweep import Row, Sweep, study_folder, summarize
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import open_training_data
from allmlp.training.report import TrainResult
from allmlp.weights.load import load_model

# The paper's colours.
_COLORS = {"none": "#1c7ed6", "patches": "#2b8a3e", "pixels": "#e8590c"}
TITLES = {"none": "original", "patches": "patches and pixels in them", "pixels": "all pixels"}


@dataclass(frozen=True, kw_only=True)
class PermutationOptions(StudyOptions):
    """Train on shuffled pixels: figure 4 of the paper, a Mixer against a convolutional network.

    Examples of use:
        mixer paper permutation --data 'cifar10_*.parquet' --output runs/permute --steps 2000
        mixer paper permutation --data FOLDER --model mixer_b16 --recipe scratch --output runs/p
        mixer paper permutation --data FOLDER --output runs/p --comparison timm:resnetv2_50x1_bit

    Each network is trained three times with the same seed: on the original images; with the patches
    and the pixels within them shuffled, alike in all images; with all pixels shuffled alike. A
    table has the accuracies and the relative drops, and permutation.png the curves under examples
    of the images. The same command resumes an interrupted study.
    """

    model: str | None = None
    """The network; the recipe's if not given. The recipe's optimizer must fit both networks."""
    comparison: str = "small_resnet"
    """The other network: small_resnet, timm:NAME, or none."""
    comparison_set: Repeated = field(default=(), metadata={"metavar": "KEY=VALUE"})
    """A setting of it, such as width=40; may be given many times."""
    patch_size: int | None = None
    """Side of the shuffled patches in pixels; the model's own patch if not given."""
    permutation_seed: int = 0
    """Of both permutations."""
    few_shot_data: str | None = field(default=None, metadata={"metavar": "SOURCE"})
    """Measure linear few-shot accuracy on this data too, as the paper did."""
    shots: int = 5
    """Training images per class for that."""


def permutation(
    options: PermutationOptions | None = None, *, quiet: bool = False, **fields: Any
) -> Study:
    """Trains two networks on original images and on two permutations of them.

    Args:
        options, fields: see `PermutationOptions`.
        quiet: print nothing.

    Returns:
        a row for each model and permutation: "model", "permutation", "accuracy" (mean over the
        seeds), "deviation" (None for one seed), "drop" (relative to none), "few_shot".
    """
    options = make(PermutationOptions, options, fields)
    own = [f"data.{name}" for name in ("permutation", "permutation_patch", "permutation_seed")]
    config = train_config(options, [*own, "model.name"], options.model)
    networks = {config.model.name: config.model.overrides}
    if options.comparison == config.model.name:
        what = f"{options.comparison} is the model itself"
        raise UserError(what, where="comparison", fix="comparison: small_resnet")
    if options.comparison != "none":
        networks[options.comparison] = assignments(options.comparison_set, "comparison_set")
    sizes = [
        model_config(name, config.model.image_size, 2, **overrides)
        for name, overrides in networks.items()
    ]
    patch = options.patch_size or getattr(sizes[0], "patch_size", None)
    if patch is None:
        what = f"{config.model.name} has no patches of its own"
        raise UserError(what, where="patch_size", fix="patch_size: 16")
    runs: dict[str, TrainConfig] = {}
    for model, overrides in networks.items():
        for kind in PERMUTATIONS:
            for seed in options.seeds:
                changes: dict[str, Any] = {
                    "model.name": model,
                    "model.overrides": overrides,
                    "seed": seed,
                    "data.permutation": kind,
                    "data.permutation_patch": patch if kind == "patches" else None,
                    "data.permutation_seed": 0 if kind == "none" else options.permutation_seed,
                }
                name = model.replace(":", "-").replace("/", "-")
                runs[f"cells/{name}/{kind}/seed-{seed}"] = config.with_values(changes)
    examples = _examples(config, patch, options.permutation_seed)
    shots = options.shots
    if options.few_shot_data is not None:
        measured = FewShotOptions(data=(options.few_shot_data,), shots=(shots,))
        num_images(open_splits(options.few_shot_data), measured)
    settings = {
        "comparison": options.comparison,
        "patch_size": patch,
        "permutation_seed": options.permutation_seed,
        "few_shot_data": options.few_shot_data,
        "shots": shots if options.few_shot_data else None,
    }

    def measure(config: TrainConfig, result: TrainResult) -> Row:
        row: Row = {"permutation": config.data.permutation}
        if options.few_shot_data is not None:
            found = few_shot(load_model(result.run_folder), options.few_shot_data, shots=(shots,))
            row |= {"few_shot": found.mean(shots), "few_shot_deviation": found.deviation(shots)}
        return row

    written = ("cells", *(f"permutation.{kind}" for kind in ("json", "png", "svg")))
    path = study_folder(options.output, written, [options.data])
    with join_world(config.device) as (world, _):
        sweep = Sweep(path, world, quiet=quiet)

        def save_rows(done: Mapping[str, Row]) -> None:
            file = path / "permutation.json"
            write_study(file, config, settings, runs, done, rows=rows_of(done.values()))

        done = sweep.run_all(runs, measure, save_rows)
        rows = rows_of(done.values())
        if world.is_main:
            _report(sweep, rows, f"{shots}-shot, {options.few_shot_data}")
            save(_figure(list(done.values()), rows, examples, options.data), path / "permutation")
            sweep.say(f"figure   {path / 'permutation.png'}")
            sweep.say(f"table    {path / 'permutation.json'}")
        return Study(path, rows)


def rows_of(done: Iterable[Row]) -> list[dict[str, Any]]:
    """Returns a row for each model and permutation that has a finished run, with its drop."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in done:
        groups.setdefault((row["model"], row["permutation"]), []).append(row)
    rows = []
    for (model, kind), own in groups.items():
        found, plain = summarize(own), groups.get((model, "none"), [])
        shots = [row["few_shot"] for row in own if row.get("few_shot") is not None]
        drop = None
        if len(plain) == len(own) and (accuracy := summarize(plain)["accuracy"]):
            drop = 1 - found["accuracy"] / accuracy
        few = statistics.fmean(shots) if shots else None
        rows.append({"model": model, "permutation": kind, **found, "drop": drop, "few_shot": few})
    return rows


def _report(sweep: Sweep, rows: list[dict[str, Any]], few_shot_title: str) -> None:
    headers, cells = ["model", "permuted", f"{rows[0]['measured_on']} top-1", "drop"], []
    for row in rows:
        spread = "" if row["deviation"] is None else f" +- {row['deviation']:.2%}"
        drop = "-" if row["permutation"] == "none" or row["drop"] is None else f"{row['drop']:.1%}"
        accuracy = f"{row['accuracy']:.2%}{spread}"
        cells.append([row["model"], TITLES[row["permutation"]], accuracy, drop])
        if row["few_shot"] is not None:
            cells[-1].append(f"{row['few_shot']:.2%}")
    headers += [few_shot_title] * (len(cells[0]) - 4)
    for line in ["", *table(headers, cells, left=2)]:
        sweep.say(line)
    sweep.say("the drop is relative to the same network on the original images")


def _examples(config: TrainConfig, patch: int, seed: int, most: int = 3) -> list[list[np.ndarray]]:
    """Returns test images, each original and under both permutations, uint8 (H, W, channels)."""
    splits = open_training_data(config.data)
    if splits.validation is None:
        what = "the curves are those of validation images, and there are none"
        raise UserError(what, where="holdout", fix="holdout: 0.1, or leave it out")
    size = config.model.image_size
    assert size is not None
    height, width = (size, size) if isinstance(size, int) else size
    rules, shown = [], splits.test or splits.validation
    for kind in PERMUTATIONS:
        try:
            rules.append(
                Preprocessing(
                    image_size=(height, width),
                    resize=config.data.resize,
                    permutation=kind,
                    permutation_patch=patch if kind == "patches" else None,
                    permutation_seed=0 if kind == "none" else seed,
                )
            )
        except ValueError as error:
            raise UserError(str(error), where="patch_size") from error
    found: list[list[np.ndarray]] = []
    for index in range(len(shown)):
        try:
            pixels = decode(shown.read(index), shown.item_name(index))
        except UserError:
            continue  # the runs report bad images
        resized = np.array(resize_for_evaluation(pixels, rules[0]))
        image = torch.from_numpy(resized).movedim(2, 0)[None]
        found.append([permute(image, rule)[0].movedim(0, 2).numpy() for rule in rules])
        if len(found) == most:
            break
    return found


def _figure(
    runs: Sequence[Row],
    rows: Sequence[dict[str, Any]],
    examples: Sequence[Sequence[np.ndarray]],
    data: str,
) -> Figure:
    """Figure 4: images under the three orders, and a panel of curves for each network."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = plots.new_figure(max(8.4, 4.6 * len(models)), 6.6)
    parts: Any = figure.subfigures(2, 1, height_ratios=(0.75, 2.3))
    groups = parts[0].subfigures(1, len(PERMUTATIONS))
    for at, (group, kind) in enumerate(zip(groups, PERMUTATIONS, strict=True)):
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
            for run in runs:
                if (run["model"], run["permutation"]) == (model, kind):
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
