"""`am.predict` and `mixer predict`: the most probable classes, or the features, of images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from allmlp.console import Reporter, report_bad_images, report_notes
from allmlp.data.source import BadImage, Source
from allmlp.data.sources import notes_of, read_from
from allmlp.deploy.formats import is_exported, load_any
from allmlp.deploy.inputs import STANDARD_INPUT, AnyImage, find_images, is_url, read_list
from allmlp.deploy.options import PredictOptions
from allmlp.deploy.parts import NAMED, Output, begin_parts, choose_output, read_bad, write_parts
from allmlp.deploy.rows import (
    Columns,
    Prediction,
    Rows,
    add_neighbors,
    choose_columns,
    predict_rows,
    row_json,
    write_table,
)
from allmlp.errors import UserError, named_memory_errors, plural
from allmlp.evaluation.predictor import Predictor
from allmlp.io import STANDARD_OUTPUT, check_not_inputs
from allmlp.models.layers import Classifier, ImageClassifier
from allmlp.options import Done, make
from allmlp.runtime.world import World, join_world
from allmlp.weights.load import files_of

_SHOWN = 40  # rows shown on screen


@named_memory_errors()
def predict(
    model: Classifier | str | Path,
    images: AnyImage | Iterable[AnyImage] | Source,
    options: PredictOptions | None = None,
    **fields: Any,
) -> list[Prediction]:
    """Returns the most probable classes of every image, in order; bad images have an error.

    All rows are kept in memory; `write_predictions` keeps one batch. If the output is a folder, the
    rows are those of the missing parts.

    Args:
        model: a model, an exported file, or anything `load_model` accepts; without class names
            the classes are called "0", "1", ...
        images: one or more files, folders (searched recursively), glob patterns, URLs, PIL images,
            uint8 arrays (H, W) or (H, W, 3) and encoded bytes; one data source such as
            "digits:test" or "list.csv"; or an open source.
        options: all options as one object.
        **fields: fields of `PredictOptions`: `top_k=3`, `features`, `output`, ... With device
            "auto", a model in memory stays on its device.

    Raises:
        UserError: no such model or image; an output that exists, is also an input, cannot be
            written or has an unknown format; or incompatible options.
    """
    rows: list[Prediction] = []
    write_predictions(model, images, make(PredictOptions, options, fields), on_rows=rows.extend)
    return rows


def write_predictions(
    model: Classifier | str | Path,
    images: AnyImage | Iterable[AnyImage] | Source,
    options: PredictOptions,
    *,
    world: World | None = None,
    on_start: Callable[[Predictor, Source, Output | None, Columns], object] = lambda *_: None,
    on_rows: Callable[[Rows], object] = lambda rows: None,
) -> Output | None:
    """Writes a row for every image to the output, one batch in memory at a time.

    Several processes, `world`, share the parts of a folder.
    """
    options, world = make(PredictOptions, options, {}), world or World()  # checks the values
    output = choose_output(options)
    folder = output if output is not None and output.is_folder else None
    if world.size > 1 and folder is None:
        what = "several processes need a folder to write their parts to"
        raise UserError(what, where="output", fix="Give a name without an ending")
    if folder is not None and options.neighbors is not None:
        what = "neighbors, among all images, are written to one file, not to parts"
        raise UserError(what, where="output", fix="Give it an ending", code="conflict")
    source, names = _open_images(images, world)
    if output is not None and output.path is not None:
        inputs = [path for name in names for path in read_from(name)]
        inputs += files_of(model) if isinstance(model, str | Path) else []
        check_not_inputs([output.path], inputs, map(source.item_name, range(len(source))))
    net = load_any(model, **options.loading)
    predictor = Predictor(
        net,
        device=None if net is model and options.device == "auto" else options.device,
        precision=options.precision,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    columns = choose_columns(
        net, options.top_k, options.unsure_below, options.features, options.neighbors
    )
    if folder is not None:
        output = world.broadcast_from_rank0(
            lambda: begin_parts(predictor, source, columns, folder, world.size)
        )
        on_start(predictor, source, output, columns)
        write_parts(predictor, source, columns, output, world, on_rows)
        return output
    on_start(predictor, source, output, columns)
    with closing(predict_rows(predictor, source, columns, on_rows)) as batches:
        rows: Iterable[Rows] = batches
        if columns.neighbors:
            rows = [[row for batch in batches for row in batch]]
            add_neighbors(rows[0], columns.neighbors)
        if output is not None:
            write_table(output.path, output.suffix, rows, columns)
        for _ in rows:  # without an output
            pass
    return output


def _open_images(
    images: AnyImage | Iterable[AnyImage] | Source, world: World
) -> tuple[Source, list[str]]:
    """Returns the images, and the names of files, folders and sources among the inputs."""
    if not isinstance(images, AnyImage | Iterable):
        return images, []
    given: list[Any] = [images] if isinstance(images, AnyImage) else list(images)
    names = [str(item) for item in given if isinstance(item, str | Path) and not is_url(item)]
    listed = None
    if STANDARD_INPUT in names and world.size > 1:  # all processes share one
        listed = world.broadcast_from_rank0(read_list)
    return find_images(given, listed), [name for name in names if name != STANDARD_INPUT]


# --- command --------------------------------------------------------------------------------------


class _Screen:
    """Console output of the command: progress, and a summary at the end."""

    def __init__(self, options: PredictOptions, world: World) -> None:
        self.options, self.world = options, world
        self.reporter = Reporter(quiet=not world.is_main, stderr=options.output == STANDARD_OUTPUT)
        self.stack = ExitStack()  # closes the bar
        self.images = self.num_bad = 0
        self.rows: list[Prediction] = []  # the first good ones, or all without an output
        self.bad: list[BadImage] = []  # the first ones

    def start(
        self, predictor: Predictor, source: Source, output: Output | None, columns: Columns
    ) -> None:
        self.columns, number = columns, len(source)
        notes = notes_of({"": source})
        if not (self.options.features or predictor.model.class_names):
            notes.append("the model has no class names: classes are called by their number, from 0")
        if self.world.is_main:
            report_notes(notes)
        if output is not None and output.is_folder:
            there = output.parts - len(output.missing)
            if there:
                self.reporter.say(f"parts    {there:,} of {output.parts:,} are there already")
            mine = output.missing[self.world.rank :: self.world.size]
            number = sum(len(output.images_of(part)) for part in mine)
        is_net = isinstance(predictor.model, ImageClassifier)
        self.precision = f", {predictor.precision} ({predictor.why})" if is_net else ""
        self.bar = self.stack.enter_context(self.reporter.progress(number, "images"))
        self.started = time.monotonic()

    def take(self, rows: Rows) -> None:
        bad = [
            BadImage(at, row.path, row.error)
            for at, row in enumerate(rows, self.images)
            if row.error is not None
        ]
        self.images += len(rows)
        self.num_bad += len(bad)
        self.bad += bad[: NAMED - len(self.bad)]
        good = [row for row in rows if row.error is None]
        self.rows += rows if self.options.output is None else good[: _SHOWN - len(self.rows)]
        seconds = time.monotonic() - self.started
        self.bar.advance(len(rows), f"{self.images / max(seconds, 1e-9):,.0f} images/s")

    def end(self, output: Output | None) -> Done:
        seconds = max(time.monotonic() - self.started, 1e-9)
        computed = number = self.images
        bad, parts = self.num_bad, ""
        if output is not None and output.is_folder:
            computed, number = sum(self.world.gather(computed)), output.images
            if not self.world.is_main:
                return Done({})  # even with bad images: torchrun would kill the main process
            bad, self.bad = read_bad(output)  # includes existing parts
            parts = f"{plural(output.parts, 'part')}, "
        elif output is None or output.path is not None:
            self._show_rows(output)
        if output is not None and output.path is not None:
            self.reporter.say(f"written  {output.path}: {parts}{plural(number, 'image')}")
        if computed:
            speed = f"{computed / seconds:,.1f} images/s{self.precision}"
            self.reporter.say(f"time     {seconds:,.1f} s: {speed}")
        code = report_bad_images(self.bad, bad)
        values: dict[str, Any] = {"images": number, "bad": bad}
        if output is None:
            values["predictions"] = [row_json(row, self.columns) for row in self.rows]
        else:
            values["written"] = output.path
        return Done(values, 2 if bad and bad == number else code)

    def _show_rows(self, output: Output | None) -> None:
        shown = [row for row in self.rows if row.error is None][:_SHOWN]
        if self.options.features or not shown:
            return
        decision, rows = self.columns.decision, []
        for row in shown:
            answer = {"answer": decision.text(row.answers)} if decision.has_answer else {}
            ranked = {f"{rank}.": f"{c} {p:.1%}" for rank, (c, p) in enumerate(row.classes, 1)}
            rows.append({"image": row.path, **answer, **ranked})
        self.reporter.table(rows, left=len(rows[0]))
        more = self.images - self.num_bad - len(rows)
        if more:
            where = f"in {output.path}" if output else "with an output"
            self.reporter.say(f"... and {more:,} more, {where}")


def command(model: str, images: tuple[str, ...], options: PredictOptions) -> Done:
    """Predicts with a progress bar; exit code 0, 3 if some images were bad, 2 if all were."""
    if options.features and options.output is None:
        what = "features are written to a file, and none is named"
        raise UserError(what, where="output", fix="Add an output: FILE.parquet, .csv or .jsonl")
    is_file = is_exported(model)
    place = "cpu" if is_file else options.device
    with join_world(place, independent=True) as (world, device):
        if not is_file:
            options = replace(options, device=str(device))
        screen = _Screen(options, world)
        with screen.stack:
            output = write_predictions(
                model, images, options, world=world, on_start=screen.start, on_rows=screen.take
            )
        return screen.end(output)
