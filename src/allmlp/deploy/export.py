"""A model -> a file that runs without this package, and a report that compares the two.

    model -> graph (onnx_graph) -> perhaps int8 (int8) -> file (formats)
                 file, run by its own runtime -> beside the model (export_report)

The file is written in a staging folder and takes its place only when it has passed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from allmlp.console import Reporter
from allmlp.data.loader import evaluation_batches
from allmlp.data.source import Source, subset
from allmlp.data.sources import open_source, read_from
from allmlp.data.transforms import normalize
from allmlp.deploy.export_report import ExportReport, Parity, compare, logits_of, measure_speed
from allmlp.deploy.exported_model import ExportedModel, info_of
from allmlp.deploy.extras import import_extra
from allmlp.deploy.formats import FormatName, choose_format, load_any
from allmlp.deploy.int8 import Int8
from allmlp.deploy.onnx_graph import graph_module
from allmlp.errors import UserError, between, needs
from allmlp.evaluation.metrics import Evaluation, check_logits, evaluate_source
from allmlp.evaluation.predictor import Predictor
from allmlp.io import check_not_inputs, check_output_file, expand, fsync, staging_folder
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.models.resize import ResizeWeights
from allmlp.options import ImageSize, Options, make
from allmlp.runtime.device import torch_settings

_RANDOM_IMAGES = 16  # to compare on without data
_CALIBRATION_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Write a model as a file that runs without this package, and measure that file.

    The file is run by its own runtime beside the model: logits, accuracy on --data, speed. A file
    that fails is not kept, and the exit code is 1.

    Examples of use:
        mixer export runs/flowers --output flowers.onnx --data FOLDER:test
        mixer export runs/flowers --output flowers.xml --precision bfloat16
        mixer export mixer_b16.i1k --output b16_448.onnx --image-size 448 --uint8-input
        mixer export runs/mine --output m.onnx --precision int8 --calibration A:train --data A:test
    """

    output: str | Path
    """The file to write: .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2 (torch.export)."""
    format: FormatName | None = None
    """If not given, by the ending of the output."""
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    """Of the weights and their products."""
    image_size: ImageSize | None = None
    """Another size than the weights' own."""
    resize_weights: ResizeWeights | None = None
    """How to reach that size; auto if not given."""
    uint8_input: bool = False
    """The file takes uint8 images, channels last, and normalises them inside."""
    data: str | None = None
    """Labelled images on which the model and the file are measured; int8 needs them."""
    max_accuracy_drop: float = 0.5
    """Points of top-1 that the file may lose on them."""
    calibration: str | None = None
    """Images, labelled or not, that determine the ranges of int8; different from --data."""
    calibration_images: int = 1000
    """How many of them are used at most, spread evenly."""
    overwrite: bool = False
    """Replace an output that exists."""
    batch_size: int = 8
    """Images per batch when the speed is measured."""
    num_threads: int | None = None
    """Of the processor; torch's own choice if not given."""
    num_workers: int | None = None
    """Processes that decode images; chosen by the size of the data if not given."""

    def __post_init__(self) -> None:
        chosen = choose_format(expand(self.output), self.format)
        if self.precision == "int8" and not chosen.has_int8:
            fix = "Export as onnx or openvino"
            raise UserError(f"{chosen.suffix} files have no int8", where="precision", fix=fix)
        needs({"precision int8": self.precision == "int8"}, "calibration", self.calibration)
        needs({"precision int8": self.precision == "int8"}, "data", self.data)
        needs({"resize_weights": self.resize_weights}, "image_size", self.image_size)
        between("max_accuracy_drop", self.max_accuracy_drop, 0, 100)
        for name in ("batch_size", "num_threads", "calibration_images"):
            between(name, getattr(self, name), 1, 2**20)


def export(
    model: ImageClassifier | str | Path,
    output: str | Path | ExportOptions | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
    **fields: Any,
) -> ExportReport:
    """Writes a model as a file that its runtime runs without this package, if it is good enough.

    FILE.onnx.report.json and FILE.onnx.report.md are written beside FILE.onnx. A file that fails a
    criterion is not kept: `passed` of the report is False, `path` None, `failures` say why.

    Args:
        model: or anything that `load_model` takes.
        output: the file to write; or all options in one object.
        log: called with what is done next.
        **fields: those of `ExportOptions`; `data` and `calibration` may be opened sources too.

    Raises:
        UserError: options that do not go together, an output that exists or cannot be written, no
            such data, or a package that is not installed.
    """
    given = output if isinstance(output, ExportOptions) else None
    if given is None and output is not None:
        fields["output"] = output
    opened = {
        name: fields[name]
        for name in ("data", "calibration")
        if not isinstance(fields.get(name), str | None)
    }
    names = {name: source.name for name, source in opened.items()}
    options = make(ExportOptions, given, {**fields, **names})
    path = expand(options.output)
    format = choose_format(path, options.format)
    for file in (*format.files(path), *_report_files(path)):
        check_output_file(file, overwrite=options.overwrite)
        for name, source in (("data", options.data), ("calibration", options.calibration)):
            if source is not None and name not in opened:
                check_not_inputs([file], read_from(source))
    for package, group in format.packages:
        import_extra(package, group)
    net = _loaded(model, options)
    for name, opener in (("data", open_source), ("calibration", _open_calibration)):
        source = getattr(options, name)
        if source is not None and name not in opened:
            opened[name] = opener(source)
    cpu = torch.device("cpu")
    with staging_folder(path) as folder, torch_settings(cpu, "float32", options.num_threads):
        work = _Export(net, options, opened, folder / path.name, log)
        report = work.run()
        if report.passed:
            work.put_in_place(report)
    return report


def _loaded(model: ImageClassifier | str | Path, options: ExportOptions) -> ImageClassifier:
    net = load_any(model, options.image_size, options.resize_weights)
    if isinstance(net, ExportedModel):
        raise UserError("this is an exported file already", where=net.source)
    if net is model:
        source, net = net.source, copy.deepcopy(net).cpu().float().eval()
        net.source = source
    if preprocessing_of(net).permutation != "none" and not options.uint8_input:
        what = "the model was trained on permuted pixels, whose order would not be in the file"
        raise UserError(what, where="uint8_input", fix="Add it: the order is then in the graph")
    return net


def _open_calibration(name: str) -> Source:
    return open_source(name, labels="any", first_of=("train", "validation", "test"))


class _Export:
    """One export: a model, what is asked for, and the file in the staging folder."""

    def __init__(
        self,
        model: ImageClassifier,
        options: ExportOptions,
        sources: dict[str, Source],
        path: Path,
        log: Callable[[str], None],
    ) -> None:
        self.model, self.options, self.sources = model, options, sources
        self.path, self.log = path, log
        self.output = expand(options.output)
        self.format = choose_format(self.output, options.format)
        self.num_threads = options.num_threads or torch.get_num_threads()
        self.info = info_of(model, options.precision, uint8_input=options.uint8_input)
        self.original: Evaluation | None = None

    def run(self) -> ExportReport:
        """Writes the file into the staging folder and returns its report."""
        self.log("exporting")
        net, example = graph_module(self.model, uint8_input=self.info.uint8_input)
        if "data" in self.sources:
            self.original = self.measure(self.model)
        made = self.format.make(net, example, self.info.precision)
        if self.info.precision == "int8":
            return self.run_int8(made)
        return self.report(self.write(made))

    def run_int8(self, graph: Any) -> ExportReport:
        """Keeps ever more of the sensitive layers in float32, until the accuracy is kept."""
        self.log("calibrating")
        calibration, limit = self.sources["calibration"], self.options.max_accuracy_drop
        summary = self.model.config.summary()
        work = Int8(graph, self.calibration_batches(), self.path.parent, self.num_threads, summary)
        count, attempts = 0, []
        most = len(work.layers) // 2
        while True:
            made, kept = work.quantized(count)
            self.info = replace(self.info, float32_layers=tuple(kept))
            self.log(f"measuring int8, {count} layers in float32")
            file = self.write(made)
            parity = self.compare(file)
            attempts.append((count, parity.drop or 0.0))
            if not parity.failures("int8", limit) or count >= most:
                break
            count = min(max(1, 2 * count), most)
        report = self.report(file, parity)
        report.num_layers, report.attempts, report.kept = (len(work.layers), attempts, kept)
        layers = work.most_sensitive() if work.sensitivity else []
        report.calibration = {
            "source": calibration.name,
            "num_images": work.num_images,
            "quantile": work.quantile,
            "sensitivity": {layer: work.sensitivity[node] for node, layer in layers} or None,
        }
        if calibration.name == self.sources["data"].name:
            report.notes.append("calibrated on the data that it was measured on: use other images")
        if not report.passed:
            in_float32 = f"{count} of {len(work.layers)} layers in float32"
            report.failures.append(f"this is with {in_float32}")
        return report

    def calibration_batches(self) -> Iterator[np.ndarray]:
        """The calibration images, evenly spread over the source, as inputs of the graph."""
        source, most = self.sources["calibration"], self.options.calibration_images
        if len(source) > most:
            chosen = np.linspace(0, len(source) - 1, most).round().astype(np.int64)
            source = subset(source, chosen, source.name)
        for batch in evaluation_batches(
            source,
            preprocessing_of(self.model),
            batch_size=_CALIBRATION_BATCH,
            num_workers=self.options.num_workers,
        ):
            if len(batch.labels):
                yield self.info.inputs(batch.images)

    def write(self, made: Any) -> ExportedModel:
        """Writes the file and returns it as a model, run by its own runtime."""
        with self.writing():
            self.format.write(made, self.info, self.path)
        return self.format.open(self.path, self.num_threads)

    def measure(self, model: ImageClassifier) -> Evaluation:
        """Evaluates a model on the data."""
        data, predictor = (
            self.sources["data"],
            Predictor(model, num_workers=self.options.num_workers),
        )
        result = evaluate_source(predictor, data, allow_missing_classes=True)
        check_logits(result, data)
        return result

    def compare(self, file: ExportedModel) -> Parity:
        """Compares the file with the model, on the data or on random pixels."""
        if self.original is not None:
            measured = self.measure(file)
            accuracy = (self.original.top1, measured.top1)
            return compare(self.original.logits, measured.logits, self.original.data, accuracy)
        config, own = self.model.config, preprocessing_of(self.model)
        random = torch.Generator().manual_seed(0)
        shape = (_RANDOM_IMAGES, config.in_channels, *config.image_size)
        pixels = torch.randint(0, 256, shape, generator=random).byte()
        exact = logits_of(self.model, normalize(pixels, own))
        return compare(exact, logits_of(file, pixels), "random pixels")

    def report(self, file: ExportedModel, parity: Parity | None = None) -> ExportReport:
        """Returns the report of a file."""
        options, info, config = self.options, self.info, self.model.config
        parity = parity or self.compare(file)
        self.log("timing")
        images = torch.zeros(options.batch_size, config.in_channels, *config.image_size)
        failures = parity.failures(info.precision, options.max_accuracy_drop)
        notes = [note for kinds, note in self.format.notes if not kinds or info.precision in kinds]
        if self.original is None:
            notes.insert(0, "no accuracy was measured: give labelled images as data")
        if info.class_names is None:
            notes.insert(0, "the model has no class names, and neither does the file")
        return ExportReport(
            None if failures else str(self.output),
            {part.name: part.stat().st_size for part in self.format.files(self.path)},
            self.format.name,
            info.precision,
            file.runtime,
            config.image_size,
            info.uint8_input,
            self.num_threads,
            options.batch_size,
            parity,
            measure_speed({"original, torch float32": self.model, "file": file}, images),
            failures,
            notes=notes,
        )

    def put_in_place(self, report: ExportReport) -> None:
        """Writes the reports and renames all files.

        What was there before is removed first, and before all the file that a runtime is given: a
        kill in between leaves no pair of old and new, and no report of another file.
        """
        title = f"{self.output.name}, exported from {self.model.source or 'a model'}"
        as_json = json.dumps(report.to_json(self.model), indent=2) + "\n"
        files = [*self.format.files(self.path), *_report_files(self.path)]
        with self.writing():
            for file, text in zip(files[-2:], (as_json, report.markdown(title)), strict=True):
                file.write_bytes(text.encode(errors="surrogateescape"))
            for file in files:
                fsync(file)
            if self.format.sidecar is not None:
                self.output.unlink(missing_ok=True)
            for file in _report_files(self.output):
                file.unlink(missing_ok=True)
            for file in files:
                os.replace(file, self.output.with_name(file.name))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turns an error of the disk into a UserError."""
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self.output.parent).free
            what = f"the file cannot be written: {error.strerror}; {free:,} bytes are free there"
            fix = "Free some space there, or give another output"
            raise UserError(what, where=self.output, fix=fix, code="disk") from error


def _report_files(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.report.json"), path.with_name(f"{path.name}.report.md")


def command(model: str, options: ExportOptions) -> ExportReport:
    """Exports, with what is done next on standard error."""
    return export(model, options, log=Reporter(stderr=True).say)


def show(report: ExportReport, options: ExportOptions) -> int:
    """Prints the report of an export; returns the exit code."""
    reporter = Reporter()
    for line in report.lines():
        reporter.say(line)
    if not report.passed:
        reporter.say("removed  the file failed and was not kept")
        return 1
    reporter.say(f"written  {options.output}")
    return 0
