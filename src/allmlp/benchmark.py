"""`am.benchmark` and `mixer benchmark`: images per second, latency, FLOPs and memory.

The paper's throughput (section 3, Tables 2 and 3) is the highest rate over a sweep of batch sizes.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from allmlp.console import Reporter, table_of
from allmlp.environment import environment_info
from allmlp.errors import UserError, one_of, plural
from allmlp.evaluation.options import LARGEST_BATCH, BenchmarkOptions
from allmlp.evaluation.result_file import check_result_path, describe, measurement, save_result
from allmlp.io import STANDARD_OUTPUT, check_not_inputs, expand
from allmlp.models.catalog import create_model, list_models
from allmlp.models.inference import Inference
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
from allmlp.training.config import AdamW, Optimizer
from allmlp.training.optim import build_optimizers, operations, power, update
from allmlp.training.recipes import recipe as recipe_config
from allmlp.weights.checkpoints import find_checkpoint, list_checkpoints
from allmlp.weights.load import files_of, load_model, open_model

_BATCH = 64  # where "auto" judges whether a model is small, by default
_RISE = 1.01  # a gain of less than 1% does not count
_USABLE = 0.8  # fraction of the free memory; leaves some to other programs
_WIDE_SPREAD = 0.2  # slowest to fastest round, relative to the median
_PEAK_SECONDS = 0.5  # for each shape
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
_PASSES = {"inference": 1, "training": 3}  # forward, gradients of inputs and of weights
Given = str | ImageClassifier
Progress = Callable[[str], object]


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


@dataclass
class ModelBenchmark:
    """Measurements of one model; the fields are those of the file."""

    name: str
    mode: str
    compiled: bool = False
    device: str = "cpu"
    model: dict[str, Any] = field(default_factory=dict)  # see `result_file.describe`
    image_size: list[int] | None = None
    precision: str = ""
    flops: int = 0  # forward pass of one image
    points: list[Point] = field(default_factory=list)
    best: Point | None = None  # the point with the highest rate: the paper's throughput
    latency_ms: dict[str, float] | None = None  # percentiles of a single image, number of runs
    peak: dict[str, Any] | None = None  # of the machine, and the fraction of it that was reached
    memory_bytes: int | None = None  # weights, optimizer, batch and step at the best batch size
    threads: int | None = None  # CPU threads at the best batch size
    ended: str | None = None  # why the sweep stopped
    error: str | None = None  # why the model failed
    spent: float = 0.0  # seconds spent in the sweep

    def operations(self, images: int) -> int:
        """Returns the FLOPs of a step on this many images."""
        return _PASSES[self.mode] * self.flops * images


@dataclass
class Benchmark:
    """Measurements of one or more models."""

    models: list[ModelBenchmark]  # in the order given
    device: torch.device
    options: BenchmarkOptions
    environment: dict[str, Any]  # versions, hardware, date and command
    recipe: dict[str, Any] | None  # estimated cost on this device

    def to_json(self) -> dict[str, Any]:
        """Returns a "throughput" result, see `evaluation.result_file`."""
        numbers = {
            "seconds": self.options.seconds,
            "rounds": self.options.rounds,
            "memory_is": _MEMORY[self.device.type],
            "models": [asdict(row) for row in self.models],
            **({} if self.recipe is None else {"recipe": self.recipe}),
            "environment": self.environment,
        }
        return measurement("throughput", None, numbers)


def benchmark(
    models: Mapping[str, Given] | Sequence[str | Path] | str | Path = (),
    options: BenchmarkOptions | None = None,
    *,
    progress: Progress = lambda text: None,
    **fields: Any,
) -> Benchmark:
    """Measures images per second, latency, FLOPs and memory.

    Several models are held in memory together and take turns. Model objects are copied first.

    Args:
        models: as in `BenchmarkOptions`; or a dict of names to models, or to such names.
        options: all options as one object.
        progress: called with what is measured next.
        **fields: fields of `BenchmarkOptions`.

    Returns:
        The measurements.

    Raises:
        UserError: an option is out of range, an unknown model or device, bfloat16 on a GPU without
            support, no compiler, an exported file, or training a model without a head.
    """
    options = make(BenchmarkOptions, options, fields)
    names = [str(name) for name in ([models] if isinstance(models, str | Path) else models)]
    given = dict(models) if isinstance(models, Mapping) else {name: name for name in names}
    device, mode, optimizer, recipe = choose_device(options.device), options.mode, AdamW(), None
    if options.precision == "bfloat16":
        check_bfloat16(device)
    if options.compile and not can_compile(device):
        fix = "Install g++, or leave compile out"
        raise UserError("torch.compile finds no compiler", where="compile", fix=fix)
    if len(given) < len(names) or (options.recipe is None) == (not names):
        what = f"give models, each once, or a recipe; got {names} and {options.recipe}"
        raise UserError(what, where="models", fix="Such as mixer_s32")
    target = check_result_path(options.output, overwrite=options.overwrite)
    inputs = [file for one in given.values() if isinstance(one, str) for file in files_of(one)]
    check_not_inputs([] if target is None else [target], inputs)
    if options.recipe is not None:
        recipe, model, optimizer = _recipe(options.recipe, options)
        mode, given = "training", {options.recipe: model}
    shared = (mode, options.compile, str(device))
    rows = [ModelBenchmark(name, *shared, {"name": name}) for name in given]
    with torch_settings(device, "float32", options.threads), _compilation(options, mode, device):
        found = Benchmark(rows, device, options, environment_info(device), recipe)
        _measure(found, given, optimizer, progress)
    if recipe is not None and rows[0].best is not None:
        rate, flops = rows[0].best.images_per_second, rows[0].flops
        total = operations(flops, recipe["images_seen"], optimizer)  # counts a step of SAM twice
        days = total / rows[0].operations(1) / rate / 86_400
        recipe |= {"operations": total, "images_per_second": rate, "device_days": days}
    if options.output is not None:
        save_result(target, found.to_json())
    return found


@contextlib.contextmanager
def _compilation(options: BenchmarkOptions, mode: str, device: torch.device) -> Iterator[None]:
    """Allows any number of compiled shapes, and keeps autocast's cache of weights alive."""
    with contextlib.ExitStack() as stack:
        if options.compile:  # else torch falls back to eager after eight shapes, without a word
            import torch._dynamo.config as settings  # takes seconds

            limits: Any = {"recompile_limit": 2**20, "accumulated_recompile_limit": 2**20}
            stack.enter_context(settings.patch(**limits, fail_on_recompile_limit_hit=True))
        if mode == "inference":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=False))
        yield


def _recipe(
    name: str, options: BenchmarkOptions
) -> tuple[dict[str, Any], ImageClassifier, Optimizer]:
    """Returns what is known about a recipe before timing, its model and its optimizer."""
    config = recipe_config(name)
    if not config.model.name:
        what = f"the recipe {name} fine-tunes a model of your choice and names none"
        raise UserError(what, where="recipe", fix="Benchmark that model with mode training")
    known = (row for start, row in _DATA.items() if name.startswith(start))
    images, classes, data = next(known, (None, 1000, ""))
    if options.images is not None:
        images, data = options.images, "as given"
    if images is None and config.steps is None:
        what = f"how many training images {name} has is unknown"
        raise UserError(what, where="recipe", fix="Set images")
    length = f"{plural(config.epochs, 'epoch')} of " if config.epochs else ""
    recipe = {
        "name": config.recipe,
        "data": f"{length}{plural(images or 0, 'image')} ({data})" if length else config.length,
        "images_seen": config.images_seen(images or 0),
        "optimizer": config.optimizer.name,
        **dict.fromkeys(("operations", "images_per_second", "device_days")),
    }
    size = options.image_size or config.model.image_size
    model = create_model(config.model.name, size, classes, **config.model.overrides)
    return recipe, model, config.optimizer


class _Timed:
    """A model on its device, with the batch it is timed on.

    A training step is forward, softmax cross-entropy, backward and an update at learning rate 0:
    all operations run, but no weight changes.
    """

    def __init__(
        self, model: ImageClassifier, row: ModelBenchmark, optimizer: Optimizer | None = None
    ) -> None:
        self.model, self.row, self.is_training = model, row, row.mode == "training"
        self.model.train(self.is_training)
        self.device, self.images = model.device, torch.empty(0)
        self.rates: list[float] = []  # images per second at this batch size, a value per round
        self.growth: int | None = None  # of the memory during a step
        self.half = row.precision == "bfloat16"
        self._network: Any = torch.compile(model, dynamic=False) if row.compiled else model
        self._inference, self._optimizers = None, []
        if not self.is_training:
            if not row.compiled:  # as in predict and evaluate
                self._inference = Inference(model, row.precision)
            return
        if not model.config.num_classes:
            what = "a training step needs a head, and this model has none"
            raise UserError(what, where=model.config.summary(), fix="Use mode inference")
        self._check_memory("gradients and moments take", 12 * model.num_parameters)
        # An all-zero kernel passes no gradient on, and with all-zero gradients a GPU draws less
        # power and runs faster than in real training.
        random = torch.Generator(self.device).manual_seed(0)
        for value in model.parameters():
            if value.dim() > 1 and not value.any():
                torch.nn.init.normal_(value, std=0.02, generator=random)
        self._optimizers = build_optimizers(model, optimizer or AdamW())

    def _check_memory(self, what: str, needed: float) -> None:
        """Raises MemoryError early: on a CPU the system would kill the process instead."""
        empty_cache(self.device)
        free = free_memory(self.device)
        if free is not None and needed > _USABLE * free:
            raise MemoryError(f"{what} {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")

    def prepare(self, batch_size: int) -> None:
        """Frees the last batch and the gradients, and draws a batch of random images."""
        self.images = torch.empty(0)
        self.model.zero_grad()
        random = torch.Generator(self.device).manual_seed(0)
        size = (batch_size, self.model.config.in_channels, *self.model.config.image_size)
        self.images = torch.randn(size, generator=random, device=self.device)

    def step(self) -> None:
        """Runs one step, asynchronously on a GPU."""
        if self._inference is not None:
            self._inference.logits(self.images)
            return
        if self.is_training:
            self.model.zero_grad()
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)
        with torch.set_grad_enabled(self.is_training), autocast:
            logits = self._network(self.images)
        if self.is_training:
            labels = torch.arange(len(logits), device=self.device) % logits.shape[1]
            F.cross_entropy(logits.float(), labels).backward()
            update(self._optimizers, 0.0)

    def seconds(self, least: float) -> float:
        """Returns the mean seconds per step, timed for at least `least` seconds."""
        threads = threads_for(self.row.operations(len(self.images)))
        timer = Timer("step()", globals={"step": self.step}, num_threads=threads)
        return timer.blocked_autorange(min_run_time=least).mean

    def run(self) -> None:
        """Runs one step and synchronizes, with the same threads as a timed step."""
        with step_threads(self.device, self.row.operations(len(self.images))):
            self.step()
        synchronize(self.device)

    def warm_up(self, size: int) -> None:
        """Compiles, allocates and measures the memory of a step; MemoryError if a batch will not
        fit, extrapolating from the last, smaller one."""
        for point in self.row.points[-1:]:
            needed = (point.step_memory_bytes or 0) * size / point.batch_size
            self._check_memory(f"{size:,} images would take about", needed)
        self.prepare(size)
        self.run()
        self.model.zero_grad()
        self.rates, self.growth = [], peak_growth(self.run, self.device)

    def record(self) -> None:
        """Adds a point to the row; if it is the best one, its threads and memory too."""
        row, size, rates = self.row, len(self.images), self.rates
        spread = min(rates), max(rates)
        row.points.append(Point(size, statistics.median(rates), spread, self.growth))
        row.best = max(row.points, key=lambda point: point.images_per_second)
        if row.best is row.points[-1]:
            row.threads, row.memory_bytes = threads_for(row.operations(size)), self.memory_bytes()

    def memory_bytes(self) -> int | None:
        """Returns the bytes of weights, buffers, moments, packed weights, batch and step."""
        if self.growth is None:
            return None
        tensors = [*self.model.parameters(), *self.model.buffers(), self.images]
        for optimizer in self._optimizers:
            tensors += [value for state in optimizer.state.values() for value in state.values()]
        copied = 0
        if not self.is_training and (self.half or (self._inference and self._inference.packed)):
            kernels = (value.numel() for value in self.model.parameters() if value.dim() > 1)
            copied = (2 if self.half else 4) * sum(kernels)  # a second copy of them
        return sum(value.nbytes for value in tensors) + copied + self.growth


def _measure(
    found: Benchmark, given: Mapping[str, Given], optimizer: Optimizer, progress: Progress
) -> None:
    """Measures the models, in turns, so that background load affects all of them alike, and the
    machine's peak before and after."""
    options, timed = found.options, list[_Timed]()

    def build(row: ModelBenchmark) -> None:
        model = _model(given[row.name], options).to(found.device)
        row.model, row.image_size = describe(model), list(model.config.image_size)
        row.precision, row.flops = options.precision, model.config.flops
        if options.precision == "auto":
            step = row.operations(max(options.batch_sizes or (_BATCH,)))
            row.precision, _ = fast_precision(found.device, step)
        timed.append(_Timed(model, row, optimizer))

    def active() -> list[_Timed]:
        return [one for one in timed if not (one.row.ended or one.row.error)]

    for row in found.models:
        progress(f"{row.name}, building")
        with _attempt(row):
            build(row)
        row.spent = 0.0  # building does not count against the budget
    progress("the machine's matrix products")
    precisions = {one.row.precision for one in timed}
    peaks = {precision: measure_peak(found.device, precision) for precision in precisions}
    for size in sorted(options.batch_sizes or [2**n for n in range(LARGEST_BATCH.bit_length())]):
        for row in (one.row for one in active() if options.batch_sizes is None):
            row.ended = _why_to_stop(row, size, options)
        for one in active():
            progress(f"{one.row.name}, batch {size:,}")
            with _attempt(one.row):
                one.warm_up(size)
        for _ in range(options.rounds):
            for one in active():
                with _attempt(one.row):
                    one.rates.append(size / one.seconds(options.seconds / options.rounds))
        for one in active():
            one.record()
        for one in timed:
            one.prepare(0)  # frees the batch
    for one in timed:
        if not one.is_training and one.row.points:
            progress(f"{one.row.name}, latency")
            with _attempt(one.row):
                _time_latency(one, options.seconds)
    progress("the machine's matrix products")
    peaks = {name: max(peak, measure_peak(found.device, name)) for name, peak in peaks.items()}
    for row in found.models:
        if row.best is not None:
            gflops, shape = peaks[row.precision]
            reached = row.operations(1) * row.best.images_per_second / 1e9
            row.peak = {"gflops": gflops, "shape": shape, "fraction": reached / gflops}


@contextlib.contextmanager
def _attempt(row: ModelBenchmark) -> Iterator[None]:
    """Records a block's time, and any error but a `UserError`; running out of memory after a
    smaller batch was measured only ends the sweep."""
    begin = time.perf_counter()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a model may raise anything; the others continue
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if row.points and "memory" in text.lower():
            row.ended = text
        else:
            row.error = text
    finally:
        row.spent += time.perf_counter() - begin


def _model(given: Given, options: BenchmarkOptions) -> ImageClassifier:
    """Returns a copy of a model, or the one that is named, with random weights if it has none."""
    if not isinstance(given, str):
        return copy.deepcopy(open_model(given))
    overrides = assignments(options.settings)
    if given in list_models() or (given.startswith("timm:") and "." not in given):
        return create_model(given, options.image_size, **overrides)
    if overrides:
        what = f"{options.settings[0]} has no effect on {given}: its weights say what it is"
        raise UserError(what, where="settings", fix="Name an architecture of `mixer models`")
    if not (":" in given or find_checkpoint(given) or expand(given).exists()):
        one_of("model", given, [*list_models(), *list_checkpoints()])
    return load_model(given, options.image_size)


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


def _time_latency(one: _Timed, seconds: float) -> None:
    """Times 10 to 1,000 single images; records nearest-rank percentiles and the number of runs."""
    one.prepare(1)
    one.run()
    runs, times = math.ceil(seconds / one.seconds(seconds / 10)), []
    for _ in range(min(max(runs, 10), 1000)):
        begin = time.perf_counter()
        one.run()
        times.append(1000 * (time.perf_counter() - begin))
    p50, p90, p99 = np.percentile(times, (50, 90, 99), method="inverted_cdf").tolist()
    one.row.latency_ms = {"p50": p50, "p90": p90, "p99": p99, "runs": len(times)}


def measure_peak(device: torch.device, precision: str) -> tuple[float, tuple[int, int, int]]:
    """Returns the highest rate of several large `F.linear` in GFLOP/s, a multiply-add being two,
    and that one's (rows, inputs, outputs)."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    found = []
    for rows, inputs, outputs in _SHAPES[device.type]:
        x = torch.randn(rows, inputs, device=device).to(dtype)
        w = torch.randn(outputs, inputs, device=device).to(dtype)
        given = {"F": F, "x": x, "w": w}
        timer = Timer("F.linear(x, w)", globals=given, num_threads=torch.get_num_threads())
        fastest = min(timer.blocked_autorange(min_run_time=_PEAK_SECONDS).times)
        found.append((2 * rows * inputs * outputs / fastest / 1e9, (rows, inputs, outputs)))
    return max(found)


def peak_growth(act: Callable[[], object], device: torch.device) -> int | None:
    """Runs `act` and returns the peak growth of memory in bytes, see `_MEMORY`; None if unknown."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        act()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    # Else the step would take memory that the process has freed and not returned.
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident_bytes("VmRSS")
    act()
    highest = _resident_bytes("VmHWM")
    return None if before is None or highest is None else max(0, highest - before)


def _resident_bytes(name: str) -> int | None:
    with contextlib.suppress(OSError):  # not Linux
        found = re.search(rf"^{name}:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)
        return None if found is None else int(found[1]) * 1024
    return None


def command(models: Sequence[str], options: BenchmarkOptions) -> Benchmark:
    """Runs the benchmark with a status line on a terminal."""
    console = Reporter(stderr=options.output == STANDARD_OUTPUT).console

    def progress(text: str) -> None:  # no spinner: its thread would be measured too
        if console.is_terminal:
            console.print(f"\r{text[:90]:<90}", end="\r", markup=False)

    found = benchmark(models, options, progress=progress)
    progress("")
    return found


def show(found: Benchmark, options: BenchmarkOptions) -> int:
    """Prints machine, models, batch sizes and notes; returns the exit code."""
    report = Reporter(stderr=options.output == STANDARD_OUTPUT)
    for line in _lines(found):
        report.say(line)
    if options.output not in (None, STANDARD_OUTPUT):
        report.say(f"written  {expand(options.output)}")
    return 0 if any(row.points for row in found.models) else 2


def _lines(found: Benchmark) -> Iterator[str]:
    info, options, training = found.environment, found.options, found.models[0].mode == "training"
    machine = info["device"]
    if found.device.type == "cpu":
        threads = f"{plural(info['threads'], 'thread')} of {plural(info['cores'], 'core')}"
        fewer = " (1 for small batches)" * (info["threads"] > 1)
        machine = f"{info['processor']}, {threads}{fewer}"
    optimizer = "AdamW" if found.recipe is None else found.recipe["optimizer"]
    step = f"a training step ({optimizer})" if training else "inference"
    yield f"machine  {machine}, torch {info['packages']['torch']}"
    yield (
        f"timed    {step}, {'' if options.compile else 'not '}compiled, median of "
        f"{plural(options.rounds, 'round')} in {options.seconds:g} s at each batch size"
    )
    measured = [row for row in found.models if row.points]
    for precision, peak in {row.precision: row.peak for row in measured if row.peak}.items():
        m, k, n = peak["shape"]
        yield f"peak     {precision}: {peak['gflops']:,.0f} GFLOP/s, {m}x{k} by {k}x{n}"
    if measured:
        rates: dict[int, dict[str, str]] = {}
        for row in measured:
            for point in row.points:
                size = point.batch_size
                cells = rates.setdefault(size, {"images/s at batch": f"{size:,}"})
                cells[row.name] = _digits(point.images_per_second)
        by_size = table_of(rates[size] for size in sorted(rates))
        yield from ("", *table_of(map(_cells, measured)), "", *by_size, "")
        passes, kept = "", "weights"
        if training:
            passes, kept = " x 3 passes", "weights, the optimizer's state"
        yield f"of peak: GFLOPs of one image{passes} x images/s, relative to the machine's matmuls."
        yield f"GB: {kept}, the batch, and what a step takes ({_MEMORY[found.device.type]})."
    for row in found.models:
        start = f"note     {row.name}: "
        if row.best is not None and row.ended is not None:
            yield f"{start}no batch above {row.points[-1].batch_size:,}: {row.ended}"
        if row.best is not None and (spread := row.best.relative_spread) > _WIDE_SPREAD:
            yield f"{start}rounds differ by {spread:.0%}: the machine was busy, measure again"
        if row.error:
            yield f"failed   {row.name}: {row.error}"
    if found.recipe is not None and measured:
        recipe = found.recipe
        rate, days = _digits(recipe["images_per_second"]), _digits(recipe["device_days"])
        yield f"\nrecipe   {recipe['name']}: {recipe['data']}, {recipe['images_seen']:,} images"
        yield f"cost     {power(recipe['operations'])} operations"
        yield f"         At {rate} images/s, {days} days of this device"
        yield "         The step alone: reading images, evaluation and checkpoints are not in it."


def _cells(row: ModelBenchmark) -> dict[str, str]:
    assert row.best is not None
    cells = {
        "model": row.name,
        "px": "x".join(map(str, dict.fromkeys(row.model["image_size"]))),
        "GFLOPs": _digits(row.flops / 1e9),
        "images/s": _digits(row.best.images_per_second),
        "spread": f"{row.best.relative_spread:.0%}",
        "batch": f"{row.best.batch_size:,}",
        "of peak": "-" if row.peak is None else f"{row.peak['fraction']:.0%}",
        "GB": "-" if row.memory_bytes is None else f"{row.memory_bytes / 1e9:.2f}",
    }
    if row.latency_ms is not None:
        p50, p90, p99, runs = row.latency_ms.values()
        cells |= {"p50 ms": _digits(p50), "p90": _digits(p90), "p99": _digits(p99)}
        cells["runs"] = str(runs)
    return cells


def _digits(value: float) -> str:
    """Formats with at least three digits: 0.0312, 4.00, 31.4, 1,384."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"
