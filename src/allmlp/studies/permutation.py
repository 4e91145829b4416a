"""Figure 4: how much a network leans on the order of the pixels (section 3.4 of the paper).

The same network is trained three times, with the same initial weights and the same order of images:
on pictures as they are; on pictures whose patches, and pixels within each patch, are shuffled by
one permutation for all pictures; and on pictures whose pixels are all shuffled by one permutation.
A Mixer can undo the first by its weights, so that nothing is lost; a convolutional network cannot.
The folder holds
  cells/<model>/<permutation>/seed-0/   the run of one of them
  permutation.json                      a measurement: every run, and the drops
  permutation.png, .svg                 the curves, with examples of the pictures above them
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allmlp.console import table
from allmlp.data.image import decode
from allmlp.data.permutation import patch_orders, permute
from allmlp.data.sources import open_splits
from allmlp.data.transforms import resize_for_evaluation
from allmlp.errors import UserError
from allmlp.evaluation.draws import check_settings
from allmlp.evaluation.few_shot import few_shot, num_images
from allmlp.models.catalog import model_config
from allmlp.models.mixer import MlpMixer
from allmlp.preprocessing import PERMUTATIONS, Preprocessing
from allmlp.studies.cells import CellStudy
from allmlp.studies.figures import save_picture
from allmlp.studies.permutation_figure import TITLES, permutation_figure
from allmlp.studies.study_file import Cell, check_random_weights, check_seeds
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import open_training_data
from allmlp.training.summary import TrainResult
from allmlp.weights.store import load_model


@dataclass(frozen=True)
class Permutation:
    """What the runs of a permutation study reached.

    Attributes:
        folder: where everything lies.
        rows: one for each model and permutation: "model", "permutation", "accuracy" (mean over the
            seeds), "deviation" (None for one seed), "drop" (relative to none), "few_shot".
    """

    folder: Path
    rows: list[dict[str, Any]]


def permutation(
    config: TrainConfig,
    *,
    comparison: str | None = "small_resnet",
    comparison_overrides: dict[str, Any] | None = None,
    patch_size: int | None = None,
    permutation_seed: int = 0,
    seeds: Sequence[int] = (0,),
    few_shot_data: str | None = None,
    shots: int = 5,
    quiet: bool = False,
) -> Permutation:
    """Trains two networks on pictures as they are and on two permutations of them.

    Args:
        config: of the runs, with the model and `output`.
        comparison: a network to compare with, by its name; None for none.
        comparison_overrides: its own settings, as `create_model` takes them.
        patch_size: side of the shuffled patches in pixels; None takes the model's own.
        permutation_seed: of both permutations.
        seeds: of the weights and of the order of images; each for all of the runs.
        few_shot_data: measure linear few-shot accuracy there too, as the paper did.
        shots: training images a class for that.
        quiet: print nothing.

    Raises:
        UserError: as `train`; or the output holds something else. Nothing has been written where it
            is a setting or the data that is wrong.
    """
    check_random_weights(config)
    check_seeds(seeds)
    if config.data.permutation is not None:
        what = f"data.permutation={config.data.permutation} has no effect: the study has its own"
        raise UserError(what, fix="Leave it out")
    overrides = {config.model.name: config.model.overrides}
    if comparison is not None:
        if comparison == config.model.name:
            what = f"{comparison} is the model itself"
            raise UserError(what, where="--comparison", fix="--comparison small_resnet")
        overrides[comparison] = comparison_overrides or {}
    elif comparison_overrides:
        what = "settings of a comparison network have no effect without one"
        raise UserError(what, fix="--comparison small_resnet")
    configs = {
        name: model_config(name, config.model.image_size, 2, **own)
        for name, own in overrides.items()
    }
    if patch_size is None:
        patch_size = getattr(configs[config.model.name], "patch_size", None)
        if patch_size is None:
            what = f"{config.model.name} has no patches of its own"
            raise UserError(what, where="--patch-size", fix="--patch-size 16")
    cells: dict[str, TrainConfig] = {}
    for model, own in overrides.items():
        for kind in PERMUTATIONS:
            for seed in seeds:
                changes: dict[str, Any] = {
                    "model.name": model,
                    "model.overrides": own,
                    "seed": seed,
                    "data.permutation": kind,
                    "data.permutation_patch": patch_size if kind == "patches" else None,
                    "data.permutation_seed": permutation_seed if kind != "none" else 0,
                }
                name = model.replace(":", "-").replace("/", "-")
                cells[f"{name}/{kind}/seed-{seed}"] = config.with_values(changes)
    example = next(each for each in cells.values() if each.data.permutation == "patches")
    pictures = _examples(config, example)
    if few_shot_data is not None:
        num_images(open_splits(few_shot_data), check_settings(shots=(shots,), seeds=(0, 1, 2)))

    def measure(_: TrainConfig, result: TrainResult) -> Cell:
        if few_shot_data is None:
            return {}
        found = few_shot(load_model(result.run_folder), few_shot_data, shots=(shots,))
        return {"few_shot": found.mean(shots), "few_shot_deviation": found.deviation(shots)}

    settings = {
        "comparison": comparison,
        "comparison_overrides": comparison_overrides or {},
        "patch_size": patch_size,
        "permutation_seed": permutation_seed,
        "few_shot_data": few_shot_data,
        "shots": shots if few_shot_data else None,
    }
    study = CellStudy("permutation", config, cells, settings, measure, quiet=quiet)
    done = study.run(lambda found: {"rows": rows_of(found)})
    rows = rows_of(done)
    if study.is_first:
        _tell(study, rows, few_shot_data, shots)
        figure = permutation_figure(done, rows, pictures, config.data.source)
        for kind in ("png", "svg"):
            save_picture(figure, study.path / f"permutation.{kind}")
        study.report.say(f"figure   {study.path / 'permutation.png'}")
        study.report.say(f"table    {study.file}")
    return Permutation(study.path, rows)


def rows_of(done: dict[str, Cell]) -> list[dict[str, Any]]:
    """Returns a row for each model and permutation that has a finished run, with its drop."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for name, cell in done.items():
        groups.setdefault((cell["model"], name.split("/")[1]), []).append(cell)
    rows = []
    for (model, kind), cells in groups.items():
        values = [cell["accuracy"] for cell in cells]
        plain = [cell["accuracy"] for cell in groups.get((model, "none"), [])]
        accuracy = statistics.fmean(values)
        shots = [cell["few_shot"] for cell in cells if "few_shot" in cell]
        is_whole = len(plain) == len(values)
        rows.append(
            {
                "model": model,
                "permutation": kind,
                "runs": len(values),
                "measured_on": cells[0]["measured_on"],
                "images": cells[0]["images"],
                "accuracy": accuracy,
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "drop": 1 - accuracy / statistics.fmean(plain) if is_whole and any(plain) else None,
                "few_shot": statistics.fmean(shots) if shots else None,
            }
        )
    return rows


def _tell(
    study: CellStudy, rows: list[dict[str, Any]], few_shot_data: str | None, shots: int
) -> None:
    headers = ["model", "permuted", f"{rows[0]['measured_on']} top-1", "drop"]
    cells = []
    for row in rows:
        spread = "" if row["deviation"] is None else f" +- {row['deviation']:.2%}"
        drop = "-" if row["permutation"] == "none" or row["drop"] is None else f"{row['drop']:.1%}"
        cells.append(
            [row["model"], TITLES[row["permutation"]], f"{row['accuracy']:.2%}{spread}", drop]
        )
        if few_shot_data is not None:
            cells[-1].append(f"{row['few_shot']:.2%}")
    if few_shot_data is not None:
        headers.append(f"{shots}-shot, {few_shot_data}")
    study.report.say("")
    for line in table(headers, cells, left=2):
        study.report.say(line)
    study.report.say("the drop is relative to the same network on pictures as they are")


def _examples(config: TrainConfig, permuted: TrainConfig, most: int = 3) -> list[list[np.ndarray]]:
    """Returns test pictures, each as it is and under both permutations, uint8 (H, W, channels).

    Raises:
        UserError: the patch does not divide the picture, or there are no validation images.
    """
    splits = open_training_data(config.data)
    if splits.validation is None:
        what = "the curves are those of validation images, and there are none"
        raise UserError(what, where="--holdout", fix="--holdout 0.1, or leave it out")
    size = config.model.image_size
    assert size is not None
    height, width = (size, size) if isinstance(size, int) else size
    data, shown = permuted.data, splits.test or splits.validation
    rules = []
    for kind in PERMUTATIONS:
        try:
            rules.append(
                Preprocessing(
                    image_size=(height, width),
                    resize=data.resize,
                    permutation=kind,
                    permutation_patch=data.permutation_patch if kind == "patches" else None,
                    permutation_seed=data.permutation_seed if kind != "none" else 0,
                )
            )
        except ValueError as error:
            raise UserError(str(error), where="--patch-size") from error
    found: list[list[np.ndarray]] = []
    for index in range(len(shown)):
        try:
            pixels = decode(shown.read(index), shown.item_name(index))
        except UserError:
            continue  # a bad image is told by the runs
        shaped = np.array(resize_for_evaluation(pixels, rules[0]))
        image = torch.from_numpy(shaped).movedim(2, 0)[None]
        found.append([permute(image, each)[0].movedim(0, 2).numpy() for each in rules])
        if len(found) == most:
            break
    return found


@torch.no_grad()
def permuted_twin(model: MlpMixer, preprocessing: Preprocessing) -> MlpMixer:
    """Returns a Mixer that makes of permuted pictures what the model makes of them as they are.

    The pixels within a patch are the stem's inputs, and the patches are the token-mixing MLPs'
    inputs and outputs: their weights are put in the order of the permutation. This is why a Mixer
    does not care: its random initial weights are as likely in any order.

    Args:
        model: a plain Mixer.
        preprocessing: with the permutation "patches" and the model's own patch size.
    """
    patch = model.config.patch_size
    assert model.config.is_plain
    assert preprocessing.permutation == "patches"
    assert preprocessing.permutation_patch == patch
    patches, inside = (torch.from_numpy(each) for each in patch_orders(preprocessing))
    tensors: dict[str, Tensor] = dict(model.state_dict())
    stem = tensors["stem.weight"]
    tensors["stem.weight"] = stem.flatten(2)[:, :, inside].view_as(stem)
    for name, value in tensors.items():
        if ".token_mixing.dense_0.weight" in name:
            tensors[name] = value[:, patches]
        elif ".token_mixing.dense_1." in name:
            tensors[name] = value[patches]
    twin = MlpMixer(model.config).train(model.training)
    twin.load_state_dict({name: value.clone() for name, value in tensors.items()})
    twin.class_names, twin.preprocessing = model.class_names, preprocessing
    return twin
