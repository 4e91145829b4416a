"""Options of inspect; does not import torch, to keep --help fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from allmlp.errors import UserError, at_least, needs
from allmlp.options import ImageSize, Options, ResizeWeights


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """Look inside a model: what its token-mixing units have learned, and what one image excites.

    Examples:
        mixer inspect runs/flowers
        mixer inspect runs/flowers --output inside --compare random
        mixer inspect mixer_b16.i21k --output inside --layers all --vector pdf
        mixer inspect runs/flowers --output inside --image photo.jpg --units 1:12 3:40
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
    outgoing: bool = False
    """Also measure and plot the outgoing weights, in the order of the incoming ones."""
    image: Path | None = None
    """An image: map what units read and write, and which regions the prediction depends on."""
    units: tuple[str | tuple[int, int], ...] | None = field(
        default=None, metadata={"type": tuple[str, ...] | None, "metavar": "LAYER:UNIT ..."}
    )
    """Units whose response to the image is plotted; by default the strongest of the first
    layers."""
    window: int | None = None
    """Side of the grey window that slides over the image, in patches."""
    stride: int | None = None
    """Step of the window, in patches."""
    vector: Literal["svg", "pdf", "none"] = "svg"
    """Vector format to write beside each PNG."""
    image_size: ImageSize | None = None
    """Image size in pixels; defaults to the model's own."""
    resize_weights: ResizeWeights = "auto"
    """How the token-mixing weights are resized to another image size."""
    batch_size: int = 64
    """Batch size of occluded images."""
    device: str = "auto"
    """Device for the image: auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        for name in ("layers", "units"):
            if getattr(self, name) == ():
                raise UserError(f"{name} is empty", fix="Give numbers from 1", code="out-of-range")
        image = {name: getattr(self, name) for name in ("units", "window", "stride")}
        needs(image, "image", self.image)
        needs({"layers": self.layers}, "output", self.output)
        at_least("batch_size", self.batch_size, 1)
        self.chosen_units()

    def chosen_units(self) -> list[tuple[int, int]]:
        """Returns the requested units as (layer, unit), both from 1."""
        pairs = []
        for unit in self.units or ():
            parts = unit.split(":") if isinstance(unit, str) else unit
            try:
                layer, number = map(int, parts)
            except ValueError:
                fix = "The layer and the unit, both from 1, such as 3:40"
                raise UserError(f"not a unit: {unit!r}", where="units", fix=fix) from None
            pairs.append((layer, number))
        return list(dict.fromkeys(pairs))
