"""`mixer evaluate`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from allmlp.cli.arguments import (
    File,
    Folder,
    Model,
    Number,
    RequiredData,
    ResizeWeights,
    Size,
    load_named,
    refuse_device,
    warn_of_bad,
    warn_of_notes,
)
from allmlp.errors import UserError, plural

if TYPE_CHECKING:
    from allmlp.console import Reporter
    from allmlp.data.items import Source
    from allmlp.evaluation.accuracy import Evaluation
    from allmlp.evaluation.real import RealLabels
    from allmlp.models.layers import ImageClassifier

_OWN = "(default: the model's own)"
ResizeName = Annotated[str | None, arg(help_behavior_hint=_OWN, metavar="METHOD")]
Precision = Annotated[str | None, arg(help_behavior_hint="(default: float32)", metavar="NAME")]
Crop = Annotated[float | None, arg(help_behavior_hint=_OWN, metavar="SHARE")]


def evaluate(
    model: Model,
    /,
    *,
    data: RequiredData,
    image_size: Size = None,
    resize_weights: ResizeWeights = None,
    resize: ResizeName = None,
    crop: Crop = None,
    real: File = None,
    output: Folder = None,
    overwrite: bool = False,
    allow_missing_classes: bool = False,
    ignore_exif: bool = False,
    batch_size: int = 64,
    device: str = "auto",
    precision: Precision = None,
    num_workers: Number = None,
) -> int:
    """Measure a trained model: top-1, top-5, calibration, each class, the confusion matrix.

    Under torchrun every process takes a share of the images; the figures are the same.

    Examples of use:
        mixer evaluate runs/flowers --data FOLDER
        mixer evaluate runs/flowers --data FOLDER:validation --output report
        mixer evaluate mixer_b16.i1k --data imagenet:validation --image-size 448
        mixer evaluate mixer_b16.i1k --data imagenet:validation --real real.json

    Args:
        model: a run folder, a .safetensors, .npz or .pth file, a name of `mixer models --weights`,
            or hf:owner/name; or a file of the verb export, run by its own runtime.
        data: any source that the verb train reads, with :train, :validation or :test behind it to
            choose a split; without it the test images, else the validation images, which are the
            run's own where it held them out of this data, else all.
        image_size: measure it at another size than its own.
        resize_weights: how to reach that size: block-diagonal, resample or auto.
        resize: how a picture comes to the model's size: resize-crop (the paper's Table 2),
            resmall-crop (its Table 3) or squash.
        crop: the share of the resized picture's side that the centre crop keeps, at most 1, of
            images smaller than the model's input as well; the paper's is 0.875.
        real: the file real.json of ImageNet ReaL; the data are validation images of ILSVRC-2012.
        output: a folder for evaluation.json, per_class.csv, confusion.csv and the pictures.
        overwrite: replace those that are there.
        allow_missing_classes: go on where the data lacks some of the model's classes.
        ignore_exif: leave photographs as they are stored, not upright: the paper's protocol.
        batch_size: images a batch, of each process.
        device: auto, cpu or cuda.
        precision: of the products: float32, bfloat16, or auto: bfloat16 where the device is fast at
            it and the model is not small. An exported file has its own.
        num_workers: processes that decode images, for each process under torchrun.
    """
    from allmlp.console import Reporter
    from allmlp.data.sources import read_from
    from allmlp.evaluation.accuracy import refuse_not_finite
    from allmlp.evaluation.figures import FILES
    from allmlp.io import check_not_inputs, check_output_folder, expand
    from allmlp.models.inference import choose_precision
    from allmlp.plots import EVALUATION, save_evaluation
    from allmlp.runtime.device import to_device
    from allmlp.training.measure import evaluate as measure
    from allmlp.training.measure import evaluate_together
    from allmlp.training.own_images import open_measured

    device = refuse_device(model, device)
    folder = None if output is None else expand(output)
    with ExitStack() as stack:
        world = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # one process needs no collectives
            from allmlp.runtime.world import join_world

            world, chosen = stack.enter_context(join_world(device))
            device = str(chosen)
        rank, size = (0, 1) if world is None else (world.rank, world.size)
        report = Reporter(quiet=rank != 0)
        names = [*FILES, *(f"{name}.png" for name in EVALUATION)]
        if folder is not None and rank == 0:
            check_output_folder(folder, names, overwrite=overwrite)
        net = to_device(load_named(model, image_size, resize_weights, exported=True), device)
        measured = open_measured(net.source, data, count=rank == 0)
        source = measured.source
        if rank == 0:
            warn_of_notes(source)
        products, why = choose_precision(net, precision)
        choose_protocol(net, resize, crop, ignore_exif)
        labels = None if real is None else _real_labels(real, source, net)
        if folder is not None and rank == 0:
            items = map(source.item_name, range(len(source)))
            check_not_inputs([folder, *map(folder.joinpath, names)], read_from(data), items)
            folder.mkdir(parents=True, exist_ok=True)  # before the work, not after it
        with report.progress(len(source) // size, "images") as bar:
            options: dict[str, Any] = {
                "batch_size": batch_size,
                "num_workers": num_workers,
                "allow_missing_classes": allow_missing_classes,
                "device": device,
                "precision": precision,
                "on_batch": lambda batch: bar.advance(len(batch.labels) + len(batch.bad)),
            }
            if world is None:
                result = measure(net, source, **options)
            else:
                result = evaluate_together(net, source, world, **options)
        refuse_not_finite(result, source)
        measured.describe(result)
        if labels is not None:
            result.real = labels.score(result.indices, result.predictions)
        if rank != 0:
            return 0  # whatever was bad: torchrun would end the first process, which still draws
        if folder is not None:  # before the first line: a reader such as `| head` may go away
            result.save(folder, net, overwrite=True)
            save_evaluation(result, source, folder)
        report.say(f"protocol {_in_words(net)}")
        if precision is not None:
            report.say(f"products {products} ({why})")
        print_evaluation(report, result)
        if folder is not None:
            report.say(f"written  {folder}")
        return warn_of_bad(result.bad)


def choose_protocol(
    net: ImageClassifier, resize: str | None, crop: float | None, ignore_exif: bool = False
) -> None:
    """Lets pictures become inputs of the model as the flags say, where they say something.

    Raises:
        UserError: no such method, a crop out of range, or one that has no effect.
    """
    from allmlp.models.layers import preprocessing_of
    from allmlp.preprocessing import RESIZE_METHODS

    own = preprocessing_of(net)
    if resize is not None and resize not in RESIZE_METHODS:
        fix = f"Known: {', '.join(RESIZE_METHODS)}"
        raise UserError(f"unknown way to resize {resize!r}", where="--resize", fix=fix)
    if crop is not None and (resize or own.resize) == "squash":
        what = f"--crop {crop:g} has no effect: squash keeps the whole picture"
        raise UserError(what, where="--crop", fix="Add --resize resize-crop or resmall-crop")
    changes: dict[str, Any] = {
        "resize": resize,
        "crop": crop,
        "crop_small": None if crop is None else True,
        "exif_orientation": False if ignore_exif else None,
    }
    try:
        given = {name: value for name, value in changes.items() if value is not None}
        net.preprocessing = replace(own, **given)
    except ValueError as error:
        raise UserError(str(error), where="--crop", fix="The paper's is 0.875") from error


def _in_words(net: ImageClassifier) -> str:
    """The protocol: "224x224 pixels, resmall-crop 0.875, bilinear, ..., upright by EXIF"."""
    from allmlp.models.layers import preprocessing_of

    own = preprocessing_of(net)
    height, width = own.image_size
    turned = "turned upright by EXIF" if own.exif_orientation else "EXIF ignored"
    return f"{height}x{width} pixels, {own.summary()}, {turned}"


def _real_labels(path: str, source: Source, net: ImageClassifier) -> RealLabels:
    from allmlp.evaluation.real import open_real
    from allmlp.models.layers import classes_of
    from allmlp.weights.checkpoints import CHECKPOINTS

    imagenet = CHECKPOINTS["mixer_b16.i1k"].class_names()
    assert imagenet is not None
    return open_real(path, source, classes_of(net), imagenet)


def print_evaluation(report: Reporter, result: Evaluation) -> None:
    """Prints the figures of an evaluation, its classes (the worst 20) and worst confusions."""
    from allmlp.console import table

    correct = int((result.predictions == result.labels).sum())
    what = plural(len(result.labels), "image")
    if result.are_held_out:
        what = f"the {len(result.labels):,} held-out images of this run"
    report.say(f"data     {result.data}: {what}")
    report.say(f"top-1    {result.top1:.2%} ({correct:,} right)")
    if result.top5 is not None:
        report.say(f"top-5    {result.top5:.2%}")
    if result.real is not None:
        scored = result.real
        report.say(
            f"ReaL     {scored.accuracy:.2%} ({scored.correct:,} of {scored.images:,} scored "
            f"images right; {scored.unlabelled:,} without a ReaL label are not scored)"
        )
    report.say(f"loss     {result.loss:.4f} (negative log-likelihood, nats)")
    error, bins = result.reliability.error, len(result.reliability.images)
    report.say(f"ECE      {error:.2%} (expected calibration error, {bins} bins)")
    for line in result.warnings():
        report.say(f"warning  {line}", style="yellow")
    rows = [row for row in result.per_class() if row["images"]]
    most = 20
    worst = sorted(rows, key=lambda row: row["recall"])[:most] if len(rows) > most else rows
    if len(rows) > most:
        report.say(f"\nthe {most} worst of {plural(len(rows), 'class')} (all with --output)")
    else:
        report.say()
    cells = [
        [
            row["class"],
            f"{row['images']:,}",
            f"{row['recall']:.1%}",
            "-" if row["precision"] is None else f"{row['precision']:.1%}",
        ]
        for row in worst
    ]
    for line in table(["class", "images", "recall", "precision"], cells):
        report.say(line)
    confusions = result.worst_confusions(5)
    if confusions:
        report.say("\nmost often confused")
        for true, predicted, count in confusions:
            report.say(f"  {true} taken for {predicted}: {count}")
