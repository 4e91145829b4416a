"""Options of the experiments; does not import torch, to keep --help fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from allmlp.errors import UserError
from allmlp.evaluation.options import Natural, Positive, Seconds
from allmlp.options import Options, Repeated
from allmlp.paper.published import DATA_SCALE
from allmlp.training.flags import OTHER_SETTINGS, flag, setting_options

# Option -> setting of the runs.
SHARED = {
    **{name: name for name in ("steps", "batch_size", "device")},
    "image_size": "model.image_size",
    "num_workers": "data.num_workers",
}
STUDY = {
    **SHARED,
    **{name: name for name in ("epochs", "evaluate_every", "precision")},
    "data": "data.source",
    "holdout": "data.holdout",
    "learning_rate": "optimizer.learning_rate",
}
_OUTPUT = flag("output", str | None, None, "Folder of the study (required).", metavar="FOLDER")
_SEEDS = "Seeds of the weights and the order of images; one run each."


@dataclass(frozen=True, kw_only=True)
class StudyOptions(setting_options("StudySettings", STUDY, _OUTPUT, OTHER_SETTINGS)):
    """Options shared by the studies that train from random weights; their defaults are those of the
    recipe."""

    recipe: str = "cifar10_compare"
    """Recipe for the settings of all runs (docs/recipes.md)."""
    seeds: tuple[int, ...] = field(default=(0,), metadata={"metavar": "N ...", "doc": _SEEDS})

    def __post_init__(self) -> None:
        if self.data is None:
            raise UserError("a study needs data", where="data", fix="data: FOLDER", code="missing")
        if not self.seeds:
            raise UserError("a study needs a seed", where="seeds", fix="seeds: 0 1 2")


@dataclass(frozen=True, kw_only=True)
class SuiteOptions(setting_options("SuiteSettings", SHARED, _OUTPUT, OTHER_SETTINGS)):
    """Options shared by all suites; their defaults are those of the protocol."""

    seeds: tuple[int, ...] = field(default=(), metadata={"metavar": "N ...", "doc": _SEEDS})
    task: Repeated = field(default=(), metadata={"metavar": "NAME=SOURCE"})
    """Data of a task as NAME=SOURCE, any source that training reads; repeatable."""
    tasks: str | dict[str, str | Path] | None = field(default=None, metadata={"type": str | None})
    """The same as a JSON file, {"pets": "FOLDER"}; paths are relative to the file."""
    grid: tuple[float, ...] = field(default=(), metadata={"metavar": "LR ..."})
    """Learning rates to choose from; with a single one there is no grid search."""


@dataclass(frozen=True, kw_only=True)
class VtabOptions(SuiteOptions):
    """Fine-tune a checkpoint on the 19 tasks of VTAB-1k, or on those that you have.

    Examples:
        mixer paper vtab --list
        mixer paper vtab mixer_b16.i21k --tasks tasks.json --output runs/vtab
        mixer paper vtab mixer_b16.i21k --task pets=FOLDER --task svhn=hf:owner/name --output runs/v
        mixer paper vtab runs/mine --tasks tasks.json --protocol lightweight --output runs/light

    Each task uses 800 images to train and 200 to choose the learning rate, then all 1,000. A mean
    over fewer than 19 tasks is marked partial. Run the same command again to resume, with more
    tasks if you like.
    """

    protocol: Literal["paper", "lightweight"] = "paper"
    """paper (2,500 steps of 512 images, a learning-rate grid, three seeds, 224 or 448 pixels) or
    lightweight (1,000 steps of 64 images, one learning rate, one seed, 224 pixels)."""
    list_tasks: bool = field(default=False, metadata={"flag": "list"})
    """List the tasks and the data each expects."""


@dataclass(frozen=True, kw_only=True)
class Avg5Options(SuiteOptions):
    """Fine-tune a checkpoint on ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers: "Avg 5".

    Examples:
        mixer paper avg5 mixer_b16.i21k --tasks tasks.json --output runs/avg5
        mixer paper avg5 mixer_b16.i21k --task pets=FOLDER --task cifar10=FILES --output runs/two
        mixer paper avg5 runs/mine --tasks tasks.json --output runs/large --image-size 448

    The tasks are imagenet, cifar10, cifar100, pets and flowers102. The learning rate is chosen on
    held-out training images; then one run per seed (0 1 2) trains on all of them, at 224 pixels.
    A mean over fewer than five tasks is marked partial. Run the same command again to resume, with
    more tasks if you like.
    """

    resize: Literal["resmall-crop", "resize-crop", "squash"] = "resmall-crop"
    """How test images are brought to the model's size: resmall-crop (the paper's Table 3), resize-crop (its Table 2, at 448 pixels) or squash."""  # noqa: E501


@dataclass(frozen=True, kw_only=True)
class DataScaleOptions(StudyOptions):
    """Train on growing fractions of the images, for the same number of steps; compare features.

    Examples:
        mixer paper data-scale --data A --few-shot-data B --models mixer_s16 --steps 9000 --output C

    The paper's figure 2, right. Each model is trained on 3, 10, 30 and 100 % of the images for the
    same number of steps; subsets are nested. The weights with the best accuracy on held-out images,
    the same for all runs, are measured by linear few-shot accuracy on other data. Run the same
    command again to resume, with more models, fractions and seeds if you like.
    """

    few_shot_data: str = field(metadata={"metavar": "SOURCE"})
    """Data for few-shot accuracy, with a train and a test split."""
    models: tuple[str, ...] = field(metadata={"metavar": "NAME ..."})
    """Architectures, as `mixer models` names them."""
    fractions: tuple[float, ...] = field(default=tuple(DATA_SCALE), metadata={"metavar": "X ..."})
    """Fractions of the training images."""
    shots: Positive = 5
    """Training images per class for few-shot accuracy."""
    few_shot_seeds: tuple[Natural, ...] = field(default=(0, 1, 2), metadata={"metavar": "N ..."})
    """Seeds of the few-shot draws."""
    recipe: str = "scratch"
    """Recipe for all other settings (docs/recipes.md), except the sizes of its model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is None:
            what = "every run of the study has the same number of steps, and none is given"
            raise UserError(what, where="steps", fix="steps: 10000", code="missing")
        if not self.models or not self.fractions:
            raise UserError("the study needs a model and a fraction", where="models, fractions")


@dataclass(frozen=True, kw_only=True)
class PermutationOptions(StudyOptions):
    """Train on shuffled pixels: figure 4 of the paper, a Mixer against a convolutional network.

    Examples:
        mixer paper permutation --data 'cifar10_*.parquet' --output runs/permute --steps 2000
        mixer paper permutation --data FOLDER --model mixer_b16 --recipe scratch --output runs/p
        mixer paper permutation --data FOLDER --output runs/p --comparison timm:resnetv2_50x1_bit

    Each network is trained three times with the same seed: on the original images; with patches and
    the pixels within them shuffled, the same way in all images; and with all pixels shuffled the
    same way. A table lists accuracies and relative drops; permutation.png shows example images and
    learning curves. Run the same command again to resume.
    """

    model: str | None = None
    """The network; defaults to the recipe's. The recipe's optimizer must fit both networks."""
    comparison: str = "small_resnet"
    """Network to compare with: small_resnet, timm:NAME, or none."""
    comparison_set: Repeated = field(default=(), metadata={"metavar": "KEY=VALUE"})
    """Override a setting of the comparison network, e.g. width=40; repeatable."""
    patch_size: int | None = None
    """Side of the shuffled patches in pixels; defaults to the model's patch size."""
    permutation_seed: int = 0
    """Seed of both permutations."""
    few_shot_data: str | None = field(default=None, metadata={"metavar": "SOURCE"})
    """Also measure linear few-shot accuracy on this data, as the paper did."""
    shots: Positive = 5
    """Training images per class for few-shot accuracy."""


@dataclass(frozen=True, kw_only=True)
class AblationsOptions(StudyOptions):
    """Compare the variants of appendix A.1 under one budget: accuracy, parameters, FLOPs, images/s.

    Examples:
        mixer paper ablations --data 'cifar10_*.parquet' --output runs/ablations --steps 2000
        mixer paper ablations --data FOLDER --output runs/a --variants shared untied --seeds 0 1 2

    Variants: shared (the paper's Mixer), untied (separate weights per channel), grouped-2 and
    grouped-4 (2 or 4 channels at once), views-2 and views-4 (learned views), pyramid (a quarter of
    the tokens from the middle on). Run the same command again to resume.
    """

    variants: tuple[str, ...] = field(default=(), metadata={"metavar": "NAME ..."})
    """Variants to train; defaults to all."""
    model: str | None = None
    """A Mixer; defaults to the recipe's."""
    seconds: Seconds = 2.0
    """Seconds to measure each variant's throughput."""


@dataclass(frozen=True, kw_only=True)
class TablesOptions(Options):
    """Write the paper's Tables 1, 2 and 3 next to your measurements, and the figures.

    Examples:
        mixer paper tables runs
        mixer paper tables runs/flowers evaluation.json few_shot.json --output reports/flowers

    The paper's results are in separate tables. Yours come from run folders and from the files that
    evaluate, few-shot, benchmark and the other paper commands write, and are shown with data,
    protocol, command, hardware and date.
    """

    output: str = field(default="report", metadata={"metavar": "FOLDER"})
    """Folder for report.html and figures/."""
    overwrite: bool = False
    """Replace existing files."""
