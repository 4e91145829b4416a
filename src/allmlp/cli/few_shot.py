"""`mixer few-shot`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from allmlp.cli.arguments import (
    File,
    Folder,
    Model,
    Number,
    Real,
    ResizeWeights,
    Seeds,
    Size,
    check_json,
    load_named,
    warn_of_bad,
    write_json,
)
from allmlp.errors import UserError, plural

if TYPE_CHECKING:
    from allmlp.console import Reporter
    from allmlp.evaluation.few_shot import FewShot

Sources = Annotated[tuple[str, ...], arg(metavar="SOURCE ...")]
Shots = Annotated[tuple[int, ...], arg(metavar="N ...")]
SeedsOf = Annotated[Seeds, arg(help_behavior_hint="(default: 0 1 2)", metavar="N ...")]
L2 = Annotated[Real, arg(help_behavior_hint="(default: 1024)", metavar="X")]
FLOOR_SEED = 0


def few_shot(
    model: Model,
    /,
    *,
    data: Sources,
    shots: Shots = (1, 5, 10, 25),
    seeds: SeedsOf = (),
    floor: bool = False,
    protocol: str = "big_vision",
    l2: L2 = None,
    image_size: Size = None,
    resize_weights: ResizeWeights = None,
    resize: str = "resize-crop",
    ignore_exif: bool = False,
    precision: str = "float32",
    output: File = None,
    overwrite: bool = False,
    cache: Folder = None,
    no_cache: bool = False,
    batch_size: int = 64,
    device: str = "auto",
    num_workers: Number = None,
) -> int:
    """Measure how well a model's features serve after a few labelled images a class.

    Examples of use:
        mixer few-shot runs/mine --data FOLDER
        mixer few-shot mixer_b16.i21k --data FLOWERS PETS --shots 1 5 --floor
        mixer few-shot runs/mine --data FOLDER --protocol scenic --output few_shot.json

    A linear classifier is fitted to the model's frozen features of some training images and
    measured on all test images. Nothing of the model is trained; it needs no head.

    Args:
        model: a run folder, a .safetensors, .npz or .pth file, a name of `mixer models --weights`,
            or hf:owner/name.
        data: sources with a train and a test (or validation) split, one or several.
        shots: images a class to learn from; a class that has fewer gives all of its images.
        seeds: of the random draws of these images; the mean over them is told.
        floor: measure the same architecture with random weights as well, seed 0.
        protocol: big_vision (random draws, one l2), or scenic, the older one (the first images of
            each class, and of 30 l2 the one that does best on the test images).
        l2: weight of the squared coefficients.
        image_size: measure it at another size than its own.
        resize_weights: how to reach that size: block-diagonal, resample or auto.
        resize: resize-crop (Google's few-shot evaluation), resmall-crop or squash.
        ignore_exif: leave photographs as they are stored, not upright: the paper's protocol.
        precision: float32 or bfloat16, of the model's products.
        output: a .json file for every figure; - for standard output.
        overwrite: replace a file that is there.
        cache: a folder that keeps the features for the next time; the default is features/ in the
            folder of the downloads.
        no_cache: keep no features and read none.
        batch_size: images a batch.
        device: auto, cpu or cuda.
        num_workers: processes that decode images.
    """
    from allmlp.console import Reporter
    from allmlp.data.sources import open_splits, read_from
    from allmlp.evaluation import few_shot as measure
    from allmlp.evaluation.measurement import measurement
    from allmlp.io import STANDARD_OUTPUT, check_not_inputs
    from allmlp.models.catalog import random_weights
    from allmlp.models.layers import preprocessing_of
    from allmlp.weights.load import files_of

    settings = measure.check_settings(
        shots=shots,
        seeds=seeds or None,
        l2=l2,
        protocol=protocol,
        resize=resize,
        precision=precision,
    )
    if len(set(data)) < len(data):
        raise UserError("the same data twice", where="--data", fix="Name each source once")
    kept = _cache_folder(cache, no_cache)
    target = check_json(output, "few_shot.json", overwrite=overwrite)
    splits = {name: open_splits(name) for name in data}
    outputs = [each for each in (target, None if cache is None else kept) if each is not None]
    inputs = [place for name in data for place in read_from(name)]
    check_not_inputs(outputs, [*inputs, *files_of(model)])
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    total = sum(measure.num_images(each, settings) for each in splits.values())
    net = load_named(model, image_size, resize_weights)
    if ignore_exif:
        net.preprocessing = replace(preprocessing_of(net), exif_orientation=False)
    nets = [net, random_weights(net, FLOOR_SEED)] if floor else [net]
    report = Reporter(stderr=output == STANDARD_OUTPUT)
    results: list[list[FewShot]] = []  # of the model, then of the floor: one for each source
    with report.progress(total * len(nets), "images") as bar:
        for each in nets:
            found = [
                measure.few_shot(
                    each,
                    opened,
                    shots=shots,
                    seeds=seeds or None,
                    l2=l2,
                    protocol=protocol,
                    resize=resize,
                    precision=precision,
                    batch_size=batch_size,
                    num_workers=num_workers,
                    device=device,
                    cache=kept,
                    on_batch=lambda batch: bar.advance(len(batch.labels) + len(batch.bad)),
                )
                for opened in splits.values()
            ]
            found = [replace(each, data=name) for each, name in zip(found, data, strict=True)]
            results.append(measure.choose_l2(found) if protocol == "scenic" else found)
    if output is not None:
        figures = {"results": [each.to_json() for each in results[0]], "floor": None}
        if floor:
            figures["floor"] = {
                "weights": "random",
                "seed": FLOOR_SEED,
                "results": [each.to_json() for each in results[1]],
            }
        # Before anything is said: who reads it may go away, as `| head` does.
        write_json(target, measurement("few-shot", net, figures))
    report.say(f"model     {model}: {net.config.summary()}")
    _print_head(report, results, kept)
    for at in range(len(data)):
        _print_source(report, [each[at] for each in results])
    if target is not None:
        report.say(f"\nwritten   {target}")
    return warn_of_bad([bad for each in results[0] for bad in each.bad])


def _cache_folder(cache: str | None, no_cache: bool) -> Path | None:
    """Returns where features are kept, None for nowhere."""
    from allmlp.io import check_output_folder, expand
    from allmlp.weights.download import cache_folder

    if no_cache:
        if cache is not None:
            what = "--no-cache keeps no features, and --cache says where to keep them"
            raise UserError(what, fix="Leave out one of them")
        return None
    if cache is None:
        return cache_folder() / "features"
    check_output_folder(expand(cache))
    return expand(cache)


def _print_head(report: Reporter, results: list[list[FewShot]], cache: Path | None) -> None:
    """Prints what was done to all data sets alike."""
    first = results[0][0]
    if first.protocol == "scenic":
        rule = "the first images of each class; the l2 that is best on the test images"
        if len(results[0]) > 1:
            rule += ", by mean rank over the data"
    else:
        seeds = " ".join(map(str, first.seeds))
        rule = f"seeds {seeds}, l2 {next(iter(first.l2.values())):g}"
    height, width = first.preprocessing.image_size
    report.say(f"protocol  {first.protocol}: {rule}")
    report.say(f"images    {height}x{width} pixels, {first.preprocessing.summary()}")
    computed = sum(each.num_computed for found in results for each in found)
    where = "no cache" if cache is None else f"cache {cache}"
    report.say(f"features  {first.precision}; of {plural(computed, 'image')} computed now; {where}")
    if len(results) > 1:
        report.say(f"floor     the same architecture with random weights, seed {FLOOR_SEED}")


def _print_source(report: Reporter, results: list[FewShot]) -> None:
    """Prints the table of a data set, of the model and, if measured, of the floor."""
    from allmlp.console import table

    first = results[0]
    classes = f"{plural(first.num_classes, 'class')} (chance {first.chance:.2%})"
    counts = plural(first.num_train, "training image")
    counts += f", {plural(first.num_test, f'{first.test_split} image')}"
    report.say(f"\ndata      {first.data}: {classes}, {counts}")
    for note in dict.fromkeys(note for each in results for note in each.notes):
        report.say(f"note      {note}")
    scenic = first.protocol == "scenic"
    headers = ["shots", "l2", "accuracy"] if scenic else ["shots", "accuracy"]
    headers += [f"seed {seed}" for seed in first.seeds]
    if len(results) > 1:
        headers += ["floor l2", "floor"] if scenic else ["floor"]
    rows: list[list[str]] = []
    for shots in first.shots:
        row = [str(shots)]
        for number, each in enumerate(results):
            row += [f"{each.l2[shots]:g}"] if scenic else []
            row.append(_figure(each, shots))
            if number == 0:
                row += [f"{each.accuracies[shots][seed]:.2%}" for seed in each.seeds]
        rows.append(row)
    for line in table(headers, rows, left=0):
        report.say(line)


def _figure(result: FewShot, shots: int) -> str:
    """Returns "12.34% +- 0.56%", without the second part where there is one draw only."""
    deviation = result.deviation(shots)
    return f"{result.mean(shots):.2%}" + ("" if deviation is None else f" +- {deviation:.2%}")
