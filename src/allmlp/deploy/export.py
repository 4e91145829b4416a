"""A model -> a file that runs without this package, and a report of what it is worth.

    model -> graph (onnx_graph) -> int8 where it is wanted (quantize, int8) -> file (exported_files)
                 file, run by its own runtime (runner) -> beside the model (export_report)

The file lies in a folder of its own until it has passed; only then it takes the place that it was
meant for. One that fails is never there.
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
from typing import Any

import numpy as np
import torch

from allmlp.data.loader import evaluation_batches
from allmlp.data.source import Source, subset
from allmlp.data.sources import open_source
from allmlp.data.transforms import normalize
from allmlp.deploy.export_report import (
    ExportReport,
    Parity,
    compare,
    failures,
    logits_of,
    measure_speed,
)
from allmlp.deploy.export_request import check_request, reports_of
from allmlp.deploy.exported_files import (
    files_of,
    open_written,
    write_graph,
    write_program,
)
from allmlp.deploy.int8 import Calibration, calibrate
from allmlp.deploy.metadata import Description, description_of
from allmlp.deploy.onnx_graph import graph_module, halved, inputs_of, to_onnx
from allmlp.deploy.runner import ExportedModel
from allmlp.errors import UserError
from allmlp.evaluation.accuracy import check_logits, evaluate_source
from allmlp.evaluation.metrics import Evaluation
from allmlp.evaluation.predictor import Predictor
from allmlp.io import staging_folder
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.runtime.device import torch_settings
from allmlp.weights.load import load_model

MAX_ACCURACY_DROP = 0.5  # points
CALIBRATION_IMAGES = 1000
_RANDOM_IMAGES = 16  # to compare on where no data is given
_CALIBRATION_BATCH = 8

Tell = Callable[[str], None]


@dataclass(frozen=True)
class _Job:
    """What is asked for, checked."""

    model: ImageClassifier
    output: Path
    format: str
    about: Description
    calibration: Source | None
    data: Source | None
    max_accuracy_drop: float
    batch_size: int
    num_threads: int
    num_workers: int | None
    tell: Tell


def export(
    model: ImageClassifier | str | Path,
    output: str | Path,
    *,
    format: str | None = None,
    precision: str = "float32",
    image_size: int | tuple[int, int] | None = None,
    uint8_input: bool = False,
    calibration: str | Source | None = None,
    calibration_images: int | None = None,
    data: str | Source | None = None,
    max_accuracy_drop: float | None = None,
    overwrite: bool = False,
    batch_size: int = 8,
    num_threads: int | None = None,
    num_workers: int | None = None,
    tell: Tell = lambda line: None,
) -> ExportReport:
    """Writes a model as a file that its runtime runs without this package, if it is good enough.

    Beside FILE.onnx lie FILE.onnx.report.json and FILE.onnx.report.md then. A file that fails a
    criterion is not left behind: `passed` of the report is False, `path` None, `failures` say why.

    Args:
        model: or anything that `load_model` takes.
        output: the file: .onnx, .xml (OpenVINO; its weights come to lie beside it, in a .bin of the
            same name) or .pt2 (torch.export).
        format: "onnx", "openvino" or "torch-export"; None goes by the output's ending.
        precision: "float32", "bfloat16" or "int8".
        image_size: another than the model's own, as for `load_model`.
        uint8_input: the graph takes uint8 (N, H, W, channels) and normalises inside.
        calibration: images by which the ranges of int8 are chosen, labelled or not; of a source
            without :SPLIT the training images. Not those of `data`.
        calibration_images: at most so many of them, spread evenly; None is 1,000.
        data: labelled images on which model and file are measured; int8 must have them.
        max_accuracy_drop: points of top-1 that the file may lose on `data`; None is 0.5.
        overwrite: replace what is there.
        batch_size: images a batch where the speed is measured.
        num_threads: of the processor; None is torch's number, and one for a small batch of torch's.
        num_workers: processes that decode images; None chooses.
        tell: is told what is done next.

    Raises:
        UserError: unknown words, settings that do not go together or have no effect, an output that
            cannot be written or is there, no such data, or a package that is not installed.
    """
    path, chosen = check_request(
        output,
        format=format,
        precision=precision,
        uint8_input=uint8_input,
        calibration=calibration,
        calibration_images=calibration_images,
        data=data,
        max_accuracy_drop=max_accuracy_drop,
        overwrite=overwrite,
        batch_size=batch_size,
        num_threads=num_threads,
    )
    if isinstance(model, ImageClassifier):
        if image_size is not None:
            what = f"image_size={image_size} has no effect on a model that is there already"
            raise UserError(what, fix="Give load_model the size, or export what load_model takes")
        net = copy.deepcopy(model).cpu().float().eval()
        net.source = model.source
    else:
        net = load_model(model, image_size)
    if isinstance(net, ExportedModel):
        raise UserError("this is an exported file already", where=net.source)
    if preprocessing_of(net).permutation != "none" and not uint8_input:
        what = "the model was trained on permuted pixels, whose order would not be in the file"
        raise UserError(what, where="--uint8-input", fix="Add it: the order comes into the graph")
    chosen_threads, num_threads = num_threads, num_threads or torch.get_num_threads()
    job = _Job(
        net,
        path,
        chosen,
        description_of(net, precision, uint8_input=uint8_input),
        None
        if calibration is None
        else _spread(_for_calibration(calibration), calibration_images or CALIBRATION_IMAGES),
        None if data is None else _opened(data),
        MAX_ACCURACY_DROP if max_accuracy_drop is None else max_accuracy_drop,
        batch_size,
        num_threads,
        num_workers,
        tell,
    )
    with (
        staging_folder(path) as folder,
        torch_settings(torch.device("cpu"), "float32", chosen_threads),
    ):
        aside = folder / path.name
        report = _make(job, aside)
        if report.passed:
            with _writing(job):
                _put_in_place(job, report, aside)
    return report


@contextlib.contextmanager
def _writing(job: _Job) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(job.output.parent).free
        what = f"the file cannot be written: {error.strerror}; {free:,} bytes are free there"
        fix = "Make room there, or give another output"
        raise UserError(what, where=job.output, fix=fix) from error


def _opened(source: str | Path | Source) -> Source:
    return open_source(str(source)) if isinstance(source, str | Path) else source


def _for_calibration(source: str | Source) -> Source:
    """The source; of one with several splits, where none is named, the training images."""
    if not isinstance(source, str):
        return source
    return open_source(source, labels="any", first_of=("train", "validation", "test"))


def _spread(source: Source, most: int) -> Source:
    """At most so many images of a source, evenly spread over it."""
    if len(source) <= most:
        return source
    chosen = np.linspace(0, len(source) - 1, most).round().astype(np.int64)
    return subset(source, chosen, source.name)


def _make(job: _Job, aside: Path) -> ExportReport:
    """Writes the file in the folder aside, and returns the report of the best that there is."""
    job.tell("exporting")
    net, example = graph_module(job.model, uint8_input=job.about.uint8_input)
    original = None if job.data is None else _measure(job, job.model)
    if job.format == "torch-export":
        with _writing(job):
            write_program(net, example, job.about, aside)
        return _report(job, aside, job.about, original)
    graph = to_onnx(net, example)
    if job.about.precision != "int8":
        made = halved(graph) if job.about.precision == "bfloat16" else graph
        with _writing(job):
            write_graph(made, job.about, aside)
        return _report(job, aside, job.about, original)
    assert original is not None
    job.tell("calibrating")
    found = calibrate(graph, lambda: _inputs(job), job.num_threads, job.model.config.summary())
    return _make_int8(job, found, aside, original)


def _make_int8(job: _Job, found: Calibration, aside: Path, original: Evaluation) -> ExportReport:
    """Keeps ever more of the sensitive layers in float32, until the accuracy is kept."""
    count, attempts = 0, []
    while True:
        graph, kept = found.file(count)
        about = replace(job.about, kept=tuple(kept))
        with _writing(job):
            write_graph(graph, about, aside)
        job.tell(f"measuring int8, {count} layers in float32")
        file = open_written(aside, about, job.num_threads)
        parity = _parity(job, file, original)
        assert parity.drop is not None
        attempts.append((count, parity.drop))
        most = len(found.products) // 2
        if not failures(parity, "int8", job.max_accuracy_drop) or count >= most:
            break
        count = min(max(1, 2 * count), most)
    report = _report(job, aside, about, original, parity)
    report.num_layers, report.attempts, report.kept = len(found.products), attempts, kept
    assert job.calibration is not None
    report.calibration = {
        "source": job.calibration.name,
        "num_images": found.num_images,
        "quantile": found.quantile,
        "sensitivity": {each.layer: found.errors[each.node] for each in found.most_sensitive()}
        if found.errors
        else None,
    }
    if job.data is not None and job.calibration.name == job.data.name:
        report.notes.append("calibrated on the data that it was measured on: choose other images")
    if not report.passed:
        report.failures.append(f"that is with {count} of {len(found.products)} layers in float32")
    return report


def _inputs(job: _Job) -> Iterator[np.ndarray]:
    """The calibration images, as inputs of the graph."""
    assert job.calibration is not None
    own = preprocessing_of(job.model)
    for batch in evaluation_batches(
        job.calibration, own, batch_size=_CALIBRATION_BATCH, num_workers=job.num_workers
    ):
        if len(batch.labels):
            yield inputs_of(batch.images, own, uint8_input=job.about.uint8_input)


def _measure(job: _Job, model: ImageClassifier) -> Evaluation:
    assert job.data is not None
    result = evaluate_source(
        Predictor(model, num_workers=job.num_workers), job.data, allow_missing_classes=True
    )
    check_logits(result, job.data)
    return result


def _parity(job: _Job, file: ExportedModel, original: Evaluation | None) -> Parity:
    if original is not None:
        measured = _measure(job, file)
        accuracy = (original.top1, measured.top1)
        return compare(original.scores, measured.scores, original.data, accuracy)
    config = job.model.config
    random = torch.Generator().manual_seed(0)
    shape = (_RANDOM_IMAGES, config.in_channels, *config.image_size)
    pixels = torch.randint(0, 256, shape, generator=random).byte()
    exact = logits_of(job.model, normalize(pixels, preprocessing_of(job.model)))
    return compare(exact, logits_of(file, pixels), "random pixels")


def _report(
    job: _Job,
    aside: Path,
    about: Description,
    original: Evaluation | None,
    parity: Parity | None = None,
) -> ExportReport:
    """Returns the report of a file that was written aside."""
    file = open_written(aside, about, job.num_threads)
    parity = parity or _parity(job, file, original)
    job.tell("timing")
    config = job.model.config
    images = torch.zeros(job.batch_size, config.in_channels, *config.image_size)
    report = ExportReport(
        str(job.output),
        {each.name: each.stat().st_size for each in files_of(aside)},
        job.format,
        about.precision,
        file.runtime,
        config.image_size,
        about.uint8_input,
        job.num_threads,
        job.batch_size,
        parity,
        measure_speed({"original, torch float32": job.model, "file": file}, images),
        failures(parity, about.precision, job.max_accuracy_drop),
        notes=_notes(job),
    )
    report.path = report.path if report.passed else None
    return report


def _notes(job: _Job) -> list[str]:
    notes = []
    if job.model.class_names is None:
        notes.append("the model carries no class names, and neither does the file")
    if job.data is None:
        notes.append("no accuracy was measured: --data SOURCE measures it")
    if job.format == "openvino":
        notes.append("OpenVINO reads two files, the .xml and the .bin beside it: move both")
        if job.about.precision != "bfloat16":
            notes.append(
                "set INFERENCE_PRECISION_HINT to f32, as here, or OpenVINO computes in bfloat16 "
                "where the processor has it"
            )
    if job.format == "onnx" and job.about.precision == "bfloat16":
        notes.append(
            "weights are stored in bfloat16; ONNX Runtime multiplies in float32 on a processor, so "
            "it is half as large and no faster"
        )
    return notes


def _put_in_place(job: _Job, report: ExportReport, aside: Path) -> None:
    """Renames the files, and writes the reports beside them.

    What was there before goes first, the file that a runtime is given before all: a kill in between
    leaves no pair of old and new, and no report of another file.
    """
    values: dict[str, Any] = report.to_json(job.model)
    title = f"{job.output.name}, exported from {job.model.source or 'a model'}"
    as_json, as_markdown = reports_of(aside)
    as_json.write_bytes((json.dumps(values, indent=2) + "\n").encode(errors="surrogateescape"))
    as_markdown.write_bytes(report.markdown(title).encode(errors="surrogateescape"))
    made = [*files_of(aside), as_json, as_markdown]
    for each in made:
        with each.open("rb+") as file:
            os.fsync(file.fileno())
    if len(files_of(job.output)) > 1:
        job.output.unlink(missing_ok=True)
    for each in reports_of(job.output):
        each.unlink(missing_ok=True)
    for each in made:
        os.replace(each, job.output.with_name(each.name))
