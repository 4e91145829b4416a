"""`mixer inspect`: a model's weights measured and drawn, and what one image excites.

docs/inspection.md lists the files. Layers and units count from 1 in files and figures.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from allmlp.console import Reporter, table
from allmlp.errors import UserError, at_least, between, needs
from allmlp.inspection.attribution import (
    Occlusion,
    UnitResponse,
    occlusion,
    occlusion_places,
    read_image,
    strongest,
    unit_responses,
)
from allmlp.inspection.figures import (
    layers_figure,
    occlusion_figure,
    response_figure,
    weight_figures,
)
from allmlp.inspection.token_mixing import (
    DEFINITIONS,
    ModelUnits,
    model_units,
    weight_correlations,
)
from allmlp.inspection.units import OPPOSITE, UnitMeasures
from allmlp.io import Content, atomic_write_all, check_not_inputs, check_output_folder, expand
from allmlp.models.catalog import random_weights
from allmlp.models.layers import ImageClassifier
from allmlp.models.resize import ResizeWeights
from allmlp.options import ImageSize, Options, make
from allmlp.plots import writer
from allmlp.runtime.device import check_has_weights, to_device
from allmlp.weights.load import load_model

FIRST_LAYERS, STRONGEST = 3, 4

AnyModel = str | Path | ImageClassifier


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """Look inside: what the token-mixing units have learned, and what one image excites.

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
    compare: AnyModel | None = field(default=None, metadata={"type": str | None})
    """Another model to show beside it; random is the same architecture with random weights."""
    seed: int = 0
    """Seed of the random weights."""
    layers: tuple[int, ...] | Literal["all"] | None = field(
        default=None, metadata={"metavar": "N ...|all"}
    )
    """Layers of figure 6, counted from 1, or all; by default the first three."""
    outgoing: bool = False
    """Also measure and draw the outgoing weights, in the order of the incoming ones."""
    image: Path | None = None
    """An image: map what units read and write, and which regions the prediction depends on."""
    units: tuple[str | tuple[int, int], ...] | None = field(
        default=None, metadata={"type": tuple[str, ...] | None, "metavar": "LAYER:UNIT ..."}
    )
    """Units whose response to the image is drawn; by default the strongest of the first layers."""
    window: int | None = None
    """Side of the grey window that slides over the image, in patches."""
    stride: int | None = None
    """Patches between two positions of the window."""
    vector: Literal["svg", "pdf", "none"] = "svg"
    """Vector format written beside each PNG."""
    image_size: ImageSize | None = None
    """Resize the model to another image size first."""
    resize_weights: ResizeWeights = "auto"
    """How the token-mixing weights are resized."""
    batch_size: int = 64
    """Covered images per batch."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N, for the image."""

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
        """Returns (layer, unit), both from 1, of each unit that was named."""
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


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`."""

    model: ModelUnits
    compared: ModelUnits | None
    occlusion: Occlusion | None  # of the image
    responses: list[UnitResponse]  # of the chosen units to the image
    notes: list[str]  # what does not apply to the models
    summary: str  # image size and architecture of the model
    outgoing: bool = False
    files: list[str] = field(default_factory=list)  # written

    def to_json(self) -> dict[str, Any]:
        """Returns every number as JSON values."""
        values: dict[str, Any] = {
            "format": "allmlp inspection",
            "version": 1,
            "definitions": DEFINITIONS,
            "model": self.model.to_json(outgoing=self.outgoing),
        }
        if self.compared is not None:
            values["compared"] = self.compared.to_json(outgoing=self.outgoing)
            values["weights_correlation"] = weight_correlations(self.model, self.compared)
        if self.occlusion is not None:
            values["occlusion"] = self.occlusion.to_json()
            values["responses"] = [response.to_json() for response in self.responses]
        return {**values, "notes": self.notes}

    def units_csv(self) -> str:
        """Returns a table with a row for every unit."""
        file = io.StringIO()
        rows = csv.writer(file, lineterminator="\n")
        names = ("layer", "weights", "unit", "frequency", "locality", "opposite", "correlation")
        rows.writerow(["model", *names])
        for model in (self.model, self.compared):
            if model is not None:
                rows.writerows(model.unit_rows(outgoing=self.outgoing))
        return file.getvalue()


def inspect(model: AnyModel, options: InspectOptions | None = None, **fields: Any) -> Inspection:
    """Returns measures of a model's weights, and draws figures 5, 6 and 7 of the paper.

    Args:
        model: of any family, or a path or name that `load_model` takes; `notes` of the result
            names what does not apply to it.
        options: see `InspectOptions`; its fields can be given as keywords instead.

    Raises:
        UserError: an exported file, no such layer or unit, an unreadable image, an output that is
            a file or has such files already.
    """
    options = make(InspectOptions, options, fields)
    net, name = _loaded(model, options, "model")
    other, other_name = None, f"random weights, seed {options.seed}"
    if options.compare == "random":
        other = random_weights(net, options.seed)
    elif options.compare is not None:
        other, other_name = _loaded(options.compare, options, "compared")
    folder = None if options.output is None else expand(options.output)
    if folder is not None:
        check_output_folder(folder, ("inspection.json", "units.csv"), overwrite=options.overwrite)
        folder.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    units = model_units(net, name)
    compared = None if other is None else model_units(other, other_name)
    drawable = [layer.number for layer in units.layers]
    layers = drawable if options.layers == "all" else options.layers or drawable[:FIRST_LAYERS]
    for number in layers:
        units.layer(number)
    notes = list(units.notes)
    if compared is not None:
        notes += [f"{other_name}: {note}" for note in compared.notes if note not in notes]
    covered, responses, figures = None, [], {}
    if options.image is not None:
        is_path = not isinstance(model, ImageClassifier)
        net = to_device(net, "auto" if is_path and options.device is None else options.device)
        image, pixels = read_image(options.image, net)
        responses = _responses(net, units, image, options)
        covered = _occlusion(net, image, options)
        title = options.image.name
        if folder is not None:
            figures["occlusion"] = occlusion_figure(pixels, covered, title)
        if folder is not None and responses:
            title += ": what token-mixing units read and write"
            figures["responses"] = response_figure(pixels, responses, title)
    height, width = net.config.image_size
    summary = f"{height}x{width} pixels, {net.config.summary()}"
    found = Inspection(units, compared, covered, responses, notes, summary, options.outgoing)
    if folder is not None:
        layers = list(dict.fromkeys(layers))
        figures |= weight_figures(units, layers, compared, outgoing=options.outgoing)
        if units.layers:
            figures["layers"] = layers_figure(units, compared)
        _write(found, figures, folder, options)
    return found


def _loaded(model: AnyModel, options: InspectOptions, name: str) -> tuple[ImageClassifier, str]:
    if isinstance(model, ImageClassifier):
        check_has_weights(model)
        if options.image_size is not None:
            fix = "Give it to load_model, or give a path"
            raise UserError("image_size is for a model that is loaded from a path", fix=fix)
        return model, name
    resize = {"image_size": options.image_size, "resize_weights": options.resize_weights}
    return load_model(model, **resize), str(model)


def _responses(
    model: ImageClassifier, known: ModelUnits, image: Tensor, options: InspectOptions
) -> list[UnitResponse]:
    units = options.chosen_units()
    if not units:
        return [
            response
            for layer in known.layers[:FIRST_LAYERS]
            for response in strongest(unit_responses(model, known, image, layer.number), STRONGEST)
        ]
    for layer, unit in units:
        between(f"units: unit of layer {layer}", unit, 1, len(known.layer(layer).incoming))
    maps = {layer: unit_responses(model, known, image, layer) for layer, _ in units}
    return [maps[layer][unit - 1] for layer, unit in units]


def _occlusion(model: ImageClassifier, image: Tensor, options: InspectOptions) -> Occlusion:
    window, stride, places = occlusion_places(model, options.window, options.stride)
    with Reporter().progress(places[..., 0].size, "covered images") as bar:
        return occlusion(
            model,
            image,
            window=window,
            stride=stride,
            batch_size=options.batch_size,
            on_batch=bar.advance,
        )


def _write(
    found: Inspection, figures: dict[str, Figure], folder: Path, options: InspectOptions
) -> None:
    """Writes all files or none."""
    kinds = ["png"] if options.vector == "none" else ["png", options.vector]
    contents: dict[Path, Content] = {
        folder / f"{name}.{kind}": writer(figure, kind)
        for name, figure in figures.items()
        for kind in kinds
    }
    contents[folder / "units.csv"] = found.units_csv().encode(errors="surrogateescape")
    text = json.dumps(found.to_json(), indent=2, default=np.ndarray.tolist) + "\n"
    contents[folder / "inspection.json"] = text.encode(errors="surrogateescape")
    check_output_folder(folder, [path.name for path in contents], overwrite=options.overwrite)
    check_not_inputs(contents, [] if options.image is None else [options.image])
    atomic_write_all(contents)
    found.files.extend(path.name for path in contents)


def show(found: Inspection, options: InspectOptions) -> None:
    """Prints the measures of every layer, and what the image excites."""
    report = Reporter()
    report.say(f"model    {found.model.name}: {found.summary}")
    if found.compared is not None:
        report.say(f"compared {found.compared.name}")
    for note in found.notes:
        report.say(f"note     {note}")
    _print_measures(report, found)
    if found.occlusion is not None:
        _print_image(report, found, options.image)
    if options.output is not None:
        figures = sum(name.endswith(".png") for name in found.files)
        also = "" if options.vector == "none" else f", each also as {options.vector}"
        report.say(
            f"written  {options.output}: inspection.json, units.csv, {figures} figures{also}"
        )


def _print_measures(report: Reporter, found: Inspection) -> None:
    """Prints a line per layer; with two models, the other's numbers after a bar."""
    models = [model for model in (found.model, found.compared) if model is not None]
    columns = [
        {
            layer if weights == "incoming" else f"{layer} {weights}": _cells(measures)
            for layer, weights, measures in model.parts(outgoing=found.outgoing)
        }
        for model in models
    ]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    if not labels:
        return
    rows = []
    for label in labels:
        cells = zip(*(column.get(label, ["-"] * 5) for column in columns), strict=True)
        rows.append([label, *(" | ".join(pair) for pair in cells)])
    header = ["layer", "units", "frequency", "opposites", "best opposite", "locality"]
    for line in ("", *table(header, rows)):
        report.say(line)
    sides = "" if found.compared is None else "; the model | the compared one"
    report.say(f"Means over the units, best opposite: median{sides}.")
    report.say("Frequency: spectral centroid in cycles per patch (stem: per pixel).")
    report.say(f"Opposites: fraction of units with a correlation below {OPPOSITE} to another.")
    report.say("Locality: fraction of the energy in the best window of half the height and width.")
    if found.compared is not None:
        alike = weight_correlations(found.model, found.compared)
        layers = [value for label, value in alike.items() if label != "stem"]
        stem = f", stem {alike['stem']:.2f}" if "stem" in alike else ""
        if layers:
            span = f"{min(layers):.2f} to {max(layers):.2f} over the layers"
            report.say(f"Correlation of the two models' weights: {span}{stem}.")


def _cells(measures: UnitMeasures) -> list[str]:
    values = measures.to_json()
    opposite = values["partner_correlation"]["quantiles"]["0.5"]
    numbers = [
        (values["frequency"]["mean"], ".3f"),
        (values["opposite_share"], ".1%"),
        (opposite, ".2f"),
        (values["locality"]["mean"], ".1%"),
    ]
    shown = ["-" if value is None else format(value, form) for value, form in numbers]
    return [f"{values['units']:,}", *shown]


def _print_image(report: Reporter, found: Inspection, image: Path | None) -> None:
    result = found.occlusion
    assert result is not None
    report.say()
    report.say(f"image    {image}: {result.name} {result.probability:.1%}")
    row, column = np.unravel_index(int(result.drop.argmax()), result.drop.shape)
    top, left = (int(patch) + 1 for patch in result.places[row, column])
    drop = f"{100 * result.drop[row, column]:.1f} points, at row {top} and column {left}"
    window = f"{result.window}x{result.window} patches, {result.drop.size} positions"
    report.say(f"covered  by a grey window of {window}: largest drop {drop} of the patches")
    if found.responses:
        named = ", ".join(f"{each.layer}:{each.unit + 1}" for each in found.responses)
        report.say(f"units    {named} (layer:unit), in responses.png")
