"""Which figures a model gets: figures 5, 6 and 7, and the numbers over the layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from allmlp.inspection.measure import ModelMeasures
from allmlp.inspection.pictures import as_drawn, color_figure, layer_panel, pair_figure
from allmlp.inspection.units import (
    OPPOSITE,
    Floats,
    pair_opposites,
    window_share,
)

_FIRST, _PAIRS, _COLUMNS, _WIDE = 3, 32, 4, 10
_COLORS = ("#0b5394", "#b45f06")


def weight_figures(
    measured: ModelMeasures, layers: Sequence[int], compared: ModelMeasures | None = None
) -> dict[str, Figure]:
    """Returns figures 5, 6 and 7 of a model by their names, and figures 5 and 7 of the other.

    Args:
        measured: the model.
        layers: numbers of the layers that figure 6 shows, from 1.
        compared: a model to set beside it.
    """
    figures = first_figures(measured, "")
    orders = {n: pair_opposites(measured.units.layer(n).incoming) for n in layers}
    for number, order in orders.items():
        layer = measured.units.layer(number)
        title = f"{measured.name}: hidden units of a token-mixing MLP"
        kinds = {"": (layer.incoming, title)}
        if measured.outgoing and layer.outgoing is not None:
            what = "outgoing weights, in the order of the incoming"
            kinds["_outgoing"] = (layer.outgoing, f"{measured.name}: {what}")
        for ending, (weights, title) in kinds.items():
            panel = layer_panel(f"Layer {number}", weights, order)
            drawn = pair_figure([panel], title, columns=_WIDE, numbered=True)
            figures[f"figure6_layer{number}{ending}"] = drawn
    if compared is not None:
        figures |= first_figures(compared, "_compared")
    return figures


def first_figures(measured: ModelMeasures, ending: str) -> dict[str, Figure]:
    """Returns figure 5 and figure 7 of a model, as far as it has them.

    Args:
        measured: the model.
        ending: of the figures' names.
    """
    figures: dict[str, Figure] = {}
    first = measured.units.layers[:_FIRST]
    orders = [pair_opposites(layer.incoming) for layer in first]
    if first:
        panels = [
            layer_panel(f"Layer {layer.number}", layer.incoming, order, _PAIRS)
            for layer, order in zip(first, orders, strict=True)
        ]
        title = f"{measured.name}: hidden units of the first token-mixing MLPs"
        figures[f"figure5{ending}"] = pair_figure(panels, title, columns=_COLUMNS)
    out = [layer for layer in first if layer.outgoing is not None and measured.outgoing]
    if out:
        panels = [
            layer_panel(f"Layer {layer.number}", layer.outgoing, order, _PAIRS)
            for layer, order in zip(first, orders, strict=True)
            if layer.outgoing is not None
        ]
        title = f"{measured.name}: outgoing weights, in the order of the incoming"
        figures[f"figure5_outgoing{ending}"] = pair_figure(panels, title, columns=_COLUMNS)
    stem = measured.units.stem
    if stem is not None and measured.stem is not None:
        order = np.argsort(np.nan_to_num(measured.stem.frequency, nan=1.0), kind="stable")
        size = f"{len(stem)} units of {stem.shape[1]}x{stem.shape[2]} pixels"
        what = "lowest spatial frequency first; grey is zero, each unit on its own scale"
        title = f"{measured.name}: units of the stem"
        figures[f"figure7{ending}"] = color_figure(stem[order], title, f"{size}, {what}")
    return figures


def layers_figure(measured: ModelMeasures, compared: ModelMeasures | None = None) -> Figure:
    """Returns frequency, partners and locality over the layers, of one or two models.

    Args:
        measured: the model, with at least one drawable layer.
        compared: a model to set beside it.
    """
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    panels = figure.subplots(1, 3)
    both = [each for each in (measured, compared) if each is not None and each.incoming]
    for model, color in zip(both, _COLORS, strict=False):
        numbers = [layer.number for layer in model.units.layers]
        values = [
            [each.frequency for each in model.incoming],
            [each.partner_correlation for each in model.incoming],
            [each.locality for each in model.incoming],
        ]
        for axes, column in zip(panels, values, strict=True):
            low, middle, high = (_quantile(column, q) for q in (0.25, 0.5, 0.75))
            axes.plot(numbers, middle, color=color, marker=".", linewidth=1.2, label=model.name)
            axes.fill_between(numbers, low, high, color=color, alpha=0.2, linewidth=0)
    partner, local = panels[1], panels[2]
    panels[0].set_ylabel("spatial frequency (cycles per patch)", fontsize=7)
    partner.set_ylabel("correlation with the best opposite", fontsize=7)
    partner.axhline(OPPOSITE, color="#777777", linewidth=0.8, linestyle=":")
    partner.set_ylim(-1.03, 0.03)
    local.set_ylabel("energy in the best quarter-window", fontsize=7)
    share = window_share(measured.incoming[0].grid)
    local.axhline(share, color="#777777", linewidth=0.8, linestyle=":")
    for axes in panels:
        axes.set_xlabel("layer", fontsize=7)
        axes.tick_params(labelsize=6.5)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles = [axes_line for axes_line in panels[0].get_lines() if axes_line.get_marker() == "."]
    names = [as_drawn(model.name) for model in both]
    figure.legend(handles, names, loc="outside upper left", ncols=2, fontsize=7, frameon=False)
    foot = (
        "Lines: median over the units; bands: quartiles. Dotted: the bound of opposites, "
        f"\N{MINUS SIGN}{-OPPOSITE}; the locality of a constant, {share:.2f}."
    )
    figure.supxlabel(foot, fontsize=6)
    return figure


def _quantile(column: list[Floats], share: float) -> Floats:
    """The quantile of each layer's units; NaN for a layer that has none."""
    known = [values[~np.isnan(values)] for values in column]
    return np.array([np.quantile(v, share) if len(v) else np.nan for v in known])
