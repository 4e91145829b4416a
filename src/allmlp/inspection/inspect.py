"""`mixer inspect`: measures and figures of a model's weights, and what one image excites."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.console import Reporter, table_of
from allmlp.errors import plural
from allmlp.evaluation.options import InspectOptions
from allmlp.inspection.attribution import (
    Occlusion,
    UnitResponse,
    occlusion,
    occlusion_places,
    read_image,
    unit_responses,
)
from allmlp.inspection.figures import occlusion_figure, response_figure, weight_figures
from allmlp.inspection.units import ModelUnits, model_units, weight_correlations
from allmlp.io import Content, atomic_write_all, check_not_inputs, check_output_folder, expand
from allmlp.models.catalog import random_weights
from allmlp.models.layers import ImageClassifier
from allmlp.options import make
from allmlp.plots import writer
from allmlp.runtime.device import choose_device
from allmlp.weights.load import open_model

FIRST_LAYERS, STRONGEST = 3, 4

AnyModel = str | Path | ImageClassifier


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect`."""

    model: ModelUnits
    compared: ModelUnits | None
    occlusion: Occlusion | None  # of the image
    responses: list[UnitResponse]  # of the strongest units to the image
    notes: list[str]  # on anything that does not apply to the models
    summary: str  # image size and architecture
    files: list[str] = field(default_factory=list)  # paths written

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"format": "allmlp inspection", "version": 1}
        values["model"] = self.model.to_json()
        if self.compared is not None:
            values["compared"] = self.compared.to_json()
            values["weights_correlation"] = weight_correlations(self.model, self.compared)
        if self.occlusion is not None:
            values["occlusion"] = self.occlusion.to_json()
            values["responses"] = [response.to_json() for response in self.responses]
        return json.loads(json.dumps({**values, "notes": self.notes}, default=np.ndarray.tolist))


def inspect(model: AnyModel, options: InspectOptions | None = None, **fields: Any) -> Inspection:
    """Measures a model's weights, and draws figures 5, 6 and 7 of the paper.

    Args:
        model: of any family, or a path or name that `load_model` takes; `notes` of the result lists
            what does not apply to it.
        options: see `InspectOptions`; its fields can be given as keywords instead.

    Raises:
        UserError: an exported file, an unknown layer or unit, an unreadable image, or an output
            that is a file or already has such files.
    """
    options = make(InspectOptions, options, fields)
    net, name = _loaded(model, options, "model")
    other = None
    if options.compare == "random":
        other = random_weights(net, options.seed), f"random weights, seed {options.seed}"
    elif options.compare is not None:
        other = _loaded(options.compare, options, "compared")
    folder = None if options.output is None else expand(options.output)
    if folder is not None:
        check_output_folder(folder, ["inspection.json"], overwrite=options.overwrite)
        folder.mkdir(parents=True, exist_ok=True)  # fail before the work, not after it
    units = model_units(net, name)
    compared = None if other is None else model_units(*other)
    drawable = [layer.number for layer in units.layers]
    layers = drawable if options.layers == "all" else options.layers or drawable[:FIRST_LAYERS]
    for number in layers:
        units.layer(number)  # an error if there is no such layer
    notes = list(units.notes)
    if compared is not None:
        notes += [f"{compared.name}: {note}" for note in compared.notes if note not in notes]
    covered, pixels = None, None
    responses: list[UnitResponse] = []
    if options.image is not None:
        stays = isinstance(model, ImageClassifier) and options.device == "auto"
        net = net if stays else net.to(choose_device(options.device))
        image, pixels = read_image(options.image, net)
        for layer in [layer for layer in units.layers if not layer.are_tokens][:FIRST_LAYERS]:
            responses += unit_responses(net, units, image, layer.number)[:STRONGEST]
        count = occlusion_places(net)[1][..., 0].size
        with Reporter().progress(count, "covered images") as bar:
            covered = occlusion(net, image, on_batch=bar.advance)
    height, width = net.config.image_size
    summary = f"{height}x{width} pixels, {net.config.summary()}"
    found = Inspection(units, compared, covered, responses, notes, summary)
    if folder is not None:
        figures = weight_figures(units, list(dict.fromkeys(layers)), compared)
        if options.image is not None and covered is not None and pixels is not None:
            title = options.image.name
            figures["occlusion"] = occlusion_figure(pixels, covered, title)
            if responses:
                title += ": what token-mixing units read and write"
                figures["responses"] = response_figure(pixels, responses, title)
        contents: dict[Path, Content] = {
            folder / f"{figure}.{kind}": writer(figures[figure], kind)
            for figure in figures
            for kind in ("png", "svg")
        }
        text = json.dumps(found.to_json(), indent=2) + "\n"
        contents[folder / "inspection.json"] = text.encode(errors="surrogateescape")
        check_output_folder(folder, [path.name for path in contents], overwrite=options.overwrite)
        check_not_inputs(contents, [] if options.image is None else [options.image])
        atomic_write_all(contents)
        found.files.extend(path.name for path in contents)
    return found


def _loaded(model: AnyModel, options: InspectOptions, name: str) -> tuple[ImageClassifier, str]:
    net = open_model(model, image_size=options.image_size, resize_weights=options.resize_weights)
    return net, str(model) if isinstance(model, str | Path) else name


def show(found: Inspection, options: InspectOptions) -> None:
    report = Reporter()
    for line in _lines(found, options):
        report.say(line)


def _lines(found: Inspection, options: InspectOptions) -> Iterator[str]:
    yield f"model    {found.model.name}: {found.summary}"
    if found.compared is not None:
        yield f"compared {found.compared.name}"
    for note in found.notes:
        yield f"note     {note}"
    for model in filter(None, (found.model, found.compared)):
        rows = []
        for layer, measures in model.measures.items():
            values = measures.to_json()
            numbers = {
                "frequency": (values["frequency"]["mean"], ".3f"),
                "opposites": (values["opposite_share"], ".1%"),
                "best opposite": (values["partner_correlation"]["quantiles"]["0.5"], ".2f"),
                "locality": (values["locality"]["mean"], ".2%"),
            }
            shown = {k: "-" if v is None else f"{v:{form}}" for k, (v, form) in numbers.items()}
            rows.append({"layer": layer, "units": f"{values['units']:,}", **shown})
        if rows:
            yield f"\n{model.name}"
            yield from table_of(rows)
    if found.compared is not None:
        alike = weight_correlations(found.model, found.compared)
        words = ", ".join(f"{label} {value:.2f}" for label, value in alike.items())
        yield f"Correlation of the two models' weights, by layer: {words or 'of other shapes'}."
    if (result := found.occlusion) is not None:
        yield f"\nimage    {options.image}: {result.name} {result.probability:.1%}"
        drop, top, left = result.largest
        place = f"{100 * drop:.1f} points, at row {top} and column {left}"
        window = f"{result.window}x{result.window} patches, {result.drop.size} positions"
        yield f"covered  by a grey window of {window}: largest drop {place} of the patches"
    if found.responses:
        named = ", ".join(f"{unit.layer}:{unit.unit + 1}" for unit in found.responses)
        yield f"units    {named} (layer:unit), in responses.png"
    if options.output is not None:
        figures = plural(sum(name.endswith(".png") for name in found.files), "figure")
        yield f"written  {options.output}: inspection.json, {figures}"
