"""`am.benchmark` and `mixer benchmark`: images per second, latency, operations and memory.

The paper's throughput (section 3, Tables 2 and 3) is the images per second at that batch size of a
sweep which gives most.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from allmlp.console import Reporter, table
from allmlp.environment import environment_info
from allmlp.errors import UserError, at_least, between, near_names, needs, plural
from allmlp.evaluation.result_file import check_result_path, describe, measurement, save_result
from allmlp.io import STANDARD_OUTPUT, check_not_inputs, expand
from allmlp.models.catalog import create_model, list_models
from allmlp.models.inference import Inference, evaluating
from allmlp.models.layers import ImageClassifier, count_parameters
from allmlp.options import ImageSize, Options, Precision, Repeated, assignments, make
from allmlp.runtime.device import (
    can_compile,
    check_bfloat16,
    check_has_weights,
    choose_device,
    fast_precision,
    free_memory,
    step_threads,
    threads_for,
    torch_settings,
)
from allmlp.training.cost import num_images_seen
from allmlp.training.recipes import recipe as recipe_config
from allmlp.weights.checkpoints import find_checkpoint, list_checkpoints
from allmlp.weights.load import files_of, load_model

LARGEST_BATCH = 2**16
_BATCH = 64  # by which "auto" judges whether a model is small, unless batch sizes are chosen
_RISE = 1.01  # a rate less than one per cent above the best so far counts as no rise
_SMALL_BATCH = 8  # tried before a larger one whose memory is unknown
_USABLE = 0.8  # of the free memory; other programs need some
_PEAK_SECONDS = 2.0
# (rows, inputs, outputs) of a dense layer: those of the channel mixing of Mixer-B/16 and L/16 with
# 8 and 16 images, and square ones. A GPU takes larger ones to be busy.
_SHAPES = {
    "cpu": ((1568, 768, 3072), (3136, 1024, 4096), (2048, 2048, 2048), (1024, 4096, 4096)),
    "cuda": ((25088, 768, 3072), (50176, 1024, 4096), (8192, 8192, 8192), (16384, 4096, 4096)),
}
# Recipes by the beginning of their names -> training images, classes, where the numbers are from.
_DATA = {
    "imagenet_": (1_281_167, 1000, "ImageNet-1k's training images"),
    "imagenet21k_": (14_000_000, 21_843, "ImageNet-21k, the paper's round number"),
    "jft_": (300_000_000, 18_291, "JFT-300M, the paper's round number"),
    "cifar10": (45_000, 10, "CIFAR-10 less the tenth that is held out"),
    "digits": (1_259, 10, "the scikit-learn digits' training images"),
}
Build = Callable[[], ImageClassifier]


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(Options):
    """Measure images per second, latency, memory and the fraction of the machine's peak.

    Models are names of `mixer models` or timm:NAME (random weights: the speed is the same), run
    folders, weights files, names of `mixer models --weights`. Several take turns, so that a
    disturbance falls on all of them; all are in memory together. Ctrl-C ends early and prints what
    was measured until then.

    Examples:
        mixer benchmark mixer_s32
        mixer benchmark mixer_s16 mixer_b16 runs/mine --output benchmark.json
        mixer benchmark mixer_b16 timm:vit_base_patch16_224 --batch-sizes 1 8 32
        mixer benchmark mixer_s16 --mode training --precision float32
        mixer benchmark mixer_s16 --set token_mixing=untied --batch-sizes 8
        mixer benchmark --recipe imagenet_b16
    """

    mode: Literal["inference", "training"] = "inference"
    """inference, or training: forward, softmax loss, backward and AdamW on random images."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """Of the matrix products; auto takes what the device is fast at."""
    compile: bool = False
    """Use torch.compile; the time that compiling takes is not counted."""
    image_size: ImageSize | None = None
    """Another size than the model's own."""
    batch_sizes: tuple[int, ...] | None = None
    """Images per step; they double while the rate rises, memory and the budget last, if not given."""  # noqa: E501
    seconds: float = 2.0
    """Timed at each batch size of each model, and for the latency."""
    rounds: int = 5
    """Into which these seconds are cut, and in which models take turns; their median counts."""
    budget: float = 30.0
    """Seconds that the doubling may take for each model."""
    recipe: str | None = None
    """A name of docs/recipes.md: the days that it takes on this device, by its training step; in place of models."""  # noqa: E501
    images: int | None = None
    """Training images of the recipe's data, where they are unknown."""
    threads: int | None = None
    """Of the CPU; torch's own choice, and one for a small batch, if not given."""
    settings: Repeated = field(default=(), metadata={"flag": "set", "metavar": "KEY=VALUE"})
    """A field of the architectures, such as token_mixing=untied; may be given many times."""
    output: str | None = None
    """A .json file for all numbers; - for standard output."""
    overwrite: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        for size in self.batch_sizes or ():
            between("batch_sizes", size, 1, LARGEST_BATCH)
        sizes = self.batch_sizes
        if sizes is not None and (not sizes or len(set(sizes)) < len(sizes)):
            raise UserError(f"batch_sizes needs one or more, each once, got {sizes}")
        between("seconds", self.seconds, 0, 1e6, above=True, below=True)
        between("budget", self.budget, 0, 1e6, above=True, below=True)
        between("rounds", self.rounds, 1, 1000)
        at_least("threads", self.threads, 1)
        at_least("images", self.images, 1)
        needs({"images": self.images}, "recipe", self.recipe)
        if self.recipe is not None and self.settings:
            what = f"settings {' '.join(self.settings)}: the recipe brings its own model"
            raise UserError(what, where="settings", fix="Leave out settings or recipe")


@dataclass(frozen=True)
class Point:
    """The rate at one batch size."""

    batch_size: int
    rates: tuple[float, ...]  # images per second in each round
    step_bytes: int | None  # by which memory rises in a step

    @property
    def images_per_second(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rates)

    def to_json(self) -> dict[str, Any]:
        """Returns the point as JSON values."""
        return {
            "batch_size": self.batch_size,
            "images_per_second": self.images_per_second,
            "spread": [min(self.rates), max(self.rates)],
            "step_memory_bytes": self.step_bytes,
        }


@dataclass(frozen=True)
class Peak:
    """The highest rate of matrix products that was seen."""

    gflops: float  # 1e9 operations per second, a multiply-add counted as two
    shape: tuple[int, int, int]  # (rows, inputs, outputs) of the product that reached it


@dataclass
class ModelBenchmark:
    """What was measured of one model."""

    name: str
    mode: str
    model: dict[str, Any] = field(default_factory=dict)  # see `result_file.describe`
    precision: str = ""
    why: str = ""  # this precision
    flops: int = 0  # of one image's forward pass, by the closed formula of its configuration
    counted: int = 0  # the same, as torch counts while it computes
    points: list[Point] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)  # seconds of single images, one by one
    peak: Peak | None = None
    memory_bytes: int | None = None  # weights, optimizer, batch and step, at the best batch size
    threads: int | None = None  # of the CPU, at the best batch size
    ended: str | None = None  # why no larger batch was tried
    error: str | None = None  # why the model was given up

    @property
    def best(self) -> Point | None:
        """The point with the highest rate: the paper's throughput."""
        return max(self.points, key=lambda point: point.images_per_second, default=None)

    @property
    def images_per_second(self) -> float | None:
        """The highest rate; None where nothing was measured."""
        return None if self.best is None else self.best.images_per_second

    @property
    def fraction_of_peak(self) -> float | None:
        """The operations of the best rate, relative to the machine's own matrix products."""
        rate = self.images_per_second
        if rate is None or self.peak is None:
            return None
        return _passes(self.mode) * self.flops * rate / (self.peak.gflops * 1e9)

    def latency_ms(self) -> dict[str, float] | None:
        """Returns the 50th, 90th and 99th percentile of a single image, and the number of runs.

        The nearest rank: a value that was measured. Of fewer than 100 runs p99 is the slowest.
        """
        if not self.latencies:
            return None
        taken = np.percentile(self.latencies, (50, 90, 99), method="inverted_cdf") * 1e3
        names = ("p50", "p90", "p99")
        return {**dict(zip(names, taken.tolist(), strict=True)), "runs": len(self.latencies)}

    def to_json(self) -> dict[str, Any]:
        """Returns all numbers as JSON values."""
        peak = self.peak
        return {
            "name": self.name,
            "model": self.model or {"name": self.name},
            "mode": self.mode,
            "precision": self.precision,
            "threads": self.threads,
            "image_size": self.model.get("image_size"),
            "points": [point.to_json() for point in self.points],
            "best": None if self.best is None else self.best.to_json(),
            "ended": self.ended,
            "error": self.error,
            "latency_ms": self.latency_ms(),
            "flops": {"formula": self.flops, "counted": self.counted},
            "peak": None
            if peak is None
            else {
                "gflops": peak.gflops,
                "shape": list(peak.shape),
                "share": self.fraction_of_peak,
            },
            "memory_bytes": self.memory_bytes,
        }


@dataclass
class Benchmark:
    """A measurement of one or more models that took turns.

    Attributes:
        models: in the order in which they were given.
        device: that computed.
        options: of the measurement.
        threads: of the CPU, at most.
        environment: versions, hardware, date and command.
        interrupted: whether it was stopped before its end.
        recipe: what the recipe takes on this device; None without one.
    """

    models: list[ModelBenchmark]
    device: torch.device
    options: BenchmarkOptions
    threads: int
    environment: dict[str, Any]
    interrupted: bool = False
    recipe: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns a measurement of the kind "throughput", see `evaluation.result_file`."""
        shared = {"compiled": self.options.compile, "device": str(self.device)}
        return measurement(
            "throughput",
            None,
            {
                "interrupted": self.interrupted,
                "seconds": self.options.seconds,
                "rounds": self.options.rounds,
                "memory_is": _memory_is(self.device),
                "models": [{**row.to_json(), **shared} for row in self.models],
                **({} if self.recipe is None else {"recipe": self.recipe}),
                "environment": self.environment,
            },
        )


def _passes(mode: str) -> int:
    return 3 if mode == "training" else 1  # the forward pass and two gradients


def _memory_is(device: torch.device) -> str:
    return "torch's allocations" if device.type == "cuda" else "growth of the resident set"


def benchmark(
    models: Mapping[str, ImageClassifier | Build] | Sequence[str] | str = (),
    options: BenchmarkOptions | None = None,
    *,
    report: Reporter | None = None,
    **fields: Any,
) -> Benchmark:
    """Returns images per second, latency, operations and memory of models that take turns.

    All models are in memory together. Model objects are left as they were given, on the device:
    training steps have the learning rate 0.

    Args:
        models: what `BenchmarkOptions` says; or, by names of your choice, models and functions
            that build one.
        options: all at once.
        report: shows what is being measured; None shows nothing.
        **fields: those of `BenchmarkOptions`.

    Returns:
        What was measured; Ctrl-C ends it early and gives what there is by then.

    Raises:
        UserError: an option is out of range, no such model or device, bfloat16 on a GPU without
            it, no compiler, an exported file, or a model without a head that is to be trained.
    """
    options = make(BenchmarkOptions, options, fields)
    names = [models] if isinstance(models, str) else list(models)
    mode = "training" if options.recipe is not None else options.mode
    device = choose_device(options.device)
    if options.precision == "bfloat16":
        check_bfloat16(device)
    if options.compile and not can_compile(device):
        fix = "Install g++, or leave compile out"
        raise UserError("torch.compile needs a C++ compiler", where="compile", fix=fix)
    if len(set(names)) < len(names) or (options.recipe is None) == (not names):
        what = f"give models, each once, or a recipe; got {names} and {options.recipe}"
        raise UserError(what, where="models", fix="Such as mixer_s32")
    target = check_result_path(options.output, overwrite=options.overwrite)
    builds: dict[str, ImageClassifier | Build] = {}
    recipe = None
    if options.recipe is not None:
        recipe, builds[options.recipe] = _recipe(options.recipe, options, device)
    elif isinstance(models, Mapping):
        builds |= models
    else:
        builds |= {name: _build(name, options, device) for name in names}
        inputs = [file for name in names for file in files_of(name)]
        check_not_inputs([] if target is None else [target], inputs)
    rows = [ModelBenchmark(name, mode) for name in builds]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_settings(device, "float32", options.threads))
        if options.compile:
            stack.enter_context(_compiles_for_every_shape())
        if mode == "inference":  # what autocast has cast is kept until this ends
            stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=False))
        found = Benchmark(
            rows, device, options, torch.get_num_threads(), environment_info(device), recipe=recipe
        )
        try:
            _measure(found, builds, report or Reporter(quiet=True), stack)
        except KeyboardInterrupt:
            found.interrupted = True
            for row in rows:
                if not row.points and row.error is None:
                    row.error = "stopped before it was measured"
    if recipe is not None and rows[0].images_per_second is not None:
        seen = recipe["images_seen"] * (1.0 + recipe["sharpness"])
        recipe["operations"] = round(3 * rows[0].flops * seen)
        recipe["images_per_second"] = rows[0].images_per_second
        recipe["device_days"] = seen / rows[0].images_per_second / 86_400
    if options.output is not None:
        save_result(target, found.to_json())
    return found


# --- the models -----------------------------------------------------------------------------------


def _build(name: str, options: BenchmarkOptions, device: torch.device) -> Build:
    """Returns what builds a model; a name that means nothing is refused at once."""
    overrides = assignments(options.settings)
    if name in list_models() or (name.startswith("timm:") and "." not in name):
        return _new(lambda: create_model(name, options.image_size, **overrides), device)
    if overrides:
        what = f"{options.settings[0]} has no effect on {name}: its weights say what it is"
        raise UserError(what, where="settings", fix="Name an architecture of `mixer models`")
    is_remote = name.startswith(("hf:", "timm:"))
    if not (is_remote or find_checkpoint(name) or expand(name).exists()):
        known = [*list_models(), *list_checkpoints()]
        fix = f"{near_names(name, known)}See `mixer models` and `mixer models --weights`"
        what = f"no model, run folder or file is called {name!r}"
        raise UserError(what, fix=fix, code="unknown-name")
    return lambda: load_model(name, options.image_size)


def _new(create: Build, device: torch.device) -> Build:
    """Returns what builds a model with random weights, after a trial without memory."""
    with torch.device("meta"):
        needed = 4 * count_parameters(create())

    def build() -> ImageClassifier:
        free = free_memory(device)
        if free is not None and needed > 0.9 * free:
            what = f"the weights take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise MemoryError(f"memory: {what}")
        return create()

    return build


def _recipe(
    name: str, options: BenchmarkOptions, device: torch.device
) -> tuple[dict[str, Any], Build]:
    """Returns what is known of a recipe before it is timed, and what builds its model."""
    config = recipe_config(name)
    model, optimizer = config.model, config.optimizer
    if not model.name:
        what = f"the recipe {name} fine-tunes a model of your choice and names none"
        fix = "Benchmark that model with mode training: images per second of a step"
        raise UserError(what, where="recipe", fix=fix)
    known = next((row for start, row in _DATA.items() if name.startswith(start)), None)
    images, classes, data = known or (None, 1000, "")
    if options.images is not None:
        images, data = options.images, "as given"
    if images is None and config.steps is None:
        what = f"how many training images {name} has is unknown"
        raise UserError(what, where="recipe", fix="Set images")
    if config.steps is not None:
        data = plural(config.steps, "step")
    else:
        data = f"{plural(images or 0, 'image')} ({data})"
    recipe = {
        "name": config.recipe,
        "images_seen": num_images_seen(config, images or 0),
        "data": data,
        "epochs": config.epochs,
        "optimizer": optimizer.name,
        "sharpness": 1.0 - optimizer.sam_start if optimizer.sam_rho else 0.0,
        "operations": None,
        "images_per_second": None,
        "device_days": None,
    }
    size = options.image_size or model.image_size
    return recipe, _new(lambda: create_model(model.name, size, classes, **model.overrides), device)


class _Timed:
    """One model on its device, with the batch that it is timed on; `close` restores the model.

    A training step is the forward pass, softmax cross-entropy, the backward pass and a step of
    AdamW at the learning rate 0: all its operations are done, and no weight moves.
    """

    def __init__(
        self, model: ImageClassifier, mode: str, precision: str, *, compile: bool = False
    ) -> None:
        self.model, self.mode, self.precision = model, mode, precision
        self.device = next(model.parameters()).device
        self.trained = [value for value in model.parameters() if value.requires_grad]
        self.images: Tensor | None = None
        self.labels: Tensor | None = None
        self._was_training = model.training
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self._gradients = [value.grad for value in self.trained]
        self._woken: list[Tensor] = []
        self.optimizer: torch.optim.Optimizer | None = None
        if mode == "training":
            if not model.config.num_classes or not self.trained:
                lacks = "parameters that are trained" if model.config.num_classes else "a head"
                what = f"a training step needs {lacks}, and this model has none"
                raise UserError(what, where=model.config.summary(), fix="Take mode inference")
            self._wake_head()
            self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.1, fused=True)
        model.train(mode == "training")
        self._network: Any = torch.compile(model, dynamic=False) if compile else model
        packs = mode == "inference" and not compile
        # What predict and evaluate compute with.
        self.inference = Inference(model, precision) if packs else None

    def prepare(self, batch_size: int) -> None:
        """Draws a batch of random images and labels."""
        self.images = self.labels = None
        config, random = self.model.config, torch.Generator(self.device).manual_seed(0)
        size = (batch_size, config.in_channels, *config.image_size)
        self.images = torch.randn(size, generator=random, device=self.device)
        if self.mode == "training":
            classes, shape = config.num_classes, (batch_size,)
            self.labels = torch.randint(classes, shape, generator=random, device=self.device)

    def threads(self, batch_size: int) -> int:
        """Returns the CPU threads that compute a step."""
        return threads_for(_passes(self.mode) * self.model.config.flops * batch_size)

    def step(self) -> None:
        """Computes one step; a GPU may still be at work."""
        assert self.images is not None
        if self.inference is not None:
            self.inference.logits(self.images)
            return
        training, half = self.mode == "training", self.precision == "bfloat16"
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=half)
        if not training:
            with torch.no_grad(), autocast:
                self._network(self.images)
            return
        assert self.optimizer is not None
        assert self.labels is not None
        self._drop_gradients()
        with autocast:
            logits = self._network(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()

    def seconds(self, least: float) -> float:
        """Returns the mean seconds of a step, timed for at least so long."""
        assert self.images is not None
        threads = self.threads(len(self.images))
        timer = Timer("step()", globals={"step": self.step}, num_threads=threads)
        return timer.blocked_autorange(min_run_time=least).mean

    def run(self) -> None:
        """Computes one step to its end, with the threads of one that is timed."""
        assert self.images is not None
        operations = _passes(self.mode) * self.model.config.flops * len(self.images)
        with step_threads(self.device, operations):
            self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def step_bytes(self) -> int | None:
        """Runs one step and returns by how much memory rose; None where that is unknown."""
        self._drop_gradients()
        return peak_growth(self.run, self.device)

    def free_memory(self) -> int | None:
        """Returns the bytes that are free on the device, on a GPU with what torch keeps."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return free_memory(self.device)

    def state_bytes(self) -> int:
        """Returns the bytes between steps: weights, buffers, the optimizer's, the packed weights.

        In bfloat16 autocast keeps the weights a second time.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, Tensor)]
        total = sum(value.nbytes for value in tensors)
        half, packed = self.precision == "bfloat16", self.inference and self.inference.packed
        if self.mode == "inference" and (half or packed):
            weights = (value.numel() for value in self.model.parameters() if value.dim() > 1)
            total += (2 if half else 4) * sum(weights)
        return total

    def release(self) -> None:
        """Forgets the batch and the gradients."""
        self.images = self.labels = None
        self._drop_gradients()

    def close(self) -> None:
        """Restores mode, buffers, gradients, and a head that was all zeros."""
        self.release()
        self.optimizer = self.inference = None
        with torch.no_grad():
            for weight in self._woken:
                weight.zero_()
            for buffer, before in self._buffers:
                buffer.copy_(before)
        for parameter, gradient in zip(self.trained, self._gradients, strict=True):
            parameter.grad = gradient
        self.model.train(self._was_training)

    def _drop_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = None

    @torch.no_grad()
    def _wake_head(self) -> None:
        """Gives kernels that are all zeros small values: through them no gradient would come back.

        With zeros for gradients a GPU draws less power and is faster than it is in training.
        """
        random = torch.Generator().manual_seed(0)
        for parameter in self.trained:
            if parameter.dim() > 1 and not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=random))
                self._woken.append(parameter)


# --- the measurement ------------------------------------------------------------------------------


def _measure(
    found: Benchmark,
    builds: Mapping[str, ImageClassifier | Build],
    report: Reporter,
    stack: contextlib.ExitStack,
) -> None:
    timed: dict[str, _Timed] = {}
    reserved = 0  # bytes that training steps will take and keep
    for row in found.models:
        _show_progress(report, f"{row.name}, building")
        with _errors_of(row):
            given = builds[row.name]
            model = given if isinstance(given, ImageClassifier) else given()
            check_has_weights(model)
            model = model.to(found.device)
            row.model, row.flops = describe(model), model.config.flops
            row.precision, row.why = _precision(row, found)
            if row.mode == "training":
                weights = sum(value.nbytes for value in model.parameters())
                reserved += 2 * weights
                free = free_memory(found.device)
                if free is not None and reserved + weights > 0.9 * free:
                    needed = f"gradients and AdamW of the models so far: {reserved + weights:.2g}"
                    raise MemoryError(f"memory: {needed} bytes, {free:.2g} are free")
            row.counted = count_flops(model)
            one = _Timed(model, row.mode, row.precision, compile=found.options.compile)
            stack.callback(one.close)
            timed[row.name] = one
    rows = [row for row in found.models if row.name in timed]
    _measure_peaks(rows, found.device, report)
    try:
        _sweep(rows, timed, found.options, report)
        if rows and rows[0].mode == "inference":
            _time_latency(rows, timed, found.options, report)
    finally:
        for row in rows:
            if row.best is not None:
                size, one = row.best.batch_size, timed[row.name]
                row.threads = one.threads(size)
                if row.best.step_bytes is not None:
                    config = one.model.config
                    image = 4 * config.in_channels * math.prod(config.image_size)
                    row.memory_bytes = one.state_bytes() + size * image + row.best.step_bytes
    _measure_peaks(rows, found.device, report)


def _precision(row: ModelBenchmark, found: Benchmark) -> tuple[str, str]:
    if found.options.precision != "auto":
        return found.options.precision, "chosen"
    batch = max(found.options.batch_sizes or (_BATCH,))
    return fast_precision(found.device, _passes(row.mode) * row.flops * batch)


def _sweep(
    rows: list[ModelBenchmark],
    timed: Mapping[str, _Timed],
    options: BenchmarkOptions,
    report: Reporter,
) -> None:
    """Measures the rate of every model at every batch size.

    The models take turns within a batch size, so that a disturbance falls on all of them. A model
    that fails keeps the reason, and the others go on.
    """
    started = dict.fromkeys(timed, 0.0)  # seconds spent on each model
    doubling = [2**power for power in range(LARGEST_BATCH.bit_length())]
    for size in sorted(options.batch_sizes or doubling):
        for row in rows:
            _check_next(row, timed[row.name], size, started[row.name], options)
        active = [row for row in rows if row.error is None and row.ended is None]
        begun: dict[str, tuple[int | None, list[float]]] = {}
        for row in active:
            _show_progress(report, f"{row.name}, batch {size:,}")
            begin = time.perf_counter()
            with _errors_of(row, timed[row.name]):
                begun[row.name] = _warm_up(timed[row.name], size, is_first=not row.points), []
            started[row.name] += time.perf_counter() - begin
        for _ in range(options.rounds):
            for row in active:
                if row.name in begun and row.error is None and row.ended is None:
                    begin = time.perf_counter()
                    with _errors_of(row, timed[row.name]):
                        seconds = timed[row.name].seconds(options.seconds / options.rounds)
                        begun[row.name][1].append(size / seconds)
                    started[row.name] += time.perf_counter() - begin
        for row in active:
            step_bytes, rates = begun.get(row.name, (None, []))
            timed[row.name].release()
            if len(rates) == options.rounds:
                row.points.append(Point(size, tuple(rates), step_bytes))
                if options.batch_sizes is None and _has_stopped_rising(row.points):
                    row.ended = "the rate no longer rises"


def _check_next(
    row: ModelBenchmark, timed: _Timed, size: int, spent: float, options: BenchmarkOptions
) -> None:
    """Notes why a model does not go on to this batch size."""
    if not row.points or row.error is not None or row.ended is not None:
        return
    last = row.points[-1]
    if options.batch_sizes is None:
        step = size / last.images_per_second
        if spent + max(options.seconds, 2 * options.rounds * step) + 3 * step > options.budget:
            row.ended = f"the budget of {options.budget:g} s"
    row.ended = row.ended or _too_large(timed, size, last.step_bytes, last.batch_size)


def _too_large(timed: _Timed, size: int, growth: int | None, of_size: int) -> str | None:
    """Returns why a batch will not fit, judged by how memory rose with a smaller one.

    On a CPU nothing raises: the system ends a process that takes too much.
    """
    free = timed.free_memory()
    if growth is None or free is None or growth * size / of_size <= _USABLE * free:
        return None
    needed = f"about {growth * size / of_size / 1e9:.1f} GB"
    return f"memory: {size:,} images would take {needed}, {free / 1e9:.1f} GB are free"


def _warm_up(timed: _Timed, size: int, *, is_first: bool) -> int | None:
    """Makes everything ready for a batch size; returns by how much memory rises in a step."""
    if size > _SMALL_BATCH and is_first:  # chosen by the user: nothing is known yet
        timed.prepare(_SMALL_BATCH)
        timed.run()
        reason = _too_large(timed, size, timed.step_bytes(), _SMALL_BATCH)
        if reason is not None:
            raise MemoryError(reason)
    timed.prepare(size)
    timed.run()  # compiles, and lays out what the libraries keep
    return timed.step_bytes()


def _has_stopped_rising(points: Sequence[Point]) -> bool:
    """Returns whether the last two rates are no rise over the best before each of them."""
    rates = [point.images_per_second for point in points]
    return len(rates) > 2 and all(rates[at] < _RISE * max(rates[:at]) for at in (-2, -1))


def _time_latency(
    rows: list[ModelBenchmark],
    timed: Mapping[str, _Timed],
    options: BenchmarkOptions,
    report: Reporter,
) -> None:
    """Times single images one by one, 10 to 1,000 of each model, a part of them in each round."""
    runs: dict[str, int] = {}
    for row in rows:
        if row.error is None and row.points:
            _show_progress(report, f"{row.name}, latency")
            with _errors_of(row, timed[row.name]):
                timed[row.name].prepare(1)
                timed[row.name].run()
                seconds = timed[row.name].seconds(options.seconds / 10)
                runs[row.name] = min(max(math.ceil(options.seconds / seconds), 10), 1000)
    for _ in range(options.rounds):
        for row in rows:
            with _errors_of(row, timed[row.name]):
                for _ in range(math.ceil(runs.get(row.name, 0) / options.rounds)):
                    begin = time.perf_counter()
                    timed[row.name].run()
                    row.latencies.append(time.perf_counter() - begin)
    for row in rows:
        timed[row.name].release()


@contextlib.contextmanager
def _errors_of(row: ModelBenchmark, timed: _Timed | None = None) -> Iterator[None]:
    """Keeps the reason if the block fails; Ctrl-C and a `UserError` go through.

    Where a smaller batch was measured before, too little memory only ends the model's sweep.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a model may raise; the others are to go on
        text = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
        # torch.OutOfMemoryError on a GPU; on a CPU "DefaultCPUAllocator: can't allocate memory".
        if isinstance(error, MemoryError | torch.OutOfMemoryError) and text[:7] != "memory:":
            text = f"out of memory: {text}"
        elif "memory" not in text:
            text = f"{type(error).__name__}: {text}"
        if row.points and "memory" in text:
            row.ended = text
        else:
            row.error = text
        if timed is not None:
            timed.release()


def _measure_peaks(rows: list[ModelBenchmark], device: torch.device, report: Reporter) -> None:
    """Measures the machine's matrix products; called before and after, the better one counts."""
    for precision in sorted({row.precision for row in rows}):
        _show_progress(report, f"matrix products in {precision}")
        found = measure_peak(device, precision, _PEAK_SECONDS)
        for row in rows:
            if row.precision == precision and (row.peak is None or found.gflops > row.peak.gflops):
                row.peak = found


def measure_peak(device: torch.device, precision: str, seconds: float) -> Peak:
    """Returns the rate of the fastest of several large products, through `F.linear`."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    random = torch.Generator(device).manual_seed(0)
    shapes = _SHAPES[device.type]
    found = []
    for shape in shapes:
        rows, inputs, outputs = shape
        x = torch.randn(rows, inputs, generator=random, device=device).to(dtype)
        w = torch.randn(outputs, inputs, generator=random, device=device).to(dtype)
        given = {"F": F, "x": x, "w": w}
        timer = Timer("F.linear(x, w)", globals=given, num_threads=torch.get_num_threads())
        fastest = min(timer.blocked_autorange(min_run_time=seconds / len(shapes)).times)
        found.append(Peak(2 * math.prod(shape) / fastest / 1e9, shape))
    return max(found, key=lambda peak: peak.gflops)


@torch.no_grad()
def count_flops(model: ImageClassifier) -> int:
    """Returns the operations of one image as torch counts them while it computes them.

    Matrix products and convolutions; a multiply-add counts as two.
    """
    device = next(model.parameters()).device
    image = torch.zeros(1, model.config.in_channels, *model.config.image_size, device=device)
    with (
        evaluating(model),
        torch.autocast(device.type, enabled=False),
        FlopCounterMode(display=False) as counter,
    ):
        model(image)
    return counter.get_total_flops()


def peak_growth(act: Callable[[], object], device: torch.device) -> int | None:
    """Runs something and returns by how many bytes memory rose; None where that is unknown.

    On a GPU torch's allocations; on a CPU the resident set, whose highest value Linux keeps and
    lets be reset, after what the allocator kept of earlier work has been given back. Right to about
    a megabyte.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        act()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far becomes what it is now
        resident = _status_bytes("VmRSS")
    except (OSError, KeyError):
        act()
        return None
    act()
    return max(0, _status_bytes("VmHWM") - resident)


def _status_bytes(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


@contextlib.contextmanager
def _compiles_for_every_shape() -> Iterator[None]:
    """Lets torch.compile make one program for each model and batch size.

    By default it gives up after eight, without a word, and computes uncompiled.
    """
    import torch._dynamo.config as settings  # takes seconds

    with settings.patch(
        recompile_limit=2**20, accumulated_recompile_limit=2**20, fail_on_recompile_limit_hit=True
    ):
        yield


# --- what is printed ------------------------------------------------------------------------------

_WIDTH, _POINTS_PER_ROW = 100, 8
_WIDE_SPREAD = 0.2  # from the slowest to the fastest round, relative to the median


def _show_progress(report: Reporter, text: str) -> None:
    """One line on a terminal that changes, nothing in a pipe."""
    if report.console.is_terminal and not report.console.quiet:
        report.console.print(f"\r{text[:90]:<90}", end="\r", markup=False)


def command(models: Sequence[str], options: BenchmarkOptions) -> Benchmark:
    """Measures, and shows on a terminal what is being measured."""
    report = Reporter(stderr=options.output == STANDARD_OUTPUT)
    found = benchmark(models, options, report=report)
    _show_progress(report, "")
    return found


def show(found: Benchmark, options: BenchmarkOptions) -> int:
    """Prints the machine, the models, their batch sizes and notes; returns the exit code."""
    report = Reporter(stderr=options.output == STANDARD_OUTPUT)
    measured = [row for row in found.models if row.points]
    lines = _machine(found)
    if measured:
        lines += ["", *_main_table(measured), "", *_points_table(measured)]
    lines += ["", *_notes(found, measured)]
    if found.recipe is not None:
        lines += _recipe_lines(found.recipe)
    if options.output not in (None, STANDARD_OUTPUT):
        incomplete = " (incomplete)" if found.interrupted else ""
        lines.append(f"written  {expand(options.output)}{incomplete}")
    for line in lines:
        report.say(line)
    if found.interrupted:
        raise KeyboardInterrupt
    return 0 if measured else 2


def _machine(found: Benchmark) -> list[str]:
    info, options, on_cpu = found.environment, found.options, found.device.type == "cpu"
    threads = f", {plural(found.threads, 'thread')} of {plural(info['cores'], 'core')}"
    if any(row.threads not in (None, found.threads) for row in found.models):
        threads += " (1 for small batches)"
    machine = f"{info['processor']}{threads}" if on_cpu else info["device"]
    step = "inference" if found.models[0].mode == "inference" else "a training step (AdamW)"
    lines = [
        f"machine  {machine}, torch {info['packages']['torch']}",
        f"timed    {step}, {'' if options.compile else 'not '}compiled, median of "
        f"{plural(options.rounds, 'round')} in {options.seconds:g} s at each batch size",
    ]
    for precision in sorted({row.precision for row in found.models if row.peak}):
        rows = [row for row in found.models if row.precision == precision]
        peak = rows[0].peak
        if peak is not None:
            (m, k, n), why = peak.shape, ", ".join(sorted({row.why for row in rows}))
            rate = f"{peak.gflops:,.0f} GFLOP/s, {m}x{k} by {k}x{n}"
            lines.append(f"peak     {precision} ({why}): {rate}")
    return lines


def _main_table(measured: list[ModelBenchmark]) -> list[str]:
    headers = ["model", "px", "GFLOPs", "images/s", "spread", "batch", "of peak", "GB"]
    has_latency = any(row.latencies for row in measured)
    headers += ["p50 ms", "p90", "p99", "runs"] if has_latency else []
    cells = []
    for row in measured:
        best, fraction, memory = row.best, row.fraction_of_peak, row.memory_bytes
        assert best is not None
        height, width = row.model["image_size"]
        line = [
            row.name,
            str(height) if height == width else f"{height}x{width}",
            _digits(row.flops / 1e9),
            _digits(best.images_per_second),
            f"{_spread(best.rates):.0%}",
            f"{best.batch_size:,}",
            "-" if fraction is None else f"{fraction:.0%}",
            "-" if memory is None else f"{memory / 1e9:.2f}",
        ]
        if has_latency:
            times = row.latency_ms()
            line += (
                ["-"] * 4 if times is None else [_digits(times[p]) for p in ("p50", "p90", "p99")]
            )
            line += [] if times is None else [str(int(times["runs"]))]
        cells.append(line)
    return _fitted(headers, cells)


def _fitted(headers: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table; names that make it too wide keep the end, which tells paths apart."""
    lines = table(headers, rows)
    longest = max(len(row[0]) for row in rows)
    most = longest - max(0, max(len(line) for line in lines) - _WIDTH)
    short = [row[0] if len(row[0]) <= most else f"...{row[0][3 - most :]}" for row in rows]
    return table(headers, [[name, *row[1:]] for name, row in zip(short, rows, strict=True)])


def _digits(value: float) -> str:
    """Three digits at least: 0.0312, 4.00, 31.4, 1,384."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _spread(rates: tuple[float, ...]) -> float:
    return (max(rates) - min(rates)) / statistics.median(rates)


def _points_table(measured: list[ModelBenchmark]) -> list[str]:
    """The rate of each model at each batch size, as many tables as the width wants."""
    sizes = sorted({point.batch_size for row in measured for point in row.points})
    lines = []
    for start in range(0, len(sizes), _POINTS_PER_ROW):
        shown = sizes[start : start + _POINTS_PER_ROW]
        cells = []
        for row in measured:
            rates = {point.batch_size: _digits(point.images_per_second) for point in row.points}
            if any(size in rates for size in shown):
                cells.append([row.name, *(rates.get(size, "") for size in shown)])
        lines += _fitted(["images/s at batch", *(f"{size:,}" for size in shown)], cells)
    return lines


def _notes(found: Benchmark, measured: list[ModelBenchmark]) -> list[str]:
    training = found.models[0].mode == "training"
    times = " x 3 passes" if training else ""
    lines = [f"of peak: GFLOPs of one image{times} x images/s, relative to the machine's matmuls."]
    if any(row.memory_bytes is not None for row in measured):
        kept = "weights, AdamW's state" if training else "weights"
        lines.append(f"GB: {kept}, the batch, and what a step takes ({_memory_is(found.device)}).")
    agree = True
    for row in measured:
        assert row.best is not None
        if row.ended is not None:
            last = row.points[-1].batch_size
            lines.append(f"note     {row.name}: no batch above {last:,}: {row.ended}")
        spread = _spread(row.best.rates)
        if spread > _WIDE_SPREAD:
            what = f"rounds differ by {spread:.0%}: the machine was busy, measure again"
            lines.append(f"note     {row.name}: {what}")
        if abs(row.counted - row.flops) > 0.01 * row.flops:
            agree = False
            counted = f"{row.counted / 1e9:.4g} GFLOPs counted, {row.flops / 1e9:.4g} by formula"
            lines.append(f"note     {row.name}: {counted}")
    if measured and agree:
        lines.append("GFLOPs: by the closed formula; torch's own count agrees within 1 %.")
    lines += [f"failed   {row.name}: {row.error}" for row in found.models if row.error]
    if found.interrupted:
        lines.append("stopped  before the end: this is what was measured until then")
    return lines


def _recipe_lines(recipe: dict[str, Any]) -> list[str]:
    if recipe["device_days"] is None:
        return []
    epochs = recipe["epochs"]
    length = f"{plural(epochs, 'epoch')} of {recipe['data']}" if epochs else recipe["data"]
    sam = recipe["sharpness"]
    twice = f", {sam:.0%} of them twice (sharpness-aware)" if sam else ""
    rate, days = _digits(recipe["images_per_second"]), _digits(recipe["device_days"])
    mantissa, _, exponent = f"{recipe['operations']:.1e}".partition("e")
    lines = [
        "",
        f"recipe   {recipe['name']}: {length}, {plural(recipe['images_seen'], 'image')}{twice}",
        f"cost     {mantissa}e{int(exponent)} operations; at {rate} images/s {days} days of this "
        "device",
        "         The step alone: reading images, evaluation and checkpoints are not in it.",
    ]
    if recipe["optimizer"] != "adamw":
        what = f"the recipe's optimizer is {recipe['optimizer']}, timed was AdamW"
        lines.append(f"note     {what}")
    return lines
