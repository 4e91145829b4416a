"""`mixer evaluate`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlp_mixer.cli.arguments import (
    Folder,
    GrowthName,
    Model,
    Number,
    RequiredData,
    Size,
    load_named,
    warn_of_bad,
)
from mlp_mixer.errors import UserError

if TYPE_CHECKING:
    from mlp_mixer.console import Reporter
    from mlp_mixer.evaluation.accuracy import Evaluation


def evaluate(
    model: Model,
    /,
    *,
    data: RequiredData,
    image_size: Size = None,
    growth: GrowthName = None,
    output: Folder = None,
    allow_missing_classes: bool = False,
    ignore_exif: bool = False,
    batch_size: int = 64,
    device: str = "auto",
    num_workers: Number = None,
) -> int:
    """Measure a trained model: top-1, top-5, each class, the confusion matrix.

    Examples of use:
        mixer evaluate runs/flowers --data FOLDER
        mixer evaluate runs/flowers --data FOLDER:validation --output report
        mixer evaluate mixer_b16.i1k --data imagenet:validation --image-size 448

    Args:
        model: a run folder, a .safetensors, .npz or .pth file, a name of `mixer models --weights`,
            or hf:owner/name.
        data: any source that the verb train reads, with :train, :validation or :test behind it to
            choose a split; without it the test images, else the validation images, else all.
        image_size: measure it at another size than its own.
        growth: how to get there: block-diagonal, resample or auto.
        output: a folder for evaluation.json, per_class.csv, confusion.csv and the pictures.
        allow_missing_classes: go on where the data lacks some of the model's classes.
        ignore_exif: leave photographs as they are stored, not upright: the paper's protocol.
        batch_size: images a batch.
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
    """
    from mlp_mixer.console import Reporter
    from mlp_mixer.data.sources import open_source
    from mlp_mixer.evaluation.accuracy import evaluate as measure
    from mlp_mixer.evaluation.pictures import save_report

    report = Reporter()
    net, source = load_named(model, image_size, growth), open_source(data)
    if ignore_exif and net.preprocessing is not None:
        net.preprocessing = replace(net.preprocessing, exif_orientation=False)
    folder = None
    if output is not None:
        folder = Path(os.path.expanduser(output))
        if folder.is_file():
            raise UserError("the output is a file, it must be a folder", where=output)
        folder.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    with report.progress(len(source), "images") as bar:
        result = measure(
            net,
            source,
            batch_size=batch_size,
            num_workers=num_workers,
            allow_missing_classes=allow_missing_classes,
            device=device,
            on_batch=lambda batch: bar.advance(len(batch.labels) + len(batch.bad)),
        )
    print_evaluation(report, result)
    if folder is not None:
        result.save(folder)
        save_report(result, source, folder)
        report.say(f"written  {folder}")
    return warn_of_bad(result.bad)


def print_evaluation(report: Reporter, result: Evaluation) -> None:
    """Prints the figures of an evaluation, its classes (the worst 20) and worst confusions."""
    from mlp_mixer.console import table

    correct = int((result.predictions == result.labels).sum())
    report.say(f"data     {result.data}: {len(result.labels):,} images")
    report.say(f"top-1    {result.top1:.2%} ({correct:,} right)")
    if result.top5 is not None:
        report.say(f"top-5    {result.top5:.2%}")
    report.say(f"loss     {result.loss:.4f}")
    rows = [row for row in result.per_class() if row["images"]]
    most = 20
    worst = sorted(rows, key=lambda row: row["recall"])[:most] if len(rows) > most else rows
    if len(rows) > most:
        report.say(f"\nthe {most} worst of {len(rows)} classes (all with --output)")
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
