"""Figures of the studies and of the tables.

The paper's results and ours never share a panel: other hardware and data need other axes. The
paper's points are circles, ours are diamonds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from allmlp import plots
from allmlp.paper.published import HARDWARE, Result, number

# The paper's colours for the three kinds of networks; our measurements have another one.
COLORS = {"MLP": "#d6336c", "attention": "#1c7ed6", "convolution": "#e0a100"}
OURS = plots.GREEN
_LINES = ("#d6336c", "#7048e8", "#0c8599", "#e8590c", "#2b8a3e", "#495057")
_MARKERS = ("o", "s", "^", "D", "v", "P")
# The paper's colours for the orders of the pixels in figure 4.
_ORDER_COLORS = {"none": "#1c7ed6", "patches": "#2b8a3e", "pixels": "#e8590c"}
_ORDERS = {"none": "original", "patches": "patches and pixels in them", "pixels": "all pixels"}
MOST_PANELS = 3  # of our measurements in one figure


class Point(NamedTuple):
    """One of our models; x is device-days, or images per second on that hardware."""

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
    """Returns figure 2, right: accuracy against the number of training images, a line per model."""
    figure = plots.new_figure(10.4, 4.5)
    few, upstream = figure.subplots(1, 2)
    for at, model in enumerate(dict.fromkeys(point["model"] for point in points)):
        own = sorted((p for p in points if p["model"] == model), key=lambda p: p["images"])
        images = [point["images"] for point in own]
        style: dict[str, Any] = {"color": _LINES[at % 6], "marker": _MARKERS[at % 6]}
        style["label"] = plots.escape(own[0]["label"])
        bars = [100 * (point["few_shot_deviation"] or 0.0) for point in own]
        few.errorbar(images, [100 * p["few_shot"] for p in own], yerr=bars, capsize=3, **style)
        upstream.plot(images, [100 * point["validation"] for point in own], **style)
    few.set(title=f"few-shot on {plots.shorten(measured_on, 44)}", ylabel=plots.escape(label))
    upstream.set(title="held-out images, best weights", ylabel="validation top-1 (%)")
    ticks = dict(sorted((point["images"], point["fraction"]) for point in points))
    for axes in (few, upstream):
        _style(axes)
        axes.set_xlabel("training images (fraction of the set)")
        names = [f"{images:,}\n{100 * fraction:.4g} %" for images, fraction in ticks.items()]
        axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
        axes.set_xticks(list(ticks), names)
    handles, names = few.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    over = "draws of the shots" if points[0]["runs"] == 1 else "runs"
    has_bars = any(point["few_shot_deviation"] for point in points)
    note = f"bars: standard deviation over the {over}" if has_bars else "no bars: one draw"
    steps = f"{points[0]['steps']:,} steps for every point"
    figure.suptitle(f"{plots.shorten(trained_on, 50)}: {steps}; {note}", fontsize=10)
    return figure


def permutation_figure(
    done: Mapping[str, dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    examples: Sequence[Sequence[np.ndarray]],
    data: str,
) -> Figure:
    """Returns figure 4: images in the three orders, and a panel of curves per network."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = plots.new_figure(max(8.4, 4.6 * len(models)), 6.6)
    parts: Any = figure.subfigures(2, 1, height_ratios=(0.75, 2.3))
    groups = parts[0].subfigures(1, len(_ORDERS))
    for at, (group, kind) in enumerate(zip(groups, _ORDERS, strict=True)):
        group.suptitle(_ORDERS[kind], fontsize=10, color=_ORDER_COLORS[kind])
        panels = group.subplots(1, max(1, len(examples)), squeeze=False)[0]
        for axes, example in zip(panels, examples, strict=False):
            plots.show(axes, example[at])
    panels = parts[1].subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, models, strict=True):
        for row in (row for row in rows if row["model"] == model):
            kind, color = row["permutation"], _ORDER_COLORS[row["permutation"]]
            label: str | None = f"{_ORDERS[kind]}: {row['accuracy']:.1%}"
            if kind != "none" and row["drop"] is not None:
                label = f"{label} (drop {row['drop']:.0%})"
            for name, run in done.items():
                if (run["model"], name.split("/")[2]) == (model, kind):
                    steps, top1 = zip(*run["curve"], strict=True)
                    curve = [100 * accuracy for accuracy in top1]
                    axes.plot(steps, curve, marker="o", ms=3.5, color=color, label=label)
                    label = None
        axes.set(title=plots.escape(model), xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.legend(loc="lower right", fontsize=8.5)
    panels[0].set(ylabel="validation top-1 (%)", ylim=(0, None))
    measured = f"{rows[0]['measured_on']} accuracy of the best weights in the legends"
    figure.suptitle(plots.escape(f"{plots.shorten(data, 60)}: {measured}"), fontsize=10)
    return figure


def pareto_figure(
    panels: Sequence[tuple[str, Sequence[Result]]], ours: Sequence[Point], *, throughput: bool
) -> Figure:
    """Returns figures 2 and 3: accuracy against training cost or throughput."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in dict.fromkeys(ours):  # a run and its evaluation give the same point
        groups.setdefault((point.hardware, point.data), []).append(point)
    shown = sorted(groups.items(), key=lambda group: -len(group[1]))[:MOST_PANELS]
    columns, rows = max(len(panels), len(shown)), 1 + bool(shown)
    figure = plots.new_figure(6.4 * columns, 5.0 * rows)
    bands: Any = figure.subfigures(rows, 1, squeeze=False)[:, 0]
    bands[0].suptitle(f"paper ({HARDWARE}), as printed", weight="bold")
    all_axes = [bands[0].subplots(1, len(panels), squeeze=False)[0]]
    for axes, (title, results) in zip(all_axes[0], panels, strict=True):
        points = []
        for row in results:
            x, top1 = number(row.throughput if throughput else row.core_days), number(row.imagenet)
            if x is not None and top1 is not None:
                axes.scatter([x], [top1], s=46, color="white", edgecolor=COLORS[row.family])
                points.append((x, top1, row.model))
        _draw(axes, points, plots.GREY, throughput)
        unit = f"images/s per {HARDWARE} core" if throughput else f"{HARDWARE} core-days"
        axes.set(title=title, xlabel=unit, ylabel="ImageNet top-1 (%)")
        for family, color in COLORS.items():
            axes.scatter([], [], color="white", edgecolor=color, label=family)
        axes.legend(loc="lower left" if throughput else "lower right", frameon=False)
    if shown:
        bands[1].suptitle("measured here", weight="bold", color=OURS)
        all_axes.append(bands[1].subplots(1, len(shown), squeeze=False)[0])
        for axes, ((hardware, data), own) in zip(all_axes[1], shown, strict=True):
            points = [(p.x, 100 * p.accuracy, plots.shorten(p.label, 26)) for p in own]
            axes.scatter([p[0] for p in points], [p[1] for p in points], marker="D", color=OURS)
            _draw(axes, points, OURS, throughput)
            unit = "images/s" if throughput else "training cost (device-days)"
            title = f"{plots.shorten(data, 56)}\non {plots.shorten(hardware, 48)}"
            axes.set(title=title, xlabel=unit, ylabel="top-1 (%)")
    figure.draw_without_rendering()  # the layout determines where there is room
    for axes in (axes for row in all_axes for axes in row):
        _spread_labels(axes)
    return figure


def frontier(points: list[tuple[float, float]], *, more_is_better: bool = False) -> list[int]:
    """Returns the indices of the points on the Pareto frontier, from the least accurate one."""
    sign = -1.0 if more_is_better else 1.0
    kept: list[int] = []
    for at in sorted(range(len(points)), key=lambda at: (sign * points[at][0], -points[at][1])):
        if not kept or points[at][1] > points[kept[-1]][1]:
            kept.append(at)
    return kept


def _draw(
    axes: Axes, points: Sequence[tuple[float, float, str]], color: str, more_is_better: bool
) -> None:
    """Labels the points and connects those on the Pareto frontier."""
    places = [(x, y) for x, y, _ in points]
    best = [places[at] for at in frontier(places, more_is_better=more_is_better)]
    axes.plot([x for x, _ in best], [y for _, y in best], ls="--", lw=1.2, color=color, zorder=0)
    for x, y, name in points:
        label = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=7)
        label.set(in_layout=False, bbox={"pad": 0.4, "facecolor": "white", "edgecolor": "none"})
    _style(axes)


# Candidate label positions: alignment, and offset from the point in units of 1/72 inch.
_PLACES = [
    (x * far, y * far, ("right", "center", "left")[x + 1], ("top", "center", "bottom")[y + 1])
    for far in (5, 11, 18)
    for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]


def _spread_labels(axes: Axes) -> None:
    """Moves each label to the first position where it covers no other label, point or legend."""
    labels: list[Any] = list(axes.texts)
    inside = axes.get_window_extent()
    taken = [axes.legend_.get_window_extent()] if axes.legend_ is not None else []
    for label in labels:
        x, y = axes.transData.transform(label.xy)
        taken.append(Bbox.from_bounds(x - 6, y - 6, 12, 12))
    for label in labels:
        costs = []
        for at, (x, y, horizontal, vertical) in enumerate(_PLACES):
            label.set(position=(x, y), ha=horizontal, va=vertical)
            box = label.get_window_extent()
            outside = box.x0 < inside.x0 or box.x1 > inside.x1
            costs.append((box.count_overlaps(taken) + 2 * outside, at))
        x, y, horizontal, vertical = _PLACES[min(costs)[1]]
        label.set(position=(x, y), ha=horizontal, va=vertical)
        taken.append(label.get_window_extent())


def _style(axes: Axes) -> None:
    """Logarithmic x-axis with plain numbers, light grid, no frame."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=30))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.14, y=0.14)
    axes.spines[["top", "right"]].set_visible(False)
