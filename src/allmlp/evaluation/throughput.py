"""What a model costs: parameters and floating-point operations, images a second, latency, memory.

The paper's throughput (section 3, Tables 2 and 3) is the images a second at that batch size of a
sweep which gives most.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from allmlp.environment import environment_info
from allmlp.errors import UserError
from allmlp.evaluation.peak import measure_peak
from allmlp.evaluation.result_file import describe
from allmlp.evaluation.sweep import (
    LARGEST_BATCH,
    Clock,
    Course,
    Plan,
    Tell,
    attempt,
    sweep,
    time_latency,
)
from allmlp.evaluation.throughput_result import ModelThroughput, Throughput
from allmlp.evaluation.timed_model import Mode, TimedModel, count_flops
from allmlp.models.layers import ImageClassifier
from allmlp.runtime.device import (
    can_compile,
    check_bfloat16,
    check_has_weights,
    choose_device,
    fast_precision,
    free_memory,
    torch_settings,
)

Build = Callable[[], ImageClassifier]
_BATCH = 64  # by which "auto" judges whether a model is small, unless batch sizes are chosen
_PEAK_SECONDS = 2.0
_USABLE = 0.9  # of the free memory, for what models keep between steps


def count_parameters(model: nn.Module) -> int:
    """Returns the number of trained values in the model."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_text(flops: int) -> str:
    """Returns "25.2 GFLOPs" or, for small numbers, "2.77 MFLOPs"."""
    return f"{flops / 1e9:.3g} GFLOPs" if flops >= 1e8 else f"{flops / 1e6:.3g} MFLOPs"


def throughput(
    models: Mapping[str, ImageClassifier | Build],
    *,
    mode: Mode = "inference",
    precision: str = "auto",
    compile: bool = False,
    device: str = "auto",
    num_threads: int | None = None,
    batch_sizes: Iterable[int] | None = None,
    seconds: float = 2.0,
    rounds: int = 5,
    budget: float | None = None,
    clock: Clock = time.perf_counter,
    tell: Tell = lambda line: None,
) -> Throughput:
    """Returns images a second, latency, operations and memory of models that take turns.

    All models are in memory together. They are left as they were given, on the device: training
    steps have the rate 0, see `allmlp.evaluation.timed_model`.

    Args:
        models: by names of your choice; a function builds its model when its turn comes.
        mode: "inference", or "training": forward, softmax loss, backward and AdamW.
        precision: of the products, "float32", "bfloat16" or "auto".
        compile: use torch.compile; its time is not counted.
        device: "auto" (the GPU where there is one), "cpu", "cuda".
        num_threads: of the processor; None is torch's own choice, and one for a small batch.
        batch_sizes: to measure; None doubles from 1 for as long as the rate rises.
        seconds: timed at each batch size, over all rounds.
        rounds: in which the models take turns; the median counts.
        budget: seconds that the doubling may take for each model; None is 30.
        clock: seconds that only rise.
        tell: is told what is measured next.

    Returns:
        What was measured; Ctrl-C ends it early and gives what there is by then.

    Raises:
        UserError: a value out of range, a setting without effect, no such device, bfloat16 on a GPU
            without it, no compiler, an exported file, or a model without a head that is to be
            trained.
    """
    plan = _checked_plan(batch_sizes, seconds, rounds, budget)
    if not models:
        raise UserError("no model to measure", fix="Name one, such as mixer_s32")
    for name, value, known in (
        ("mode", mode, ("inference", "training")),
        ("precision", precision, ("auto", "float32", "bfloat16")),
    ):
        if value not in known:
            raise UserError(
                f"unknown {name} {value!r}", where=name, fix=f"Known: {', '.join(known)}"
            )
    where = choose_device(device)
    if precision == "bfloat16":
        check_bfloat16(where)
    if compile and not can_compile(where):
        what = "torch.compile needs a C++ compiler, and there is none here"
        raise UserError(what, where="compile", fix="Install g++, or leave it out")
    if num_threads is not None and (num_threads < 1 or where.type != "cpu"):
        what = f"threads={num_threads} " + (
            "must be at least 1" if num_threads < 1 else "has no effect on a GPU"
        )
        raise UserError(what, where="threads", fix="--threads 2, or leave it out")
    with contextlib.ExitStack() as afterwards:
        afterwards.enter_context(torch_settings(where, "float32", num_threads))
        if compile:
            afterwards.enter_context(_compiles_for_every_shape())
        if mode == "inference":  # what autocast has cast is kept until this ends
            afterwards.enter_context(torch.autocast(where.type, torch.bfloat16, enabled=False))
        rows = [ModelThroughput(name, mode, Course(name), {"name": name}) for name in models]
        result = Throughput(
            rows, where, torch.get_num_threads(), compile, plan, environment_info(where)
        )
        try:
            _measure(result, models, precision, clock, tell, afterwards)
        except KeyboardInterrupt:
            result.interrupted = True
            for row in rows:
                if row.course.best is None and row.course.error is None:
                    row.course.error = "stopped before it was measured"
        return result


def _checked_plan(
    batch_sizes: Iterable[int] | None, seconds: float, rounds: int, budget: float | None
) -> Plan:
    sizes = None if batch_sizes is None else tuple(batch_sizes)
    for size in () if sizes is None else sizes:
        if not 1 <= size <= LARGEST_BATCH:
            what = f"a batch size is from 1 to {LARGEST_BATCH:,}, got {size:,}"
            raise UserError(what, where="batch_sizes", fix="--batch-sizes 1 8 32")
    if sizes is not None and (not sizes or len(set(sizes)) < len(sizes)):
        what = "a batch size is given twice" if sizes else "no batch size is given"
        raise UserError(what, where="batch_sizes", fix="--batch-sizes 1 8 32")
    if sizes is not None and budget is not None:
        what = f"budget={budget:g} has no effect: the batch sizes are chosen"
        raise UserError(what, where="budget", fix="Leave --budget or --batch-sizes out")
    limit = Plan.budget if budget is None else budget
    for name, value in (("seconds", seconds), ("budget", limit)):
        if not 0.0 < value < 1e6:
            what = f"{name} must be above 0 and below 1,000,000, got {value:g}"
            raise UserError(what, where=name, fix=f"--{name} 2")
    if not 1 <= rounds <= 1000:
        raise UserError(f"rounds must be from 1 to 1,000, got {rounds}", fix="--rounds 5")
    return Plan(sizes, seconds, rounds, limit)


def _measure(
    result: Throughput,
    models: Mapping[str, ImageClassifier | Build],
    precision: str,
    clock: Clock,
    tell: Tell,
    afterwards: contextlib.ExitStack,
) -> None:
    promised = 0  # bytes that training steps will take and keep
    for row in result.models:
        tell(f"{row.name}, building")

        def build(row: ModelThroughput = row) -> None:
            nonlocal promised
            promised = _build(row, models[row.name], result, precision, promised)

        if attempt(row.course, build):
            assert isinstance(row.course.subject, TimedModel)
            afterwards.callback(row.course.subject.close)
    there = [row for row in result.models if row.course.error is None]
    _peaks(there, result.device, clock, tell)
    courses = [row.course for row in there]
    try:
        sweep(courses, result.plan, clock, tell)
        if there and there[0].mode == "inference":
            time_latency(courses, result.plan, clock, tell)
    finally:
        for row in there:
            assert isinstance(row.course.subject, TimedModel)
            row.state_bytes = row.course.subject.state_bytes()
            row.batch_bytes = row.course.subject.batch_bytes(1)
            if row.course.best is not None:
                row.threads = row.course.subject.threads(row.course.best.batch_size)
    _peaks(there, result.device, clock, tell)


def _build(
    row: ModelThroughput,
    given: ImageClassifier | Build,
    result: Throughput,
    precision: str,
    promised: int,
) -> int:
    """Makes one model ready to be timed; returns the bytes promised to all of them until now."""
    model = given if isinstance(given, ImageClassifier) else given()
    check_has_weights(model)
    model = model.to(result.device)
    row.header, row.flops = describe(model), model.config.flops
    passes = 3 if row.mode == "training" else 1
    batch = max(result.plan.batch_sizes or (_BATCH,))
    row.precision, row.why = precision, "chosen"
    if precision == "auto":
        row.precision, row.why = fast_precision(result.device, passes * row.flops * batch)
    if row.mode == "training":
        weights = sum(each.nbytes for each in model.parameters())
        promised += 2 * weights
        free = free_memory(result.device)
        if free is not None and promised + weights > _USABLE * free:
            needed = f"gradients and AdamW of the models so far take {promised + weights:.2g} bytes"
            raise MemoryError(f"memory: {needed}, {free:.2g} are free")
    row.counted = count_flops(model)
    row.course.subject = TimedModel(model, row.mode, row.precision, compile=result.compiled)
    return promised


def _peaks(rows: list[ModelThroughput], device: torch.device, clock: Clock, tell: Tell) -> None:
    """Measures the machine's products; called before and after, the better one counts."""
    for precision in sorted({row.precision for row in rows}):
        tell(f"products of matrices in {precision}")
        found = measure_peak(device, precision, _PEAK_SECONDS, clock)
        for row in rows:
            if row.precision == precision and (row.peak is None or found.gflops > row.peak.gflops):
                row.peak = found


@contextlib.contextmanager
def _compiles_for_every_shape() -> Iterator[None]:
    """Lets torch.compile make one program for each model and batch size, as many as there are.

    By its defaults it gives up after eight, without a word, and computes uncompiled.
    """
    import torch._dynamo.config as settings  # takes seconds

    with settings.patch(
        recompile_limit=2**20, accumulated_recompile_limit=2**20, fail_on_recompile_limit_hit=True
    ):
        yield
