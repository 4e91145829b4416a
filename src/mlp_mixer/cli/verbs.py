"""The verbs: what each takes on the command line, and what it prints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from mlp_mixer.errors import UserError

if TYPE_CHECKING:
    from mlp_mixer.console import Reporter
    from mlp_mixer.data.sources import BadImage
    from mlp_mixer.evaluation.accuracy import Evaluation

# The types of the flags, with what the help calls their values.
Recipe = Annotated[Positional[str | None], arg(help_behavior_hint="", metavar="RECIPE")]
Model = Annotated[Positional[str], arg(metavar="RUN")]
Inputs = Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES")]
Text = Annotated[str | None, arg(help_behavior_hint="", metavar="TEXT")]
DataName = Annotated[str | None, arg(help_behavior_hint="", metavar="SOURCE")]
RequiredData = Annotated[str, arg(metavar="SOURCE")]
Size = Annotated[str | None, arg(help_behavior_hint="", metavar="PIXELS|HxW")]
Folder = Annotated[str | None, arg(help_behavior_hint="", metavar="FOLDER")]
File = Annotated[str | None, arg(help_behavior_hint="", metavar="FILE")]
Number = Annotated[int | None, arg(help_behavior_hint="", metavar="N")]
Real = Annotated[float | None, arg(help_behavior_hint="", metavar="X")]
Assignments = Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE")]


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """Returns 224 of "224" and (192, 256) of "192x256".

    Raises:
        UserError: the text is neither.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if not (1 <= len(parts) <= 2 and all(part.isdigit() and int(part) for part in parts)):
        fix = "a number such as 224, or height x width such as 192x256"
        raise UserError(f"not an image size: {text!r}", where="--image-size", fix=fix)
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def models(*, image_size: Size = None, num_classes: int = 1000) -> None:
    """List the architectures with their parameters, GFLOPs and tokens.

    Examples of use:
        mixer models
        mixer models --image-size 448

    Args:
        image_size: at this size; the default is the paper's 224.
        num_classes: outputs of the head, for the column "with head".
    """
    import torch

    from mlp_mixer.console import table
    from mlp_mixer.evaluation.throughput import count_flops, count_parameters
    from mlp_mixer.models.catalog import create_model, list_models

    size, rows, skipped = parse_size(image_size), [], []
    for name in list_models():
        try:
            with torch.device("meta"):
                model = create_model(name, size, num_classes)
        except UserError as error:
            skipped.append(error.text())
            continue
        head = sum(p.numel() for key, p in model.named_parameters() if key.startswith("head."))
        parameters = count_parameters(model)
        height, width = model.config.image_size
        cells = [name, f"{height}x{width}", f"{parameters - head:,}", f"{parameters:,}"]
        rows.append([*cells, f"{count_flops(model) / 1e9:.2f}", f"{model.config.num_tokens:,}"])
    if not rows:
        raise UserError(skipped[0], where="--image-size")
    header = ["name", "pixels", "parameters", "with head", "GFLOPs", "tokens"]
    print("\n".join(table(header, rows)))
    print("GFLOPs of one image with the head; a multiply-add counts as two.")
    for line in skipped:
        print(f"left out: {line}")


def train(
    recipe: Recipe = None,
    /,
    *,
    data: DataName = None,
    output: Folder = None,
    model: Text = None,
    image_size: Size = None,
    epochs: Number = None,
    batch_size: Number = None,
    learning_rate: Real = None,
    holdout: Real = None,
    seed: Number = None,
    device: Text = None,
    num_workers: Number = None,
    settings: Assignments = (),
) -> None:
    """Train a Mixer from random weights and write a run folder with the best weights and pictures.

    Examples of use:
        mixer train
        mixer train --data FOLDER --image-size 64
        mixer train --data FOLDER --model mixer_s16 --epochs 100 --output runs/flowers
        mixer train digits --seed 1 --set optimizer.weight_decay=0.05

    FOLDER has train/<class>/*.jpg, with val/ and test/ if you have them, or just <class>/*.jpg.

    Args:
        recipe: digits or scratch; without it digits, and scratch where --data is given.
        data: a folder of class folders, or digits.
        output: the run folder; the default is runs/<date>_<recipe>.
        model: a name of `mixer models`.
        image_size: what the model sees; the patch must divide it.
        epochs: passes over the training images.
        batch_size: images a step.
        learning_rate: the highest, after the warm-up.
        holdout: share of each class held out for validation where the data has no val/.
        seed: of the weights, the order of the images and every random number.
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
        settings: any other setting, as config.json of a run names it; may be given many times.
    """
    from mlp_mixer.training.loop import train as run_training
    from mlp_mixer.training.recipes import recipe as named_recipe

    name = recipe or ("digits" if data in (None, "digits") else "scratch")
    config = named_recipe(name)
    flags = {
        "data.source": data,
        "output": output,
        "model.name": model,
        "model.image_size": parse_size(image_size),
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer.learning_rate": learning_rate,
        "data.holdout": holdout,
        "seed": seed,
        "device": device,
        "data.num_workers": num_workers,
    }
    for key, value in flags.items():
        if value is not None:
            config = config.with_value(key, value)
    for assignment in settings:
        config = config.with_setting(assignment)
    run_training(config)


def evaluate(
    run: Model,
    /,
    *,
    data: RequiredData,
    output: Folder = None,
    allow_missing_classes: bool = False,
    batch_size: int = 64,
    device: str = "auto",
    num_workers: Number = None,
) -> int:
    """Measure a trained model: top-1, top-5, each class, the confusion matrix.

    Examples of use:
        mixer evaluate runs/flowers --data FOLDER
        mixer evaluate runs/flowers --data FOLDER:validation --output report

    Args:
        run: a run folder, its best/ folder or a .safetensors file.
        data: FOLDER or digits, with :train, :validation or :test behind it to choose a split;
            without it the test images, else the validation images, else all.
        output: a folder for evaluation.json, per_class.csv, confusion.csv and the pictures.
        allow_missing_classes: go on where the data lacks some of the model's classes.
        batch_size: images a batch.
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
    """
    from mlp_mixer.console import Reporter
    from mlp_mixer.data.sources import open_source
    from mlp_mixer.evaluation.accuracy import evaluate as measure
    from mlp_mixer.evaluation.pictures import save_report
    from mlp_mixer.weights.store import load_model

    report = Reporter()
    model, source = load_model(run), open_source(data)
    if output is not None and Path(output).expanduser().is_file():
        raise UserError("the output is a file, it must be a folder", where=output)
    with report.progress(len(source), "images") as bar:
        result = measure(
            model,
            source,
            batch_size=batch_size,
            num_workers=num_workers,
            allow_missing_classes=allow_missing_classes,
            device=device,
            on_batch=lambda batch: bar.advance(len(batch.labels) + len(batch.bad)),
        )
    print_evaluation(report, result)
    if output is not None:
        folder = Path(output).expanduser()
        result.save(folder)
        save_report(result, source, folder)
        report.say(f"written  {folder}")
    return warn_of_bad(report, result.bad)


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


def predict(
    run: Model,
    images: Inputs,
    /,
    *,
    top_k: int = 5,
    output: File = None,
    batch_size: int = 64,
    device: str = "auto",
    num_workers: Number = None,
) -> int:
    """Classify images: files, folders and patterns.

    Examples of use:
        mixer predict runs/flowers photo.jpg
        mixer predict runs/flowers FOLDER 'more/*.png' --output predictions.csv
        mixer predict runs/digits digits:test --top-k 1

    Args:
        run: a run folder, its best/ folder or a .safetensors file.
        images: files, folders (to any depth), patterns, or digits:test.
        top_k: classes for each image.
        output: a file to write to, its ending says how: .csv, .json or .jsonl.
        batch_size: images a batch.
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
    """
    from mlp_mixer.console import Reporter, table
    from mlp_mixer.data.sources import BadImage
    from mlp_mixer.deploy.predict import check_output, find_images
    from mlp_mixer.deploy.predict import predict as classify

    report = Reporter()
    if output is not None:
        check_output(output)
    with report.progress(len(find_images(images)), "images") as bar:
        predictions = classify(
            run,
            images,
            top_k=top_k,
            output=output,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            on_batch=bar.advance,
        )
    good = [each for each in predictions if each.error is None]
    rows = [[each.path, *(f"{name} {share:.1%}" for name, share in each.classes)] for each in good]
    most = 40
    if rows:
        ranks = [f"{rank}." for rank in range(1, len(rows[0]))]
        for line in table(["image", *ranks], rows[:most], left=len(rows[0])):
            report.say(line)
    if len(rows) > most:
        where = f"in {output}" if output else "with --output FILE"
        report.say(f"... and {len(rows) - most:,} more, {where}")
    if output is not None:
        report.say(f"written  {output}: {len(predictions):,} images")
    bad = [
        BadImage(at, each.path, each.error)
        for at, each in enumerate(predictions)
        if each.error is not None
    ]
    code = warn_of_bad(report, bad)
    return 2 if not good else code


def warn_of_bad(report: Reporter, bad: list[BadImage]) -> int:
    """Names the bad images (the first 20) on standard error; returns the exit code, 0 or 3."""
    for each in bad[:20]:
        print(f"bad image: {each.name}: {each.what}", file=sys.stderr)
    if len(bad) > 20:
        print(f"... and {len(bad) - 20} more bad images", file=sys.stderr)
    return 3 if bad else 0


VERBS: dict[str, Callable[..., Any]] = {
    "models": models,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
}
