"""Options of inspect; does not import torch, to keep --help fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from allmlp.errors import UserError, needs
from allmlp.options import ImageSize, Options, ResizeWeights


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """Look inside a model: what its token-mixing units have learned, and what one image excites.

    Examples:
        mixer inspect runs/flowers
        mixer inspect runs/flowers --output inside --compare random
        mixer inspect mixer_b16.i21k --output inside --layers all
        mixer inspect runs/flowers --output inside --image photo.jpg
    """

    output: Path | None = None
    """Folder for figures 5, 6 and 7 of the paper and all numbers; without it they are printed."""
    overwrite: bool = False
    """Replace existing files."""
    compare: Any = field(default=None, metadata={"type": str | None})  # or a model
    """Another model to compare with; random is the same architecture with random weights."""
    seed: int = 0
    """Seed of the random weights."""
    layers: tuple[int, ...] | Literal["all"] | None = field(
        default=None, metadata={"metavar": "N ...|all"}
    )
    """Layers in figure 6, counted from 1, or all; defaults to the first three."""
    image: Path | None = None
    """An image: map what units read and write, and which regions the prediction depends on."""
    image_size: ImageSize | None = None
    """Image size in pixels; defaults to the model's own."""
    resize_weights: ResizeWeights = "auto"
    """How the token-mixing weights are resized to another image size."""
    device: str = "auto"
    """Device for the image: auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        if self.layers == ():
            raise UserError("layers is empty", fix="Give numbers from 1", code="out-of-range")
        needs({"layers": self.layers}, "output", self.output)
