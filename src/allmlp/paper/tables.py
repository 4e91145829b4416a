"""The paper's Tables 1, 2 and 3 next to our own measurements, as Markdown and HTML.

The paper's values come from `published`, ours from files that our commands wrote. They never share
a table or a figure panel. An accuracy appears in an ImageNet column only if it covers all 50,000
validation images; a mean with missing tasks is marked.
"""

from __future__ import annotations

import contextlib
import functools
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
from matplotlib.figure import Figure

from allmlp import page as html
from allmlp.console import Reporter
from allmlp.errors import UserError, plural
from allmlp.evaluation.imagenet_real import IMAGES
from allmlp.evaluation.result_file import read_measurement
from allmlp.io import atomic_write, check_not_inputs, check_output_folder, expand, parse_json
from allmlp.models.catalog import architecture_name, config_from_json, config_to_json, create_model
from allmlp.names import NAME, own_entry
from allmlp.options import make
from allmlp.paper import figures, published
from allmlp.paper.options import TablesOptions
from allmlp.training.run_folder import read_metrics, read_results
from allmlp.weights.checkpoints import find_checkpoint

REAL_IMAGES = 46_837  # images that have a ReaL label
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
    _OTHER: "Not the 50,000 validation images of ImageNet, so in no column of the paper's tables.",
    "Training cost": "The wall time of each run, with reading and evaluation, times its processes.",
    "Few-shot accuracy": "Linear few-shot top-1 in per cent, mean and deviation over the draws.",
}
Cells = dict[str, object]  # column -> value; None is a dash


@dataclass
class Measured:
    """A run folder or measurement file, and its contribution.

    Attributes:
        number: the reference in table rows.
        kind: "run", or that of the measurement.
        rows: (section, cells) of our own tables.
        accuracy: on a set of images, if measured.
        speeds: of inference, fastest first.
    """

    number: int
    path: Path
    kind: str
    values: dict[str, Any]
    rows: list[tuple[str, Cells]] = field(default_factory=list)
    accuracy: dict[str, Any] | None = None
    speeds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def model(self) -> dict[str, Any]:
        """As written by `describe` of the result file."""
        return self.values.get("model") or {}


class Tables(NamedTuple):
    """Files of a report, the measurements in it, and what was left out and why."""

    files: list[Path]
    measured: list[Measured]
    left_out: list[str]


def tables(
    paths: Sequence[str | Path], options: TablesOptions | None = None, **fields: Any
) -> Tables:
    """Writes the paper's tables next to our measurements, as Markdown and HTML.

    Args:
        paths: run folders, measurement files, and folders to search for them.
        options, fields: see `TablesOptions`.
    """
    options = make(TablesOptions, options, fields)
    folder = expand(options.output)
    check_output_folder(folder, ("report.md", "report.html"), overwrite=options.overwrite)
    check_output_folder(folder / "figures")
    found, left_out = collect(paths)
    check_not_inputs([folder], (one.path for one in found))
    page = Page(folder)
    _write(page, found, left_out)
    return Tables([*page.save(), *page.figures], found, left_out)


def show(result: Tables, _: TablesOptions) -> None:
    say = Reporter().say
    kinds = Counter(one.kind for one in result.measured)
    say(f"found    {', '.join(f'{count} {kind}' for kind, count in kinds.items())}")
    for text in result.left_out:
        say(f"left out {text}", style="yellow")
    for path in result.files:
        say(f"written  {path}")


# Reading


def collect(paths: Sequence[str | Path]) -> tuple[list[Measured], list[str]]:
    """Returns the runs and measurements found, and what cannot be read with the reason."""
    found: dict[Path, Measured] = {}
    left_out: dict[Path, str] = {}

    def add(path: Path, *, by_name: bool = False) -> str | None:
        key = path.resolve()
        if key not in found and key not in left_out:
            try:
                found[key] = _read(path, len(found) + 1)
            except _DAMAGED as error:
                if by_name:
                    raise
                text = error.what if isinstance(error, UserError) else f"damaged: {error}"
                left_out[key] = f"{path}: {' '.join(text.split())[:200]}"
        return found[key].kind if key in found else None

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
            if "finetune.json" in files:  # only the final runs of a grid count
                folders[:] = [name for name in folders if name not in ("grid", "best")]
            kinds = {add(here / name) for name in sorted(files) if _is_measurement(here / name)}
            if kinds & _STUDIES:
                folders.clear()  # its own file covers the runs
    if not found:
        what = "no run and no measurement found"
        what += "".join(f"; left out {text}" for text in list(left_out.values())[:3])
        fix = "Give run folders, or files that evaluate, few-shot or benchmark wrote"
        raise UserError(what, where=", ".join(map(str, paths)) or None, fix=fix)
    return list(found.values()), list(left_out.values())


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
        one.rows = [(title, {**row, "how": f"[{number}]"}) for title, row in _contribute(one)]
    except _DAMAGED as error:
        what = f"damaged, or of another version: {type(error).__name__} {error}"
        raise UserError(what, where=path, fix="Measure again") from error
    return one


def _read_run(path: Path) -> dict[str, Any]:
    """Returns what a run folder records of its training and its last measurement."""

    def read(name: str) -> dict[str, Any] | None:
        file = path / name
        return parse_json(file.read_bytes()) if file.is_file() else None

    log, seconds, steps = path / "log.txt", 0.0, 0
    for last in read_metrics(path)[-1:]:
        seconds, steps = float(last["seconds"]), int(last["step"]) + 1
    for row in read_results(path):  # the last evaluation comes after the last logged step
        seconds = max(seconds, float(row.get("seconds") or 0.0))
    text = log.read_text("utf-8", "replace") if log.is_file() else ""
    processes = re.findall(r"^run      .*?(\d+) processes on ", text, re.MULTILINE) or ["1"]
    model: dict[str, Any] = {}
    if best := read("best/config.json"):
        architecture = config_from_json(best["architecture"])
        model = {
            "name": architecture_name(architecture) or architecture.summary(),
            "source": str(path),
            "architecture": best["architecture"],
            "image_size": list(architecture.image_size),
            "preprocessing": best.get("preprocessing"),
        }
    return {
        "kind": "run",
        "config": read("config.json"),
        "environment": read("environment.json"),
        "model": model,
        "steps": steps,
        "evaluation": read("test/evaluation.json") or read("validation/evaluation.json"),
        "days": seconds * int(processes[-1]) / 86_400,
    }


def _contribute(one: Measured) -> Iterator[tuple[str, Cells]]:
    """Yields (section, cells) of our tables; stores the accuracy and the speeds."""
    values, machine = one.values, hardware(one.values["environment"])
    evaluation = values if one.kind == "evaluation" else values.get("evaluation")
    if one.kind == "run":
        config, steps = values["config"], values["steps"]
        yield (
            "Training cost",
            {
                "run": one.path,
                "from": config.get("model", {}).get("weights") or "random weights",
                "data": config.get("data", {}).get("source"),
                "steps": f"{steps:,}{'' if evaluation else ' (not finished)'}",
                "images seen": f"{steps * config.get('batch_size', 0):,}",
                "device-days": _plain(values["days"]),
                "device": machine,
            },
        )
    if evaluation is not None:
        one.accuracy = found = _accuracy(one, evaluation)
        if found["not_imagenet"] is not None:
            columns = {"model": "model", "source": "source", "data": "data", "size": "px"}
            row: Cells = {title: found[name] for name, title in columns.items()}
            row |= {"images": f"{evaluation['images']:,}", "top-1": percent(found["top1"])}
            yield _OTHER, {**row, "device-days": _cost(found)}
    for entry in values["models"] if one.kind == "throughput" else ():
        if entry["best"] is not None:
            speed = _speed(one, entry)
            if entry["mode"] == "inference":
                one.speeds.append(speed)
            columns = ("model", "px", "mode", "precision", "batch", "images/s", "hardware")
            yield "Throughput", {name: speed[name] for name in columns}
    if one.kind == "few-shot":
        baseline = (values.get("floor") or {"results": []})["results"]
        source = one.model.get("source") or one.model.get("name")
        for name, results in ((source, values["results"]), ("random weights", baseline)):
            for result in results:
                row = {"model": name, "data": result["data"]}
                for shots, mean in result["mean"].items():
                    row[f"{int(shots)}-shot"] = _spread(mean, result["deviation"].get(shots))
                yield "Few-shot accuracy", row
    if one.kind in _SUITES:
        title = f"{_SUITES[one.kind][0]} of {values.get('checkpoint')}"
        for name, task in values["tasks"].items():
            row = {"task": name, "top-1": _spread(task["accuracy"], task.get("deviation"))}
            yield title, {**row, "runs": len(task.get("seeds") or []), "data": task.get("source")}
        yield title, {"task": "mean", "top-1": _suite_mean(one)}
        if missing := ", ".join(map(str, values["missing"])):
            yield title, {"task": f"missing: {missing}"}
    if one.kind == "data-scale":
        shots = f"{values['settings']['shots']}-shot: {values['settings']['few_shot_data']}"
        for point in _points(one):
            row = {"model": point["label"], "fraction": f"{100 * point['fraction']:.4g} %"}
            row |= {"images": f"{point['images']:,}", "epochs": f"{point['epochs']:,.4g}"}
            row |= {"validation": percent(point["validation"])}
            row |= {
                shots: _spread(point["few_shot"], point["few_shot_deviation"]),
                "runs": point["runs"],
            }
            yield _SCALE, row
        if values["partial"]:
            yield _SCALE, {"model": f"partial: {plural(len(values['missing']), 'run')} missing"}


def _points(one: Measured) -> list[dict[str, Any]]:
    """Points of a data-scale study; older files use other names."""
    points = one.values["rows"] if "rows" in one.values else one.values["points"]
    return [{"few_shot_deviation": point.get("deviation"), **point} for point in points]


def _accuracy(one: Measured, found: dict[str, Any]) -> dict[str, Any]:
    """The result of an evaluation in the form that the tables and figures need."""
    real = found.get("real")
    protocol = found.get("protocol") or one.model.get("preprocessing") or {}
    resize, crop = protocol.get("resize"), protocol.get("crop")
    is_papers = resize in ("resmall-crop", "resize-crop") and crop in (None, 0.875)
    shown = resize or "protocol unknown"
    if crop is not None and shown.endswith("crop"):
        shown += f" {crop:.4g}"
    is_from_random = not one.values.get("config", {}).get("model", {}).get("weights")
    return {
        **_of_model(one.model, one),
        "source": str(one.model.get("source") or one.path),
        "data": str(found["data"]),
        "top1": float(found["top1"]),
        "real": float(real["accuracy"]) if real and real["images"] == REAL_IMAGES else None,
        "table": 2 if resize == "resize-crop" else 3,
        "mark": "" if is_papers else f" ({shown})",
        "not_imagenet": why_not_imagenet(found),
        "days": (one.values.get("days") or None) if is_from_random else None,
    }


def _speed(one: Measured, entry: dict[str, Any]) -> dict[str, Any]:
    speed = float(entry["best"]["images_per_second"])
    found = _of_model(entry["model"], one, entry.get("threads"))
    return {
        **found,
        "px": found["size"],
        "mode": entry.get("mode"),
        "precision": f"{entry.get('precision')}{', compiled' * bool(entry.get('compiled'))}",
        "batch": f"{entry['best']['batch_size']:,}",
        "images/s": f"{speed:,.4g}",
        "speed": speed,
        "number": one.number,
    }


def _of_model(model: dict[str, Any], one: Measured, threads: object = None) -> dict[str, Any]:
    shape = dict(model.get("architecture") or {})
    with contextlib.suppress(UserError, TypeError):  # only if we know all of its fields
        shape = config_to_json(config_from_json(shape))
    for name in ("num_classes", "dropout", "stochastic_depth", "gelu"):
        shape.pop(name, None)
    return {
        "model": str(model.get("name") or "unknown"),
        "size": _size(model.get("image_size")),
        "shape": json.dumps(shape, sort_keys=True) if shape else "",  # determines the speed
        "hardware": hardware(one.values["environment"], threads),
    }


def _suite_mean(one: Measured) -> str:
    """Mean of a suite, marked if tasks are missing or the protocol differs."""
    tasks, total = one.values["tasks"], _SUITES[one.kind][1]
    if not tasks:
        return "none yet"
    is_whole = len(tasks) == total and not one.values["missing"]
    marks = [] if is_whole else [f"partial: {len(tasks)} of {plural(total, 'task')}"]
    marks += ["changed protocol"] if one.values.get("changes") else []
    marks += ["other data"] if any(task.get("departs") for task in tasks.values()) else []
    return percent(one.values["mean"]) + (f" ({', '.join(marks)})" if marks else "")


def why_not_imagenet(values: dict[str, Any]) -> str | None:
    """Returns why an evaluation is not on the ImageNet validation set, which is recognised by its
    1000 synsets and its size: 50,000 images, 50 per class."""
    names = values.get("class_names") or []
    if len(names) != 1000 or {str(name)[:9] for name in names} != _synsets():
        return f"its {plural(len(names), 'class')} are not the 1000 of ImageNet"
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
    """Returns the hardware: the GPU, or the processor and its threads."""
    device = str(environment.get("device", "unknown"))
    if device != "cpu":
        return device
    count = environment.get("threads") if threads is None else threads
    return f"{environment.get('processor', 'cpu')}, {count} thread{'s' * (count != 1)}"


def percent(fraction: float) -> str:
    """Formats 0.8415 as 84.15."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"not a fraction: {fraction!r}")
    return f"{100 * fraction:.2f}"


def _spread(mean: float, deviation: float | None) -> str:
    return percent(mean) + ("" if deviation is None else f" +- {percent(deviation)}")


def _plain(value: float) -> str:
    return np.format_float_positional(value, 3, fractional=False, trim="-")


def _size(value: object) -> str:
    if isinstance(value, list) and len(value) == 2:
        return str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"
    return str(value) if isinstance(value, int) else "unknown"


def _cost(accuracy: dict[str, Any]) -> str | None:
    days = accuracy["days"]
    return None if days is None else f"{_plain(days)} on {accuracy['hardware']}"


def fastest(shape: str, found: list[Measured]) -> list[dict[str, Any]]:
    """Returns the fastest inference for models of this shape on each hardware."""
    best: dict[str, dict[str, Any]] = {}
    speeds = [speed for one in found for speed in one.speeds if shape and speed["shape"] == shape]
    for speed in sorted(speeds, key=lambda speed: -speed["speed"]):
        best.setdefault(speed["hardware"], speed)
    return list(best.values())


# Report


def _write(page: Page, found: list[Measured], left_out: list[str]) -> None:
    page.heading("MLP-Mixer: the paper's tables, and what was measured here")
    page.text(
        "Tables and rows named paper are printed in arXiv 2105.01601; speed and cost there are "
        f"of {published.HARDWARE}. Rows named measured here come from the files at the end of "
        "this page, by the numbers in brackets, on the hardware that they name: their speed "
        "and cost cannot be compared with the paper's. A dash is a missing value."
    )
    page.heading("Table 1: architectures")
    _write_table_1(page)
    page.heading("Table 2: transfer, throughput and cost")
    protocol = 'Mixer at 448 pixels, by "resize-crop"'
    _write_table(page, published.TABLE_2, protocol, ("px", "epochs"), _our_rows(found, 2))
    page.heading("Table 3: scale")
    _write_table(page, published.TABLE_3, 'by "resmall-crop"', ("VTAB-1k",), _our_rows(found, 3))
    page.heading("Figures 2 and 3: accuracy against cost and throughput")
    _draw_pareto(page, found)
    rows: dict[str, list[Cells]] = {}
    for one in found:
        for title, cells in one.rows:
            rows.setdefault(title, []).append(cells)
    for title, cells in rows.items():
        page.heading(title)
        if title in _TEXTS:
            page.text(_TEXTS[title])
        if title == _SCALE:
            _draw_data_scale(page, found)
        page.table("measured here", cells)
    page.heading("How it was measured")
    page.items([_how(one) for one in found])
    if left_out:
        page.heading("Not understood, and left out")
        page.items(left_out)


def _how(one: Measured) -> str:
    """Returns one line on how something was measured: data, protocol, command, hardware, date."""
    values, environment = one.values, one.values["environment"]
    found = values.get("evaluation") or values
    keys = ("checkpoint", "data", "images", "protocol", "changes", "settings", "rounds", "seconds")
    shown = {key: found[key] for key in keys if found.get(key)}
    for result in values.get("results", []):
        shown |= {key: result.get(key) for key in ("data", "test_images", "protocol", "seeds")}
    if one.accuracy is not None and one.accuracy["not_imagenet"] is not None:
        shown["not ImageNet validation:"] = one.accuracy["not_imagenet"]
    shown |= {key: environment[key] for key in ("command", "date") if environment.get(key)}
    torch_version = (environment.get("packages") or {}).get("torch")
    made_with = f"with {NAME} {own_entry(environment)}, torch {torch_version}"
    parts = [f"[{one.number}] {one.kind}: {one.path}", _flat(shown)]
    return "; ".join([*parts, f"on {hardware(environment)}", made_with])


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(inner)}" for name, inner in value.items())
    return " ".join(map(_flat, value)) if isinstance(value, list | tuple) else str(value)


def _write_table_1(page: Page) -> None:
    """Architectures; our parameter counts come from the models themselves."""
    head = "224 pixels, without the head"
    titles = ("layers", "patch P", "hidden size C", "sequence length S", "channel MLP D_C")
    printed: list[Cells] = [
        {head: title, **{column.name: column[at] for column in published.TABLE_1}}
        for at, title in enumerate((*titles, "token MLP D_S", "parameters (M)"), 2)
    ]
    page.table("paper", printed)
    counted: Cells = {head: "parameters"}
    for column in published.TABLE_1:
        with torch.device("meta"):
            counted[column.name] = f"{create_model(column.model, 224, 0).num_parameters:,}"
    page.table("measured here", [counted], "counted from our models")


def _write_table(
    page: Page,
    results: Sequence[published.Result],
    protocol: str,
    exclude: Sequence[str],
    ours: list[Cells],
) -> None:
    columns = {"pre-trained on": "data", "model": "model", "px": "pixels", "epochs": "epochs"}
    columns |= {"ImageNet": "imagenet", "ReaL": "real", "Avg 5": "avg5", "VTAB-1k": "vtab"}
    columns |= {f"img/s/core ({published.HARDWARE})": "throughput"}
    columns |= {f"{published.HARDWARE} core-days": "core_days"}
    columns = {title: name for title, name in columns.items() if title not in exclude}
    printed = [
        {title: getattr(result, name) for title, name in columns.items()} for result in results
    ]
    page.table("paper", printed, f"top-1 in per cent; {protocol}")
    if ours:
        page.table("measured here", ours, f"top-1 in per cent; {protocol}, or as marked")


def _our_rows(found: list[Measured], number: int) -> list[Cells]:
    """Our rows for Table 2 (resize-crop, and suites measured with it) or Table 3 (all others)."""
    columns = ("ImageNet", "ReaL", "Avg 5", "VTAB-1k", "img/s", "device-days", "how")
    rows: list[Cells] = []

    def row_for(source: str, model: str, size: str, column: str) -> Cells:
        """The model's row, or a new one if this column already has a value."""
        name = model if source == model else f"{model} ({source})"
        for row in rows:
            if (row["model"], row["px"], row[column]) == (name, size, None):
                return row
        checkpoint = find_checkpoint(source)
        trained = None if checkpoint is None else checkpoint.trained_on
        new: Cells = {"pre-trained on": trained, "model": name, "px": size}
        rows.append({**new, **dict.fromkeys(columns)})
        return rows[-1]

    def cite(row: Cells, *numbers: int) -> None:
        row["how"] = " ".join(
            [*filter(None, [str(row["how"] or "")]), *(f"[{n}]" for n in numbers)]
        )

    for one in found:
        accuracy = one.accuracy
        if accuracy and accuracy["not_imagenet"] is None and accuracy["table"] == number:
            row = row_for(accuracy["source"], accuracy["model"], accuracy["size"], "ImageNet")
            row["ImageNet"] = percent(accuracy["top1"]) + accuracy["mark"]
            if accuracy["real"] is not None:
                row["ReaL"] = percent(accuracy["real"]) + accuracy["mark"]
            fast = fastest(accuracy["shape"], found)
            row["img/s"] = "; ".join(
                f"{speed['images/s']} on {speed['hardware']}, {speed['precision']}"
                for speed in fast
            )
            row["device-days"] = _cost(accuracy)
            cite(row, one.number, *(speed["number"] for speed in fast))
    for one in found:
        tasks = one.values["tasks"].values() if one.kind in _SUITES else ()
        by = {task.get("resize") for task in tasks}
        if tasks and number == (3 if by == {"resmall-crop"} else 2):
            source = str(one.values.get("checkpoint") or one.model.get("source") or one.path)
            sizes = {str(task.get("image_size")) for task in tasks}
            size = sizes.pop() if len(sizes) == 1 else _size(one.model.get("image_size"))
            column = _SUITES[one.kind][0]
            row = row_for(source, str(one.model.get("name", source)), size, column)
            row[column] = _suite_mean(one)
            cite(row, one.number)
    return rows


def _draw_pareto(page: Page, found: list[Measured]) -> None:
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
    for name, title, panels, ours in (
        ("cost", "training cost", [figure_2, figure_3], cost),
        ("throughput", "throughput", [figure_3], fast),
    ):
        figure = figures.pareto_figure(panels, ours, throughput=name == "throughput")
        below = "Below: measured here, a panel for each hardware and data (at most 3)."
        page.figure(name, figure, f"Accuracy against {title}. {below if ours else ''}")


def _draw_data_scale(page: Page, found: list[Measured]) -> None:
    for one in found:
        if one.kind == "data-scale" and _points(one):
            settings = one.values["settings"]
            label = f"linear {settings['shots']}-shot top-1 (%)"
            source = str(settings.get("source") or one.values["data"]["source"])
            figure = figures.data_scale_figure(
                _points(one), label, str(settings["few_shot_data"]), source
            )
            caption = f"[{one.number}] Measured here, trained on {source}."
            page.figure(f"data_scale_{one.number}", figure, caption)


class Page:
    """A page written twice, as report.md and as report.html with embedded figures."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.figures = folder, list[Path]()
        self._markdown, self._html = list[str](), list[str]()

    def save(self) -> list[Path]:
        markdown, web = self.folder / "report.md", self.folder / "report.html"
        atomic_write(markdown, ("\n\n".join(self._markdown) + "\n").encode())
        atomic_write(web, html.page("MLP-Mixer: the paper's tables", self._html))
        return [markdown, web]

    def heading(self, text: str) -> None:
        self._add(f"{'##' if self._markdown else '#'} {_escaped(text)}", html.tag("h2", text))

    def text(self, text: str) -> None:
        self._add(_escaped(text), html.tag("p", text))

    def items(self, texts: Sequence[str]) -> None:
        self._add("\n".join(f"- {_escaped(text)}" for text in texts), html.items(texts))

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        (self.folder / "figures").mkdir(parents=True, exist_ok=True)
        path = self.folder / "figures" / name
        figures.save(figure, path)
        self.figures.append(path.with_name(f"{name}.png"))
        link = f"![{_escaped(caption)}](figures/{name}.png)"
        self._add(link, html.image(self.figures[-1], caption))
        self._add(f"{_escaped(caption)} ([SVG](figures/{name}.svg))", html.tag("p", caption))

    def table(self, origin: str, rows: Sequence[Cells], caption: str = "") -> None:
        """A table with a single origin, "paper" or "measured here"."""
        head = list(dict.fromkeys(column for row in rows for column in row))
        cells = [head, *([row.get(column) for column in head] for row in rows)]
        texts = [
            [origin, *("-" if value in (None, "") else str(value) for value in row)]
            for row in cells
        ]
        lines = [f"| {' | '.join(map(_escaped, row))} |" for row in texts]
        lines.insert(1, "| --- " * len(texts[0]) + "|")
        self._add(f"**{origin}** {_escaped(caption)}".strip(), html.tag("p", caption))
        self._add("\n".join(lines), html.table(texts, style=origin.split()[0]))

    def _add(self, markdown: str, html: str) -> None:
        self._markdown.append(markdown)
        self._html.append(html)


def _escaped(text: str) -> str:
    """Escapes everything that Markdown, or HTML in it, would interpret."""
    return re.sub(r"([\\`*_\[\]|#~!$])", r"\\\1", html.safe(" ".join(text.split())))
