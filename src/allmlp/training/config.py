"""Settings of a run: frozen dataclasses, JSON serialisation, and `--set section.name=value`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from allmlp.errors import UserError, near_names, one_of, plural
from allmlp.options import (
    OptionError,
    Options,
    Precision,
    ResizeWeights,
    assigned,
    literal,
    validated,
)

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")  # see `loggers`
VERSION = 2  # of config.json; in version 1 choices had no settings of their own, see `_RENAMED`


class Rule:
    """A rule of pydantic, which is imported only to check values: `--help` does without it."""

    def __init__(self, **field: Any) -> None:
        self.field = field

    def __get_pydantic_core_schema__(self, kind: Any, handler: Any) -> Any:
        from pydantic import Field, InstanceOf

        ruled = Annotated[kind, Field(**self.field)] if self.field else InstanceOf[kind]
        return handler.generate_schema(ruled)


Flag: TypeAlias = Annotated[bool, Rule(strict=True)]
Real: TypeAlias = Annotated[float, Rule(strict=True, allow_inf_nan=False)]
Text: TypeAlias = Annotated[str, Rule()]  # paths may contain bytes that are not UTF-8
Count: TypeAlias = Annotated[int, Rule(strict=True, ge=1)]
Natural: TypeAlias = Annotated[int, Rule(strict=True, ge=0)]
Positive: TypeAlias = Annotated[float, Rule(strict=True, allow_inf_nan=False, gt=0)]
NonNegative: TypeAlias = Annotated[float, Rule(strict=True, allow_inf_nan=False, ge=0)]
Fraction: TypeAlias = Annotated[float, Rule(strict=True, ge=0, le=1)]
PositiveFraction: TypeAlias = Annotated[float, Rule(strict=True, gt=0, le=1)]
BelowOne: TypeAlias = Annotated[float, Rule(strict=True, ge=0, lt=1)]
CHOICE = Rule(discriminator="name")


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Options):
    """The network to train."""

    name: Text = "mixer_s16"
    """Architecture, as `mixer models` names it; "" if `weights` bring their own."""
    image_size: Count | tuple[Count, Count] | None = 224
    """Image size in pixels, a number or (H, W); defaults to that of the weights."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Override fields of the architecture; with `weights` only dropout and stochastic_depth."""
    weights: Text | None = None
    """Trained weights to start from, as `load_model` takes them; random weights if not given."""
    resize_weights: ResizeWeights = "auto"
    """How `weights` are resized to another image size, as in `load_model`."""
    train_only: Literal["all", "head", "probe"] = "all"
    """Train all parameters, or only the head. probe fits the head to the frozen features of images
    without augmentation, by logistic regression instead of steps."""
    head_bias: Real = 0.0
    """Initial bias of a new head; about the log of a class's frequency with sigmoid loss."""

    def __post_init__(self) -> None:
        for name in {"name", "image_size", "num_classes"} & self.overrides.keys():
            source = "comes from the data" if name == "num_classes" else f"is model.{name}"
            raise UserError(f"model.overrides.{name} {source}", fix="Leave it out here")
        if self.weights is None:
            if not self.name or self.image_size is None:
                what = "random weights need a name of `mixer models` and an image size"
                raise UserError(what, where="model.name, model.image_size")
            if self.train_only != "all":
                what = f"model.train_only={self.train_only}: all but the head would stay random"
                raise UserError(what, fix="model.weights=CHECKPOINT")
            return
        if self.name:
            what = f"model.name={self.name}: the weights bring their own architecture"
            raise UserError(what, where=f"model.weights={self.weights}", fix="model.name=")
        for name in sorted(self.overrides.keys() - {"dropout", "stochastic_depth"}):
            what = f"model.overrides.{name} cannot change: the weights determine it"
            raise UserError(what, where=f"model.weights={self.weights}", fix="Leave it out")


@dataclass(frozen=True, kw_only=True)
class DataSettings(Options):
    """The images to train on."""

    source: Text = "digits"
    """A folder, list, Parquet files, packed data, arrays, hf:owner/name or digits."""
    holdout: BelowOne | None = None
    """Fraction of each class to hold out for validation; by default the data's own validation
    images, or else a tenth. 0 trains on everything and keeps the last weights."""
    fold: tuple[Count, Count] | None = None
    """Hold out one of several folds of the training and validation images, such as 2 of 5, and keep
    the last weights. `folds` of `mixer train` holds out each in turn."""
    fraction: PositiveFraction = 1.0
    """Fraction of the training images to use, drawn at random; smaller fractions are subsets of
    larger ones."""
    fraction_seed: Natural = 0
    """Seed of that draw."""
    balance: Literal["none", "weights", "sampler"] = "none"
    """How rare classes count: none as they are; weights multiplies the loss of an image by images /
    (classes * images of its class), and with several labels per image the loss where a label is
    present by the images without it / those with it; sampler draws every class equally often."""
    exclude: Text | None = None
    """List of images to exclude, as written by `mixer data check` or `mixer data mistakes`."""
    resize: Literal["resize-crop", "resmall-crop", "squash"] = "resmall-crop"
    """How images are brought to the model's size in evaluation, see `allmlp.preprocessing`."""
    crop: PositiveFraction | None = None
    """Fraction of the resized side to keep in evaluation, also for small images; by default that of
    the weights, or 0.875 with small images enlarged whole."""
    exif_orientation: Flag = True
    """Apply the EXIF orientation; the paper's code does not."""
    permutation: Literal["none", "patches", "pixels"] | None = None
    """Permute the pixels of every image (the paper's figure 4); defaults to that of `weights`."""
    permutation_patch: Count | None = None
    """Side of the patches in pixels, for "patches"."""
    permutation_seed: Natural = 0
    """Seed of the permutation."""
    max_bad: Fraction = 0.01
    """Largest fraction of undecodable images to tolerate. Up to 5 are always tolerated, unless this
    is 0 or they are half of a split or all images of a class."""
    num_workers: Natural | None = None
    """Number of processes that decode images; by default chosen by the size of the data."""
    timeout: NonNegative = 600.0
    """Seconds without a batch after which a worker counts as hung; 0 waits forever."""

    def __post_init__(self) -> None:
        if (self.permutation_patch is None) != (self.permutation != "patches"):
            what = f"data.permutation={self.permutation} with permutation_patch="
            what += f"{self.permutation_patch}: patches, and only they, have a size"
            raise UserError(what, fix="data.permutation=patches data.permutation_patch=16")
        if self.fold is not None and (self.fold[0] > self.fold[1] or self.holdout is not None):
            what = f"data.fold={self.fold} with data.holdout={self.holdout}: a fold, from 1 to the "
            what += "number of folds, is what is held out"
            raise UserError(what, fix="data.holdout=null data.fold=1,5")
        if self.crop is not None and self.resize == "squash":
            what = f"data.crop={self.crop:g} with data.resize=squash, which crops nothing"
            raise UserError(what, fix="data.resize=resmall-crop")


@dataclass(frozen=True, kw_only=True)
class InceptionCrop(Options):
    """A random rectangle."""

    name: Literal["inception"] = "inception"
    area: tuple[Real, Real] = (0.05, 1.0)
    """Smallest and largest fraction of the image's area."""

    def __post_init__(self) -> None:
        if not 0.0 < self.area[0] <= self.area[1] <= 1.0:
            what = "augment.crop.area must be two fractions, 0 < smallest <= largest <= 1, got "
            raise UserError(f"{what}{self.area}", code="out-of-range")


@dataclass(frozen=True, kw_only=True)
class PaddedCrop(Options):
    """Resized as for evaluation, then moved by whole pixels: for small images."""

    name: Literal["padded"] = "padded"
    padding: BelowOne = 0.125
    """Largest shift, as a fraction of the side."""


@dataclass(frozen=True, kw_only=True)
class RandomCrop(Options):
    """Both sides resized to 8/7 of the model's (one over its `crop`), then cropped at random."""

    name: Literal["random"] = "random"


@dataclass(frozen=True, kw_only=True)
class NoCrop(Options):
    """Resized as for evaluation."""

    name: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class AugmentSettings(Options):
    """Random augmentation of the training images, in the order of the fields."""

    crop: Annotated[InceptionCrop | PaddedCrop | RandomCrop | NoCrop, CHOICE] = InceptionCrop()
    flip: Flag = True
    """Flip half of the images horizontally."""
    rotate: Annotated[float, Rule(strict=True, ge=0, le=180)] = 0.0
    """Largest rotation, in degrees."""
    scale: BelowOne = 0.0
    """Largest relative change of width and height."""
    shear: BelowOne = 0.0
    """Largest shear, in pixels per pixel."""
    shift: BelowOne = 0.0
    """Largest shift, as a fraction of the side."""
    elastic: BelowOne = 0.0
    """Standard deviation of an elastic deformation, as a fraction of the side."""
    randaugment: Annotated[float, Rule(strict=True, ge=0, le=30)] | None = None
    """Magnitude of RandAugment, up to about 20; 0 or null is off."""
    randaugment_layers: Annotated[int, Rule(strict=True, ge=1, le=16)] = 2
    """RandAugment operations per image."""
    random_erasing: Fraction = 0.0
    """Probability of random erasing with noise."""
    mixup: NonNegative = 0.0
    """Mixup alpha; 0 is off."""
    cutmix: NonNegative = 0.0
    """CutMix alpha; 0 is off. With mixup as well, each step uses one of them at random."""
    mix_until: PositiveFraction = 1.0
    """Fraction of the run after which mixup and CutMix are switched off."""


@dataclass(frozen=True, kw_only=True)
class Cosine(Options):
    """Decay along half a cosine."""

    final_lr_fraction: Fraction = 0.0
    """Learning rate at the last step, as a fraction of the peak."""
    name: Literal["cosine"] = "cosine"


@dataclass(frozen=True, kw_only=True)
class Linear(Cosine):
    """Linear decay."""

    name: Literal["linear"] = "linear"  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclass(frozen=True, kw_only=True)
class Steps(Options):
    """Multiplies the learning rate by `decay_factor` after each step in `decay_at`."""

    name: Literal["steps"] = "steps"
    decay_at: tuple[Real, ...] = (0.3, 0.6, 0.9)
    """Where the learning rate drops, ascending: fractions of the run, or step numbers."""
    decay_factor: Annotated[float, Rule(strict=True, gt=0, lt=1)] = 0.1

    def __post_init__(self) -> None:
        are_fractions = all(0.0 < at < 1.0 for at in self.decay_at)
        are_steps = all(at >= 1.0 and at == round(at) for at in self.decay_at)
        ascend = all(a < b for a, b in itertools.pairwise(self.decay_at))
        if not (self.decay_at and ascend and (are_fractions or are_steps)):
            rule = "ascending fractions below 1, or ascending whole numbers of steps"
            what = f"optimizer.schedule.decay_at must be {rule}, got {self.decay_at}"
            raise UserError(what, code="out-of-range")


Schedule: TypeAlias = Annotated[Cosine | Linear | Steps, CHOICE]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Options):
    """Settings shared by all optimizers."""

    name: str
    learning_rate: Positive = 1e-3
    """Peak learning rate, after the warm-up. Muon's updates are scaled so that AdamW's learning
    rates fit."""
    clip_norm: NonNegative = 1.0
    """Global norm to clip gradients to; 0 is off."""
    schedule: Schedule = Cosine()
    warmup: NonNegative = 0.1
    """Length of the linear warm-up: a fraction of the run if below 1, else steps."""
    ema_decay: BelowOne = 0.0
    """Decay of the EMA of the weights, which is then evaluated and saved; 0 is off."""
    sam_rho: NonNegative = 0.0
    """Radius of sharpness-aware minimisation, which doubles the cost; 0 is off."""
    sam_start: BelowOne = 0.0
    """Fraction of the run after which it starts."""

    def __post_init__(self) -> None:
        if self.warmup > 1 and self.warmup != round(self.warmup):
            what = f"optimizer.warmup must be a fraction below 1 or whole steps, got {self.warmup}"
            raise UserError(what, code="out-of-range")


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerSettings):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    weight_decay: NonNegative = 0.1
    """Weight decay, multiplied by the learning rate; kernels only."""
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999


@dataclass(frozen=True, kw_only=True)
class SGD(OptimizerSettings):
    """Stochastic gradient descent with momentum, without weight decay."""

    name: Literal["sgd"] = "sgd"
    momentum: BelowOne = 0.9


@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Orthogonalised momentum for the matrices in the blocks, AdamW for all other weights."""

    name: Literal["muon"] = "muon"  # pyright: ignore[reportIncompatibleVariableOverride]
    momentum: BelowOne = 0.95
    """Momentum of the matrices; beta1 and beta2 are AdamW's."""


Optimizer: TypeAlias = Annotated[AdamW | SGD | Muon, CHOICE]


@dataclass(frozen=True, kw_only=True)
class Softmax(Options):
    """Softmax cross-entropy."""

    name: Literal["softmax"] = "softmax"
    label_smoothing: BelowOne = 0.0
    """Fraction of each target to spread over all classes."""


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Options):
    """Sigmoid cross-entropy, summed over the classes; the paper's pre-training loss."""

    name: Literal["sigmoid"] = "sigmoid"


# Setting -> its choices, which have settings of their own; `--set augment.crop=none` selects.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "augment.crop": (InceptionCrop, PaddedCrop, RandomCrop, NoCrop),
    "optimizer": (AdamW, SGD, Muon),
    "optimizer.schedule": (Cosine, Linear, Steps),
    "loss": (Softmax, Sigmoid),
}
_OF_ONE = ("weight_decay", "beta1", "beta2", "momentum")  # optimizer
# Aliases of settings, either shorter or from version 1.
_RENAMED = {
    **{f"{key}.name": key for key in _CHOICES},
    "augment.crop_area": "augment.crop.area",
    "augment.crop_padding": "augment.crop.padding",
    "augment.erasing": "augment.random_erasing",
    "data.without": "data.exclude",
    "label_smoothing": "loss.label_smoothing",
    "model.growth": "model.resize_weights",
    "model.trained": "model.train_only",
    "optimizer.average": "optimizer.ema_decay",
    "optimizer.decay_at": "optimizer.schedule.decay_at",
    "optimizer.decay_factor": "optimizer.schedule.decay_factor",
    "optimizer.final": "optimizer.schedule.final_lr_fraction",
    "optimizer.final_lr_fraction": "optimizer.schedule.final_lr_fraction",
    "optimizer.sharpness": "optimizer.sam_rho",
    "optimizer.sharpness_from": "optimizer.sam_start",
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """All settings of a run."""

    recipe: Text = "digits"
    """Name of the recipe it is based on."""
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    optimizer: Optimizer = AdamW()
    loss: Annotated[Softmax | Sigmoid, CHOICE] = Softmax()
    epochs: Count | None = 100
    """Passes over the training images, unless steps is given."""
    steps: Count | None = None
    """Training steps, instead of epochs."""
    batch_size: Count = 64
    """Images per step, over all processes."""
    micro_batch_size: Count | None = None
    """Images per forward pass, with gradients accumulated. By default all images of a process,
    halved until they fit into memory."""
    evaluate_every: Count = 5
    """Epochs between evaluations on the validation images, or steps if steps is given."""
    best_by: Text = "top1"
    """Metric that chooses the weights in best/, the learning rate of a grid, and the end by
    `patience`: top1, balanced_accuracy, macro_f1, loss or another of evaluation.json."""
    patience: Count | None = None
    """Stop after this many evaluations without improvement."""
    keep_checkpoints: Natural = 2
    """Checkpoints to keep, besides that of the best evaluation. With 0 the run cannot be
    resumed."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; by default one at every evaluation."""
    seed: Annotated[int, Rule(strict=True, ge=0, lt=2**63)] = 0
    """Seed of the weights, the order of the images and all other random numbers."""
    device: Text = "auto"
    """auto, cpu, cuda or mps (an Apple GPU)."""
    num_threads: Count | None = None
    """CPU threads; by default torch's choice, and one for a small model."""
    precision: Precision = "auto"
    """Precision of matrix products; auto uses bfloat16 if the device is fast at it and the model
    large enough to benefit. Weights, LayerNorm and the residual stream stay float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile; auto does for long runs (on a CPU in bfloat16: the tanh GELU alone)."""
    sharding: Literal["none", "full"] = "none"
    """none replicates weights and optimizer state in every process (DDP); full shards them
    (FSDP2)."""
    log: Text = ""
    """Where to log the run as well, with commas between: tensorboard, trackio, wandb, mlflow."""
    output: Text | None = None
    """Run folder; defaults to runs/<date>_<recipe>."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            what = f"epochs={self.epochs} and steps={self.steps}: exactly one sets the run's length"
            raise UserError(what, fix="epochs=N or steps=N")
        why = "needs validation images; data.holdout=0 keeps none"
        if self.data.fold is not None:
            why = "would choose weights by the fold that measures them"
        for name, usual in (("patience", None), ("best_by", "top1")):
            value, measures = getattr(self, name), self.data.holdout == 0.0 or self.data.fold
            if value != usual and measures:
                fix = f"{name}={usual or 'null'}, or other images to choose by"
                raise UserError(f"{name}={value} {why}", fix=fix)
        for name in self.trackers:
            one_of("log", name, TRACKERS)
        if isinstance(self.optimizer, Muon):
            why = "adamw trains the head" if self.model.train_only != "all" else None
            why = "sharding=full splits its matrices" if self.sharding == "full" else why
            if why:
                what = f"optimizer=muon needs whole matrices of the blocks to train, and {why}"
                raise UserError(what, fix="optimizer=adamw")
        if self.model.train_only == "probe":
            asked = {"sharding": self.sharding, "data.balance": self.data.balance}
            given = [f"{name}={value}" for name, value in asked.items() if value != "none"]
            given += [] if isinstance(self.loss, Softmax) else [f"loss={self.loss.name}"]
            if given:
                what = f"model.train_only=probe, which is a softmax regression, with {given[0]}"
                raise UserError(what, fix="Leave it out, or model.train_only=head")

    @property
    def trackers(self) -> list[str]:
        """The names in `log`."""
        return self.log.replace(",", " ").split()

    @property
    def length(self) -> str:
        """Length of the run: "1 epoch" or "1,000 steps"."""
        is_epochs = self.epochs is not None
        return plural(self.epochs or self.steps or 0, "epoch" if is_epochs else "step")

    def images_seen(self, num_images: int) -> int:
        """Returns how many images a run on `num_images` images processes, with repetitions."""
        return (self.epochs or 0) * num_images or (self.steps or 0) * self.batch_size

    def to_json(self) -> dict[str, Any]:
        """Returns all settings as JSON values; the inverse of `from_json`."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> TrainConfig:
        """Returns the configuration of such JSON values; absent settings get their defaults.

        Raises:
            UserError: an unknown setting, an invalid value, or a newer version.
        """
        settings = flat(values)
        version = settings.pop("version", 1)
        if settings.pop("tensorboard", None) is True:  # the setting before `log`
            settings["log"] = "tensorboard"
        if version not in (1, VERSION):
            what = f"the settings have version {version!r}, this program reads up to {VERSION}"
            raise UserError(what, fix="Install the allmlp that wrote them, or a newer one")
        settings = {_RENAMED.get(key, key): value for key, value in settings.items()}
        # Of version 1, where all choices shared one flat list of settings.
        flat_ones = {*_RENAMED.values(), *(f"optimizer.{name}" for name in _OF_ONE)}
        if version == 1 and settings.get("optimizer") == "sgd":
            settings["optimizer.momentum"] = settings.get("optimizer.beta1", 0.9)
        nested = dataclasses.asdict(TrainConfig())
        for key in sorted(settings, key=lambda key: key.count(".")):
            try:
                _put(nested, key, settings[key])
            except OptionError:
                if version != 1 or key not in flat_ones:
                    raise
        return validated(TrainConfig, nested)

    def with_value(self, key: str, value: Any) -> TrainConfig:
        """Returns a copy with the setting "section.name" changed."""
        return self.with_values({key: value})

    def with_values(
        self, changes: Mapping[str, Any], assignments: Iterable[str] = ()
    ) -> TrainConfig:
        """Returns a copy with several settings changed; only the result has to be valid.

        Switching a choice (`optimizer=sgd`) keeps the settings that both have in common.

        Args:
            changes: path of a setting, "section.name" -> value of the right type.
            assignments: "section.name=value", applied after the changes.

        Raises:
            UserError: an unknown setting or an invalid value.
        """
        texts = {_RENAMED.get(key, key): text for key, text in assigned(assignments).items()}
        changes = {_RENAMED.get(key, key): value for key, value in changes.items()}
        changes |= {key: literal(text) for key, text in texts.items()}
        while True:
            try:
                return self._changed(changes)
            except OptionError as error:
                # A folder may be called 2024: text becomes a number only where one is expected.
                text = texts.pop(error.name, None)
                if text is None or error.code == "out-of-range" or changes[error.name] == text:
                    raise
                changes[error.name] = text

    def _changed(self, changes: dict[str, Any]) -> TrainConfig:
        values = dataclasses.asdict(self)
        # First the model: switching it drops the sizes of the recipe, but not those of the user.
        # Then choices, before the settings that belong to them.
        first = ("model.weights", "model.name")
        for key in sorted(changes, key=lambda key: (key not in first, key.count("."))):
            value = changes[key]
            is_other = value is not None and value != getattr(self.model, key[6:], None)
            if key in first and is_other:
                kept = ["dropout", "stochastic_depth"]
                kept += ["gelu", "in_channels"] if key == "model.name" else []
                overrides = values["model"]["overrides"].items()
                values["model"]["overrides"] = {k: v for k, v in overrides if k in kept}
                if key == "model.weights" and self.model.weights is None:
                    values["model"] |= {"name": "", "image_size": None}  # the weights bring theirs
            _put(values, key, value)
        for key, other in (("epochs", "steps"), ("steps", "epochs")):
            if changes.get(key) is not None and other not in changes:
                values[other] = None  # they are mutually exclusive
                is_other = getattr(self, key) is None and isinstance(changes[key], int)
                if is_other and "evaluate_every" not in changes:  # it has the same unit
                    values["evaluate_every"] = max(1, changes[key] // 20)
        return validated(TrainConfig, values)


def setting_names(changes: Iterable[str], assignments: Iterable[str]) -> set[str]:
    """Returns the names of the settings that these change, see `TrainConfig.with_values`."""
    return {_RENAMED.get(key, key) for key in (*changes, *assigned(assignments))}


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    target, (*parents, name) = values, key.split(".")
    for parent in parents:
        if not isinstance(target.get(parent), dict):
            raise _unknown(key)
        target = target[parent]
    if name not in target and parents != ["model", "overrides"]:
        raise _unknown(key)
    if key in _CHOICES and not isinstance(value, dict | Options):
        choices = {choice.name: choice for choice in _CHOICES[key]}
        try:
            own = dataclasses.asdict(choices[one_of(key, value, choices)]())
        except UserError as error:
            raise OptionError(key, error.what, error.fix, error.code) from None
        value = {k: target[name].get(k, v) for k, v in own.items()} | {"name": value}
    target[name] = dataclasses.asdict(value) if isinstance(value, Options) else value


def _unknown(key: str) -> OptionError:
    section, _, name = key.rpartition(".")
    owners = [choice.name for choice in _CHOICES.get(section, ()) if hasattr(choice, name)]
    known = list(flat(TrainConfig().to_json()))
    beside = [other for other in known if section and other.startswith(f"{section}.")]
    near = near_names(name if beside else key, beside or known)
    fix = f"{near}config.json of a run names all settings"
    if owners:
        fix = f"It belongs to {section}={' or '.join(owners)}"
    return OptionError(key, f"unknown setting {key!r}", fix, "unknown-name")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
