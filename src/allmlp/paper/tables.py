"""The paper's Tables 1, 2 and 3 next to our own measurements, as a web page.

The paper's values and ours never share a table or a figure panel. An accuracy appears in an
ImageNet column only if it covers all 50,000 validation images; a mean with missing tasks is marked.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from allmlp import page as html
from allmlp.console import Reporter
from allmlp.errors import UserError, plural
from allmlp.evaluation.imagenet_real import IMAGES
from allmlp.evaluation.metrics import main_of
from allmlp.evaluation.result_file import read_measurement
from allmlp.io import atomic_write, check_not_inputs, check_output_folder, expand, parse_json
from allmlp.models.catalog import architecture_name, config_from_json, config_to_json, create_model
from allmlp.names import NAME, own_entry
from allmlp.options import make
from allmlp.paper import figures, published
from allmlp.paper.options import TablesOptions
from allmlp.training.run_folder import read_metrics, read_results
from allmlp.weights.checkpoints import find_checkpoint, imagenet_classes

REAL_IMAGES = 46_837  # images that have a ReaL label
_SUITES = {"avg5": ("Avg 5", 5), "vtab": ("VTAB-1k", 19)}
_STUDIES = {"data-scale", "permutation", "ablations", *_SUITES}
_KINDS = {"run", "evaluation", "few-shot", "throughput", *_STUDIES}
_OF_RUN = {"best", "test", "validation", "checkpoints", "plots", "tensorboard"}
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)
_OTHER = "Accuracy on other data"
_TEXTS = {
    _OTHER: "Not the 50,000 validation images of ImageNet, so in no column of the paper's tables.",
    "Few-shot accuracy": "Linear few-shot top-1 in per cent, mean over the draws.",
}
_OURS = ("ImageNet", "ReaL", "Avg 5", "VTAB-1k", "img/s", "device-days", "how")
Cells = dict[str, object]  # column -> value; None is a dash


@dataclass
class Measured:
    """A run folder or measurement file, and its contribution."""

    number: int  # the reference in table rows
    path: Path
    kind: str  # "run", or that of the measurement
    values: dict[str, Any]
    rows: list[tuple[str, Cells]] = field(default_factory=list)  # section, cells of our tables
    accuracy: dict[str, Any] | None = None  # on a set of images, if measured
    speeds: list[dict[str, Any]] = field(default_factory=list)  # of inference

    @property
    def model(self) -> dict[str, Any]:
        """As written by `describe` of the result file."""
        return self.values.get("model") or {}


@dataclass
class Tables:
    """A page of tables and figures, the measurements in it, and what was left out and why.

    `tables` holds the rows by section and origin, which is "paper" or "measured here".
    """

    folder: Path
    measured: list[Measured]
    left_out: list[str]
    tables: dict[str, dict[str, list[Cells]]] = field(default_factory=dict)
    figures: list[Path] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)  # HTML

    @property
    def files(self) -> list[Path]:
        return [self.folder / "report.html", *self.figures]

    def to_json(self) -> dict[str, Any]:
        measured = [{"kind": one.kind, "path": one.path} for one in self.measured]
        return {"files": self.files, "measured": measured, "left_out": self.left_out}

    def heading(self, title: str) -> None:
        self.tables[title] = {}
        self.parts += [html.tag("h2", title), html.tag("p", _TEXTS.get(title, ""))]

    def add(self, origin: str, rows: Sequence[Cells], caption: str = "") -> None:
        """Adds a table of one origin to the last section."""
        head = list(dict.fromkeys(column for row in rows for column in row))
        texts = [[origin, *(str(row.get(name) or "-") for name in head)] for row in rows]
        self.tables[next(reversed(self.tables))][origin] = list(rows)
        self.parts.append(html.tag("p", caption))
        self.parts.append(html.table(texts, [origin, *head], style=origin.split()[0]))

    def draw(self, name: str, figure: Figure, caption: str) -> None:
        path = self.folder / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figures.save(figure, path.with_suffix(""))
        self.figures.append(path)
        self.parts += [html.image(path, caption), html.tag("p", caption)]


def tables(
    paths: Sequence[str | Path], options: TablesOptions | None = None, **fields: Any
) -> Tables:
    """Writes the paper's tables next to our measurements."""
    options = make(TablesOptions, options, fields)
    folder = expand(options.output)
    check_output_folder(folder, ["report.html"], overwrite=options.overwrite)
    check_output_folder(folder / "figures")
    found, left_out = _collect(paths)
    check_not_inputs([folder], (one.path for one in found))
    page = Tables(folder, found, left_out)
    _fill(page, found)
    atomic_write(page.files[0], html.page("MLP-Mixer: the paper's tables", page.parts))
    return page


def show(result: Tables, _: TablesOptions) -> None:
    say = Reporter().say
    kinds = Counter(one.kind for one in result.measured)
    say(f"found    {', '.join(f'{count} {kind}' for kind, count in kinds.items())}")
    for text in result.left_out:
        say(f"left out {text}", style="yellow")
    for path in result.files:
        say(f"written  {path}")


# Reading


def _collect(paths: Sequence[str | Path]) -> tuple[list[Measured], list[str]]:
    """Returns the runs and measurements found, and what cannot be read with the reason."""
    found: dict[Path, Measured] = {}
    left_out: dict[Path, str] = {}
    for path in map(expand, paths):
        if not path.exists():
            raise UserError("no such file or folder", where=path)
        for place in _places(path):
            key = place.resolve()
            if key in found or key in left_out:
                continue
            try:
                found[key] = _read(place, len(found) + 1)
            except _DAMAGED as error:
                if path.is_file():  # it was named
                    raise
                text = error.what if isinstance(error, UserError) else f"damaged: {error}"
                left_out[key] = f"{place}: {' '.join(text.split())[:200]}"
    if not found:
        what = "; ".join(["no run and no measurement found", *[*left_out.values()][:3]])
        fix = "Give run folders, or files that evaluate, few-shot or benchmark wrote"
        raise UserError(what, where=", ".join(map(str, paths)) or None, fix=fix)
    return list(found.values()), list(left_out.values())


def _places(path: Path) -> Iterator[Path]:
    """Yields a file, or the run folders and measurement files in a folder."""
    if path.is_file():
        yield path
    for place, folders, files in os.walk(path):
        here, skipped = Path(place), set[str]()
        if {"config.json", "environment.json"} <= {*files}:
            yield here
            skipped |= _OF_RUN
        if "finetune.json" in files:  # only the final runs of a grid count
            skipped |= {"grid", "best"}
        kinds = {here / name: _kind_of(here / name) for name in sorted(files)}
        yield from (file for file, kind in kinds.items() if kind)
        if _STUDIES & {*kinds.values()}:  # its own file covers the runs
            skipped |= {*folders}
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in skipped)


def _kind_of(path: Path) -> str | None:
    """Returns the kind of a measurement, which stands at its beginning; None for other files."""
    if path.suffix != ".json" or path.name.startswith("."):
        return None
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            start = file.read(1000)
    except OSError:
        # Whoever reads all of it says why; a study's file covers its runs even so.
        return "vtab" if path.name == "suite.json" else path.stem.replace("_", "-")
    kind = re.search(rb'"kind": "([\w-]*)"', start)
    return None if b" measurement" not in start else kind[1].decode() if kind else "unknown"


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

    last = read_metrics(path)[-1:]
    # The last evaluation comes after the last logged step.
    ends = [float(row.get("seconds") or 0.0) for row in [*last, *read_results(path)]]
    log = path / "log.txt"
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
        "evaluation": read("test/evaluation.json") or read("validation/evaluation.json"),
        "days": max(ends, default=0.0) * int(processes[-1]) / 86_400,
    }


def _contribute(one: Measured) -> Iterator[tuple[str, Cells]]:
    """Yields (section, cells) of our tables; stores the accuracy and the speeds."""
    values = one.values
    evaluation = values if one.kind == "evaluation" else values.get("evaluation")
    of_several = {"mean_average_precision", "micro_f1"} & {*(evaluation or ())}
    if evaluation is not None and of_several and "top1" not in evaluation:
        main = main_of(evaluation)
        row: Cells = {"model": str(one.model.get("name")), "data": str(evaluation["data"])}
        row |= {"source": str(one.model.get("source") or one.path)}
        row |= {"images": f"{evaluation['images']:,}", main.title: percent(evaluation[main.name])}
        yield _OTHER, row
    elif evaluation is not None:
        one.accuracy = found = _accuracy(one, evaluation)
        if found["not_imagenet"] is not None:
            row = {name: found[name] for name in ("model", "source", "data", "px")}
            row |= {"images": f"{evaluation['images']:,}", "top-1": percent(found["top1"])}
            yield _OTHER, {**row, "device-days": found["device-days"]}
    if one.kind == "throughput":
        for entry in values["models"]:
            if entry["best"] is not None:
                speed = _speed(one, entry)
                if entry["mode"] == "inference":
                    one.speeds.append(speed)
                columns = ("model", "px", "mode", "precision", "batch", "images/s", "hardware")
                yield "Throughput", {name: speed[name] for name in columns}
    if one.kind == "few-shot":
        source = one.model.get("source") or one.model.get("name")
        for result in values["results"]:
            shots = {f"{shots}-shot": percent(mean) for shots, mean in result["mean"].items()}
            yield "Few-shot accuracy", {"model": source, "data": result["data"], **shots}
    if one.kind in _SUITES:  # an error if they are not there
        _ = values["missing"], values["tasks"] and _suite_mean(one)


def _accuracy(one: Measured, found: dict[str, Any]) -> dict[str, Any]:
    """The result of an evaluation in the form that the tables and figures need."""
    real: dict[str, Any] = found.get("real") or {"images": None}
    model = _of_model(one.model, one)
    protocol = found.get("protocol") or one.model.get("preprocessing") or {}
    resize, crop = protocol.get("resize"), protocol.get("crop")
    mark = ""
    if resize not in ("resmall-crop", "resize-crop") or crop not in (None, 0.875):
        with_crop = crop is not None and (resize or "").endswith("crop")
        mark = f" ({resize or 'protocol unknown'}{f' {crop:.4g}' if with_crop else ''})"
    is_from_random = not one.values.get("config", {}).get("model", {}).get("weights")
    days, cost = (one.values.get("days") or None) if is_from_random else None, None
    if days is not None:
        shown = np.format_float_positional(days, 3, fractional=False, trim="-")
        cost = f"{shown} on {model['hardware']}"
    return {
        **model,
        "source": str(one.model.get("source") or one.path),
        "data": str(found["data"]),
        "top1": float(found["top1"]),
        "not_imagenet": why_not_imagenet(found),
        "days": days,
        "table": 2 if resize == "resize-crop" else 3,
        "ImageNet": percent(found["top1"]) + mark,
        "ReaL": percent(real["accuracy"]) + mark if real["images"] == REAL_IMAGES else None,
        "device-days": cost,
    }


def _speed(one: Measured, entry: dict[str, Any]) -> dict[str, Any]:
    speed = float(entry["best"]["images_per_second"])
    return {
        **_of_model(entry["model"], one, entry.get("threads")),
        "mode": entry.get("mode"),
        "precision": f"{entry.get('precision')}{', compiled' * bool(entry.get('compiled'))}",
        "batch": f"{entry['best']['batch_size']:,}",
        "images/s": f"{speed:,.4g}",
        "speed": speed,
    }


def _of_model(model: dict[str, Any], one: Measured, threads: object = None) -> dict[str, Any]:
    shape = dict(model.get("architecture") or {})
    with contextlib.suppress(UserError, TypeError):  # only if we know all of its fields
        shape = config_to_json(config_from_json(shape))
    for name in ("num_classes", "dropout", "stochastic_depth", "gelu"):
        shape.pop(name, None)
    return {
        "model": str(model.get("name") or "unknown"),
        "px": _size(model.get("image_size")),
        "shape": json.dumps(shape, sort_keys=True) if shape else "",  # determines the speed
        "number": one.number,
        "hardware": hardware(one.values["environment"], threads),
    }


def _suite_mean(one: Measured) -> str:
    """Mean of a suite, marked if tasks are missing or the protocol differs."""
    tasks, total = one.values["tasks"], _SUITES[one.kind][1]
    is_whole = len(tasks) == total and not one.values["missing"]
    marks = [] if is_whole else [f"partial: {len(tasks)} of {plural(total, 'task')}"]
    marks += ["changed protocol"] if one.values.get("changes") else []
    marks += ["other data"] if any(task.get("departs") for task in tasks.values()) else []
    return percent(one.values["mean"]) + (f" ({', '.join(marks)})" if marks else "")


def why_not_imagenet(values: dict[str, Any]) -> str | None:
    """Returns why an evaluation is not on the ImageNet validation set, which is recognised by its
    1000 synsets and its size: 50,000 images, 50 per class."""
    names = values.get("class_names") or []
    synsets = {str(name)[:9] for name in names}
    if len(names) != 1000 or synsets != {name[:9] for name in imagenet_classes()}:
        return f"its {plural(len(names), 'class')} are not the 1000 of ImageNet"
    if values["images"] != IMAGES:
        return f"{values['images']:,} images, not {IMAGES:,}"
    counts = {row.get("images") for row in values.get("per_class") or [{}]}
    return None if counts == {50} else "not 50 images of each class"


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


def _size(value: object) -> str:
    if isinstance(value, list):
        return "x".join(map(str, dict.fromkeys(value)))
    return "unknown" if value is None else str(value)


def _fastest(shape: str, found: list[Measured]) -> list[dict[str, Any]]:
    """Returns the fastest inference for models of this shape on each hardware."""
    best: dict[str, dict[str, Any]] = {}
    speeds = [speed for one in found for speed in one.speeds if shape and speed["shape"] == shape]
    for speed in sorted(speeds, key=lambda speed: -speed["speed"]):
        best.setdefault(speed["hardware"], speed)
    return list(best.values())


# Report


def _fill(page: Tables, found: list[Measured]) -> None:
    page.parts += [html.tag("h1", "MLP-Mixer: the paper's tables, and what was measured here")]
    introduction = (
        "Tables and rows named paper are printed in arXiv 2105.01601; speed and cost there are "
        f"of {published.HARDWARE}. Rows named measured here come from the files at the end of "
        "this page, by the numbers in brackets, on the hardware that they name: their speed "
        "and cost cannot be compared with the paper's. A dash is a missing value."
    )
    page.parts += [html.tag("p", introduction)]
    page.heading("Table 1: architectures")
    _table_1(page)
    page.heading("Table 2: transfer, throughput and cost")
    protocol = 'Mixer at 448 pixels, by "resize-crop"'
    _table(page, published.TABLE_2, protocol, ("px", "epochs"), _our_rows(found, 2))
    page.heading("Table 3: scale")
    _table(page, published.TABLE_3, 'by "resmall-crop"', ("VTAB-1k",), _our_rows(found, 3))
    page.heading("Figures 2 and 3: accuracy against cost and throughput")
    _draw_pareto(page, found)
    rows: dict[str, list[Cells]] = {}
    for title, cells in (row for one in found for row in one.rows):
        rows.setdefault(title, []).append(cells)
    for title, cells in rows.items():
        page.heading(title)
        page.add("measured here", cells)
    page.heading("How it was measured")
    page.parts.append(html.items(map(_how, found)))
    if page.left_out:
        page.heading("Not understood, and left out")
        page.parts.append(html.items(page.left_out))


def _how(one: Measured) -> str:
    """Returns one line: data, protocol, command, hardware, date."""
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


def _table_1(page: Tables) -> None:
    """Architectures; our parameter counts come from the models themselves."""
    head = "224 pixels, without the head"
    titles = ("layers", "patch P", "hidden size C", "sequence length S", "channel MLP D_C")
    printed: list[Cells] = [
        {head: title, **{column.name: column[at] for column in published.TABLE_1}}
        for at, title in enumerate((*titles, "token MLP D_S", "parameters (M)"), 2)
    ]
    page.add("paper", printed)
    counted: Cells = {head: "parameters"}
    for column in published.TABLE_1:
        with torch.device("meta"):
            counted[column.name] = f"{create_model(column.model, 224, 0).num_parameters:,}"
    page.add("measured here", [counted], "counted from our models")


def _table(
    page: Tables,
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
    printed = [{title: getattr(row, name) for title, name in columns.items()} for row in results]
    page.add("paper", printed, f"top-1 in per cent; {protocol}")
    if ours:
        page.add("measured here", ours, f"top-1 in per cent; {protocol}, or as marked")


def _our_rows(found: list[Measured], number: int) -> list[Cells]:
    """Our rows for Table 2 (resize-crop, and suites measured with it) or Table 3 (all others)."""
    rows: list[Cells] = []
    for accuracy in (one.accuracy for one in found if one.accuracy is not None):
        if accuracy["not_imagenet"] is None and accuracy["table"] == number:
            fast = _fastest(accuracy["shape"], found)
            row = _own_row(accuracy["source"], accuracy["model"], accuracy["px"])
            row |= {name: accuracy[name] for name in ("ImageNet", "ReaL", "device-days")}
            speeds = (f"{s['images/s']} on {s['hardware']}, {s['precision']}" for s in fast)
            row["img/s"] = "; ".join(speeds)
            row["how"] = " ".join(f"[{of['number']}]" for of in (accuracy, *fast))
            rows.append(row)
    for one in found:
        tasks = one.values["tasks"].values() if one.kind in _SUITES else ()
        by = {task.get("resize") for task in tasks}
        if tasks and number == (3 if by == {"resmall-crop"} else 2):
            source = str(one.values.get("checkpoint") or one.model.get("source") or one.path)
            sizes = {str(task.get("image_size")) for task in tasks}
            size = sizes.pop() if len(sizes) == 1 else _size(one.model.get("image_size"))
            new = _own_row(source, str(one.model.get("name", source)), size)
            title = _SUITES[one.kind][0]
            own = {"model": new["model"], "px": size, title: None}
            row = next((row for row in rows if own.items() <= row.items()), None)
            if row is None:
                rows.append(row := new)
            row[title] = _suite_mean(one)
            row["how"] = f"{row['how']} [{one.number}]" if row["how"] else f"[{one.number}]"
    return rows


def _own_row(source: str, model: str, size: str) -> Cells:
    checkpoint = find_checkpoint(source)
    trained = None if checkpoint is None else checkpoint.trained_on
    name = model if source == model else f"{model} ({source})"
    return {"pre-trained on": trained, "model": name, "px": size, **dict.fromkeys(_OURS)}


def _draw_pareto(page: Tables, found: list[Measured]) -> None:
    cost, fast = [], []
    for accuracy in (one.accuracy for one in found if one.accuracy is not None):
        label = Path(accuracy["source"]).name or accuracy["model"]
        top1, data = accuracy["top1"], accuracy["data"]
        if accuracy["days"] is not None:
            cost.append(figures.Point(label, accuracy["days"], top1, accuracy["hardware"], data))
        for speed in _fastest(accuracy["shape"], found):
            fast.append(figures.Point(label, speed["speed"], top1, speed["hardware"], data))
    figure_2 = ("Figure 2: Table 2, and large L/16 of Table 3", published.FIGURE_2)
    figure_3 = ("Figure 3: JFT-300M, 224 pixels", published.FIGURE_3)
    for name, title, panels, ours in (
        ("cost", "training cost", [figure_2, figure_3], cost),
        ("throughput", "throughput", [figure_3], fast),
    ):
        figure = figures.pareto_figure(panels, ours, throughput=name == "throughput")
        below = "Below: measured here, a panel for each hardware and data (at most 3)."
        page.draw(name, figure, f"Accuracy against {title}. {below if ours else ''}")
