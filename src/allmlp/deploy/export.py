"""Export: a file that runs without this package, moved into place once it agrees with the model."""

from __future__ import annotations

import copy
import json
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import benchmark

from allmlp.console import Reporter
from allmlp.data.loader import evaluation_batches
from allmlp.data.source import Source, subset
from allmlp.data.sources import open_source, read_from
from allmlp.data.transforms import normalize
from allmlp.decision import Decision
from allmlp.deploy.formats import ExportedModel, ExportInfo, Format, format_of, info_of, load_any
from allmlp.deploy.int8 import Int8
from allmlp.deploy.onnx_graph import graph_module
from allmlp.deploy.options import ExportOptions
from allmlp.errors import UserError, disk_errors, plural
from allmlp.evaluation.metrics import Evaluation, check_logits, evaluate_source
from allmlp.evaluation.predictor import Predictor
from allmlp.evaluation.result_file import measurement
from allmlp.io import (
    check_not_inputs,
    check_output_file,
    check_output_folder,
    expand,
    fsync,
    staging_folder,
)
from allmlp.models.inference import Inference
from allmlp.models.layers import Classifier, ImageClassifier, check_trained, preprocessing_of
from allmlp.names import import_extra
from allmlp.options import make
from allmlp.runtime.device import torch_settings
from allmlp.training.own_images import open_measured
from allmlp.weights.load import weights_fingerprint

# Largest logit difference, relative to the largest logit, explained by rounding. int8 is judged by
# accuracy.
LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1}
_RANDOM_IMAGES = 16  # for the comparison without data
_BATCH = 8  # images at a time, for calibration and speed
_SECONDS = 0.2  # at least, of each measurement of speed
Speed = dict[str, float]  # images_per_second in batches, latency_ms of one image; medians


@dataclass(frozen=True)
class Parity:
    """Agreement between the answers of a model and of its exported file."""

    images: str
    num_images: int
    largest_difference: float
    largest_logit: float
    top1_agreement: float  # fraction of images with the same top-1 class, or the same labels
    accuracy: tuple[float, float] | None = None  # `metric` of model and file, with labels
    metric: str = "accuracy"  # top-1, or "mAP" with several labels per image

    @property
    def relative(self) -> float:
        """Largest difference, relative to the largest logit."""
        return self.largest_difference / (self.largest_logit or 1.0)

    @property
    def drop(self) -> float:
        """Accuracy drop in percentage points; negative for a gain, 0 if unknown."""
        return 0.0 if self.accuracy is None else 100.0 * (self.accuracy[0] - self.accuracy[1])

    def failures(self, precision: str, max_accuracy_drop: float) -> list[str]:
        limit = LARGEST_DIFFERENCE.get(precision, np.inf)
        differs = f"the largest difference is {self.relative:.2g} of the largest logit"
        fell = f"the {self.metric} fell by {self.drop:.2f} points"
        criteria = {
            "the file computes logits that are not finite": np.isfinite(self.largest_difference),
            f"{differs}, and {precision} may differ by {limit:g}": not self.relative > limit,
            f"{fell}, and may fall by {max_accuracy_drop:g}": self.drop <= max_accuracy_drop + 1e-9,
        }
        return [what for what, holds in criteria.items() if not holds]


@dataclass(kw_only=True)
class ExportReport:
    """The exported files, and a comparison with the model.

    Attributes:
        path: the file; None if it failed and was not kept.
        files: file name -> size in bytes.
        speed: of model and file, with `num_threads`.
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
        return not self.failures

    def lines(self) -> list[str]:
        return [f"{name:<10}  {value}" for name, value in self._rows()]

    def _rows(self) -> Iterator[tuple[str, str]]:
        height, width = self.image_size
        shape = "uint8 (N, H, W, channels)" if self.uint8_input else "float32 (N, channels, H, W)"
        total = sum(self.files.values()) / 2**20
        parity, is_multi = self.parity, self.parity.metric != "accuracy"
        difference = f"largest difference {parity.largest_difference:.2g}"
        yield "file", f"{', '.join(self.files)} ({total:,.1f} MiB)"
        yield "format", f"{self.format}, {self.precision}, run by {self.runtime}"
        yield "input", f"{height}x{width} pixels, {shape}, any batch"
        yield "compared", f"{plural(parity.num_images, 'image')}: {parity.images}"
        yield "logits", f"{difference}, {parity.relative:.2g} of the largest logit"
        same = "labels" if is_multi else "top-1 class"
        yield "agreement", f"{parity.top1_agreement:.2%} have the same {same}"
        if parity.accuracy is not None:
            before, after = parity.accuracy
            moved = f"{0.0 - parity.drop:+.2f} points"
            yield parity.metric, f"{before:.2%} original, {after:.2%} file: {moved}"
        for name, speed in self.speed.items():
            batches = f"{speed['images_per_second']:,.1f} images/s in batches of {_BATCH}"
            single = f"{speed['latency_ms']:.3g} ms for one image"
            yield "speed", f"{name}: {batches}, {single} (threads: at most {self.num_threads})"
        if self.calibration is not None:
            num_int8 = (self.num_layers or 0) - len(self.kept)
            source = self.calibration["source"]
            yield "calibrated", f"{self.calibration['num_images']:,} images of {source}"
            yield "int8", f"{num_int8} of {self.num_layers} dense layers"
        texts = {"float32": self.kept, "note": self.notes, "failed": self.failures}
        yield from ((title, text) for title, lines in texts.items() for text in lines)


def export(
    model: ImageClassifier | str | Path,
    output: str | Path | ExportOptions | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
    **fields: Any,
) -> ExportReport:
    """Exports a model to a file that runs without this package, and validates the file.

    FILE.onnx.report.json is written next to FILE.onnx. A file that fails a criterion is not kept:
    in the report `passed` is False, `path` None, and `failures` say why.

    Args:
        model: a model or anything `load_model` accepts.
        output: the file to write; or all options as one object.
        log: called with progress messages.
        **fields: fields of `ExportOptions`; `data` and `calibration` may be open sources too.

    Raises:
        UserError: incompatible options, an output that exists or cannot be written, missing data,
            or a package that is not installed.
    """
    sources = {name: value for name, value in fields.items() if isinstance(value, Source)}
    fields |= {name: source.name for name, source in sources.items()}
    options = make(ExportOptions, output, fields, "output")
    path, format = expand(options.output), format_of(options.output)
    path = path if path.name else path.resolve()  # "."
    is_folder = not format.suffix
    if is_folder:  # of a page, which hands over pixels
        check_output_folder(path)
        options = replace(options, uint8_input=True)
    if options.precision == "int8" and format.is_program:
        fix = "Export as onnx or openvino"
        raise UserError(f"{format.suffix} files have no int8", where="precision", fix=fix)
    to_open = {"data": options.data, "calibration": options.calibration}
    to_open = {name: given for name, given in to_open.items() if given and name not in sources}
    read = [file for given in to_open.values() for file in read_from(given)]
    if isinstance(model, str | Path) and expand(model).is_file():
        read.append(str(expand(model)))
    outputs = [*format.files(path), _report_of(path)]
    for file in outputs:
        check_output_file(file, overwrite=options.overwrite, parents=is_folder)
    check_not_inputs(outputs, read)
    for package, group in format.packages:
        import_extra(package, group)
    format.prepare()
    net = load_any(model, **options.loading)
    if not isinstance(net, ImageClassifier):
        raise UserError("this is an exported file already", where=net.source)
    made_from = weights_fingerprint(str(model)) if isinstance(model, str | Path) else None
    if net.class_names:
        check_trained(net)
    if net is model:
        net = copy.deepcopy(net).cpu().float().eval()
    if preprocessing_of(net).kind == "arrays" and options.uint8_input:
        what = "the model takes rows of arrays, which are not uint8 images"
        raise UserError(what, where="uint8_input", fix="Use onnx, without it", code="arrays")
    if preprocessing_of(net).permutation != "none" and not options.uint8_input:
        what = "the model was trained on permuted pixels, whose order would not be in the file"
        raise UserError(what, where="uint8_input", fix="Add it: the order is then in the graph")
    if "data" in to_open:  # which may be the images that the run held out
        sources["data"] = open_measured(net.source, to_open["data"], count=False).source
    if "calibration" in to_open:
        splits = ("train", "validation", "test")
        sources["calibration"] = open_source(to_open["calibration"], labels="any", first_of=splits)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(path) as folder, torch_settings(torch.device("cpu"), "float32", None):
        staged = folder / path.name
        report = build(net, options, sources, staged, log, made_from)
        if report.passed:
            _put_in_place(report, net, format, staged, path)
    return report


def build(
    model: ImageClassifier,
    options: ExportOptions,
    sources: dict[str, Source],
    path: Path,
    log: Callable[[str], None],
    made_from: str | None,
) -> ExportReport:
    output, format = expand(options.output), format_of(options.output)
    num_threads = torch.get_num_threads()
    data, calibration = sources.get("data"), sources.get("calibration")
    info = info_of(model, options.precision, made_from, uint8_input=options.uint8_input)
    log("exporting")
    net, example = graph_module(model, uint8_input=info.uint8_input)
    original = None if data is None else _measure(model, data, options)
    made = format.make(net, example, info.precision)

    def written(graph: Any, info: ExportInfo) -> tuple[ExportedModel, Parity]:
        with disk_errors("the file cannot be written", output):
            format.write(graph, info, path)
        file = format.open(path, num_threads)
        if data is None or original is None:
            inputs, what = _random_inputs(model)
            numbers = inputs if what == "random numbers" else normalize(inputs, info.preprocessing)
            exact = _logits_of(model, numbers)
            return file, compare(exact, _logits_of(file, inputs), what, model.decision)
        found = _measure(file, data, options)
        parity = compare(original.logits, found.logits, original.data, model.decision)
        metric = original.main.title if original.is_multi_label else "accuracy"
        both = original.main_metric, found.main_metric
        return file, replace(parity, accuracy=both, metric=metric)

    if data is not None and calibration is not None and info.precision == "int8":
        log("calibrating")
        batches = _calibration_batches(calibration, model, info, options)
        work = Int8(made, batches, path.parent, num_threads)
        file, parity, about = _int8_file(work, info, written, options, log)
        about["calibration"]["source"] = calibration.name
    else:
        (file, parity), about = written(made, info), {}
    failures = parity.failures(info.precision, options.max_accuracy_drop)
    notes = []
    if info.class_names is None:
        notes.append("the model has no class names, and neither does the file")
    if data is None:
        notes.append("no accuracy was measured: give labelled images as data")
    if about and data is not None and about["calibration"]["source"] == data.name:
        notes.append("calibrated on the data that it was measured on: use other images")
    if about and failures:
        layers = f"{len(about['kept'])} of {about['num_layers']} layers"
        failures.append(f"this is with {layers} in float32")
    log("timing")
    images = torch.zeros(_BATCH, model.config.in_channels, *model.config.image_size)
    return ExportReport(
        path=None if failures else str(output),
        files={part.name: part.stat().st_size for part in format.files(path)},
        format=format.name,
        precision=info.precision,
        runtime=file.runtime,
        image_size=model.config.image_size,
        uint8_input=info.uint8_input,
        num_threads=num_threads,
        parity=parity,
        speed=_measure_speed(model, file, images),
        failures=failures,
        notes=notes,
        **about,
    )


def _int8_file(
    work: Int8,
    info: ExportInfo,
    written: Callable[[Any, ExportInfo], tuple[ExportedModel, Parity]],
    options: ExportOptions,
    log: Callable[[str], None],
) -> tuple[ExportedModel, Parity, dict[str, Any]]:
    """Keeps more and more sensitive layers in float32 until the accuracy is preserved."""
    count, most, attempts = 0, len(work.layers) // 2, []
    while True:
        graph, kept = work.quantized(count)
        log(f"measuring int8, {count} layers in float32")
        file, parity = written(graph, replace(info, float32_layers=tuple(kept)))
        attempts.append((count, parity.drop))
        if count >= most or not parity.failures("int8", options.max_accuracy_drop):
            break
        count = min(max(1, 2 * count), most)
    sensitivity = {layer: error for (_, layer), error in work.sensitivity.items()} or None
    about = {"num_images": work.num_images, "quantile": work.quantile, "sensitivity": sensitivity}
    found = {"num_layers": len(work.layers), "attempts": attempts, "kept": kept}
    return file, parity, {**found, "calibration": about}


def _calibration_batches(
    source: Source, model: ImageClassifier, info: ExportInfo, options: ExportOptions
) -> Iterator[np.ndarray]:
    """Yields images, evenly spread over the source, as graph inputs."""
    number, workers = min(len(source), options.calibration_images), options.num_workers
    chosen = np.linspace(0, len(source) - 1, number).round().astype(np.int64)
    source = subset(source, chosen, source.name)
    for batch in evaluation_batches(
        source, preprocessing_of(model), batch_size=_BATCH, num_workers=workers
    ):
        if len(batch.labels):
            yield info.inputs(batch.images)


def _measure(model: Classifier, data: Source, options: ExportOptions) -> Evaluation:
    predictor = Predictor(model, num_workers=options.num_workers)
    result = evaluate_source(predictor, data, allow_missing_classes=True, keep_logits=True)
    check_logits(result, data)
    return result


def _random_inputs(model: ImageClassifier) -> tuple[Tensor, str]:
    random = torch.Generator().manual_seed(0)
    shape = (_RANDOM_IMAGES, model.config.in_channels, *model.config.image_size)
    if preprocessing_of(model).kind == "arrays":
        return torch.randn(shape, generator=random), "random numbers"
    return torch.randint(0, 256, shape, generator=random).byte(), "random pixels"


@torch.inference_mode()
def _logits_of(model: Classifier, images: Tensor) -> np.ndarray:
    """Returns the logits (N, K), computed in batches of 1, 3, 3, 3, ..."""
    parts = [model(part) for part in (images[:1], *images[1:].split(3))]
    return torch.cat(parts).float().numpy()


def compare(exact: np.ndarray, found: np.ndarray, images: str, decision: Decision) -> Parity:
    def answers(logits: np.ndarray) -> np.ndarray:
        if decision.labels == "single":
            return logits.argmax(axis=1)[:, None]
        return decision.answers(decision.probabilities(torch.from_numpy(logits))).numpy()

    difference = float(np.abs(exact - found).max())
    same = float((answers(exact) == answers(found)).all(axis=1).mean())
    return Parity(images, len(exact), difference, float(np.abs(exact).max()), same)


@torch.inference_mode()
def _measure_speed(model: ImageClassifier, file: ExportedModel, images: Tensor) -> dict[str, Speed]:
    def seconds(run: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
        names, threads = {"run": run, "inputs": inputs}, torch.get_num_threads()
        timer = benchmark.Timer("run(inputs)", globals=names, num_threads=threads)
        return timer.blocked_autorange(min_run_time=_SECONDS).median

    def speed(run: Callable[[Tensor], Tensor], inputs: Tensor) -> Speed:
        rate, latency = len(inputs) / seconds(run, inputs), 1000.0 * seconds(run, inputs[:1])
        return {"images_per_second": rate, "latency_ms": latency}

    pixels = images.byte() if file.info.uint8_input else images
    exact = speed(Inference(model).logits, images)
    return {"original, torch float32": exact, "file": speed(file, pixels)}


def _report_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.report.json")


def _put_in_place(
    report: ExportReport, model: ImageClassifier, format: Format, staged: Path, output: Path
) -> None:
    """Writes the report and renames all files.

    A kill never leaves a mix of old and new files: the old one that a runtime opens goes first.
    """
    values = {"export": asdict(report) | {"passed": report.passed}}
    text = json.dumps(measurement("export", model, values), indent=2) + "\n"
    new, old = [[*format.files(path), _report_of(path)] for path in (staged, output)]
    with disk_errors("the file cannot be written", output):
        new[-1].write_bytes(text.encode(errors="surrogateescape"))
        for file in new:
            fsync(file)
        if len(new) > 2:
            old[-2].unlink(missing_ok=True)
        old[-1].unlink(missing_ok=True)
        old[0].parent.mkdir(exist_ok=True)
        for written, file in zip(new, old, strict=True):
            os.replace(written, file)


def command(model: str, options: ExportOptions) -> ExportReport:
    return export(model, options, log=Reporter(stderr=True).say)


def show(report: ExportReport, options: ExportOptions) -> int:
    reporter = Reporter()
    failed = "failed   the file did not pass and was deleted"
    for line in (*report.lines(), f"written  {options.output}" if report.passed else failed):
        reporter.say(line)
    if report.passed and report.format == "web":
        where = shlex.quote(str(options.output))
        reporter.say(f"see it   python3 -m http.server --directory {where}: http://localhost:8000")
    return 0 if report.passed else 1
