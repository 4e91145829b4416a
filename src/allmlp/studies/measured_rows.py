"""Rows of what was measured, for the tables of a report, and how each was measured.

What may stand in a column of the paper's: an accuracy only if it is of the ImageNet validation
images, a mean only with a mark where tasks are missing. Nothing measured here was on a TPUv3.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np

from allmlp.errors import UserError, plural
from allmlp.evaluation.real import IMAGES
from allmlp.models.catalog import config_from_json, config_to_json
from allmlp.names import NAME, own_entry
from allmlp.studies.findings import Findings, Measured
from allmlp.weights.checkpoints import find_checkpoint

REAL_IMAGES = 46_837  # that have a ReaL label
_DAY = 86_400.0
_SUITE_TASKS = {"transfer": 5, "vtab": 19}
_SUITE_NAMES = {"transfer": "Avg 5", "vtab": "VTAB-1k"}


@dataclass(frozen=True)
class Accuracy:
    """A top-1 accuracy of one model on one set of images.

    Attributes:
        model: its name; `source`: where its weights come from.
        image_size: (H, W), as text.
        shape: what models of the same speed have in common.
        data, images, top1, real: what was measured; `real` is None without ReaL labels.
        resize: how the pictures were fitted; None where that is not known.
        departs: that, where it is neither of the paper's protocols; "" where it is.
        not_imagenet: why this is not ImageNet's top-1; None where it is.
        days, hardware: of its training from random weights; None where that is not known.
        number: of the measurement.
    """

    model: str
    source: str
    image_size: str
    shape: str
    data: str
    images: int
    top1: float
    real: float | None
    resize: str | None
    departs: str
    not_imagenet: str | None
    days: float | None
    hardware: str | None
    number: int


@dataclass(frozen=True)
class Speed:
    """The best throughput of one model on one machine."""

    model: str
    image_size: str
    shape: str
    mode: str
    precision: str
    compiled: bool
    batch_size: int
    images_per_second: float
    hardware: str
    number: int


@dataclass
class Row:
    """A row of ours for Table 2 or Table 3."""

    model: str
    data: str | None
    image_size: str | None
    cells: dict[str, str] = field(default_factory=dict)
    numbers: set[int] = field(default_factory=set)


def accuracies(findings: Findings) -> list[Accuracy]:
    """Returns every accuracy on a set of images: of evaluations, and of runs at their end."""
    found = []
    for each in findings.of("evaluation", "run"):
        is_run = each.kind == "run"
        values = each.values["evaluation"] if is_run else each.values
        if values is None:
            continue
        model = each.values.get("model") or {}
        trained_here = is_run and each.values["config"].get("model", {}).get("weights") is None
        days = days_of(each) if trained_here and each.values["seconds"] > 0 else None
        real = values.get("real")
        reason = why_not_imagenet(values)
        is_whole = real is not None and real["images"] == REAL_IMAGES and reason is None
        protocol = values.get("protocol") or model.get("preprocessing") or {}
        found.append(
            Accuracy(
                model=str(model.get("name", "unknown")),
                source=str(model.get("source") or each.path),
                image_size=_size(model.get("image_size")),
                shape=_shape(model),
                data=values["data"],
                images=values["images"],
                top1=values["top1"],
                real=real["accuracy"] if is_whole and real is not None else None,
                resize=protocol.get("resize"),
                departs=_departs(protocol),
                not_imagenet=reason,
                days=days,
                hardware=None if days is None else hardware(each.values["environment"]),
                number=each.number,
            )
        )
    return found


def _departs(protocol: dict[str, Any]) -> str:
    """Returns a protocol in words where it is neither of the paper's, 224 of 256 and so on."""
    resize, crop = protocol.get("resize"), protocol.get("crop")
    if resize is None:
        return "protocol unknown"
    if resize == "squash":
        return "squash"
    return "" if crop is None or abs(crop - 0.875) < 1e-6 else f"{resize} {crop:.4g}"


def why_not_imagenet(values: dict[str, Any]) -> str | None:
    """Returns why an evaluation is not on the ImageNet validation images; None where it is.

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
    text = files("allmlp.weights").joinpath("imagenet_1k_classes.txt").read_text("utf-8")
    return frozenset(line[:9] for line in text.splitlines())


def days_of(run: Measured) -> float:
    """Returns the wall time of a run times its processes, in days."""
    return run.values["seconds"] * run.values["processes"] / _DAY


def hardware(environment: dict[str, Any], threads: object = None) -> str:
    """Returns what computed: the GPU, or the processor and its threads."""
    device = str(environment.get("device", "unknown"))
    if device != "cpu":
        return device
    count = environment.get("threads") if threads is None else threads
    return f"{environment.get('processor', 'cpu')}, {count} thread{'s' * (count != 1)}"


def speeds(findings: Findings) -> list[Speed]:
    """Returns the best throughput of every model that was measured."""
    found = []
    for each in findings.of("throughput"):
        for values in each.values["models"]:
            if values["best"] is None:
                continue
            model, best = values["model"], values["best"]
            threads = values.get("threads")
            found.append(
                Speed(
                    model=str(model.get("name") or values.get("name") or "unknown"),
                    image_size=_size(model.get("image_size")),
                    shape=_shape(model),
                    mode=str(values.get("mode")),
                    precision=str(values.get("precision")),
                    compiled=bool(values.get("compiled")),
                    batch_size=best["batch_size"],
                    images_per_second=best["images_per_second"],
                    hardware=hardware(each.values["environment"], threads),
                    number=each.number,
                )
            )
    return found


def speed_of(shape: str, all_speeds: list[Speed]) -> dict[str, Speed]:
    """Returns the fastest inference of models of this shape on each hardware."""
    fastest: dict[str, Speed] = {}
    for each in all_speeds:
        if each.mode == "inference" and each.shape == shape and shape:
            old = fastest.get(each.hardware)
            if old is None or each.images_per_second > old.images_per_second:
                fastest[each.hardware] = each
    return fastest


def table_rows(findings: Findings, table: int) -> list[Row]:
    """Returns our rows for Table 2 ("resize-crop", suites) or Table 3 ("resmall-crop").

    Models whose throughput alone is known stand in Table 3.
    """
    rows: dict[tuple[str, str | None, int], Row] = {}
    all_speeds, used = speeds(findings), set[str]()

    def row(source: str, model: str, size: str | None, cell: str) -> Row:
        """Returns the model's row; another where it has a value of this column already."""
        again = 0
        while (source, size, again) in rows and cell in rows[source, size, again].cells:
            again += 1
        checkpoint = find_checkpoint(source)
        trained = None if checkpoint is None else checkpoint.trained_on
        name = model if source == model else f"{model} ({source})"
        return rows.setdefault((source, size, again), Row(name, trained, size))

    for each in accuracies(findings):
        if each.not_imagenet is not None:
            continue
        used |= {each.shape} - {""}
        if (2 if each.resize == "resize-crop" else 3) != table:
            continue
        own = row(each.source, each.model, each.image_size, "ImageNet")
        mark = f" ({each.departs})" if each.departs else ""
        own.cells["ImageNet"] = percent(each.top1) + mark
        if each.real is not None:
            own.cells["ReaL"] = percent(each.real) + mark
        if each.days is not None:
            own.cells["device-days"] = f"{plain(each.days)} on {each.hardware}"
        fast = speed_of(each.shape, all_speeds).values()
        if fast:
            own.cells["img/s"] = "; ".join(_speed_text(one) for one in fast)
        own.numbers |= {each.number, *(one.number for one in fast)}
    for each in findings.of("transfer", "vtab"):
        if suite_table(each) == table and each.values["mean"] is not None:
            model = each.values.get("model") or {}
            source = str(each.values.get("checkpoint") or model.get("source") or each.path)
            sizes = {str(task.get("image_size")) for task in each.values["tasks"].values()}
            size = sizes.pop() if len(sizes) == 1 else _size(model.get("image_size"))
            name = _SUITE_NAMES[each.kind]
            own = row(source, str(model.get("name", source)), size, name)
            own.cells[name] = suite_mean(each)
            own.numbers.add(each.number)
    if table == 3:
        for each in all_speeds:
            if each.mode == "inference" and each.shape not in used:
                name = f"{each.model}, speed alone"
                key = (f"speed of {each.shape} {each.model}", each.image_size, 0)
                own = rows.setdefault(key, Row(name, None, each.image_size))
                text = _speed_text(each)
                own.cells["img/s"] = "; ".join(filter(None, [own.cells.get("img/s"), text]))
                own.numbers.add(each.number)
    return list(rows.values())


def suite_table(suite: Measured) -> int:
    """Returns which table a suite belongs to, by how its tasks fit pictures to the model."""
    fits = {each.get("resize") for each in suite.values["tasks"].values()}
    return 3 if fits == {"resmall-crop"} else 2


def suite_mean(suite: Measured) -> str:
    """Returns the mean of a suite, marked where tasks are missing or the protocol is another."""
    mean, tasks = suite.values["mean"], suite.values["tasks"]
    if mean is None:
        return "none yet"
    done = sum(each.get("accuracy") is not None for each in tasks.values())
    total = _SUITE_TASKS[suite.kind]
    is_whole = done == total and not suite.values["partial"] and not suite.values["missing"]
    marks = [] if is_whole else [f"partial: {done} of {plural(total, 'task')}"]
    marks += ["changed protocol"] if suite.values.get("changes") else []
    marks += ["other data"] if any(each.get("departs") for each in tasks.values()) else []
    return percent(mean) + (f" ({', '.join(marks)})" if marks else "")


def percent(share: float) -> str:
    """Returns 84.15 of 0.8415."""
    return f"{100 * share:.2f}"


def plain(value: float) -> str:
    """Returns a small number with three digits that count: 0.000102."""
    return np.format_float_positional(value, 3, fractional=False, trim="-")


def _speed_text(speed: Speed) -> str:
    parts = [speed.hardware, speed.precision, "compiled" if speed.compiled else ""]
    rate = f"{speed.images_per_second:,.4g}"
    return f"{rate} on {', '.join(filter(None, parts))}"


def _size(value: object) -> str:
    if isinstance(value, list | tuple) and len(value) == 2:
        return str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"
    return str(value) if isinstance(value, int) else "unknown"


def _shape(model: dict[str, Any]) -> str:
    """Returns what decides the speed of a model, as text; "" where it is not known."""
    shape = dict(model.get("architecture") or {})
    with contextlib.suppress(UserError, TypeError):  # one that we know: with all of its fields
        shape = config_to_json(config_from_json(shape))
    for name in ("num_classes", "dropout", "stochastic_depth", "gelu"):
        shape.pop(name, None)
    return json.dumps(shape, sort_keys=True) if shape else ""


def how(each: Measured) -> str:
    """Returns how something was measured, as one line: data, protocol, command, hardware, date."""
    values, environment = each.values, each.values["environment"]
    parts = [f"[{each.number}] {each.kind}: {each.path}", *_what(each)]
    for name in ("command", "date"):
        if environment.get(name):
            parts.append(f"{name} {environment[name]}")
    packages = environment.get("packages") or {}
    threads = values.get("models", [{}])[0].get("threads") if each.kind == "throughput" else None
    versions = {NAME: own_entry(environment), "torch": packages.get("torch")}
    versions["Python"] = environment.get("python")
    text = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    return "; ".join([*parts, f"on {hardware(environment, threads)}", f"with {text}"])


def _what(each: Measured) -> Iterator[str]:
    """Yields what was measured, by kind."""
    values = each.values
    if each.kind in ("evaluation", "run"):
        evaluation = values["evaluation"] if each.kind == "run" else values
        if evaluation is None:
            yield "not at its end: no accuracy"
        else:
            split = f" ({values['split']} split)" if each.kind == "run" else ""
            yield f"data {evaluation['data']}{split}, {plural(evaluation['images'], 'image')}"
            if evaluation.get("protocol"):
                yield f"protocol {_flat(evaluation['protocol'])}"
            reason = why_not_imagenet(evaluation)
            if reason is not None:
                yield f"not ImageNet validation: {reason}"
    if each.kind == "few-shot":
        for one in values["results"]:
            parts = [f"{one.get('test_images', '?')} {one.get('test_split', 'test')} images"]
            parts += [f"{one.get('classes', '?')} classes", f"protocol {one.get('protocol')}"]
            seeds = one.get("seeds")
            yield f"data {one['data']}: {', '.join(parts)}, seeds {_flat(seeds)}"
    if each.kind == "throughput":
        yield f"{values.get('rounds')} rounds of {values.get('seconds')} s, best batch size"
    if each.kind in ("transfer", "vtab"):
        yield f"checkpoint {values.get('checkpoint')}, protocol {_flat(values.get('protocol'))}"
        if values.get("changes"):
            yield f"changed from it: {'; '.join(map(str, values['changes']))}"
    if each.kind == "data-scale":
        settings = values["settings"]
        where, seeds = settings["few_shot_data"], _flat(settings.get("few_shot_seeds"))
        yield f"trained on {values['data']['source']}"
        yield f"{settings['shots']}-shot accuracy on {where}, seeds {seeds}"


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_flat(each) for each in value)
    return str(value)
