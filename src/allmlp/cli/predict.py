"""`mixer predict`."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from allmlp.cli.arguments import (
    File,
    Inputs,
    Model,
    Number,
    ResizeWeights,
    Size,
    load_named,
    refuse_device,
    warn_of_notes,
    warn_of_numbers,
)
from allmlp.cli.predict_lines import NAMED, Seen, follower, say_rows, say_speed, warn
from allmlp.errors import UserError, plural

if TYPE_CHECKING:
    from pathlib import Path

    from allmlp.console import Reporter
    from allmlp.data.source import Source
    from allmlp.deploy.answers import Question
    from allmlp.deploy.plan import Plan
    from allmlp.deploy.rows import OnRows
    from allmlp.models.layers import ImageClassifier
    from allmlp.runtime.world import World

TopK = Annotated[int | None, arg(help_behavior_hint="(default: 5)", metavar="N")]
Precision = Annotated[str | None, arg(help_behavior_hint="(default: auto)", metavar="NAME")]
FormatName = Annotated[str | None, arg(help_behavior_hint="(default: csv)", metavar="FORMAT")]


def predict(
    model: Model,
    images: Inputs,
    /,
    *,
    top_k: TopK = None,
    features: bool = False,
    image_size: Size = None,
    resize_weights: ResizeWeights = None,
    output: File = None,
    overwrite: bool = False,
    format: FormatName = None,
    part_size: Number = None,
    precision: Precision = None,
    batch_size: int = 64,
    device: str = "auto",
    num_workers: Number = None,
) -> int:
    """Classify images: files, folders and patterns, or any source of data.

    An output with an ending is one file. One without is a folder of part files and a manifest: the
    same command again writes the parts that are missing, and under torchrun the processes share
    them.

    Examples of use:
        mixer predict runs/flowers photo.jpg
        mixer predict runs/flowers FOLDER 'more/*.png' --output predictions.csv
        find photos -name '*.jpg' | mixer predict runs/flowers - --output predictions.jsonl
        mixer predict runs/digits digits:test --top-k 1 --output -
        mixer predict mixer_b16.i1k photos --features --output features.parquet
        mixer predict mixer_b16.i1k shards:test --output predictions --format parquet

    Args:
        model: a run folder, a .safetensors, .npz or .pth file, a name of `mixer models --weights`,
            or hf:owner/name; or a file of the verb export, run by its own runtime.
        images: files, folders (to any depth), patterns, - for a list of paths on standard input;
            or one source of data: digits:test, list.csv, FOLDER:test, Parquet files, shards,
            hf:owner/name.
        top_k: classes for each image.
        features: the pooled features that the head reads, and no classes.
        image_size: look at the images at another size than the model's own.
        resize_weights: how to reach that size: block-diagonal, resample or auto.
        output: a file to write to, its ending says how: .csv, .json, .jsonl or .parquet; a folder
            for parts, a name without an ending; or - for standard output.
        overwrite: replace a file that is there.
        format: of the parts: csv, jsonl or parquet; of standard output: csv or jsonl.
        part_size: images a part; chosen, at most about 10,000, where it is left out.
        precision: of the products: float32, bfloat16, or auto: bfloat16 where the device is fast at
            it and the model is not small.
        batch_size: images a batch, of each process.
        device: auto, cpu or cuda.
        num_workers: processes that decode images, for each process under torchrun.
    """
    from allmlp.console import Reporter
    from allmlp.deploy.answers import make_question
    from allmlp.deploy.inputs import STANDARD_INPUT, find_images, read_list
    from allmlp.deploy.plan import check_folder, is_folder
    from allmlp.deploy.predict import check_output, refuse_read
    from allmlp.io import STANDARD_OUTPUT
    from allmlp.runtime.device import to_device

    if top_k is not None and top_k < 1:  # before anything is read
        raise UserError(f"top_k must be at least 1, got {top_k}", where="--top-k")
    device = refuse_device(model, device)
    in_parts = output is not None and is_folder(output)
    to_stdout = output == STANDARD_OUTPUT
    _refuse_idle(output, in_parts, features, overwrite, format, part_size)
    with ExitStack() as stack:
        world: World | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # one process needs no collectives
            if not in_parts:
                what = "several processes need a folder to write their parts to"
                fix = "--output FOLDER, a name without an ending"
                raise UserError(what, where="--output", fix=fix)
            from allmlp.runtime.world import join_world

            world, chosen = stack.enter_context(join_world(device))
            device = str(chosen)
        path = None
        if output is not None and in_parts:
            path = check_folder(output, format or "csv", part_size)
        elif output is not None and not to_stdout:
            path = check_output(output, overwrite=overwrite)
        listed = None
        if world is not None and STANDARD_INPUT in images:  # of which there is one for all
            listed = world.broadcast_from_rank0(read_list)
        source = find_images(images, listed)
        if path is not None:
            refuse_read(path, model, images, source)
        net = to_device(load_named(model, image_size, resize_weights, exported=True), device)
        question = make_question(
            net, top_k=top_k, features=features, precision=precision, batch_size=batch_size
        )
        report = Reporter(quiet=world is not None and not world.is_main, stderr=to_stdout)
        if world is None or world.is_main:
            warn_of_notes(source)
            if not features:
                warn_of_numbers(net)
        options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
        if path is None or not in_parts:
            if to_stdout:
                options["suffix"] = f".{format or 'csv'}"
            return _at_once(report, net, source, question, path, options)
        options |= {"kind": format or "csv", "part_size": part_size, "world": world}
        return _in_parts(report, net, source, question, path, options)


def _refuse_idle(
    output: str | None,
    in_parts: bool,
    features: bool,
    overwrite: bool,
    format: str | None,
    part_size: int | None,
) -> None:
    """Refuses flags that would have no effect."""
    if features and output is None:
        what = "--features are written to a file, and none is named"
        raise UserError(what, where="--features", fix="Add --output FILE.parquet, .csv or .jsonl")
    if overwrite and (output in (None, "-") or in_parts):
        what = "--overwrite has no effect: it is for one file; a folder keeps the parts it has"
        raise UserError(what, where="--overwrite", fix="Leave it out, or give --output FILE.csv")
    if output == "-" and format == "parquet":
        what = "Parquet cannot be written to standard output"
        raise UserError(what, where="--format", fix="--format csv or jsonl, or --output FILE")
    allowed = {"--format": output == "-" or in_parts, "--part-size": in_parts}
    for flag, value in {"--format": format, "--part-size": part_size}.items():
        if value is not None and not allowed[flag]:
            what = f"{flag} {value} has no effect: it is for the parts of a folder"
            fix = "--output FOLDER, a name without an ending; the ending of a file is its format"
            raise UserError(what, where=flag, fix=fix)
    if output == "-" and format not in (None, "csv", "jsonl"):
        raise UserError(f"unknown format {format!r}", where="--format", fix="csv or jsonl")


def _at_once(
    report: Reporter,
    net: ImageClassifier,
    source: Source,
    question: Question,
    path: Path | None,
    options: dict[str, Any],
) -> int:
    """All images to one file, to standard output, or the first to the screen."""
    from allmlp.deploy.predict import predict_to_file
    from allmlp.deploy.rows import predict_rows

    seen, started = Seen(), time.monotonic()
    with report.progress(len(source), "images") as bar:
        follow = follower(bar, seen)
        if path is None and "suffix" not in options:
            for rows in predict_rows(net, source, question, **options):
                follow(rows)
        else:
            predict_to_file(net, source, question, path, **options, on_rows=follow)
    if "suffix" not in options:
        say_rows(report, seen, None if path is None else str(path))
    if path is not None:
        report.say(f"written  {path}: {plural(seen.images, 'image')}")
    say_speed(report, seen.images, time.monotonic() - started, question)
    return warn(seen.first_bad, seen.bad, seen.images)


def _in_parts(
    report: Reporter,
    net: ImageClassifier,
    source: Source,
    question: Question,
    folder: Path,
    options: dict[str, Any],
) -> int:
    """The missing parts of a folder, those of this process."""
    from allmlp.deploy.parts import bad_images, predict_parts

    world: World | None = options["world"]
    seen, started = Seen(), time.monotonic()
    with ExitStack() as shown:

        def begin(plan: Plan) -> OnRows:
            there = plan.parts - len(plan.missing)
            if there:
                report.say(f"parts    {there:,} of {plan.parts:,} are there already")
            total = plan.count(plan.share(world))
            bar = shown.enter_context(report.progress(total, "images"))
            if world is not None:
                bar.advance(0, description=f"rank 0 of {world.size}")
            return follower(bar, seen)

        plan = predict_parts(net, source, question, folder, **options, on_plan=begin)
    images = seen.images if world is None else sum(world.gather(seen.images))
    if world is not None and not world.is_main:
        return 0  # whatever was bad: torchrun would end the first process, which still speaks
    report.say(f"written  {folder}: {plural(plan.parts, 'part')}, {plural(plan.images, 'image')}")
    if images:
        say_speed(report, images, time.monotonic() - started, question)
    bad, first_bad = bad_images(plan, NAMED)  # also those of parts that were there already
    return warn(first_bad, bad, plan.images)
