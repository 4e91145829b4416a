"""A model and images from anywhere -> the most probable classes, or the features, of each."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from allmlp.console import ProgressBar, Reporter, report_bad_images, report_notes, table
from allmlp.data.source import BadImage, Source
from allmlp.data.sources import notes_of, read_from
from allmlp.deploy.exported_model import ExportedModel
from allmlp.deploy.formats import is_exported, load_any
from allmlp.deploy.inputs import STANDARD_INPUT, AnyImage, find_images, is_url, read_list
from allmlp.deploy.output import Output, choose_output, read_bad, watched, write_output
from allmlp.deploy.rows import Prediction, Rows, choose_columns, predict_rows
from allmlp.errors import UserError, at_least, named_memory_errors, needs, plural
from allmlp.evaluation.predictor import Predictor
from allmlp.io import STANDARD_OUTPUT, check_not_inputs
from allmlp.models.layers import ImageClassifier
from allmlp.models.resize import ResizeWeights
from allmlp.options import ComputeOptions, ImageSize, make
from allmlp.runtime.device import check_device_of_exported
from allmlp.runtime.world import World, join_world
from allmlp.weights.load import files_of

__all__ = ["PredictOptions", "Prediction", "predict", "write_predictions"]

_SHOWN = 40  # rows on the screen
_NAMED = 20  # bad images
_WINDOW = 30  # batches whose time the rate in the bar is of


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ComputeOptions):
    """Classify images: files, folders and patterns, or any data source.

    An output with an ending is one file. One without is a folder of part files and a manifest: the
    same command again writes the missing parts, and under torchrun the processes share them.

    Examples of use:
        mixer predict runs/flowers photo.jpg
        mixer predict runs/flowers FOLDER 'more/*.png' --output predictions.csv
        find photos -name '*.jpg' | mixer predict runs/flowers - --output predictions.jsonl
        mixer predict runs/digits digits:test --top-k 1 --output -
        mixer predict mixer_b16.i1k photos --features --output features.parquet
        mixer predict mixer_b16.i1k shards:test --output predictions --format parquet
    """

    top_k: int | None = None
    """Classes per image; 5 if not given."""
    features: bool = False
    """The pooled features that the head reads instead of classes."""
    image_size: ImageSize | None = None
    """Another size than the model's own."""
    resize_weights: ResizeWeights | None = None
    """How to reach that size; auto if not given."""
    output: str | Path | None = None
    """A .csv, .json, .jsonl or .parquet file, a folder for parts, or - for standard output."""
    overwrite: bool = False
    """Replace a file that exists."""
    format: Literal["csv", "jsonl", "parquet"] | None = None
    """Of the parts of a folder, or of standard output (csv or jsonl); csv if not given."""
    part_size: int | None = None
    """Images per part of a folder; at most about 10,000 if not given."""

    def __post_init__(self) -> None:
        at_least("top_k", self.top_k, 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("part_size", self.part_size, 1)
        needs({"resize_weights": self.resize_weights}, "image_size", self.image_size)
        if self.features and self.top_k is not None:
            what = f"top_k={self.top_k} and features exclude each other: rows have one of them"
            raise UserError(what, fix="Leave out one of them", code="conflict")


@named_memory_errors()
def predict(
    model: ImageClassifier | str | Path,
    images: AnyImage | Iterable[AnyImage] | Source,
    options: PredictOptions | None = None,
    *,
    on_batch: Callable[[int], None] | None = None,
    **fields: Any,
) -> list[Prediction]:
    """Returns the most probable classes of every image, in order; bad images carry an error.

    All rows are kept in memory; `write_predictions` keeps one batch. If the output is a folder, the
    rows are those of the parts that were missing.

    Args:
        model: a model, an exported file, or anything that `load_model` takes; without class names
            the classes are called "0", "1", ...
        images: one or any number of files, folders (searched to any depth), glob patterns, URLs,
            PIL images, uint8 arrays (H, W) or (H, W, 3) and encoded bytes; one data source such as
            "digits:test" or "list.csv"; or what `find_images` made of them.
        options: all options in one object.
        on_batch: called with the number of images of every batch once it is done.
        **fields: single options: `top_k=3`, `features`, `output`, ... see `PredictOptions`. With
            the device "auto" a model in memory stays where it is.

    Raises:
        UserError: no such model or image, an output that exists, is read, cannot be written or has
            an unknown format, or options that do not go together.
    """
    predictions: list[Prediction] = []

    def keep(rows: Rows) -> None:
        predictions.extend(rows)
        if on_batch is not None:
            on_batch(len(rows))

    write_predictions(model, images, make(PredictOptions, options, fields), on_rows=keep)
    return predictions


def write_predictions(
    model: ImageClassifier | str | Path,
    images: AnyImage | Iterable[AnyImage] | Source,
    options: PredictOptions,
    *,
    world: World | None = None,
    on_start: Callable[[Predictor, Source, Output | None], object] = lambda *_: None,
    on_rows: Callable[[Rows], object] = lambda rows: None,
) -> Output | None:
    """Writes a row for every image to the output of the options, one batch in memory at a time.

    Args:
        model, images: as of `predict`.
        world: the processes that share the parts of a folder; None is this one alone.
        on_start: called once all is open, with what is missing; the output is None without one.
        on_rows: called with the rows of every batch.
    """
    world = world or World()
    output = choose_output(
        options.output, options.format, options.part_size, overwrite=options.overwrite
    )
    if world.size > 1 and (output is None or not output.is_folder):
        what = "several processes need a folder to write their parts to"
        raise UserError(what, where="output", fix="Give a name without an ending")
    given: list[Any] = []
    if isinstance(images, AnyImage | Iterable):
        given = [images] if isinstance(images, AnyImage) else list(images)
        is_listed = any(isinstance(item, str) and item == STANDARD_INPUT for item in given)
        # Standard input is there once for all processes.
        listed = world.broadcast_from_rank0(read_list) if is_listed and world.size > 1 else None
        source = find_images(given, listed)
    else:
        source = images
    if output is not None and output.path is not None:
        names = [str(item) for item in given if isinstance(item, str | Path) and not is_url(item)]
        inputs = [path for name in names if name != STANDARD_INPUT for path in read_from(name)]
        inputs += files_of(model) if isinstance(model, str | Path) else []
        check_not_inputs([output.path], inputs, map(source.item_name, range(len(source))))
    net = load_any(model, options.image_size, options.resize_weights)
    predictor = Predictor(
        net,
        device=None if net is model and options.device == "auto" else options.device,
        precision=None if options.precision == "auto" else options.precision,
        default_precision="auto",
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    columns = choose_columns(predictor.model, top_k=options.top_k, features=options.features)
    if output is None:
        on_start(predictor, source, None)
        for _ in watched(predict_rows(predictor, source, columns), on_rows):
            pass
        return None
    return write_output(
        predictor,
        source,
        columns,
        output,
        world,
        on_start=lambda begun: on_start(predictor, source, begun),
        on_rows=on_rows,
    )


# --- the command ----------------------------------------------------------------------------------


class Progress:
    """What the command keeps of its rows: counts, the first rows and the first bad images."""

    def __init__(self, bar: ProgressBar) -> None:
        self.bar, self.images, self.bad = bar, 0, 0
        self.rows: list[Prediction] = []
        self.bad_images: list[BadImage] = []
        self._times = deque([(time.monotonic(), 0)], maxlen=_WINDOW)

    def take(self, rows: Rows) -> None:
        """Counts the rows of a batch and advances the bar."""
        for row in rows:
            if row.error is not None:
                self.bad += 1
                if len(self.bad_images) < _NAMED:
                    self.bad_images.append(BadImage(self.images, row.path, row.error))
            elif len(self.rows) < _SHOWN:
                self.rows.append(row)
            self.images += 1
        self._times.append((time.monotonic(), self.images))
        (start, before), (now, _) = self._times[0], self._times[-1]
        rate = (self.images - before) / max(now - start, 1e-9)
        self.bar.advance(len(rows), f"{rate:,.0f} images/s")


def command(model: str, images: tuple[str, ...], options: PredictOptions) -> int:
    """Predicts with a progress bar; prints the first rows, the speed and the bad images."""
    if options.features and options.output is None:
        what = "features are written to a file, and none is named"
        raise UserError(what, where="output", fix="Add an output: FILE.parquet, .csv or .jsonl")
    with join_world("cpu" if is_exported(model) else options.device) as (world, device):
        if is_exported(model):
            check_device_of_exported(options.device)
        options = replace(options, device=str(device))
        reporter = Reporter(quiet=not world.is_main, stderr=options.output == STANDARD_OUTPUT)
        return _run(model, images, options, world, reporter)


def _run(
    model: str, images: tuple[str, ...], options: PredictOptions, world: World, reporter: Reporter
) -> int:
    started = time.monotonic()
    with ExitStack() as stack:
        progress: Progress | None = None
        precision = ""

        def start(predictor: Predictor, source: Source, output: Output | None) -> None:
            nonlocal progress, precision, started
            if world.is_main:
                report_notes(notes_of({"": source}))
                if not options.features and not predictor.model.class_names:
                    note = "the model has no class names: classes are called by their number"
                    report_notes([f"{note}, from 0"])
            number = len(source)
            if output is not None and output.is_folder:
                there = output.parts - len(output.missing)
                if there:
                    reporter.say(f"parts    {there:,} of {output.parts:,} are there already")
                number = sum(len(output.images_of(part)) for part in output.share(world))
            if not isinstance(predictor.model, ExportedModel):
                precision = f", {predictor.precision} ({predictor.why})"
            bar = stack.enter_context(reporter.progress(number, "images"))
            if world.size > 1:
                bar.advance(0, description=f"rank 0 of {world.size}")
            progress, started = Progress(bar), time.monotonic()

        def follow(rows: Rows) -> None:
            assert progress is not None
            progress.take(rows)

        output = write_predictions(
            model, images, options, world=world, on_start=start, on_rows=follow
        )
    assert progress is not None
    seconds = time.monotonic() - started
    computed, bad, bad_images = progress.images, progress.bad, progress.bad_images
    number = computed
    if output is not None and output.is_folder:
        computed, number = sum(world.gather(computed)), output.images
        if not world.is_main:
            return 0  # whatever was bad: torchrun would end the main process, which reports it
        bad, bad_images = read_bad(output, _NAMED)  # also of parts that existed
        parts = f"{plural(output.parts, 'part')}, {plural(number, 'image')}"
        reporter.say(f"written  {output.path}: {parts}")
    elif output is None or output.path is not None:
        _show_rows(reporter, progress, output)
        if output is not None:
            reporter.say(f"written  {output.path}: {plural(number, 'image')}")
    if computed:
        rate = f"{seconds:,.1f} s: {computed / max(seconds, 1e-9):,.1f} images/s"
        reporter.say(f"time     {rate}{precision}")
    code = report_bad_images(bad_images)
    if bad > len(bad_images):
        print(f"... and {bad - len(bad_images):,} more bad images", file=sys.stderr)
    return 2 if bad and bad == number else code


def _show_rows(reporter: Reporter, progress: Progress, output: Output | None) -> None:
    """Prints the first rows as a table, and where the others are."""
    first = progress.rows
    if not first or first[0].features is not None:
        return
    rows = [[row.path, *(f"{name} {value:.1%}" for name, value in row.classes)] for row in first]
    ranks = [f"{rank}." for rank in range(1, len(rows[0]))]
    for line in table(["image", *ranks], rows, left=len(rows[0])):
        reporter.say(line)
    more = progress.images - progress.bad - len(rows)
    if more:
        where = f"in {output.path}" if output else "with an output"
        reporter.say(f"... and {more:,} more, {where}")


def show(code: int, options: PredictOptions) -> int:
    """Returns the exit code: 0, 3 if some images were bad, 2 if all were."""
    return code
