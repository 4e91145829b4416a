"""The figures of the data-scale study and of the tables: accuracy against images, cost and speed.

What the paper printed and what was measured here never share a panel: other hardware and other data
make other axes. The paper's points are circles, ours are diamonds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from allmlp import plots
from allmlp.paper.published import HARDWARE, Result, frontier, number

# The paper's colours of the three kinds of networks; what was measured here has one of its own.
COLORS = {"MLP": "#d6336c", "attention": "#1c7ed6", "convolution": "#e0a100"}
OURS = plots.GREEN
_LINES = ("#d6336c", "#7048e8", "#0c8599", "#e8590c", "#2b8a3e", "#495057")
_MARKERS = ("o", "s", "^", "D", "v", "P")
MOST_PANELS = 3  # of measured points in one figure


class Point(NamedTuple):
    """A model of ours: x in device-days or images per second on that hardware."""

    label: str
    x: float
    accuracy: float
    hardware: str
    data: str


def save(figure: Figure, path: Path) -> None:
    """Writes PATH.png and PATH.svg; the folder must exist."""
    for kind in ("png", "svg"):
        plots.save(figure, path.with_name(f"{path.name}.{kind}"))


def data_scale_figure(
    points: Sequence[dict[str, Any]], label: str, measured_on: str, trained_on: str
) -> Figure:
    """Returns figure 2, right: accuracy against the number of training images, a line per model.

    Args:
        points: the rows that `data_scale` returns.
        label: of the first panel's accuracy.
        measured_on: the few-shot data.
        trained_on: the training data.
    """
    figure = plots.new_figure(10.4, 4.5)
    few, upstream = figure.subplots(1, 2)
    for at, model in enumerate(dict.fromkeys(point["model"] for point in points)):
        own = sorted((p for p in points if p["model"] == model), key=lambda p: p["images"])
        images = [point["images"] for point in own]
        style: dict[str, Any] = {"color": _LINES[at % 6], "marker": _MARKERS[at % 6]}
        style["label"] = plots.escape(own[0]["label"])
        bars = [100 * (point["deviation"] or 0.0) for point in own]
        few.errorbar(images, [100 * p["few_shot"] for p in own], yerr=bars, capsize=3, **style)
        upstream.plot(images, [100 * point["validation"] for point in own], **style)
    ticks = dict(sorted((point["images"], point["fraction"]) for point in points))
    few.set(title=f"few-shot on {plots.shorten(measured_on, 44)}", ylabel=plots.escape(label))
    upstream.set(title="held-out images, best weights", ylabel="validation top-1 (%)")
    for axes in (few, upstream):
        _style(axes)
        axes.set_xlabel("training images (fraction of the set)")
        names = [f"{images:,}\n{100 * fraction:.4g} %" for images, fraction in ticks.items()]
        axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
        axes.set_xticks(list(ticks), names)
    handles, names = few.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    of = sorted({point["deviation_of"] for point in points if point["deviation_of"]})
    note = f"bars: standard deviation of {' or '.join(of)}" if of else "no bars: one draw"
    steps = f"{points[0]['steps']:,} steps for every point"
    figure.suptitle(f"{plots.shorten(trained_on, 50)}: {steps}; {note}", fontsize=10)
    return figure


def pareto_figure(
    panels: Sequence[tuple[str, Sequence[Result]]], ours: Sequence[Point], *, throughput: bool
) -> Figure:
    """Returns figures 2 and 3: accuracy against the training cost, or against the throughput.

    Args:
        panels: title and rows of each panel of the paper's, which stand above.
        ours: measured here, a panel for each hardware and data.
        throughput: more is better.
    """
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in dict.fromkeys(ours):  # a run and an evaluation of it are the same point
        groups.setdefault((point.hardware, point.data), []).append(point)
    shown = sorted(groups.items(), key=lambda group: -len(group[1]))[:MOST_PANELS]
    columns, rows = max(len(panels), len(shown)), 1 + bool(shown)
    figure = plots.new_figure(6.0 * columns, 4.6 * rows)
    bands: list[Any] = list(np.ravel(np.array(figure.subfigures(rows, 1))))
    bands[0].suptitle(f"paper ({HARDWARE}), as printed", weight="bold")
    for axes, (title, results) in zip(_panels(bands[0], len(panels)), panels, strict=True):
        points = []
        for row in results:
            x, top1 = number(row.throughput if throughput else row.core_days), number(row.imagenet)
            if x is not None and top1 is not None:
                axes.scatter([x], [top1], s=46, color="white", edgecolor=COLORS[row.family])
                points.append((x, top1, row.model))
        _draw(axes, points, "#888888", throughput)
        unit = f"images/s per {HARDWARE} core" if throughput else f"{HARDWARE} core-days"
        axes.set(title=title, xlabel=unit, ylabel="ImageNet top-1 (%)")
        for family, color in COLORS.items():
            axes.scatter([], [], color="white", edgecolor=color, label=family)
        axes.legend(loc="lower left" if throughput else "lower right", frameon=False)
    if shown:
        bands[1].suptitle("measured here", weight="bold", color=OURS)
        for axes, ((hardware, data), own) in zip(_panels(bands[1], len(shown)), shown, strict=True):
            points = [(p.x, 100 * p.accuracy, plots.shorten(p.label, 26)) for p in own]
            axes.scatter([p[0] for p in points], [p[1] for p in points], marker="D", color=OURS)
            _draw(axes, points, OURS, throughput)
            unit = "images/s" if throughput else "training cost (device-days)"
            title = f"{plots.shorten(data, 56)}\non {plots.shorten(hardware, 48)}"
            axes.set(title=title, xlabel=unit, ylabel="top-1 (%)")
    return figure


def _panels(band: Any, number: int) -> list[Axes]:
    return list(np.ravel(band.subplots(1, number, squeeze=False)))


def _draw(
    axes: Axes, points: Sequence[tuple[float, float, str]], color: str, more_is_better: bool
) -> None:
    """Names the points and joins those on the Pareto frontier."""
    places = [(x, y) for x, y, _ in points]
    best = [places[at] for at in frontier(places, more_is_better=more_is_better)]
    axes.plot([x for x, _ in best], [y for _, y in best], ls="--", lw=1.2, color=color, zorder=0)
    for x, y, name in points:
        axes.annotate(name, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7)
    _style(axes)


def _style(axes: Axes) -> None:
    """A logarithmic x-axis with plain numbers, a light grid, no box."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=30))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.14, y=0.14)
    axes.spines[["top", "right"]].set_visible(False)
