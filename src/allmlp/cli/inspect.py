"""`mixer inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from allmlp.cli.arguments import (
    File,
    Folder,
    Model,
    Number,
    ResizeWeights,
    Size,
    Text,
    load_named,
)
from allmlp.errors import UserError

if TYPE_CHECKING:
    from allmlp.console import Reporter
    from allmlp.inspection.measure import ModelMeasures
    from allmlp.inspection.report import Inspection
    from allmlp.inspection.units import UnitMeasures

Layers = Annotated[tuple[str, ...] | None, arg(help_behavior_hint="", metavar="[N ...]|all")]
Units = Annotated[tuple[str, ...] | None, arg(help_behavior_hint="", metavar="[LAYER:UNIT ...]")]
Vector = Annotated[str | None, arg(help_behavior_hint="(default: svg)", metavar="svg|pdf|none")]
Other = Annotated[str | None, arg(help_behavior_hint="", metavar="MODEL|random")]


def inspect(
    model: Model,
    /,
    *,
    output: Folder = None,
    overwrite: bool = False,
    compare: Other = None,
    seed: Number = None,
    layers: Layers = None,
    outgoing: bool = False,
    image: File = None,
    units: Units = None,
    window: Number = None,
    stride: Number = None,
    vector: Vector = None,
    image_size: Size = None,
    resize_weights: ResizeWeights = None,
    batch_size: Number = None,
    device: Text = None,
) -> None:
    """Look inside: what the token-mixing units have learned, and what one image excites.

    Examples of use:
        mixer inspect runs/flowers
        mixer inspect runs/flowers --output inside --compare random
        mixer inspect mixer_b16.i21k --output inside --layers all --vector pdf
        mixer inspect runs/flowers --output inside --image photo.jpg --units 1:12 3:40

    Args:
        model: a run folder, a .safetensors, .npz or .pth file, a name of `mixer models --weights`,
            or hf:owner/name.
        output: a folder for figures 5, 6 and 7 of the paper and the numbers; without it they are
            only printed.
        overwrite: replace files that are there.
        compare: another model to set beside it; random is the same architecture, untrained.
        seed: of the random weights (0).
        layers: whose units figure 6 shows, counted from 1, or all; the first three without it.
        outgoing: the outgoing weights as well.
        image: a file, to map what its units read and write and what its class hangs on.
        units: whose response to the image is drawn; the strongest of the first layers without it.
        window: side of the grey window that slides over the image, in patches.
        stride: patches between two places of the window.
        vector: what is written beside each PNG, for papers.
        image_size: look at it at another size than its own.
        resize_weights: how to reach that size: block-diagonal, resample or auto.
        batch_size: covered images a batch (64).
        device: auto, cpu or cuda, for the image.
    """
    for flag, value in {"--batch-size": batch_size, "--device": device}.items():
        if value is not None and image is None:
            what = f"{flag} is for what one image excites, and none is given"
            raise UserError(what, where=flag, fix="Add --image FILE")
    if seed is not None and compare != "random":
        what = "--seed is of the random weights, and none are asked for"
        raise UserError(what, where="--seed", fix="Add --compare random, or leave it out")
    chosen = _parse_units(units)

    from allmlp.console import Reporter
    from allmlp.inspection.attribution import occlusion_places
    from allmlp.inspection.report import inspect as look_inside
    from allmlp.inspection.report import random_weights
    from allmlp.inspection.token_mixing import model_units

    report = Reporter()
    net = load_named(model, image_size, resize_weights)
    other, other_name = None, ""
    if compare == "random":
        other = random_weights(net, seed or 0)
        other_name = f"random weights, seed {seed or 0}"
    elif compare is not None:
        other, other_name = load_named(compare, image_size, resize_weights), compare
    wanted = None
    if layers is not None:
        drawable = [each.number for each in model_units(net).layers]
        wanted = [_number(each) for each in layers] if layers != ("all",) else drawable or None
    total = 0 if image is None else occlusion_places(net, window, stride)[2][..., 0].size
    with report.progress(total, "covered images") as bar:
        found = look_inside(
            net,
            output=output,
            overwrite=overwrite,
            compare=other,
            layers=wanted,
            outgoing=outgoing,
            image=image,
            units=chosen,
            window=window,
            stride=stride,
            vector=vector,
            batch_size=64 if batch_size is None else batch_size,
            device="auto" if image is not None and device is None else device,
            names=(model, other_name),
            on_batch=bar.advance,
        )
    height, width = net.config.image_size
    report.say(f"model    {model}: {height}x{width} pixels, {net.config.summary()}")
    if other is not None:
        report.say(f"compared {other_name}")
    for note in found.notes:
        report.say(f"note     {note}")
    _print_numbers(report, found)
    _print_likeness(report, found)
    _print_image(report, found, image)
    if output is not None:
        pictures = sum(name.endswith(".png") for name in found.files)
        more = "" if vector == "none" else f", each as {vector or 'svg'} too"
        report.say(f"written  {output}: inspection.json, units.csv, {pictures} pictures{more}")


def _number(text: str) -> int:
    if not (text.isdecimal() and len(text) < 7):
        fix = "Numbers from 1, such as --layers 1 8, or all"
        raise UserError(f"not a layer: {text!r}", where="--layers", fix=fix)
    return int(text)


def _parse_units(units: tuple[str, ...] | None) -> list[tuple[int, int]] | None:
    """Returns (layer, unit) of each "3:40"."""
    if units is None:
        return None
    pairs = []
    for text in units:
        parts = text.split(":")
        if len(parts) != 2 or not all(part.isdecimal() and len(part) < 7 for part in parts):
            fix = "The layer and the unit, both from 1, such as 3:40"
            raise UserError(f"not a unit: {text!r}", where="--units", fix=fix)
        pairs.append((int(parts[0]), int(parts[1])))
    return pairs


def _print_numbers(report: Reporter, found: Inspection) -> None:
    """Prints a line a layer; with two models, the other's figure behind each, after a bar."""
    from allmlp.console import table
    from allmlp.inspection.units import OPPOSITE

    rows = [_rows(each) for each in (found.model, found.compared) if each is not None]
    labels = list(dict.fromkeys(label for each in rows for label in each))
    if not labels:
        return
    empty = ["-"] * 5
    cells = [
        [
            label,
            *(" | ".join(pair) for pair in zip(*(r.get(label, empty) for r in rows), strict=True)),
        ]
        for label in labels
    ]
    header = ["layer", "units", "frequency", "opposites", "best opposite", "locality"]
    report.say()
    for line in table(header, cells):
        report.say(line)
    sides = "" if found.compared is None else "; the model | the compared one"
    report.say(f"Means over the units, best opposite: median{sides}.")
    report.say("Frequency: spectral centroid in cycles per patch (stem: per pixel).")
    report.say(f"Opposites: share of units with a correlation below {OPPOSITE} to another.")
    report.say("Locality: share of the energy in the best window of half the height and width.")


def _rows(measured: ModelMeasures) -> dict[str, list[str]]:
    rows = {}
    for at, layer in enumerate(measured.units.layers):
        rows[str(layer.number)] = _cells(measured.incoming[at])
        out = measured.outgoing[at] if measured.outgoing else None
        if out is not None:
            rows[f"{layer.number} outgoing"] = _cells(out)
    if measured.stem is not None:
        rows["stem"] = _cells(measured.stem)
    return rows


def _cells(measures: UnitMeasures) -> list[str]:
    values = measures.to_json()
    share, partner = values["opposite_share"], values["partner_correlation"]["quantiles"]["0.5"]
    return [
        f"{values['units']:,}",
        _shown(values["frequency"]["mean"], ".3f"),
        _shown(share, ".1%"),
        _shown(partner, ".2f"),
        _shown(values["locality"]["mean"], ".1%"),
    ]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _print_likeness(report: Reporter, found: Inspection) -> None:
    """Says how alike the weights of the two models are, where they have the same shapes."""
    from allmlp.inspection.measure import weight_correlations

    if found.compared is None:
        return
    alike = weight_correlations(found.model, found.compared)
    layers = [value for label, value in alike.items() if label != "stem"]
    if layers:
        span = f"{min(layers):.2f} to {max(layers):.2f} over the layers"
        stem = f", stem {alike['stem']:.2f}" if "stem" in alike else ""
        report.say(f"Correlation of the two models' weights: {span}{stem}.")


def _print_image(report: Reporter, found: Inspection, image: str | None) -> None:
    import numpy as np

    if found.occlusion is None:
        return
    result = found.occlusion
    report.say()
    report.say(f"image    {image}: {result.name} {result.probability:.1%}")
    row, column = np.unravel_index(int(result.drop.argmax()), result.drop.shape)
    top, left = (int(each) + 1 for each in result.places[row, column])
    size = result.window
    report.say(
        f"covered  with a grey window of {size}x{size} patches, {result.drop.size} places: the "
        f"largest drop is {100 * result.drop[row, column]:.1f} points, at row {top} and column "
        f"{left} of the patches"
    )
    if found.responses:
        named = ", ".join(f"{each.layer}:{each.unit + 1}" for each in found.responses)
        report.say(f"units    {named} (layer:unit), in responses.png")
