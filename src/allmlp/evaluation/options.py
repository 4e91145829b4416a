"""Options of the commands that measure a model; does not import torch, to keep --help fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

from allmlp.errors import UserError, exclusive, needs
from allmlp.options import (
    ImageSize,
    LoadOptions,
    Options,
    Precision,
    Repeated,
    SizeOptions,
)

Resize = Literal["resize-crop", "resmall-crop", "squash"]
LARGEST_BATCH = 2**16
Positive = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Seconds = Annotated[float, Interval(gt=0, lt=1e6)]


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(Options):
    """Where and how a command computes."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Precision = "auto"
    """Precision of matrix products; auto uses bfloat16 if the device is fast at it and the model
    large enough to benefit."""
    batch_size: Positive = 64
    """Images per batch and process."""
    num_workers: int | None = None
    """Number of processes that decode images; by default chosen by the size of the data."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(ComputeOptions, SizeOptions):
    """Options shared by the commands that measure a model on labelled images."""

    precision: Precision = "float32"
    """Precision of matrix products; auto uses bfloat16 if the device is fast at it and the model
    large enough to benefit. An exported file keeps its own."""
    ignore_exif: bool = False
    """Ignore the EXIF orientation, as the paper does."""
    overwrite: bool = False
    """Replace existing files."""
    timeout: Annotated[float, Interval(ge=0, lt=1e6)] = 600.0
    """Seconds to wait for a batch from the workers; 0 waits forever."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(MeasureOptions, LoadOptions):
    """Measure a trained model: top-1, top-5, calibration, per-class metrics, confusion matrix.

    Under torchrun the images are split across processes; the results are the same.

    Examples:
        mixer evaluate runs/flowers --data FOLDER
        mixer evaluate runs/flowers --data FOLDER:validation --output report
        mixer evaluate mixer_b16.i1k --data imagenet:validation --image-size 448
        mixer evaluate mixer_b16.i1k --data imagenet:validation --real real.json
    """

    data: str
    """Any source that `mixer train` reads; append :train, :validation or :test to choose a split.
    By default the test images, else the validation images (the run's own if it held them out of
    this data), else all."""
    resize: Resize | None = None
    """How images are brought to the model's size: resize-crop (the paper's Table 2), resmall-crop
    (its Table 3) or squash; defaults to the model's own."""
    crop: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Fraction of the resized image's side to keep in the centre crop, at most 1; also applies to
    images smaller than the input. The paper uses 0.875; defaults to the model's own."""
    real: str | None = None
    """The file real.json of ImageNet ReaL; the data must be ILSVRC-2012 validation images."""
    allow_missing_classes: bool = False
    """Accept data without some of the model's classes."""
    output: str | None = None
    """Folder for report.html, evaluation.json, per_class.csv, confusion.csv and plots."""


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(MeasureOptions, LoadOptions):
    """Fit probabilities on held-out images, and choose below which the answer is "unsure".

    Writes the model with a temperature (Guo et al. 2017), and with a threshold if one is asked for;
    predict, evaluate, serve and export use both. Prints the fraction of images that are answered,
    and the accuracy of these answers, at several thresholds. Use images that were not trained on.

    Examples:
        mixer calibrate runs/flowers flowers --data FOLDER:validation
        mixer calibrate runs/flowers flowers --data FOLDER:validation --accuracy 0.98
        mixer calibrate mixer_b16.i1k b16 --data imagenet:validation --unsure-below 0.5
    """

    data: str
    """Labelled images, as in `mixer evaluate`."""
    accuracy: Fraction | None = None
    """Choose the threshold that answers the most images with at least this accuracy."""
    unsure_below: Fraction | None = None
    """The threshold itself: below this probability the answer is "unsure"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        exclusive(accuracy=self.accuracy, unsure_below=self.unsure_below)


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(MeasureOptions):
    """Options shared by the commands that use frozen features."""

    cache: str | None = None
    """Folder to cache features in; the command defaults to features/ in the download cache."""
    no_cache: bool = False
    """Neither read nor write cached features."""


@dataclass(frozen=True, kw_only=True)
class FewShotOptions(FeatureOptions):
    """Measure how good a model's features are, given a few labelled images per class.

    A linear classifier is fitted to frozen features of a few training images and evaluated on all
    test images. The model itself is not trained and needs no head.

    Examples:
        mixer few-shot runs/mine --data FOLDER
        mixer few-shot mixer_b16.i21k --data FLOWERS PETS --shots 1 5 --random-baseline
        mixer few-shot runs/mine --data FOLDER --protocol scenic --output few_shot.json
    """

    data: tuple[str, ...] = field(metadata={"metavar": "SOURCE ..."})
    """One or more sources with a train and a test (or validation) split."""
    shots: tuple[Positive, ...] = (1, 5, 10, 25)
    """Training images per class; a class with fewer uses all of them."""
    protocol: Literal["big_vision", "scenic"] = "big_vision"
    """big_vision (random draws, one l2) or the older scenic (the first images of each class, and
    the best of 30 l2 values on the test images)."""
    seeds: tuple[Natural, ...] = (0, 1, 2)
    """Seeds of big_vision's random draws; their mean is reported."""
    l2: Annotated[float, Interval(gt=0, lt=inf)] = 1024.0
    """L2 penalty of big_vision."""
    random_baseline: bool = False
    """Also measure the same architecture with random weights (seed 0)."""
    resize: Resize = "resize-crop"
    """resize-crop (Google's few-shot evaluation), resmall-crop or squash."""
    output: str | None = None
    """Write all numbers to a .json file; - is standard output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "shots", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                what = f"{name} needs one value or more, each once, got {values}"
                raise UserError(what, where=name, code="duplicates")


@dataclass(frozen=True, kw_only=True)
class LabelMistakesOptions(FeatureOptions):
    """Find images whose label is probably wrong.

    Any model will do whose features separate the classes; its own classes do not matter. Features
    of a model trained on these very labels find fewer mistakes than those of another.

    Examples:
        mixer data mistakes mixer_b16.i21k --data FOLDER
        mixer data mistakes runs/mine --data FOLDER --output suspects
        mixer train --data FOLDER --exclude suspects/exclude.txt
    """

    data: str
    """A source with labels; all its splits, or the one named by :train, :validation or :test."""
    top: Natural = 20
    """Number of images to print."""
    output: str | None = None
    """Folder for mistakes.csv (all images, ranked), mistakes.png (the first) and exclude.txt (the
    suspected images, for exclude of training)."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(Options):
    """Measure images per second, latency, memory and the fraction of the machine's peak.

    A model is a name from `mixer models` or `mixer models --weights`, timm:NAME, a run folder or a
    weights file; weights are random where only an architecture is named, which does not affect the
    speed. Several models are held in memory together and take turns, so that background load
    affects all of them alike.

    Examples:
        mixer benchmark mixer_s32
        mixer benchmark mixer_s16 mixer_b16 runs/mine --output benchmark.json
        mixer benchmark mixer_b16 timm:vit_base_patch16_224 --batch-sizes 1 8 32
        mixer benchmark mixer_s16 --mode training --precision float32
        mixer benchmark mixer_s16 --set token_mixing=untied --batch-sizes 8
        mixer benchmark --recipe imagenet_b16
    """

    mode: Literal["inference", "training"] = "inference"
    """inference, or training (forward, softmax loss, backward and AdamW on random images)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Precision = "auto"
    """Precision of matrix products; auto uses the fastest that the device supports."""
    compile: bool = False
    """Use torch.compile; compilation time is not counted."""
    image_size: ImageSize | None = None
    """Image size in pixels; defaults to the model's own."""
    batch_sizes: tuple[Annotated[int, Interval(ge=1, le=LARGEST_BATCH)], ...] | None = None
    """Batch sizes; by default they double while throughput rises and memory and the budget
    allow."""
    seconds: Seconds = 2.0
    """Seconds to time each batch size of each model, and the latency."""
    rounds: Annotated[int, Interval(ge=1, le=1000)] = 5
    """Rounds to split these seconds into; models take turns and the median counts."""
    budget: Seconds = 30.0
    """Most seconds to spend per model while batch sizes double."""
    recipe: str | None = None
    """Instead of models: estimate the days a recipe (docs/recipes.md) takes on this device."""
    images: Positive | None = None
    """Number of training images of the recipe, if its data set's size is not known."""
    threads: Positive | None = None
    """CPU threads; by default torch's choice, and one for a small batch."""
    settings: Repeated = field(default=(), metadata={"flag": "set", "metavar": "KEY=VALUE"})
    """Override a field of the architectures, e.g. token_mixing=untied; repeatable."""
    output: str | None = None
    """Write all numbers to a .json file; - is standard output."""
    overwrite: bool = False
    """Replace existing files."""

    def __post_init__(self) -> None:
        sizes = self.batch_sizes
        if sizes is not None and (not sizes or len(set(sizes)) < len(sizes)):
            raise UserError(f"batch_sizes needs one or more, each once, got {sizes}")
        needs({"images": self.images}, "recipe", self.recipe)
        exclusive(recipe=self.recipe, settings=self.settings)


@dataclass(frozen=True, kw_only=True)
class InspectOptions(SizeOptions):
    """Look inside a model: what its token-mixing units have learned, and what one image excites.

    Examples:
        mixer inspect runs/flowers
        mixer inspect runs/flowers --output inside --compare random
        mixer inspect mixer_b16.i21k --output inside --layers all
        mixer inspect runs/flowers --output inside --image photo.jpg
    """

    output: Path | None = None
    """Folder for figures 5, 6 and 7 of the paper and all numbers; without it they are printed."""
    overwrite: bool = False
    """Replace existing files."""
    compare: Any = field(default=None, metadata={"type": str | None})  # or a model
    """Another model to compare with; random is the same architecture with random weights."""
    seed: int = 0
    """Seed of the random weights."""
    layers: tuple[int, ...] | Literal["all"] | None = field(
        default=None, metadata={"metavar": "N ...|all"}
    )
    """Layers in figure 6, counted from 1, or all; defaults to the first three."""
    image: Path | None = None
    """An image: map what units read and write, and which regions the prediction depends on."""
    device: str = "auto"
    """Device for the image: auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers == ():
            raise UserError("layers is empty", fix="Give numbers from 1", code="out-of-range")
        needs({"layers": self.layers}, "output", self.output)
