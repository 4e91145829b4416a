"""What `mixer throughput` prints: tables of at most 100 columns, and the cost of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from allmlp.console import table
from allmlp.errors import plural
from allmlp.training.cost import operations, planned, power

if TYPE_CHECKING:
    from allmlp.evaluation.throughput_result import ModelThroughput, Throughput
    from allmlp.training.config import TrainConfig

_WIDTH, _POINTS_A_ROW = 100, 8
_WIDE_SPREAD = 0.2  # from the slowest to the fastest round, relative to the median


def lines_of(result: Throughput) -> list[str]:
    """Returns the machine, the table of the models, the table of batch sizes, and notes."""
    there = [each for each in result.models if each.course.points]
    lines = _machine(result)
    if there:
        lines += ["", *_main_table(there), "", *_points(there)]
    lines += ["", *_notes(result, there)]
    return lines


def _machine(result: Throughput) -> list[str]:
    found, where = result.environment, result.device
    device = found["processor"] if where.type == "cpu" else found["device"]
    of = f", {plural(result.threads, 'thread')} of {plural(found['cores'], 'core')}"
    if any(each.threads not in (None, result.threads) for each in result.models):
        of += " (1 for small batches)"
    step = "inference" if result.models[0].mode == "inference" else "a training step (AdamW)"
    compiled = "compiled" if result.compiled else "not compiled"
    lines = [
        f"machine  {device}{of if where.type == 'cpu' else ''}, torch {found['packages']['torch']}",
        f"timed    {step}, {compiled}, median of {plural(result.plan.rounds, 'round')} "
        f"in {result.plan.seconds:g} s at each batch size",
    ]
    peaks = {each.precision: each.peak for each in result.models if each.peak is not None}
    for precision, peak in sorted(peaks.items()):
        assert peak is not None
        rows, inputs, outputs = peak.shape
        why = sorted({each.why for each in result.models if each.precision == precision})
        lines.append(
            f"peak     {precision} ({', '.join(why)}): {peak.gflops:,.0f} GFLOP/s, "
            f"{rows}x{inputs} by {inputs}x{outputs}"
        )
    return lines


def _main_table(there: list[ModelThroughput]) -> list[str]:
    headers = ["model", "px", "GFLOPs", "images/s", "spread", "batch", "of peak", "GB"]
    has_latency = any(each.course.latencies for each in there)
    if has_latency:
        headers += ["p50 ms", "p90", "p99", "runs"]
    rows = []
    for each in there:
        best, share, memory = each.course.best, each.share_of_peak, each.memory_bytes
        assert best is not None
        height, width = each.header["image_size"]
        row = [
            each.name,
            str(height) if height == width else f"{height}x{width}",
            _digits(each.flops / 1e9),
            _digits(best.images_per_second),
            f"{_spread(best.rates):.0%}",
            f"{best.batch_size:,}",
            "-" if share is None else f"{share:.0%}",
            "-" if memory is None else f"{memory / 1e9:.2f}",
        ]
        if has_latency:
            found = each.latency_ms()
            names = ("p50", "p90", "p99")
            row += ["-"] * 4 if found is None else [_digits(found[name]) for name in names]
            row += [] if found is None else [str(int(found["runs"]))]
        rows.append(row)
    return _fitted(headers, rows)


def _fitted(headers: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table; of names that make it too wide the end, which tells paths apart."""
    lines = table(headers, rows)
    longest = max(len(row[0]) for row in rows)
    most = longest - max(0, max(len(line) for line in lines) - _WIDTH)
    short = [row[0] if len(row[0]) <= most else f"...{row[0][3 - most :]}" for row in rows]
    return table(headers, [[name, *row[1:]] for name, row in zip(short, rows, strict=True)])


def _digits(value: float) -> str:
    """Three digits at least: 0.0312, 4.00, 31.4, 1,384."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _spread(rates: tuple[float, ...]) -> float:
    ranked = sorted(rates)
    return (ranked[-1] - ranked[0]) / ranked[len(ranked) // 2]


def _points(there: list[ModelThroughput]) -> list[str]:
    """The rate of each model at each batch size, as many tables as the width wants."""
    sizes = sorted({point.batch_size for each in there for point in each.course.points})
    lines = []
    for start in range(0, len(sizes), _POINTS_A_ROW):
        shown = sizes[start : start + _POINTS_A_ROW]
        rows = []
        for each in there:
            rates = {point.batch_size: point.images_per_second for point in each.course.points}
            cells = [_digits(rates[size]) if size in rates else "" for size in shown]
            if any(cells):
                rows.append([each.name, *cells])
        lines += _fitted(["images/s at batch", *(f"{size:,}" for size in shown)], rows)
    return lines


def _notes(result: Throughput, there: list[ModelThroughput]) -> list[str]:
    passes = 3 if result.models[0].mode == "training" else 1
    times = "" if passes == 1 else f" x {passes} passes"
    share = (
        f"of peak: GFLOPs of one image{times} x images/s, relative to the machine's own products."
    )
    lines = [share]
    if any(each.memory_bytes is not None for each in there):
        means = (
            "torch's allocations" if result.device.type == "cuda" else "growth of the resident set"
        )
        kept = "weights" if passes == 1 else "weights, AdamW's state"
        lines.append(f"GB: {kept}, the batch, and what a step takes ({means}).")
    for each in there:
        best = each.course.best
        assert best is not None
        if each.course.ended is not None:
            last = each.course.points[-1].batch_size
            lines.append(f"note     {each.name}: no batch above {last:,}: {each.course.ended}")
        spread = _spread(best.rates)
        if spread > _WIDE_SPREAD:
            what = f"rounds differ by {spread:.0%}: the machine was busy, measure again"
            lines.append(f"note     {each.name}: {what}")
        if abs(each.counted - each.flops) > 0.01 * each.flops:
            counted = f"{each.counted / 1e9:.4g} GFLOPs counted, {each.flops / 1e9:.4g} by formula"
            lines.append(f"note     {each.name}: {counted}")
    if there and all(abs(each.counted - each.flops) <= 0.01 * each.flops for each in there):
        lines.append("GFLOPs: by the closed formula; torch's own count agrees within 1 %.")
    lines += [
        f"failed   {each.name}: {each.course.error}" for each in result.models if each.course.error
    ]
    if result.interrupted:
        lines.append("stopped  before the end: this is what was measured until then")
    return lines


def cost_lines(
    result: Throughput, config: TrainConfig, seen: int, data: str
) -> tuple[list[str], dict[str, Any]]:
    """Returns what a recipe takes on this device, as lines and as JSON values.

    Args:
        result: of the recipe's model, one training step.
        config: of the recipe.
        seen: images that it looks at, the same one once for each time.
        data: what it trains on, in words.
    """
    row, optimizer = result.models[0], config.optimizer
    sam = 1.0 - optimizer.sam_start if optimizer.sam_rho else 0.0
    total, rate = operations(row.flops, seen, optimizer), row.images_per_second
    figures: dict[str, Any] = {
        "name": config.recipe,
        "images_seen": seen,
        "data": data,
        "sharpness": sam,
        "operations": total,
        "images_per_second": rate,
        "device_days": None,
    }
    if row.course.error and rate is None:
        return [], figures
    assert rate is not None
    days = seen * (1.0 + sam) / rate / 86_400
    figures["device_days"] = days
    length = planned(config) + (f" of {data}" if config.steps is None else "")
    twice = f", {sam:.0%} of them twice (sharpness-aware)" if sam else ""
    lines = [
        "",
        f"recipe   {config.recipe}: {length}, {plural(seen, 'image')}{twice}",
        f"cost     {power(total)} operations; at {_digits(rate)} images/s "
        f"{_digits(days)} days of this device",
        "         The step alone: reading images, evaluation and checkpoints are not in it.",
    ]
    if optimizer.name != "adamw":
        lines.append(f"note     the recipe's optimizer is {optimizer.name}, timed was AdamW")
    return lines, figures
