"""The picture of the permutation study: examples above, the curves of each network below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from allmlp.plots import escape, shorten
from allmlp.preprocessing import PERMUTATIONS
from allmlp.studies.study_file import Cell

# The paper's colours: blue as they are, green the patches, orange all pixels.
_COLORS = {"none": "#1c7ed6", "patches": "#2b8a3e", "pixels": "#e8590c"}
TITLES = {"none": "as they are", "patches": "patches and pixels in them", "pixels": "all pixels"}
_INK, _GRID = "#333333", "#dddddd"


def permutation_figure(
    done: dict[str, Cell],
    rows: Sequence[dict[str, Any]],
    examples: Sequence[Sequence[np.ndarray]],
    data: str,
) -> Figure:
    """Returns figure 4: pictures under the three orders, and a panel of curves for each network.

    Args:
        done: what the runs have reached, by "<model>/<permutation>/seed-<n>".
        rows: of the table: one for each network and permutation.
        examples: of each example the picture under each of `PERMUTATIONS`, uint8 (H, W, channels).
        data: what was trained on.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    width = max(8.4, 4.6 * len(models))
    figure = Figure(figsize=(width, 6.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(0.75, 2.3))
    top, bottom = parts
    _draw_examples(top, examples)
    panels = bottom.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, models, strict=True):
        for kind in PERMUTATIONS:
            own = [
                cell
                for name, cell in done.items()
                if cell["model"] == model and name.split("/")[1] == kind
            ]
            row = next(r for r in rows if r["model"] == model and r["permutation"] == kind)
            label = f"{TITLES[kind]}: {row['accuracy']:.1%}"
            if kind != "none" and row["drop"] is not None:
                label += f" (drop {row['drop']:.0%})"
            for number, cell in enumerate(own):
                steps = [point[0] for point in cell["curve"]]
                shares = [100 * point[1] for point in cell["curve"]]
                axes.plot(
                    steps,
                    shares,
                    color=_COLORS[kind],
                    marker="o",
                    markersize=3.5,
                    linewidth=1.7,
                    label=escape(label) if number == 0 else None,
                )
        axes.set_title(escape(model), fontsize=11, color=_INK)
        axes.set_xlabel("step")
        axes.grid(color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.legend(loc="lower right", fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="none")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("validation top-1 (%)")
    panels[0].set_ylim(bottom=0)
    measured = f"{rows[0]['measured_on']} accuracy of the best weights in the legends"
    figure.suptitle(escape(f"{shorten(data, 60)}: {measured}"), fontsize=10, color="#555555")
    return figure


def _draw_examples(part: Any, examples: Sequence[Sequence[np.ndarray]]) -> None:
    """The examples in three groups, one for each order, as the paper has them."""
    groups = part.subfigures(1, len(PERMUTATIONS))
    for at, (group, kind) in enumerate(zip(groups, PERMUTATIONS, strict=True)):
        group.suptitle(TITLES[kind], fontsize=10, color=_COLORS[kind])
        panels = group.subplots(1, max(1, len(examples)), squeeze=False)[0]
        for axes in panels:
            axes.set_axis_off()
        for axes, example in zip(panels, examples, strict=False):
            pixels = example[at]
            shown = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
            axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
