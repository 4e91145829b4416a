"""am.inspect: a model's weights measured and drawn, another's beside them, and one image.

What it writes into a folder:

    inspection.json      the numbers of every layer, their definitions, and what the image excites
    units.csv            a line per hidden unit: frequency, locality, its opposite
    figure5.png          hidden units of the first three token-mixing MLPs, in pairs
    figure6_layer1.png   all units of a layer, with their numbers
    figure7.png          the units of the patch embedding, in colour
    layers.png           the numbers over the layers
    occlusion.png, responses.png   of one image
and each again as .svg or .pdf. Layers and units are counted from 1 in files and pictures.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from allmlp.errors import UserError
from allmlp.inspection.attribution import (
    Occlusion,
    UnitResponse,
    occlusion,
    read_image,
    strongest,
    unit_responses,
)
from allmlp.inspection.image_pictures import occlusion_figure, response_figure
from allmlp.inspection.layer_pictures import layers_figure, weight_figures
from allmlp.inspection.measure import (
    ModelMeasures,
    definitions,
    measure_model,
    weight_correlations,
)
from allmlp.inspection.pictures import VECTORS, save_figure
from allmlp.io import Content, atomic_write_all, check_not_inputs, check_output_folder, expand
from allmlp.models.catalog import model_from_config
from allmlp.models.layers import ImageClassifier
from allmlp.runtime.device import check_has_weights, to_device

FIRST_LAYERS, STRONGEST = 3, 4


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        model: its numbers.
        compared: those of the other model, or None.
        occlusion: of the image, or None.
        responses: of the chosen units to the image.
        notes: a line for each thing that does not apply.
        files: what was written, by name.
    """

    model: ModelMeasures
    compared: ModelMeasures | None
    occlusion: Occlusion | None
    responses: list[UnitResponse]
    notes: list[str]
    files: list[str]

    def to_json(self) -> dict[str, Any]:
        """Returns every number as JSON values."""
        values: dict[str, Any] = {
            "format": "allmlp inspection",
            "version": 1,
            "definitions": definitions(),
            "model": self.model.to_json(),
        }
        if self.compared is not None:
            values["compared"] = self.compared.to_json()
            values["weights_correlation"] = weight_correlations(self.model, self.compared)
        if self.occlusion is not None:
            values["occlusion"] = occlusion_to_json(self.occlusion)
            values["responses"] = [response_to_json(each) for each in self.responses]
        return {**values, "notes": self.notes}


def inspect(
    model: ImageClassifier,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    compare: ImageClassifier | None = None,
    layers: Sequence[int] | None = None,
    outgoing: bool = False,
    image: str | Path | None = None,
    units: Sequence[tuple[int, int]] | None = None,
    window: int | None = None,
    stride: int | None = None,
    vector: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
    names: tuple[str, str] = ("model", "compared"),
    on_batch: Callable[[int], None] | None = None,
) -> Inspection:
    """Returns numbers of the weights of a model, and draws figures 5, 6 and 7 of the paper.

    Args:
        model: of any family; what does not apply to it is said in `notes`.
        output: a folder for the pictures and the numbers; None only measures.
        overwrite: replace files that are there.
        compare: a model to set beside it; `random_weights` gives one that has learned nothing.
        layers: numbers of the layers that figure 6 shows, from 1; None: the first three.
        outgoing: measure and draw the outgoing weights as well, in the order of the incoming.
        image: a file, to draw what it excites.
        units: (layer, unit), both from 1, whose responses are drawn; None: the four of each of the
            first three layers that add most to the tokens.
        window, stride: of the occlusion in patches, see `occlusion`.
        vector: "svg" (also None), "pdf" or "none", beside every PNG.
        batch_size: covered images a batch.
        device: "auto" (the GPU where there is one), "cpu", "cuda"; None leaves the model where it
            is.
        names: of the model and the compared one, for titles and files.
        on_batch: called with the number of covered images of every batch once it is done.

    Raises:
        UserError: an exported file, no such layer or unit, an image that cannot be read, an output
            that is a file or has such files already, or a setting without effect.
    """
    if not isinstance(model, ImageClassifier):
        raise UserError(f"inspect takes a model, got {model!r}", fix="am.load_model(...) gives one")
    for each in (model, compare):
        if each is not None:
            check_has_weights(each)
    _check_settings(output, layers, image, units, window, stride, vector, batch_size)
    folder = None if output is None else expand(output)
    if folder is not None:
        check_output_folder(folder, ("inspection.json", "units.csv"), overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    model = to_device(model, device)
    measured = measure_model(model, names[0], outgoing=outgoing)
    compared = None if compare is None else measure_model(compare, names[1], outgoing=outgoing)
    drawable = [each.number for each in measured.units.layers]
    chosen = drawable[:FIRST_LAYERS] if layers is None else list(dict.fromkeys(layers))
    for number in chosen:
        measured.units.layer(number)
    notes = list(measured.units.notes)
    if compared is not None:
        others = [note for note in compared.units.notes if note not in notes]
        notes += [f"{names[1]}: {note}" for note in others]
    covered, responses, figures = None, [], {}
    if image is not None:
        given, pixels = read_image(image, model)
        responses = _responses(model, measured, given, units)
        covered = occlusion(
            model, given, window=window, stride=stride, batch_size=batch_size, on_batch=on_batch
        )
        title = Path(image).name
        figures["occlusion"] = occlusion_figure(pixels, covered, title)
        if responses:
            what = "what token-mixing units do to it"
            figures["responses"] = response_figure(pixels, responses, f"{title}: {what}")
    found = Inspection(measured, compared, covered, responses, notes, [])
    if folder is not None:
        figures = {**weight_figures(measured, chosen, compared), **figures}
        if measured.incoming:
            figures["layers"] = layers_figure(measured, compared)
        contents = _contents(found, figures, folder, vector or VECTORS[0])
        check_output_folder(folder, [path.name for path in contents], overwrite=overwrite)
        check_not_inputs(contents, [] if image is None else [image])
        atomic_write_all(contents)
        found.files.extend(path.name for path in contents)
    return found


def random_weights(model: ImageClassifier, seed: int = 0) -> ImageClassifier:
    """Returns a model of the same architecture with random weights, in evaluation mode.

    Args:
        model: whose configuration is taken.
        seed: of the weights; torch's own random numbers stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_from_config(model.config).eval()


def occlusion_to_json(result: Occlusion) -> dict[str, Any]:
    """Returns an occlusion map as JSON values; patches are counted from 0."""
    return {
        "class": result.name,
        "class_index": result.label,
        "probability": result.probability,
        "window": result.window,
        "stride": result.stride,
        "places": result.places.tolist(),
        "drop": result.drop.tolist(),
        "patch_drop": result.patch_drop.tolist(),
    }


def response_to_json(response: UnitResponse) -> dict[str, Any]:
    """Returns a unit's response maps as JSON values; layer and unit are counted from 1."""
    return {
        "layer": response.layer,
        "unit": response.unit + 1,
        "strength": response.strength,
        "read": response.read.tolist(),
        "written": None if response.written is None else response.written.tolist(),
    }


def _check_settings(
    output: str | Path | None,
    layers: Sequence[int] | None,
    image: str | Path | None,
    units: Sequence[tuple[int, int]] | None,
    window: int | None,
    stride: int | None,
    vector: str | None,
    batch_size: int,
) -> None:
    """Refuses settings that would have no effect, and values that are none."""
    drawing = {"--layers": layers, "--vector": vector, "--image": image}
    for flag, value in drawing.items():
        if value is not None and output is None:
            what = f"{flag} is for the pictures, and none are drawn without a folder"
            raise UserError(what, where=flag, fix="Add --output FOLDER")
    for flag, value in {"--units": units, "--window": window, "--stride": stride}.items():
        if value is not None and image is None:
            what = f"{flag} is for what one image excites, and none is given"
            raise UserError(what, where=flag, fix="Add --image FILE")
    if vector not in (None, "none", *VECTORS):
        known = f"Known: {', '.join(VECTORS)}, none"
        raise UserError(f"unknown vector format {vector!r}", where="--vector", fix=known)
    if batch_size < 1:
        what = f"the batch size must be at least 1, got {batch_size}"
        raise UserError(what, where="--batch-size")
    for flag, empty in {"--layers": layers, "--units": units}.items():
        if empty is not None and not len(empty):
            raise UserError(f"{flag} names none", where=flag, fix="Give numbers from 1")


def _responses(
    model: ImageClassifier,
    measured: ModelMeasures,
    image: torch.Tensor,
    units: Sequence[tuple[int, int]] | None,
) -> list[UnitResponse]:
    known = measured.units
    if units is None:
        numbers = [each.number for each in known.layers[:FIRST_LAYERS]]
        return [
            each
            for number in numbers
            for each in strongest(unit_responses(model, known, image, number), STRONGEST)
        ]
    for layer, unit in units:
        count = len(known.layer(layer).incoming)
        if not 1 <= unit <= count:
            what = f"no unit {unit} in layer {layer}"
            raise UserError(what, where="--units", fix=f"1 to {count}")
    maps = {n: unit_responses(model, known, image, n) for n in sorted({each[0] for each in units})}
    return [maps[layer][unit - 1] for layer, unit in dict.fromkeys(units)]


def _contents(
    found: Inspection, figures: dict[str, Figure], folder: Path, vector: str
) -> dict[Path, Content]:
    """Returns what is written, by its place."""
    contents: dict[Path, Content] = {}
    for name, figure in figures.items():
        for kind in ("png", vector):
            if kind != "none":
                contents[folder / f"{name}.{kind}"] = _saver(figure, kind)
    contents[folder / "units.csv"] = _units_csv(found).encode(errors="surrogateescape")
    text = json.dumps(found.to_json(), indent=2, default=np.ndarray.tolist) + "\n"
    contents[folder / "inspection.json"] = text.encode(errors="surrogateescape")
    return contents


def _saver(figure: Figure, kind: str) -> Callable[[Path], None]:
    return lambda path: save_figure(figure, path, kind)


def _units_csv(found: Inspection) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["model", "layer", "weights", "unit", "frequency", "locality", "opposite", "correlation"]
    )
    for model in (found.model, found.compared):
        if model is not None:
            writer.writerows([model.name, *row] for row in model.unit_rows())
    return file.getvalue()
