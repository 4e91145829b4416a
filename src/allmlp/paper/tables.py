"""The paper's Tables 1, 2 and 3 with what was measured here beside them: Markdown and HTML.

The paper's values come from `published`, ours from files that our commands wrote. They never share
a table or a panel of a figure. An accuracy stands in an ImageNet column only if it is of all 50,000
validation images; a mean only with a mark if tasks are missing.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from allmlp.console import Reporter
from allmlp.errors import UserError, plural
from allmlp.evaluation.imagenet_real import IMAGES
from allmlp.evaluation.result_file import read_measurement
from allmlp.io import atomic_write, check_not_inputs, check_output_folder, expand, parse_json
from allmlp.models.catalog import architecture_name, config_from_json, config_to_json, create_model
from allmlp.models.layers import count_parameters
from allmlp.names import NAME, own_entry
from allmlp.options import Options, make
from allmlp.paper import figures, published
from allmlp.training.run_folder import read_metrics, read_results
from allmlp.weights.checkpoints import find_checkpoint

REAL_IMAGES = 46_837  # that have a ReaL label
_SUITES = {"avg5": ("Avg 5", 5), "transfer": ("Avg 5", 5), "vtab": ("VTAB-1k", 19)}
_STUDIES = {"data-scale", "permutation", "ablations", *_SUITES}
_KINDS = {"run", "evaluation", "few-shot", "throughput", *_STUDIES}
_OF_RUN = {"best", "test", "validation", "checkpoints", "plots", "tensorboard"}
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)
_SCALE, _OTHER = "Figure 2, right: the number of training images", "Accuracy on other data"
_TEXTS = {
    _SCALE: "The paper's runs see fractions of JFT-300M for these epochs: "
    + ", ".join(f"{100 * at:g} %: {epochs}" for at, epochs in published.DATA_SCALE.items())
    + "; its figure prints no numbers.",
    _OTHER: "These are not accuracies on the 50,000 validation images of ImageNet, and stand in no "
    "column of the paper's.",
    "Training cost": "The wall time of each run, with reading and evaluation, times its processes.",
    "Few-shot accuracy": "Linear few-shot top-1 in per cent, mean and deviation over the draws.",
}
Cells = dict[str, str | None]  # column -> text; None is a dash


@dataclass(frozen=True, kw_only=True)
class TablesOptions(Options):
    """Write the paper's Tables 1, 2 and 3 with your measurements beside them, and the figures.

    Examples of use:
        mixer paper tables runs
        mixer paper tables runs/flowers evaluation.json few_shot.json --output reports/flowers

    The paper's rows stand in tables of their own. Yours come from run folders and from the files
    that evaluate, few-shot, throughput and the other paper commands write; each is shown with its
    data, protocol, command, hardware and date.
    """

    output: str = field(default="report", metadata={"metavar": "FOLDER"})
    """A folder for report.md, report.html and figures/."""
    overwrite: bool = False
    """Replace the report that is there."""


@dataclass
class Measured:
    """One run folder or one measurement file, and what it contributes.

    Attributes:
        number: by which rows refer to it.
        kind: "run", or that of the measurement.
        rows: (section, cells) for the tables of ours.
        accuracy: on a set of images; None where none was measured.
        speeds: of each model whose throughput was measured.
    """

    number: int
    path: Path
    kind: str
    values: dict[str, Any]
    rows: list[tuple[str, Cells]] = field(default_factory=list)
    accuracy: dict[str, Any] | None = None
    speeds: list[dict[str, Any]] = field(default_factory=list)


class Tables(NamedTuple):
    """The files of a report, what it was made of, and (path, reason) of what was left out."""

    files: list[Path]
    measured: list[Measured]
    left_out: list[tuple[Path, str]]


class Table(NamedTuple):
    """A table of one origin only, "paper" or "measured here"."""

    origin: str
    rows: Sequence[Cells]
    caption: str = ""


class Drawing(NamedTuple):
    """A figure: the name of its PNG, beside which an SVG lies."""

    name: str
    caption: str


Section = tuple[str, list[str | list[str] | Table | Drawing]]


def tables(
    paths: Sequence[str | Path], options: TablesOptions | None = None, **fields: Any
) -> Tables:
    """Writes the paper's tables with our measurements beside them, as Markdown and HTML.

    Args:
        paths: run folders, measurement files, and folders that are searched for them.
        options, fields: see `TablesOptions`.
    """
    options = make(TablesOptions, options, fields)
    folder = expand(options.output)
    names = ("report.md", "report.html")
    check_output_folder(folder, names, overwrite=options.overwrite)
    check_output_folder(folder / "figures")
    found, left_out = collect(paths)
    check_not_inputs([folder], (one.path for one in found))
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    sections = list(_sections(found, left_out, folder / "figures"))
    atomic_write(folder / "report.md", _markdown(sections).encode())
    atomic_write(folder / "report.html", _html(sections, folder / "figures").encode())
    drawn = [block.name for _, blocks in sections for block in blocks if isinstance(block, Drawing)]
    files = [*(folder / name for name in names), *(folder / "figures" / name for name in drawn)]
    return Tables(files, found, left_out)


def show(result: Tables, _: TablesOptions) -> None:
    """Prints what was found and written."""
    console = Reporter()
    kinds = Counter(one.kind for one in result.measured)
    console.say(f"found    {', '.join(f'{count} {kind}' for kind, count in kinds.items())}")
    for path, reason in result.left_out:
        console.say(f"left out {path}: {reason}", style="yellow")
    for path in result.files:
        console.say(f"written  {path}")


def collect(paths: Sequence[str | Path]) -> tuple[list[Measured], list[tuple[Path, str]]]:
    """Returns the runs and measurements of the paths, and what cannot be read, with the reason."""
    found: list[Measured] = []
    left_out: list[tuple[Path, str]] = []
    seen: set[Path] = set()

    def add(path: Path, *, by_name: bool = False) -> str | None:
        if path.resolve() in seen:
            return None
        seen.add(path.resolve())
        try:
            found.append(_read(path, len(found) + 1))
            return found[-1].kind
        except _DAMAGED as error:
            if by_name:
                raise
            text = error.what if isinstance(error, UserError) else f"not a whole run: {error}"
            left_out.append((path, " ".join(text.split())[:200]))
            return None

    for path in map(expand, paths):
        if not path.exists():
            raise UserError("no such file or folder", where=path)
        if path.is_file():
            add(path, by_name=True)
        for place, folders, files in os.walk(path):
            here = Path(place)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if {"config.json", "environment.json"} <= {*files}:
                add(here)
                folders[:] = [name for name in folders if name not in _OF_RUN]
            if "finetune.json" in files:  # of its grid only the final runs count
                folders[:] = [name for name in folders if name not in ("grid", "best")]
            kinds = {add(here / name) for name in sorted(files) if _is_measurement(here / name)}
            if kinds & _STUDIES:
                folders.clear()  # its runs are in its own file
    if not found:
        what = "no run and no measurement found"
        what += "".join(f"; {path} is left out: {reason}" for path, reason in left_out[:3])
        fix = "These write what is reported: mixer evaluate MODEL --data SOURCE --output FOLDER; "
        fix += "mixer few-shot MODEL --data SOURCE --output FILE.json; mixer train --output FOLDER"
        raise UserError(what, where=", ".join(map(str, paths)) or None, fix=fix)
    return found, left_out


def _is_measurement(path: Path) -> bool:
    if path.suffix != ".json" or path.name.startswith("."):
        return False
    with path.open("rb") as file:
        return b" measurement" in file.read(1000)


def _read(path: Path, number: int) -> Measured:
    values = _read_run(path) if path.is_dir() else read_measurement(path)
    one = Measured(number, path, str(values.get("kind")), values)
    if one.kind not in _KINDS:
        raise UserError(f"of the unknown kind {one.kind!r}", where=path)
    try:
        one.rows = list(_contribute(one))
    except _DAMAGED as error:
        what = f"damaged, or of another version: {type(error).__name__} {error}"
        raise UserError(what, where=path, fix="Measure again") from error
    return one


def _read_run(path: Path) -> dict[str, Any]:
    """Returns what a run folder knows of its training and its own last measurement."""
    config = parse_json((path / "config.json").read_bytes())
    environment = parse_json((path / "environment.json").read_bytes())
    seconds, steps = 0.0, 0
    for last in read_metrics(path)[-1:]:
        seconds, steps = float(last["seconds"]), int(last["step"]) + 1
    for row in read_results(path):  # the last evaluation comes after the last logged step
        seconds = max(seconds, float(row.get("seconds") or 0.0))
    evaluation = None
    for name in ("validation", "test"):
        if (path / name / "evaluation.json").is_file():
            evaluation = parse_json((path / name / "evaluation.json").read_bytes())
    log = path / "log.txt"
    text = log.read_text("utf-8", "replace") if log.is_file() else ""
    processes = re.findall(r"^run      .*?(\d+) processes on ", text, re.MULTILINE)
    model: dict[str, Any] = {}
    if (path / "best" / "config.json").is_file():
        best = parse_json((path / "best" / "config.json").read_bytes())
        architecture = config_from_json(best["architecture"])
        model = {
            "name": architecture_name(architecture) or architecture.summary(),
            "source": str(path),
            "architecture": best["architecture"],
            "image_size": list(architecture.image_size),
            "preprocessing": best.get("preprocessing"),
        }
    days = seconds * (int(processes[-1]) if processes else 1) / 86_400
    values = {"kind": "run", "config": config, "environment": environment, "model": model}
    return {**values, "steps": steps, "evaluation": evaluation, "days": days}


def _cells(columns: str, *values: object) -> Cells:
    texts = (None if value is None else str(value) for value in values)
    return dict(zip(columns.split(", "), texts, strict=True))


def _contribute(one: Measured) -> Iterator[tuple[str, Cells]]:
    """Yields (section, cells) of the tables of ours; keeps the accuracy and the speeds."""
    values, how = one.values, f"[{one.number}]"
    model, machine = values.get("model") or {}, hardware(values["environment"])
    if one.kind == "run":
        config, steps = values["config"], values["steps"]
        weights, source = config.get("model", {}).get("weights"), config.get("data", {})
        length = f"{steps:,}{' (not finished)' * (values['evaluation'] is None)}"
        images = f"{steps * config.get('batch_size', 0):,}"
        columns = "run, from, data, steps, images seen, device-days, device, how"
        cells = (one.path, weights or "random weights", source.get("source"), length, images)
        cells += (_plain(values["days"]), machine, how)
        yield "Training cost", _cells(columns, *cells)
    evaluation = values if one.kind == "evaluation" else values.get("evaluation")
    if evaluation is not None:
        one.accuracy = found = _accuracy(one, evaluation, model)
        if found["not_imagenet"] is not None:
            columns = "model, source, data, images, px, top-1, device-days, how"
            cells = (found["model"], found["source"], found["data"], f"{evaluation['images']:,}")
            cells += (found["size"], percent(found["top1"]), _cost(found), how)
            yield _OTHER, _cells(columns, *cells)
    for entry in values["models"] if one.kind == "throughput" else ():
        if (best := entry["best"]) is not None:
            speed = _speed(one, entry)
            one.speeds.append(speed)
            columns = "model, px, mode, precision, batch, images/s, hardware, how"
            cells = (speed["model"], speed["size"], speed["mode"], speed["precision"])
            cells += (f"{best['batch_size']:,}", f"{speed['speed']:,.4g}", speed["hardware"], how)
            yield "Throughput", _cells(columns, *cells)
    if one.kind == "few-shot":
        names = [str(model.get("source") or model.get("name")), "random weights"]
        floor = values.get("floor") or {"results": []}
        for name, results in zip(names, (values["results"], floor["results"]), strict=True):
            for result in results:
                accuracies = {
                    f"{int(shots)}-shot": _spread(mean, result["deviation"].get(shots))
                    for shots, mean in result["mean"].items()
                }
                first = _cells("model, data", name, result["data"])
                yield "Few-shot accuracy", {**first, **accuracies, "how": how}
    if one.kind in _SUITES:
        title = f"{_SUITES[one.kind][0]} of {values.get('checkpoint')}"
        columns = "task, top-1, runs, data, how"
        for name, task in values["tasks"].items():
            accuracy = _spread(task["accuracy"], task.get("deviation"))
            runs = len(task.get("seeds") or [])
            yield title, _cells(columns, name, accuracy, runs, task.get("source"), how)
        yield title, _cells(columns, "mean", _suite_mean(one), None, None, how)
        if missing := ", ".join(map(str, values["missing"])):
            yield title, _cells("task", f"missing: {missing}")
    if one.kind == "data-scale":
        settings, partial = values["settings"], ""
        if values["partial"]:
            partial = f"partial: {plural(len(values.get('missing', [])), 'run')} missing, "
        few = f"{settings['shots']}-shot: {settings['few_shot_data']}".replace(", ", " ")
        columns = f"model, fraction, images, epochs, validation, {few}, runs, how"
        for point in values["points"]:
            cells = (point["label"], f"{100 * point['fraction']:.4g} %", f"{point['images']:,}")
            cells += (f"{point['epochs']:,.4g}", percent(point["validation"]))
            cells += (_spread(point["few_shot"], point["deviation"]), point["runs"])
            yield _SCALE, _cells(columns, *cells, f"{partial}{how}")


def _accuracy(one: Measured, found: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation found, as Table 2 or 3 and the figures need it."""
    real, protocol = found.get("real"), found.get("protocol") or model.get("preprocessing") or {}
    resize, crop = protocol.get("resize"), protocol.get("crop")
    mark = " (protocol unknown)" if resize is None else f" ({resize})"
    if resize in ("resmall-crop", "resize-crop"):  # the paper's, 224 of 256 and so on
        mark = "" if crop is None or abs(crop - 0.875) < 1e-6 else f" ({resize} {crop:.4g})"
    weights = one.values.get("config", {}).get("model", {}).get("weights")
    return {
        **_of_model(model, one),
        "source": str(model.get("source") or one.path),
        "data": str(found["data"]),
        "top1": float(found["top1"]),
        "real": float(real["accuracy"]) if real and real["images"] == REAL_IMAGES else None,
        "resize": resize,
        "mark": mark,
        "not_imagenet": why_not_imagenet(found),
        "days": one.values.get("days") or None if weights is None else None,
    }


def _speed(one: Measured, entry: dict[str, Any]) -> dict[str, Any]:
    return {
        **_of_model(entry["model"], one, entry.get("threads")),
        "number": one.number,
        "mode": entry.get("mode"),
        "precision": f"{entry.get('precision')}{', compiled' * bool(entry.get('compiled'))}",
        "speed": float(entry["best"]["images_per_second"]),
    }


def _of_model(model: dict[str, Any], one: Measured, threads: object = None) -> dict[str, Any]:
    return {
        "model": str(model.get("name") or "unknown"),
        "size": _size(model.get("image_size")),
        "shape": _shape(model),
        "hardware": hardware(one.values["environment"], threads),
    }


def _suite_mean(one: Measured) -> str:
    """The mean of a suite, marked if tasks are missing or the protocol is another."""
    tasks, total = one.values["tasks"], _SUITES[one.kind][1]
    if not tasks:
        return "none yet"
    is_whole = len(tasks) == total and not one.values["missing"]
    marks = [] if is_whole else [f"partial: {len(tasks)} of {plural(total, 'task')}"]
    marks += ["changed protocol"] if one.values.get("changes") else []
    marks += ["other data"] if any(task.get("departs") for task in tasks.values()) else []
    return percent(one.values["mean"]) + (f" ({', '.join(marks)})" if marks else "")


def why_not_imagenet(values: dict[str, Any]) -> str | None:
    """Returns why an evaluation is not on the ImageNet validation images; None if it is.

    They are known by their classes, which must be the 1000 synsets, and by their number: 50,000, of
    each class 50. A set with other classes, a part of it, or one with undecodable images is not.
    """
    names = values.get("class_names")
    if not isinstance(names, list) or len(names) != 1000:
        many = len(names) if isinstance(names, list) else "unknown"
        return f"its classes are {many}, not 1000"
    if {str(name)[:9] for name in names} != _synsets():
        return "its classes are not those of ImageNet"
    if values["images"] != IMAGES:
        return f"{values['images']:,} images, not {IMAGES:,}"
    counts = {row.get("images") for row in values.get("per_class") or [{}]}
    return None if counts == {50} else "not 50 images of each class"


@functools.cache
def _synsets() -> frozenset[str]:
    checkpoint = find_checkpoint("mixer_b16.i1k")
    assert checkpoint is not None
    return frozenset(name[:9] for name in checkpoint.class_names() or ())


def hardware(environment: dict[str, Any], threads: object = None) -> str:
    """Returns what computed: the GPU, or the processor and its threads."""
    device = str(environment.get("device", "unknown"))
    if device != "cpu":
        return device
    count = environment.get("threads") if threads is None else threads
    return f"{environment.get('processor', 'cpu')}, {count} thread{'s' * (count != 1)}"


def percent(fraction: float) -> str:
    """Returns 84.15 of 0.8415."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"not a fraction: {fraction!r}")
    return f"{100 * fraction:.2f}"


def _spread(mean: float, deviation: float | None) -> str:
    return percent(mean) + ("" if deviation is None else f" +- {percent(deviation)}")


def _plain(value: float) -> str:
    return np.format_float_positional(value, 3, fractional=False, trim="-")


def _size(value: object) -> str:
    if isinstance(value, list | tuple) and len(value) == 2:
        return str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"
    return str(value) if isinstance(value, int) else "unknown"


def _shape(model: dict[str, Any]) -> str:
    """Returns what decides the speed of a model, as text; "" if it is not known."""
    shape = dict(model.get("architecture") or {})
    with contextlib.suppress(UserError, TypeError):  # one that we know: with all of its fields
        shape = config_to_json(config_from_json(shape))
    for name in ("num_classes", "dropout", "stochastic_depth", "gelu"):
        shape.pop(name, None)
    return json.dumps(shape, sort_keys=True) if shape else ""


def _how(one: Measured) -> str:
    """Returns how something was measured, as one line: data, protocol, command, hardware, date."""
    values, environment = one.values, one.values["environment"]
    found = values.get("evaluation") or values
    keys = ("checkpoint", "data", "images", "protocol", "changes", "settings", "rounds", "seconds")
    shown = {key: found[key] for key in keys if found.get(key)}
    for result in values.get("results", []):
        shown |= {key: result.get(key) for key in ("data", "test_images", "protocol", "seeds")}
    if one.accuracy is not None and one.accuracy["not_imagenet"] is not None:
        shown["not ImageNet validation:"] = one.accuracy["not_imagenet"]
    shown |= {key: environment[key] for key in ("command", "date") if environment.get(key)}
    packages = environment.get("packages") or {}
    versions = {NAME: own_entry(environment), "torch": packages.get("torch")}
    parts = [f"[{one.number}] {one.kind}: {one.path}", _flat(shown)]
    return "; ".join([*parts, f"on {hardware(environment)}", f"with {_flat(versions)}"])


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(inner)}" for name, inner in value.items())
    return " ".join(map(_flat, value)) if isinstance(value, list | tuple) else str(value)


def _sections(
    found: list[Measured], left_out: list[tuple[Path, str]], folder: Path
) -> Iterator[Section]:
    yield (
        "MLP-Mixer: the paper's tables, and what was measured here",
        [
            "Tables and rows named paper are printed in arXiv 2105.01601; speed and cost there are "
            f"of {published.HARDWARE}. Rows named measured here come from the files at the end of "
            "this page, by the numbers in brackets, on the hardware that they name: their speed "
            "and cost cannot be compared with the paper's. A dash is a value that nobody measured."
        ],
    )
    yield "Table 1: architectures", _table_1()
    head = {"pre-trained on": "data", "model": "model", "px": "pixels", "epochs": "epochs"}
    head |= {"ImageNet": "imagenet", "ReaL": "real", "Avg 5": "avg5", "VTAB-1k": "vtab"}
    head |= {f"img/s/core ({published.HARDWARE})": "throughput"}
    head |= {f"{published.HARDWARE} core-days": "core_days"}
    for number, results, caption in (
        (2, published.TABLE_2, 'top-1 in per cent; Mixer at 448 pixels, by "resize-crop"'),
        (3, published.TABLE_3, 'top-1 in per cent, by "resmall-crop"'),
    ):
        without = ("px", "epochs") if number == 2 else ("VTAB-1k",)
        own = {title: name for title, name in head.items() if title not in without}
        printed = []
        for result in results:
            cells = {title: getattr(result, name) for title, name in own.items()}
            printed.append({k: None if v is None else str(v) for k, v in cells.items()})
        title = f"Table {number}: {'transfer, throughput and cost' if number == 2 else 'scale'}"
        ours = _our_rows(found, number)
        fits = "resize-crop" if number == 2 else "resmall-crop, or as marked"
        here = [Table("measured here", ours, f"ImageNet and ReaL by {fits}")] if ours else []
        yield title, [Table("paper", printed, caption), *here]
    yield "Figures 2 and 3: accuracy against cost and throughput", list(_pareto(found, folder))
    rows: dict[str, list[Cells]] = {}
    for one in found:
        for title, cells in one.rows:
            rows.setdefault(title, []).append(cells)
    for title, cells in rows.items():
        drawn = list(_data_scale(found, folder)) if title == _SCALE else []
        text: list[Any] = [_TEXTS[title]] if title in _TEXTS else []
        yield title, [*text, *drawn, Table("measured here", cells)]
    yield "How it was measured", [[_how(one) for one in found]]
    if left_out:
        yield "Not understood, and left out", [[f"{path}: {reason}" for path, reason in left_out]]


def _table_1() -> list[Any]:
    """The architectures; parameters of ours are counted from the models themselves."""
    titles = ("layers", "patch P", "hidden size C", "sequence length S", "channel MLP D_C")
    printed: list[Cells] = []
    for at, title in enumerate((*titles, "token MLP D_S", "parameters (M)"), 2):
        cells = {column.name: str(column[at]) for column in published.TABLE_1}
        printed.append({"224 pixels, without the head": title, **cells})
    counted: Cells = {"224 pixels, without the head": "parameters"}
    for column in published.TABLE_1:
        with torch.device("meta"):
            counted[column.name] = f"{count_parameters(create_model(column.model, 224, 0)):,}"
    return [Table("paper", printed), Table("measured here", [counted], "counted from our models")]


def _our_rows(found: list[Measured], number: int) -> list[Cells]:
    """Our rows for Table 2 (resize-crop, suites) or Table 3 (resmall-crop, speed alone)."""
    columns = ("ImageNet", "ReaL", "Avg 5", "VTAB-1k", "img/s", "device-days")
    rows: list[Cells] = []

    def row_for(source: str, model: str, size: str, column: str, one: Measured) -> Cells:
        """The model's row; a new one if it has a value of this column already."""
        name = model if source == model else f"{model} ({source})"
        own = (row for row in rows if (row["model"], row["px"]) == (name, size))
        row = next((row for row in own if row[column] is None), None)
        if row is None:
            checkpoint = find_checkpoint(source)
            trained = None if checkpoint is None else checkpoint.trained_on
            row = {"pre-trained on": trained, "model": name, "px": size}
            row |= dict.fromkeys(columns) | {"how": ""}
            rows.append(row)
        row["how"] = f"{row['how']} [{one.number}]".strip()
        return row

    speeds = [speed for one in found for speed in one.speeds if speed["mode"] == "inference"]
    used: set[str] = set()
    for one in found:
        accuracy = one.accuracy
        if accuracy is None or accuracy["not_imagenet"] is not None:
            continue
        used |= {accuracy["shape"]} - {""}  # "" is unknown
        if (2 if accuracy["resize"] == "resize-crop" else 3) == number:
            names = (accuracy["source"], accuracy["model"], accuracy["size"])
            row = row_for(*names, "ImageNet", one)
            row["ImageNet"] = percent(accuracy["top1"]) + accuracy["mark"]
            if accuracy["real"] is not None:
                row["ReaL"] = percent(accuracy["real"]) + accuracy["mark"]
            row["device-days"] = _cost(accuracy)
            fast = fastest(accuracy["shape"], found)
            row["img/s"] = "; ".join(map(_speed_text, fast)) or None
            row["how"] = " ".join([str(row["how"]), *(f"[{speed['number']}]" for speed in fast)])
    for one in found:
        tasks = one.values["tasks"].values() if one.kind in _SUITES else ()
        fits = {task.get("resize") for task in tasks}
        if tasks and number == (3 if fits == {"resmall-crop"} else 2):
            model, column = one.values.get("model") or {}, _SUITES[one.kind][0]
            source = str(one.values.get("checkpoint") or model.get("source") or one.path)
            sizes = {str(task.get("image_size")) for task in tasks}
            size = sizes.pop() if len(sizes) == 1 else _size(model.get("image_size"))
            row_for(source, str(model.get("name", source)), size, column, one)[column] = (
                _suite_mean(one)
            )
    for one in found if number == 3 else ():
        for speed in one.speeds:
            if speed in speeds and speed["shape"] not in used:
                name = f"{speed['model']}, speed alone"
                row_for(name, name, speed["size"], "img/s", one)["img/s"] = _speed_text(speed)
    return rows


def fastest(shape: str, found: list[Measured]) -> list[dict[str, Any]]:
    """Returns the fastest inference of models of this shape on each hardware."""
    best: dict[str, dict[str, Any]] = {}
    speeds = [speed for one in found for speed in one.speeds if speed["mode"] == "inference"]
    for speed in sorted(speeds, key=lambda speed: -speed["speed"]):
        if shape and speed["shape"] == shape:
            best.setdefault(speed["hardware"], speed)
    return list(best.values())


def _speed_text(speed: dict[str, Any]) -> str:
    return f"{speed['speed']:,.4g} on {speed['hardware']}, {speed['precision']}"


def _cost(accuracy: dict[str, Any]) -> str | None:
    days = accuracy["days"]
    return None if days is None else f"{_plain(days)} on {accuracy['hardware']}"


def _pareto(found: list[Measured], folder: Path) -> Iterator[Drawing]:
    cost, fast = [], []
    for accuracy in (one.accuracy for one in found if one.accuracy is not None):
        label = Path(accuracy["source"]).name or accuracy["model"]
        top1, data = accuracy["top1"], accuracy["data"]
        if accuracy["days"] is not None:
            cost.append(figures.Point(label, accuracy["days"], top1, accuracy["hardware"], data))
        for speed in fastest(accuracy["shape"], found):
            fast.append(figures.Point(label, speed["speed"], top1, speed["hardware"], data))
    figure_2 = ("Figure 2: Table 2, and large L/16 of Table 3", published.FIGURE_2)
    figure_3 = ("Figure 3: JFT-300M, 224 pixels", published.FIGURE_3)
    for name, panels, ours in (
        ("cost", [figure_2, figure_3], cost),
        ("throughput", [figure_3], fast),
    ):
        figure = figures.pareto_figure(panels, ours, throughput=name == "throughput")
        figures.save(figure, folder / name)
        below = "Below: measured here, a panel for each hardware and data (at most 3)."
        title = "training cost" if name == "cost" else name
        yield Drawing(f"{name}.png", f"Accuracy against {title}. {below if ours else ''}")


def _data_scale(found: list[Measured], folder: Path) -> Iterator[Drawing]:
    for one in found:
        if one.kind == "data-scale" and one.values["points"]:
            points, settings = one.values["points"], one.values["settings"]
            label, name = f"linear {settings['shots']}-shot top-1 (%)", f"data_scale_{one.number}"
            source, where = str(one.values["data"]["source"]), str(settings["few_shot_data"])
            figures.save(figures.data_scale_figure(points, label, where, source), folder / name)
            yield Drawing(f"{name}.png", f"[{one.number}] Measured here, trained on {source}.")


def _head(table: Table) -> list[str]:
    return list(dict.fromkeys(column for row in table.rows for column in row))


def _markdown(sections: Sequence[Section]) -> str:
    parts = []
    for number, (title, blocks) in enumerate(sections):
        parts.append(f"{'##' if number else '#'} {_escaped(title)}")
        for block in blocks:
            if isinstance(block, str):
                parts.append(_escaped(block))
            elif isinstance(block, list):
                parts.append("\n".join(f"- {_escaped(item)}" for item in block))
            elif isinstance(block, Drawing):
                svg = block.name.replace(".png", ".svg")
                image = f"![{_escaped(block.caption)}](figures/{block.name})"
                parts.append(f"{image}\n\n{_escaped(block.caption)} ([SVG](figures/{svg}))")
            else:
                head = _head(block)
                rows = [[block.origin, *head]]
                rows += [
                    [block.origin, *(row.get(name) or "-" for name in head)] for row in block.rows
                ]
                lines = [f"| {' | '.join(map(_escaped, row))} |" for row in rows]
                lines.insert(1, "| --- " * len(rows[0]) + "|")
                parts.append(f"**{block.origin}** {_escaped(block.caption)}".strip())
                parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """Returns the text with nothing in it that Markdown, or the HTML within it, would act on."""
    plain = html.escape(" ".join(_valid(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~!$])", r"\\\1", plain)


def _valid(text: str) -> str:
    """A file name need not be valid text: its bytes are written out."""
    return text.encode(errors="backslashreplace").decode()


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>MLP-Mixer: the paper's tables</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; }
caption { text-align: left; font-weight: 600; }
th, td { padding: .2rem .6rem; text-align: left; border-bottom: 1px solid #e5e5e5; }
.paper { color: #555; font-style: italic; } .measured { border-left: 4px solid #1a7f37; }
img { max-width: 100%; } li { overflow-wrap: anywhere; }
</style></head><body>
BODY
</body></html>
"""


def _html(sections: Sequence[Section], folder: Path) -> str:
    """Returns the report as one HTML page with its figures inside."""

    def safe(text: str) -> str:
        return html.escape(_valid(text))

    parts = []
    for title, blocks in sections:
        parts.append(f"<h2>{safe(title)}</h2>")
        for block in blocks:
            if isinstance(block, str):
                parts.append(f"<p>{safe(block)}</p>")
            elif isinstance(block, list):
                parts.append(f"<ul>{''.join(f'<li>{safe(item)}</li>' for item in block)}</ul>")
            elif isinstance(block, Drawing):
                data = base64.b64encode((folder / block.name).read_bytes()).decode()
                source = f'src="data:image/png;base64,{data}"'
                parts.append(f'<p><img alt="{safe(block.caption)}" {source}></p>')
            else:
                head, kind = _head(block), block.origin.partition(" ")[0]
                caption = safe(f"{block.origin} {block.caption}")
                parts.append(f'<table class="{kind}"><caption>{caption}</caption>')
                for row in [{name: name for name in head}, *block.rows]:
                    texts = [block.origin, *(row.get(name) or "-" for name in head)]
                    parts.append(f"<tr>{''.join(f'<td>{safe(text)}</td>' for text in texts)}</tr>")
                parts.append("</table>")
    return _PAGE.replace("BODY", "\n".join(parts))
