"""`am.evaluate` and `mixer evaluate`: the metrics of a model on labelled images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from allmlp.console import Reporter, report_bad_images, report_notes
from allmlp.data.source import Source
from allmlp.data.sources import notes_of, read_from
from allmlp.deploy.formats import ExportedModel, is_exported, load_any
from allmlp.deploy.inputs import labelled_images
from allmlp.errors import UserError, plural
from allmlp.evaluation.imagenet_real import open_real
from allmlp.evaluation.metrics import FILES, Evaluation, check_logits, evaluate_source
from allmlp.evaluation.options import EvaluateOptions
from allmlp.evaluation.predictor import Outputs, predictor_for
from allmlp.evaluation.result_file import measured_on
from allmlp.io import expand, made_folder
from allmlp.models.layers import Classifier, check_trained, classes_of, preprocessing_of
from allmlp.options import make
from allmlp.plots import EVALUATION, save_evaluation
from allmlp.runtime.device import check_device_of_exported
from allmlp.runtime.process import is_main_process
from allmlp.runtime.world import join_world
from allmlp.training.own_images import Measured, open_measured
from allmlp.training.report import REPORT, evaluation_report
from allmlp.weights.checkpoints import imagenet_classes

_WORST = 20  # number of classes printed
_FRACTIONS = ("recall", "precision", "f1", "average_precision", "threshold")
_FORMATS = {"images": ",", "correct": ",", **dict.fromkeys(_FRACTIONS, ".1%")}


def evaluate(
    model: Classifier | str | Path,
    data: Any = None,
    *,
    report: Reporter | None = None,
    on_batch: Callable[[Outputs], None] | None = None,
    **fields: Any,
) -> Evaluation:
    """Returns the metrics of a model on labelled images.

    Args:
        model: a model with class names, or anything `load_model` or `open_exported` accepts. A
            model object stays on its device unless `device` is set.
        data: labelled images: a source or its name; (images, labels), or a list of (image, label)
            pairs, with images as in `predict` and labels as names or numbers of classes; or all
            options as one object.
        report: shows progress; None shows nothing.
        on_batch: called with every batch of this process.
        **fields: fields of `EvaluateOptions`.

    Returns:
        Metrics and predictions, identical on all processes.

    Raises:
        UserError: the data does not exist or its classes differ from the model's; the model has no
            head or only one class; no image can be decoded, or logits are not finite.
    """
    source = data if isinstance(data, Source) else None
    in_memory = not isinstance(data, EvaluateOptions | Source | str | Path | None)
    given = source.name if source is not None else "images" if in_memory else data
    options = make(EvaluateOptions, given, fields, "data")
    report = report or Reporter(quiet=True)
    if isinstance(model, ExportedModel) or is_exported(model):
        check_device_of_exported(options.device)
        options = replace(options, device="cpu")
    with ExitStack() as stack:
        world, chosen = stack.enter_context(join_world(options.device))
        stays = not isinstance(model, str | Path) and options.device == "auto" and world.size == 1
        net = load_any(model, **options.loading)
        check_trained(net)
        device = None if stays else str(chosen)
        predictor = predictor_for(options, net, device, **_protocol(net, options))
        if in_memory:
            source = labelled_images(data, classes_of(net))
        measured = Measured(source) if source is not None else None
        measured = measured or open_measured(net.source, options.data, count=world.is_main)
        source = measured.source
        if world.is_main and not report.console.quiet:
            report_notes(notes_of({"": source}))
        labels = None
        if options.real is not None:
            labels = open_real(options.real, source, classes_of(net), imagenet_classes())
        folder = made_folder(
            options.output if world.is_main else None,
            [*FILES, *(f"{name}.png" for name in EVALUATION), REPORT],
            overwrite=options.overwrite,
            inputs=read_from(options.data),
            images=map(source.item_name, range(len(source))),
        )
        bar = stack.enter_context(report.progress(len(source) // world.size, "images"))

        def advance(outputs: Outputs) -> None:
            bar.advance(len(outputs))
            if on_batch is not None:
                on_batch(outputs)

        result = evaluate_source(
            predictor,
            source,
            allow_missing_classes=options.allow_missing_classes,
            world=world,
            on_batch=advance,
        )
        check_logits(result, source)
        result.are_held_out, result.trained_on = measured.are_held_out, measured.trained_on
        result.notes, result.described = list(measured.notes), measured_on(net)
        if labels is not None:
            result.real = labels.score(result.indices, result.predictions)
        if folder is not None:
            result.save(folder, net, overwrite=True)
            save_evaluation(result, source, folder)
            evaluation_report(net, result, source, folder)
        return result


def _protocol(net: Classifier, options: EvaluateOptions) -> dict[str, Any]:
    """Returns the overrides of the model's preprocessing."""
    changes: dict[str, Any] = {} if options.resize is None else {"resize": options.resize}
    if options.crop is not None:
        if (options.resize or preprocessing_of(net).resize) == "squash":
            what = f"crop {options.crop:g} has no effect: squash keeps the whole image"
            raise UserError(what, where="crop", fix="Set resize to resize-crop or resmall-crop")
        changes |= {"crop": options.crop, "crop_small": True}
    return changes


def command(model: str, options: EvaluateOptions) -> Evaluation:
    """Evaluates with a progress bar on a terminal."""
    return evaluate(model, options, report=Reporter(quiet=not is_main_process()))


def show(result: Evaluation, options: EvaluateOptions) -> int:
    """Prints metrics, the 20 worst classes and the most frequent confusions."""
    if not is_main_process():
        return 0  # even with bad images: torchrun would kill the main process, which still prints
    report, own = Reporter(), result.preprocessing
    if own is not None:
        height, width = own.image_size
        turned = "turned upright by EXIF" if own.exif_orientation else "EXIF ignored"
        seen = f"{height}x{width} pixels, {own.summary()}, {turned}"
        report.say(f"protocol {own.summary() if own.kind == 'arrays' else seen}")
    if options.precision != "float32":
        report.say(f"products {result.precision}")
    what = plural(len(result.labels), "image")
    if result.are_held_out:
        what = f"the {len(result.labels):,} held-out images of this run"
    report.say(f"data     {result.data}: {what}")
    for line in result.lines():
        report.say(line)
    for line in result.warnings():
        report.say(f"warning  {line}", style="yellow")
    rows = [row for row in result.per_class() if row["images"]]
    report.say()
    if len(rows) > _WORST:
        report.say(f"the {_WORST} of {len(rows):,} classes with the lowest recall")
        rows = sorted(rows, key=lambda row: row["recall"])[:_WORST]
    report.table(rows, formats=_FORMATS)
    for true, predicted, count in result.worst_confusions(5):
        report.say(f"confused: {true} taken for {predicted}: {count}")
    if options.output is not None:
        report.say(f"written  {expand(options.output)}")
        report.say(f"report   {expand(options.output) / REPORT}")
    return report_bad_images(result.bad)
