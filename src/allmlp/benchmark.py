"""`am.benchmark` and `mixer benchmark`: images per second, latency, FLOPs and memory.

The paper's throughput (section 3, Tables 2 and 3) is the highest rate over a sweep of batch sizes.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from allmlp.console import Reporter, table
from allmlp.environment import environment_info
from allmlp.errors import UserError, near_names, plural
from allmlp.evaluation.options import LARGEST_BATCH, BenchmarkOptions
from allmlp.evaluation.result_file import check_result_path, describe, measurement, save_result
from allmlp.io import STANDARD_OUTPUT, check_not_inputs, expand
from allmlp.models.catalog import create_model, list_models
from allmlp.models.inference import Inference, evaluating
from allmlp.models.layers import ImageClassifier
from allmlp.options import assignments, make
from allmlp.runtime.device import (
    can_compile,
    check_bfloat16,
    choose_device,
    empty_cache,
    fast_precision,
    free_memory,
    step_threads,
    synchronize,
    threads_for,
    torch_settings,
)
from allmlp.training.optim import operations, power
from allmlp.training.recipes import recipe as recipe_config
from allmlp.weights.checkpoints import find_checkpoint, list_checkpoints
from allmlp.weights.load import files_of, load_model, open_model

_BATCH = 64  # where "auto" judges whether a model is small, by default
_RISE = 1.01  # a gain of less than 1% does not count
_SMALL_BATCH = 8  # run first, to estimate the memory of a larger batch
_USABLE = 0.8  # fraction of the free memory; leaves some to other programs
_PEAK_SECONDS = 2.0
_WIDE_SPREAD = 0.2  # slowest to fastest round, relative to the median
# (rows, inputs, outputs) of a dense layer: channel mixing in Mixer-B/16 and L/16 at 8 and 16
# images, and square ones. Saturating a GPU takes larger shapes.
_SHAPES = {
    "cpu": ((1568, 768, 3072), (3136, 1024, 4096), (2048, 2048, 2048), (1024, 4096, 4096)),
    "cuda": ((25088, 768, 3072), (50176, 1024, 4096), (8192, 8192, 8192), (16384, 4096, 4096)),
}
_SHAPES["mps"] = _SHAPES["cuda"]
# Recipe name prefix -> training images, classes, source of the numbers.
_DATA = {
    "imagenet_": (1_281_167, 1000, "ImageNet-1k's training images"),
    "imagenet21k_": (14_000_000, 21_843, "ImageNet-21k, the paper's round number"),
    "jft_": (300_000_000, 18_291, "JFT-300M, the paper's round number"),
    "cifar10": (45_000, 10, "CIFAR-10 less the tenth that is held out"),
    "digits": (1_259, 10, "the digits' training images"),
}
_MEMORY = {
    "cuda": "torch's allocations",
    "cpu": "growth of the resident set",
    "mps": "unknown on an Apple GPU",
}
Build = Callable[[], ImageClassifier]


@dataclass(frozen=True)
class Point:
    """Throughput at one batch size."""

    batch_size: int
    images_per_second: float  # median over the rounds
    spread: tuple[float, float]  # slowest and fastest round
    step_memory_bytes: int | None  # memory growth during a step

    @property
    def relative_spread(self) -> float:
        return (self.spread[1] - self.spread[0]) / self.images_per_second


@dataclass(frozen=True)
class Peak:
    """The highest matmul rate measured."""

    gflops: float  # 1e9 FLOPs per second; a multiply-add counts as two
    shape: tuple[int, int, int]  # (rows, inputs, outputs) of the fastest matmul


@dataclass
class ModelBenchmark:
    """Measurements of one model."""

    name: str
    mode: str
    model: dict[str, Any] = field(default_factory=dict)  # see `result_file.describe`
    precision: str = ""
    why: str = ""  # reason for the precision
    flops: int = 0  # forward pass of one image, from the closed formula for the config
    counted: int = 0  # the same, counted by torch during a forward pass
    points: list[Point] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)  # seconds at batch size 1
    peak: Peak | None = None
    memory_bytes: int | None = None  # weights, optimizer, batch and step at the best batch size
    threads: int | None = None  # CPU threads at the best batch size
    ended: str | None = None  # why the sweep stopped
    error: str | None = None  # why the model failed
    spent: float = 0.0  # seconds spent in the sweep

    @property
    def is_active(self) -> bool:
        """Whether the sweep continues with larger batches."""
        return self.error is None and self.ended is None

    @property
    def best(self) -> Point | None:
        """The point with the highest rate: the paper's throughput."""
        return max(self.points, key=lambda point: point.images_per_second, default=None)

    @property
    def images_per_second(self) -> float | None:
        """The highest rate; None if nothing was measured."""
        return None if self.best is None else self.best.images_per_second

    @property
    def fraction_of_peak(self) -> float | None:
        """FLOPs per second at the best rate, relative to the machine's peak matmul rate."""
        if self.best is None or self.peak is None:
            return None
        step = _passes(self.mode) * self.flops
        return step * self.best.images_per_second / (self.peak.gflops * 1e9)

    def latency_ms(self) -> dict[str, float] | None:
        """Returns the 50th, 90th and 99th percentile for a single image, and the number of runs.

        Nearest-rank percentiles. With fewer than 100 runs, p99 is the slowest.
        """
        if not self.latencies:
            return None
        p50, p90, p99 = np.percentile(self.latencies, (50, 90, 99), method="inverted_cdf") * 1e3
        runs = len(self.latencies)
        return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "runs": runs}

    def to_json(self) -> dict[str, Any]:
        """Returns all numbers as JSON values."""
        names = ("name", "mode", "precision", "threads", "ended", "error", "memory_bytes")
        return {
            **{name: getattr(self, name) for name in names},
            "model": self.model or {"name": self.name},
            "image_size": self.model.get("image_size"),
            "points": [asdict(point) for point in self.points],
            "best": self.best and asdict(self.best),
            "latency_ms": self.latency_ms(),
            "flops": {"formula": self.flops, "counted": self.counted},
            "peak": self.peak and {**asdict(self.peak), "share": self.fraction_of_peak},
        }


@dataclass
class Benchmark:
    """Measurements of one or more models."""

    models: list[ModelBenchmark]  # in the order given
    device: torch.device
    options: BenchmarkOptions
    threads: int  # maximum number of CPU threads
    environment: dict[str, Any]  # versions, hardware, date and command
    interrupted: bool = False
    recipe: dict[str, Any] | None = None  # estimated cost on this device

    def to_json(self) -> dict[str, Any]:
        """Returns a "throughput" result, see `evaluation.result_file`."""
        shared = {"compiled": self.options.compile, "device": str(self.device)}
        numbers = {
            "interrupted": self.interrupted,
            "seconds": self.options.seconds,
            "rounds": self.options.rounds,
            "memory_is": _MEMORY[self.device.type],
            "models": [{**row.to_json(), **shared} for row in self.models],
            **({} if self.recipe is None else {"recipe": self.recipe}),
            "environment": self.environment,
        }
        return measurement("throughput", None, numbers)


def _passes(mode: str) -> int:
    return 3 if mode == "training" else 1  # forward pass, gradients of inputs and of weights


def benchmark(
    models: Mapping[str, ImageClassifier | Build] | Sequence[str] | str = (),
    options: BenchmarkOptions | None = None,
    *,
    report: Reporter | None = None,
    **fields: Any,
) -> Benchmark:
    """Measures images per second, latency, FLOPs and memory.

    Several models are held in memory together and take turns. Model objects are copied first.

    Args:
        models: as in `BenchmarkOptions`; or a dict of names to models or functions that build one.
        options: all options as one object.
        report: shows progress; None shows nothing.
        **fields: fields of `BenchmarkOptions`.

    Returns:
        The measurements; after Ctrl-C, those made so far.

    Raises:
        UserError: an option is out of range, an unknown model or device, bfloat16 on a GPU without
            support, no compiler, an exported file, or training a model without a head.
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
    recipe = None
    if options.recipe is not None:
        recipe, build = _recipe(options.recipe, options, device)
        builds: Mapping[str, ImageClassifier | Build] = {options.recipe: build}
    elif isinstance(models, Mapping):
        builds = models
    else:
        builds = {name: _build(name, options, device) for name in names}
        inputs = [file for name in names for file in files_of(name)]
        check_not_inputs([] if target is None else [target], inputs)
    rows = [ModelBenchmark(name, mode) for name in builds]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_settings(device, "float32", options.threads))
        if options.compile:
            stack.enter_context(_compiles_for_every_shape())
        if mode == "inference":  # keeps autocast's weight cache alive
            stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=False))
        threads = torch.get_num_threads()
        found = Benchmark(rows, device, options, threads, environment_info(device), recipe=recipe)
        try:
            _measure(found, builds, report or Reporter(quiet=True))
        except KeyboardInterrupt:
            found.interrupted = True
            for row in rows:
                if not row.points and row.error is None:
                    row.error = "stopped before it was measured"
    if recipe is not None and (rate := rows[0].images_per_second) is not None:
        config = recipe_config(recipe["name"])
        recipe["operations"] = operations(rows[0].flops, recipe["images_seen"], config.optimizer)
        recipe["images_per_second"] = rate
        seen = recipe["images_seen"] * (1.0 + recipe["sharpness"])
        recipe["device_days"] = seen / rate / 86_400
    if options.output is not None:
        save_result(target, found.to_json())
    return found


# --- models ---------------------------------------------------------------------------------------


def _build(name: str, options: BenchmarkOptions, device: torch.device) -> Build:
    """Returns a function that builds the named model; checks the name first."""
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
    """Returns a function that builds a model with random weights; sizes it on the meta device."""
    with torch.device("meta"):
        needed = 4 * create().num_parameters

    def build() -> ImageClassifier:
        _check_memory("the weights take", needed, device)
        return create()

    return build


def _check_memory(what: str, needed: float, device: torch.device, usable: float = 0.9) -> None:
    """Raises MemoryError early: on a CPU the system would kill the process instead."""
    empty_cache(device)
    free = free_memory(device)
    if free is not None and needed > usable * free:
        raise MemoryError(f"memory: {what} {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def _recipe(
    name: str, options: BenchmarkOptions, device: torch.device
) -> tuple[dict[str, Any], Build]:
    """Returns what is known about a recipe before timing, and a function that builds its model."""
    config = recipe_config(name)
    model, optimizer = config.model, config.optimizer
    if not model.name:
        what = f"the recipe {name} fine-tunes a model of your choice and names none"
        fix = "Benchmark that model with mode training: images per second of a step"
        raise UserError(what, where="recipe", fix=fix)
    known = (row for start, row in _DATA.items() if name.startswith(start))
    images, classes, data = next(known, (None, 1000, ""))
    if options.images is not None:
        images, data = options.images, "as given"
    if images is None and config.steps is None:
        what = f"how many training images {name} has is unknown"
        raise UserError(what, where="recipe", fix="Set images")
    recipe = {
        "name": config.recipe,
        "data": f"{plural(images or 0, 'image')} ({data})" if config.epochs else config.length,
        "images_seen": config.images_seen(images or 0),
        "epochs": config.epochs,
        "optimizer": optimizer.name,
        "sharpness": 1.0 - optimizer.sam_start if optimizer.sam_rho else 0.0,
        **dict.fromkeys(("operations", "images_per_second", "device_days")),
    }
    size = options.image_size or model.image_size
    return recipe, _new(lambda: create_model(model.name, size, classes, **model.overrides), device)


class _Timed:
    """A model on its device, with the batch it is timed on.

    A training step is forward, softmax cross-entropy, backward and an AdamW update at learning
    rate 0: all operations run, but no weight changes.
    """

    def __init__(
        self, model: ImageClassifier, mode: str, precision: str, *, compile: bool = False
    ) -> None:
        self.model, self.mode, self.precision = model.train(mode == "training"), mode, precision
        self.device = next(model.parameters()).device
        self.images = self.labels = torch.empty(0)
        self._network: Any = torch.compile(model, dynamic=False) if compile else model
        self.inference: Inference | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        if mode == "training":
            self.optimizer = self._new_optimizer()
        elif not compile:  # as in predict and evaluate
            self.inference = Inference(model, precision)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """Returns AdamW with its moments allocated, so that the free memory accounts for them."""
        trained = [value for value in self.model.parameters() if value.requires_grad]
        if not self.model.config.num_classes or not trained:
            lacks = "parameters that are trained" if self.model.config.num_classes else "a head"
            what = f"a training step needs {lacks}, and this model has none"
            raise UserError(what, where=self.model.config.summary(), fix="Take mode inference")
        needed = 3 * sum(value.nbytes for value in trained)
        _check_memory("gradients and AdamW take", needed, self.device)
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in trained:
                # An all-zero kernel passes no gradient on, and with all-zero gradients a GPU
                # draws less power and runs faster than in real training.
                if value.dim() > 1 and not value.any():
                    value.copy_(0.02 * torch.randn(value.shape, generator=random))
                value.grad = torch.zeros_like(value)
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.1, fused=True)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def prepare(self, batch_size: int) -> None:
        """Draws a batch of random images and labels."""
        self.release()
        config, random = self.model.config, torch.Generator(self.device).manual_seed(0)
        size = (batch_size, config.in_channels, *config.image_size)
        self.images = torch.randn(size, generator=random, device=self.device)
        if self.mode == "training":
            classes, shape = config.num_classes, (batch_size,)
            self.labels = torch.randint(classes, shape, generator=random, device=self.device)

    def release(self) -> None:
        """Frees batch and gradients."""
        self.images = self.labels = torch.empty(0)
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def operations(self, batch_size: int) -> int:
        """Returns the FLOPs of a step, from which the number of threads is chosen."""
        return _passes(self.mode) * self.model.config.flops * batch_size

    def step(self) -> None:
        """Runs one step, asynchronously on a GPU."""
        if self.inference is not None:
            self.inference.logits(self.images)
            return
        half = self.precision == "bfloat16"
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=half)
        if self.optimizer is None:
            with torch.no_grad(), autocast:
                self._network(self.images)
            return
        self.optimizer.zero_grad()
        with autocast:
            logits = self._network(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()

    def seconds(self, least: float) -> float:
        """Returns the mean seconds per step, timed for at least `least` seconds."""
        threads = threads_for(self.operations(len(self.images)))
        timer = Timer("step()", globals={"step": self.step}, num_threads=threads)
        return timer.blocked_autorange(min_run_time=least).mean

    def run(self) -> None:
        """Runs one step and synchronizes, with the same threads as a timed step."""
        with step_threads(self.device, self.operations(len(self.images))):
            self.step()
        synchronize(self.device)

    def warm_up(self, size: int) -> int | None:
        """Prepares a batch, compiles, allocates memory; returns the memory growth of a step."""
        self.prepare(size)
        self.run()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        return peak_growth(self.run, self.device)

    def check_fits(self, size: int, growth: int | None, of_size: int) -> None:
        """Raises MemoryError for a batch that will not fit, extrapolating from a smaller one."""
        if growth is not None:
            what = f"{size:,} images would take about"
            _check_memory(what, growth * size / of_size, self.device, _USABLE)

    def memory_bytes(self, point: Point) -> int | None:
        """Returns the bytes of weights, buffers, moments, packed weights, batch and step.

        In bfloat16, autocast keeps a second copy of the weights.
        """
        if point.step_memory_bytes is None:
            return None
        states = [] if self.optimizer is None else self.optimizer.state.values()
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [value for state in states for value in state.values()]
        total = sum(value.nbytes for value in tensors)
        half, packed = self.precision == "bfloat16", self.inference and self.inference.packed
        if self.optimizer is None and (half or packed):
            kernels = (value.numel() for value in self.model.parameters() if value.dim() > 1)
            total += (2 if half else 4) * sum(kernels)
        config = self.model.config
        image = 4 * config.in_channels * math.prod(config.image_size)
        return total + point.batch_size * image + point.step_memory_bytes


# --- measurement ----------------------------------------------------------------------------------


def _measure(
    found: Benchmark, builds: Mapping[str, ImageClassifier | Build], report: Reporter
) -> None:
    """Measures the models, and the machine's peak before and after."""
    timed: list[tuple[ModelBenchmark, _Timed]] = []
    for row in found.models:
        _show_progress(report, f"{row.name}, building")
        with _errors_of(row):
            timed.append((row, _built(row, builds[row.name], found)))
    built = [row for row, _ in timed]
    _measure_peaks(built, found.device, report)
    _sweep(timed, found.options, report)
    if found.models[0].mode == "inference":
        _time_latency(timed, found.options, report)
    _measure_peaks(built, found.device, report)


def _built(row: ModelBenchmark, given: ImageClassifier | Build, found: Benchmark) -> _Timed:
    is_model = hasattr(given, "config")
    model = copy.deepcopy(open_model(cast(Any, given))) if is_model else cast(Build, given)()
    model, options = model.to(found.device), found.options
    row.model, row.flops, row.counted = describe(model), model.config.flops, count_flops(model)
    row.precision, row.why = options.precision, "chosen"
    if options.precision == "auto":
        batch = max(options.batch_sizes or (_BATCH,))
        step = _passes(row.mode) * row.flops * batch
        row.precision, row.why = fast_precision(found.device, step)
    return _Timed(model, row.mode, row.precision, compile=options.compile)


def _sweep(
    timed: Sequence[tuple[ModelBenchmark, _Timed]], options: BenchmarkOptions, report: Reporter
) -> None:
    """Measures every model at every batch size.

    Models take turns at each batch size, so that background load affects all of them alike. A
    model that fails records the error; the others continue.
    """
    for row, _ in timed:
        row.spent = 0.0  # building does not count against the budget
    doubling = [2**power for power in range(LARGEST_BATCH.bit_length())]
    for size in sorted(options.batch_sizes or doubling):
        active: list[tuple[ModelBenchmark, _Timed, int | None, list[float]]] = []
        for row, one in timed:
            if options.batch_sizes is None:
                row.ended = row.ended or _why_to_stop(row, size, options)
            if row.is_active:
                _show_progress(report, f"{row.name}, batch {size:,}")
                with _errors_of(row):
                    if row.points:
                        last = row.points[-1]
                        one.check_fits(size, last.step_memory_bytes, last.batch_size)
                    elif size > _SMALL_BATCH:  # chosen by the user: no smaller size was measured
                        one.check_fits(size, one.warm_up(_SMALL_BATCH), _SMALL_BATCH)
                    active.append((row, one, one.warm_up(size), []))
        for _ in range(options.rounds):
            for row, one, _, rates in active:
                if row.is_active:
                    with _errors_of(row):
                        rates.append(size / one.seconds(options.seconds / options.rounds))
        for _, one in timed:
            one.release()
        for row, one, step_bytes, rates in active:
            if row.is_active:
                spread = (min(rates), max(rates))
                row.points.append(
                    point := Point(size, statistics.median(rates), spread, step_bytes)
                )
                if row.best is point:
                    row.threads = threads_for(one.operations(size))
                    row.memory_bytes = one.memory_bytes(point)


def _why_to_stop(row: ModelBenchmark, size: int, options: BenchmarkOptions) -> str | None:
    """Returns why the sweep stops before this size: the last two sizes brought no gain over the
    best before them, or the next one would exceed the budget."""
    rates = [point.images_per_second for point in row.points]
    if len(rates) > 2 and all(rates[at] < _RISE * max(rates[:at]) for at in (-2, -1)):
        return "the rate no longer rises"
    step = size / rates[-1] if rates else 0.0
    needed = max(options.seconds, 2 * options.rounds * step) + 3 * step
    if rates and row.spent + needed > options.budget:
        return f"the budget of {options.budget:g} s"
    return None


def _time_latency(
    timed: Sequence[tuple[ModelBenchmark, _Timed]], options: BenchmarkOptions, report: Reporter
) -> None:
    """Times 10 to 1,000 single images per model, spread over the rounds."""
    runs: dict[str, int] = {}
    measured = [(row, one) for row, one in timed if row.points]
    for row, one in measured:
        _show_progress(report, f"{row.name}, latency")
        with _errors_of(row):
            one.prepare(1)
            one.run()
            fitting = math.ceil(options.seconds / one.seconds(options.seconds / 10))
            runs[row.name] = min(max(fitting, 10), 1000)
    for _ in range(options.rounds):
        for row, one in measured:
            with _errors_of(row):
                for _ in range(math.ceil(runs.get(row.name, 0) / options.rounds)):
                    begin = time.perf_counter()
                    one.run()
                    row.latencies.append(time.perf_counter() - begin)


@contextlib.contextmanager
def _errors_of(row: ModelBenchmark) -> Iterator[None]:
    """Records the time the block takes and any error except a `UserError`.

    Running out of memory after a smaller batch was measured only ends the model's sweep.
    """
    begin = time.perf_counter()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a model may raise anything; the others continue
        text = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
        # torch.OutOfMemoryError on a GPU; on a CPU "DefaultCPUAllocator: can't allocate memory".
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            text = text if text.startswith("memory:") else f"out of memory: {text}"
        elif "memory" not in text:
            text = f"{type(error).__name__}: {text}"
        if row.points and "memory" in text:
            row.ended = text
        else:
            row.error = text
    finally:
        row.spent += time.perf_counter() - begin


def _measure_peaks(rows: list[ModelBenchmark], device: torch.device, report: Reporter) -> None:
    """Measures the machine's peak matmul rate; of several calls, the best result counts."""
    for precision in sorted({row.precision for row in rows}):
        _show_progress(report, f"matrix products in {precision}")
        found = measure_peak(device, precision, _PEAK_SECONDS)
        for row in rows:
            if row.precision == precision and (row.peak is None or found.gflops > row.peak.gflops):
                row.peak = found


def measure_peak(device: torch.device, precision: str, seconds: float) -> Peak:
    """Returns the highest rate over several large matmuls, through `F.linear`."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    random = torch.Generator(device).manual_seed(0)
    found = []
    for rows, inputs, outputs in _SHAPES[device.type]:
        x = torch.randn(rows, inputs, generator=random, device=device).to(dtype)
        w = torch.randn(outputs, inputs, generator=random, device=device).to(dtype)
        given = {"F": F, "x": x, "w": w}
        timer = Timer("F.linear(x, w)", globals=given, num_threads=torch.get_num_threads())
        fastest = min(timer.blocked_autorange(min_run_time=seconds / 4).times)
        gflops = 2 * rows * inputs * outputs / fastest / 1e9
        found.append(Peak(gflops, (rows, inputs, outputs)))
    return max(found, key=lambda peak: peak.gflops)


@torch.no_grad()
def count_flops(model: ImageClassifier) -> int:
    """Returns the FLOPs of matmuls and convolutions for one image, counted by torch."""
    device = next(model.parameters()).device
    image = torch.zeros(1, model.config.in_channels, *model.config.image_size, device=device)
    exact = torch.autocast(device.type, enabled=False)
    with evaluating(model), exact, FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops()


def peak_growth(act: Callable[[], object], device: torch.device) -> int | None:
    """Runs `act` and returns the peak memory growth in bytes; None if unknown.

    On a GPU, torch's allocations; on a CPU, the peak resident set, which Linux can reset, after
    the allocator has returned its free memory.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        act()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident_bytes("VmRSS")
    act()
    highest = _resident_bytes("VmHWM")
    return None if before is None or highest is None else max(0, highest - before)


def _resident_bytes(name: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.partition(f"\n{name}:")[2].split()[0]) * 1024


@contextlib.contextmanager
def _compiles_for_every_shape() -> Iterator[None]:
    """Lets torch.compile specialize for every model and batch size.

    By default it silently falls back to eager after eight recompilations.
    """
    import torch._dynamo.config as settings  # takes seconds

    with settings.patch(
        recompile_limit=2**20, accumulated_recompile_limit=2**20, fail_on_recompile_limit_hit=True
    ):
        yield


# --- output ---------------------------------------------------------------------------------------


def _show_progress(report: Reporter, text: str) -> None:
    """Updates a status line on a terminal; prints nothing in a pipe."""
    if report.console.is_terminal and not report.console.quiet:
        report.console.print(f"\r{text[:90]:<90}", end="\r", markup=False)


def command(models: Sequence[str], options: BenchmarkOptions) -> Benchmark:
    """Runs the benchmark with progress on a terminal."""
    report = Reporter(stderr=options.output == STANDARD_OUTPUT)
    found = benchmark(models, options, report=report)
    _show_progress(report, "")
    return found


def show(found: Benchmark, options: BenchmarkOptions) -> int:
    """Prints machine, models, batch sizes and notes; returns the exit code."""
    report = Reporter(stderr=options.output == STANDARD_OUTPUT)
    measured = [row for row in found.models if row.best is not None]
    lines = [*_machine(found), ""]
    if measured:
        lines += [*_main_table(measured), "", *_points_table(measured), ""]
    lines += _notes(found, measured)
    if found.recipe is not None and measured:
        lines += _recipe_lines(found.recipe)
    if options.output not in (None, STANDARD_OUTPUT):
        incomplete = " (incomplete)" if found.interrupted else ""
        lines.append(f"written  {expand(options.output)}{incomplete}")
    for line in lines:
        report.say(line)
    if found.interrupted:
        raise KeyboardInterrupt
    return 0 if measured else 2


def _machine(found: Benchmark) -> Iterator[str]:
    info, options = found.environment, found.options
    machine = info["device"]
    if found.device.type == "cpu":
        threads = f"{plural(found.threads, 'thread')} of {plural(info['cores'], 'core')}"
        machine = f"{info['processor']}, {threads}"
        if any(row.threads not in (None, found.threads) for row in found.models):
            machine += " (1 for small batches)"
    step = "inference" if found.models[0].mode == "inference" else "a training step (AdamW)"
    yield f"machine  {machine}, torch {info['packages']['torch']}"
    yield (
        f"timed    {step}, {'' if options.compile else 'not '}compiled, median of "
        f"{plural(options.rounds, 'round')} in {options.seconds:g} s at each batch size"
    )
    peaks = {(row.precision, row.why): row.peak for row in found.models if row.peak is not None}
    for (precision, why), peak in sorted(peaks.items()):
        m, k, n = peak.shape
        yield f"peak     {precision} ({why}): {peak.gflops:,.0f} GFLOP/s, {m}x{k} by {k}x{n}"


def _main_table(measured: list[ModelBenchmark]) -> list[str]:
    headers = ["model", "px", "GFLOPs", "images/s", "spread", "batch", "of peak", "GB"]
    has_latency = any(row.latencies for row in measured)
    headers += ["p50 ms", "p90", "p99", "runs"] if has_latency else []
    rows = []
    for row in measured:
        best, fraction, memory = row.best, row.fraction_of_peak, row.memory_bytes
        assert best is not None
        cells = [
            row.name,
            "x".join(map(str, dict.fromkeys(row.model["image_size"]))),
            _digits(row.flops / 1e9),
            _digits(best.images_per_second),
            f"{best.relative_spread:.0%}",
            f"{best.batch_size:,}",
            "-" if fraction is None else f"{fraction:.0%}",
            "-" if memory is None else f"{memory / 1e9:.2f}",
        ]
        if latency := row.latency_ms():
            cells += [_digits(latency[name]) for name in ("p50", "p90", "p99")]
            cells.append(str(latency["runs"]))
        rows.append(cells + ["-"] * (len(headers) - len(cells)))
    return table(headers, rows)


def _digits(value: float) -> str:
    """Formats with at least three digits: 0.0312, 4.00, 31.4, 1,384."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _points_table(measured: list[ModelBenchmark]) -> list[str]:
    """Images per second by model and batch size."""
    rates = [
        {point.batch_size: _digits(point.images_per_second) for point in row.points}
        for row in measured
    ]
    sizes = sorted({size for column in rates for size in column})
    rows = [[f"{size:,}", *(column.get(size, "") for column in rates)] for size in sizes]
    return table(["images/s at batch", *(row.name for row in measured)], rows)


def _notes(found: Benchmark, measured: list[ModelBenchmark]) -> Iterator[str]:
    training = found.models[0].mode == "training"
    times = " x 3 passes" if training else ""
    yield f"of peak: GFLOPs of one image{times} x images/s, relative to the machine's matmuls."
    if any(row.memory_bytes is not None for row in measured):
        kept = "weights, AdamW's state" if training else "weights"
        yield f"GB: {kept}, the batch, and what a step takes ({_MEMORY[found.device.type]})."
    for row in measured:
        start = f"note     {row.name}: "
        if row.ended is not None:
            yield f"{start}no batch above {row.points[-1].batch_size:,}: {row.ended}"
        if row.best is not None and (spread := row.best.relative_spread) > _WIDE_SPREAD:
            yield f"{start}rounds differ by {spread:.0%}: the machine was busy, measure again"
        if abs(row.counted - row.flops) > 0.01 * row.flops:
            counted, formula = row.counted / 1e9, row.flops / 1e9
            yield f"{start}{counted:.4g} GFLOPs counted, {formula:.4g} by formula"
    for row in found.models:
        if row.error:
            yield f"failed   {row.name}: {row.error}"
    if found.interrupted:
        yield "stopped  before the end: this is what was measured until then"


def _recipe_lines(recipe: dict[str, Any]) -> Iterator[str]:
    epochs, sam = recipe["epochs"], recipe["sharpness"]
    length = f"{plural(epochs, 'epoch')} of {recipe['data']}" if epochs else recipe["data"]
    twice = f", {sam:.0%} of them twice (sharpness-aware)" if sam else ""
    rate, days = _digits(recipe["images_per_second"]), _digits(recipe["device_days"])
    cost = f"{power(recipe['operations'])} operations; at {rate} images/s {days} days"
    yield f"\nrecipe   {recipe['name']}: {length}, {plural(recipe['images_seen'], 'image')}{twice}"
    yield f"cost     {cost} of this device"
    yield "         The step alone: reading images, evaluation and checkpoints are not in it."
    if recipe["optimizer"] != "adamw":
        yield f"note     the recipe's optimizer is {recipe['optimizer']}, timed was AdamW"
