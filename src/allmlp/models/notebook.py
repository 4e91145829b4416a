"""How a model shows itself in a notebook: a table, and the weights of the first token mixing."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np
from torch import nn

from allmlp.data.image import encode_png
from allmlp.page import data_url

_COLUMNS, _ROWS = 8, 3


def model_html(model: Any) -> str:
    config, names = model.config, model.class_names or []
    height, width = config.image_size
    classes = f"{config.num_classes:,}" + (f": {', '.join(names[:5])}" if names else "")
    facts = {
        "architecture": config.summary(),
        "input": f"{height}x{width} pixels, {config.in_channels} channels",
        "classes": classes + ", ..." * (len(names) > 5),
        "parameters": f"{model.num_parameters:,}",
        "weights": "random" if model.preprocessing is None else str(model.source or "in memory"),
    }
    rows = (f"<tr><th>{name}</th><td>{html.escape(fact)}</td></tr>" for name, fact in facts.items())
    table = f"<b>{type(model).__name__}</b><table>{''.join(rows)}</table>"
    grid = getattr(config, "grid", (0, 0))
    layers = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.head)
    layer = next((layer for layer in layers if layer.in_features == math.prod(grid)), None)
    if layer is None:
        return table
    weights = layer.weight.detach().float().cpu().numpy()[: _COLUMNS * _ROWS].reshape(-1, *grid)
    largest = np.abs(weights).max(axis=(1, 2), keepdims=True)
    shown = (127.5 + 127.5 * weights / np.maximum(largest, 1e-30)).round().astype(np.uint8)
    gaps = ((0, -len(weights) % _COLUMNS), (0, 1), (0, 1))
    shown = np.pad(shown, gaps, constant_values=255)
    _, high, wide = shown.shape
    tiles = shown.reshape(-1, _COLUMNS, high, wide).swapaxes(1, 2)
    source = data_url(encode_png(np.ascontiguousarray(tiles.reshape(-1, _COLUMNS * wide))))
    what = "input weights of the first token-mixing units, on the grid of the patches"
    style = "width:320px;image-rendering:pixelated"
    return f'{table}<img src="{source}" style="{style}" alt="{what}" title="{what}">'
