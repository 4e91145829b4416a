"""Export: a file that runs without this package, and a report comparing it with the model.

    model -> graph (onnx_graph) -> optionally int8 (int8) -> file (formats), run by its runtime

The file is written to a staging folder and moved into place only once validated.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allmlp.console import Reporter
from allmlp.data.loader import evaluation_batches
from allmlp.data.source import Source, subset
from allmlp.data.sources import open_source, read_from
from allmlp.data.transforms import normalize
from allmlp.deploy.exported_model import ExportedModel, info_of
from allmlp.deploy.formats import format_of, load_any
from allmlp.deploy.int8 import Int8
from allmlp.deploy.onnx_graph import graph_module
from allmlp.deploy.options import ExportOptions
from allmlp.errors import UserError, plural
from allmlp.evaluation.metrics import Evaluation, check_logits, evaluate_source
from allmlp.evaluation.predictor import Predictor
from allmlp.evaluation.result_file import measurement
from allmlp.io import check_not_inputs, check_output_file, expand, fsync, staging_folder
from allmlp.models.inference import Inference
from allmlp.models.layers import Classifier, ImageClassifier, preprocessing_of
from allmlp.names import import_extra
from allmlp.options import make
from allmlp.runtime.device import torch_settings

# Largest logit difference, relative to the largest logit, explained by rounding. int8 is judged by
# accuracy.
LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1}
_RANDOM_IMAGES = 16  # for the comparison without data
_CALIBRATION_BATCH = 8
_ROUNDS, _LATENCIES = 5, 4  # single images per round


@dataclass(frozen=True)
class Parity:
    """Agreement between the logits of a model and of its exported file.

    Attributes:
        top1_agreement: fraction of images with the same top-1 class.
        accuracy: top-1 accuracy of model and file; None without labels.
    """

    images: str
    num_images: int
    largest_difference: float
    largest_logit: float
    top1_agreement: float
    accuracy: tuple[float, float] | None = None

    @property
    def relative(self) -> float:
        """Largest difference, relative to the largest logit."""
        return self.largest_difference / (self.largest_logit or 1.0)

    @property
    def drop(self) -> float:
        """Accuracy drop in percentage points; negative for a gain, 0 if unknown."""
        return 0.0 if self.accuracy is None else 100.0 * (self.accuracy[0] - self.accuracy[1])

    def failures(self, precision: str, max_accuracy_drop: float) -> list[str]:
        """Returns descriptions of the failed criteria."""
        found = []
        if not np.isfinite(self.largest_difference):
            found.append("the file computes logits that are not finite")
        limit = LARGEST_DIFFERENCE.get(precision)
        if limit is not None and self.relative > limit:
            differs = f"the largest difference is {self.relative:.2g} of the largest logit"
            found.append(f"{differs}, and {precision} may differ by {limit:g}")
        if self.drop > max_accuracy_drop + 1e-9:
            limits = f"and may fall by {max_accuracy_drop:g}"
            found.append(f"the accuracy fell by {self.drop:.2f} points, {limits}")
        return found


@dataclass(frozen=True)
class Speed:
    """Images per second in batches, and milliseconds for one image: medians over rounds."""

    images_per_second: float
    latency_ms: float


@dataclass
class ExportReport:
    """The exported files, and a comparison with the model.

    Attributes:
        path: the file; None if it failed and was not kept.
        files: file name -> size in bytes.
        num_threads, batch_size: settings of the speed measurement.
        speed: of model and file.
        failures: descriptions of the failed criteria.
        kept: layers of an int8 file kept in float32, most sensitive first.
        num_layers: number of dense layers; None except for int8.
        calibration: source, number of images and chosen range for int8; None otherwise.
        attempts: int8 files measured on the data: (layers kept, points lost).
    """

    path: str | None
    files: dict[str, int]
    format: str
    precision: str
    runtime: str
    image_size: tuple[int, int]
    uint8_input: bool
    num_threads: int
    batch_size: int
    parity: Parity
    speed: dict[str, Speed]
    failures: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    num_layers: int | None = None
    calibration: dict[str, Any] | None = None
    attempts: list[tuple[int, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the file meets all criteria."""
        return not self.failures

    def rows(self) -> list[tuple[str, str]]:
        """Returns the report as (name, value) pairs."""
        height, width = self.image_size
        shape = "uint8 (N, H, W, channels)" if self.uint8_input else "float32 (N, channels, H, W)"
        sizes = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in self.files.items())
        parity = self.parity
        difference = f"largest difference {parity.largest_difference:.2g}"
        rows = [
            ("file", sizes),
            ("format", f"{self.format}, {self.precision}, run by {self.runtime}"),
            ("input", f"{height}x{width} pixels, {shape}, any batch"),
            ("compared", f"{plural(parity.num_images, 'image')}: {parity.images}"),
            ("logits", f"{difference}, {parity.relative:.2g} of the largest logit"),
            ("agreement", f"{parity.top1_agreement:.2%} have the same top-1 class"),
        ]
        if parity.accuracy is not None:
            before, after = parity.accuracy
            moved = f"{0.0 - parity.drop:+.2f} points"
            rows.append(("accuracy", f"{before:.2%} original, {after:.2%} file: {moved}"))
        for name, speed in self.speed.items():
            value = (
                f"{name}: {speed.images_per_second:,.1f} images/s in batches of {self.batch_size}, "
                f"{speed.latency_ms:.3g} ms for one image (threads: at most {self.num_threads})"
            )
            rows.append(("speed", value))
        if self.calibration is not None:
            source = f"{self.calibration['num_images']:,} images of {self.calibration['source']}"
            num_int8 = (self.num_layers or 0) - len(self.kept)
            rows.append(("calibrated", source))
            rows.append(("int8", f"{num_int8} of {self.num_layers} dense layers"))
            rows += [("float32", name) for name in self.kept]
        rows += [("note", note) for note in self.notes]
        rows += [("failed", failure) for failure in self.failures]
        return rows

    def lines(self) -> list[str]:
        """Returns the report as lines for the console."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {value}" for name, value in rows]

    def markdown(self, title: str) -> str:
        """Returns the report as Markdown."""
        cells = [f"| {name} | {value.replace('|', '/')} |" for name, value in self.rows()]
        return "\n".join([f"# {title}", "", "| | |", "| --- | --- |", *cells, ""])


def export(
    model: ImageClassifier | str | Path,
    output: str | Path | ExportOptions | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
    **fields: Any,
) -> ExportReport:
    """Exports a model to a file that runs without this package, and validates the file.

    FILE.onnx.report.json and FILE.onnx.report.md are written next to FILE.onnx. A file that fails a
    criterion is not kept: in the report `passed` is False, `path` None, and `failures` say why.

    Args:
        model: a model or anything `load_model` accepts.
        output: the file to write; or all options as one object.
        log: called with progress messages.
        **fields: fields of `ExportOptions`; `data` and `calibration` may be open sources too.

    Raises:
        UserError: incompatible options, an output that exists or cannot be written, missing data,
            or a package that is not installed.
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
    format = format_of(path)
    if options.precision == "int8" and format.is_program:
        fix = "Export as onnx or openvino"
        raise UserError(f"{format.suffix} files have no int8", where="precision", fix=fix)
    inputs = [options.data, options.calibration]
    read = [
        file for name in inputs if name and name not in names.values() for file in read_from(name)
    ]
    for file in (*format.files(path), *_report_files(path)):
        check_output_file(file, overwrite=options.overwrite)
        check_not_inputs([file], read)
    for package, group in format.packages:
        import_extra(package, group)
    net = _loaded(model, options)
    if options.data is not None and "data" not in opened:
        opened["data"] = open_source(options.data)
    if options.calibration is not None and "calibration" not in opened:
        splits = ("train", "validation", "test")
        opened["calibration"] = open_source(options.calibration, labels="any", first_of=splits)
    cpu = torch.device("cpu")
    with staging_folder(path) as folder, torch_settings(cpu, "float32", options.num_threads):
        work = _Export(net, options, opened, folder / path.name, log)
        report = work.run()
        if report.passed:
            work.put_in_place(report)
    return report


def _loaded(model: ImageClassifier | str | Path, options: ExportOptions) -> ImageClassifier:
    net = load_any(model, options.image_size, options.resize_weights, **options.foreign)
    if not isinstance(net, ImageClassifier):
        raise UserError("this is an exported file already", where=net.source)
    if net is model:
        source, net = net.source, copy.deepcopy(net).cpu().float().eval()
        net.source = source
    if preprocessing_of(net).kind == "arrays" and options.uint8_input:
        what = "the model takes rows of arrays, which are not uint8 images"
        raise UserError(what, where="uint8_input", fix="Leave it out", code="arrays")
    if preprocessing_of(net).permutation != "none" and not options.uint8_input:
        what = "the model was trained on permuted pixels, whose order would not be in the file"
        raise UserError(what, where="uint8_input", fix="Add it: the order is then in the graph")
    return net


class _Export:
    """One export: model, options, and the file in the staging folder."""

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
        self.format = format_of(self.output)
        self.num_threads = options.num_threads or torch.get_num_threads()
        self.info = info_of(model, options.precision, uint8_input=options.uint8_input)
        self.original: Evaluation | None = None

    def run(self) -> ExportReport:
        """Writes the file to the staging folder and returns its report."""
        self.log("exporting")
        net, example = graph_module(self.model, uint8_input=self.info.uint8_input)
        if "data" in self.sources:
            self.original = self.measure(self.model)
        made = self.format.make(net, example, self.info.precision)
        if self.info.precision == "int8":
            return self.run_int8(made)
        file = self.write(made)
        return self.report(file, self.compare(file))

    def run_int8(self, graph: Any) -> ExportReport:
        """Keeps more and more sensitive layers in float32 until the accuracy is preserved."""
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
            attempts.append((count, parity.drop))
            if not parity.failures("int8", limit) or count >= most:
                break
            count = min(max(1, 2 * count), most)
        report = self.report(file, parity)
        report.num_layers, report.attempts, report.kept = len(work.layers), attempts, kept
        report.calibration = {
            "source": calibration.name,
            "num_images": work.num_images,
            "quantile": work.quantile,
            "sensitivity": {layer: work.sensitivity[node] for node, layer in work.ranked} or None,
        }
        if calibration.name == self.sources["data"].name:
            report.notes.append("calibrated on the data that it was measured on: use other images")
        if not report.passed:
            in_float32 = f"{count} of {len(work.layers)} layers in float32"
            report.failures.append(f"this is with {in_float32}")
        return report

    def calibration_batches(self) -> Iterator[np.ndarray]:
        """Yields calibration images, evenly spread over the source, as graph inputs."""
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
        """Writes the file and opens it with its runtime."""
        with self.writing():
            self.format.write(made, self.info, self.path)
        return self.format.open(self.path, self.num_threads)

    def measure(self, model: Classifier) -> Evaluation:
        """Evaluates a model on the data."""
        data = self.sources["data"]
        predictor = Predictor(model, num_workers=self.options.num_workers)
        result = evaluate_source(predictor, data, allow_missing_classes=True)
        check_logits(result, data)
        return result

    def compare(self, file: ExportedModel) -> Parity:
        """Compares file and model on the data or on random pixels."""
        if self.original is not None:
            measured = self.measure(file)
            accuracy = (self.original.main_metric, measured.main_metric)
            return compare(self.original.logits, measured.logits, self.original.data, accuracy)
        config, own = self.model.config, preprocessing_of(self.model)
        random = torch.Generator().manual_seed(0)
        shape = (_RANDOM_IMAGES, config.in_channels, *config.image_size)
        if own.kind == "arrays":
            rows = torch.randn(shape, generator=random)
            return compare(_logits_of(self.model, rows), _logits_of(file, rows), "random numbers")
        pixels = torch.randint(0, 256, shape, generator=random).byte()
        exact = _logits_of(self.model, normalize(pixels, own))
        return compare(exact, _logits_of(file, pixels), "random pixels")

    def report(self, file: ExportedModel, parity: Parity) -> ExportReport:
        """Times the file and returns its report."""
        options, info, config = self.options, self.info, self.model.config
        self.log("timing")
        images = torch.zeros(options.batch_size, config.in_channels, *config.image_size)
        failures = parity.failures(info.precision, options.max_accuracy_drop)
        notes = [note for precisions, note in self.format.notes if info.precision in precisions]
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
            _measure_speed(self.model, file, images),
            failures,
            notes=notes,
        )

    def put_in_place(self, report: ExportReport) -> None:
        """Writes the reports and renames all files.

        Old files are removed first, starting with the one a runtime opens: a kill in between never
        leaves a mix of old and new files, or a report on another file.
        """
        title = f"{self.output.name}, exported from {self.model.source or 'a model'}"
        values = {"export": asdict(report) | {"passed": report.passed}}
        as_json = json.dumps(measurement("export", self.model, values), indent=2) + "\n"
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
        """Turns disk errors into a UserError."""
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self.output.parent).free
            what = f"the file cannot be written: {error.strerror}; {free:,} bytes are free there"
            fix = "Free some space there, or give another output"
            raise UserError(what, where=self.output, fix=fix, code="disk") from error


def _report_files(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.report.json"), path.with_name(f"{path.name}.report.md")


def compare(
    original: np.ndarray, file: np.ndarray, images: str, accuracy: tuple[float, float] | None = None
) -> Parity:
    """Compares the logits (N, K) of a model and of its file."""
    difference = float(np.abs(original - file).max())
    same = float((original.argmax(axis=1) == file.argmax(axis=1)).mean())
    largest = float(np.abs(original).max())
    return Parity(images, len(original), difference, largest, same, accuracy)


@torch.inference_mode()
def _logits_of(model: Classifier, images: Tensor) -> np.ndarray:
    """Returns the logits (N, K), computed in batches of 1, 3, 3, 3, ..."""
    parts = [model(images[:1])]
    parts += [model(images[start : start + 3]) for start in range(1, len(images), 3)]
    return torch.cat(parts).float().numpy()


@torch.inference_mode()
def _measure_speed(model: ImageClassifier, file: ExportedModel, images: Tensor) -> dict[str, Speed]:
    """Times model and file in turn, on the CPU in float32.

    Every round times a batch and a few single images of each.
    """
    runs: Mapping[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "original, torch float32": (Inference(model).logits, images),
        "file": (file, images.byte() if file.info.uint8_input else images),
    }
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    for count in range(_ROUNDS + 1):  # the first is for warm-up
        for name, (run, batch) in runs.items():
            for at, inputs in enumerate((batch, *[batch[:1]] * _LATENCIES)):
                started = time.perf_counter()
                run(inputs)
                if count:
                    seconds[name][min(at, 1)].append(time.perf_counter() - started)
    medians = {name: map(statistics.median, times) for name, times in seconds.items()}
    return {
        name: Speed(len(images) / max(batch, 1e-9), 1000.0 * single)
        for name, (batch, single) in medians.items()
    }


def command(model: str, options: ExportOptions) -> ExportReport:
    """Exports with progress on standard error."""
    return export(model, options, log=Reporter(stderr=True).say)


def show(report: ExportReport, options: ExportOptions) -> int:
    """Prints the report; returns the exit code."""
    reporter = Reporter()
    for line in report.lines():
        reporter.say(line)
    end = (
        f"written  {options.output}"
        if report.passed
        else "removed  the file failed and was not kept"
    )
    reporter.say(end)
    return 0 if report.passed else 1
