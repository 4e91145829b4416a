"""The sections of a report that have no table of the paper's beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from allmlp.errors import plural
from allmlp.studies import figures, paper
from allmlp.studies.findings import NAMED_ONLY, Findings, Measured
from allmlp.studies.measured_rows import (
    Accuracy,
    accuracies,
    days_of,
    hardware,
    how,
    percent,
    plain,
    speeds,
    suite_mean,
)
from allmlp.studies.pages import Block, Heading, Listing, Paragraph, Picture, Table


def few_shot(findings: Findings) -> list[Block]:
    """Returns the table of the few-shot accuracies, and of random weights beside them."""
    measured = findings.of("few-shot")
    if not measured:
        return []
    tested = [each for one in measured for each in one.values["results"]]
    shots = sorted({int(number) for each in tested for number in each["mean"]})
    rows = []
    for each in measured:
        model, floor = each.values.get("model") or {}, each.values.get("floor")
        sets = [(str(model.get("source") or model.get("name")), each.values["results"])]
        sets += [("random weights, the same architecture", floor["results"])] if floor else []
        rows += [
            [
                name,
                str(result["data"]),
                *(_spread(result["mean"], result["deviation"], number) for number in shots),
                f"[{each.number}]",
            ]
            for name, results in sets
            for result in results
        ]
    head = ["model", "data", *(f"{number}-shot" for number in shots), "how"]
    caption = "linear few-shot top-1 in per cent, mean and standard deviation over the draws"
    return [Heading("Few-shot accuracy"), Table("measured here", head, rows, caption=caption)]


def _spread(means: dict[str, float], deviations: dict[str, Any], shots: int) -> str | None:
    mean, deviation = means.get(str(shots)), deviations.get(str(shots))
    if mean is None:
        return None
    return percent(mean) + ("" if deviation is None else f" +- {percent(deviation)}")


def data_scale(findings: Findings, folder: Path) -> list[Block]:
    """Returns the figure and the table of each data-scale study; draws into the folder."""
    blocks: list[Block] = []
    for each in findings.of("data-scale"):
        points, settings = each.values["points"], each.values["settings"]
        shots, where = settings["shots"], settings["few_shot_data"]
        if not points:
            continue
        source = each.values["data"]["source"]
        name = f"data_scale_{each.number}"
        figure = figures.data_scale_figure(
            points, f"linear {shots}-shot top-1 (%)", where, source, points[0]["steps"]
        )
        for kind in ("png", "svg"):
            figures.save_picture(figure, folder / f"{name}.{kind}")
        rows = [
            [
                point["label"],
                f"{100 * point['fraction']:.4g} %",
                f"{point['images']:,}",
                f"{point['epochs']:,.4g}",
                percent(point["validation"]),
                _spread({"0": point["few_shot"]}, {"0": point["deviation"]}, 0),
                str(point["runs"]),
                f"[{each.number}]",
            ]
            for point in points
        ]
        head = ["model", "share", "images", "epochs", "validation", f"{shots}-shot", "runs", "how"]
        caption = (
            f"{plural(points[0]['steps'], 'step')} on {source}; {shots}-shot accuracy on {where}"
        )
        if each.values["partial"]:
            caption += f"; partial: {plural(len(each.values.get('missing', [])), 'run')} missing"
        blocks += [
            Picture(f"pictures/{name}.png", f"Measured here [{each.number}]: {caption}."),
            Table("measured here", head, rows, left=1, caption=caption),
        ]
    if not blocks:
        return []
    epochs = ", ".join(f"{100 * share:g} %: {n}" for share, n in paper.DATA_SCALE.items())
    text = f"The paper's runs see shares of JFT-300M for these epochs: {epochs}; its figure prints "
    text += "no numbers."
    return [Heading("Figure 2, right: the number of training images"), Paragraph(text), *blocks]


def suites(findings: Findings) -> list[Block]:
    """Returns a table of the tasks of each suite."""
    blocks: list[Block] = []
    for each in findings.of("transfer", "vtab"):
        values = each.values
        rows = [
            [
                name,
                None if task.get("accuracy") is None else percent(task["accuracy"]),
                None if task.get("deviation") is None else percent(task["deviation"]),
                str(len(task.get("seeds") or [])),
                str(task.get("source") or ""),
            ]
            for name, task in values["tasks"].items()
        ]
        rows.append(["mean", suite_mean(each), None, None, ""])
        caption = f"{each.kind} of {values.get('checkpoint')} [{each.number}]"
        if values["missing"]:
            caption += f"; missing: {', '.join(map(str, values['missing']))}"
        head = ["task", "top-1", "deviation", "runs", "data"]
        blocks.append(Table("measured here", head, rows, left=1, caption=caption))
    return [Heading("Transfer, task by task"), *blocks] if blocks else []


def other_data(findings: Findings) -> list[Block]:
    """Returns the accuracies that belong in no column of the paper's."""
    found = [each for each in accuracies(findings) if each.not_imagenet is not None]
    if not found:
        return []
    rows = [
        [
            *(each.model, each.source, each.data, f"{each.images:,}", each.image_size),
            *(percent(each.top1), _cost(each), f"[{each.number}]"),
        ]
        for each in found
    ]
    head = ["model", "source", "data", "images", "px", "top-1", "device-days", "how"]
    text = "These are not accuracies on the 50,000 validation images of ImageNet, and stand in no "
    text += "column of the paper's."
    table = Table("measured here", head, rows, left=3, caption="top-1 in per cent")
    return [Heading("Accuracy on other data"), Paragraph(text), table]


def _cost(accuracy: Accuracy) -> str | None:
    return None if accuracy.days is None else f"{plain(accuracy.days)} on {accuracy.hardware}"


def throughput(findings: Findings) -> list[Block]:
    """Returns the table of all throughputs."""
    rows = [
        [
            *(each.model, each.image_size, each.mode, each.precision),
            "compiled" if each.compiled else "not compiled",
            f"{each.batch_size:,}",
            f"{each.images_per_second:,.4g}",
            each.hardware,
            f"[{each.number}]",
        ]
        for each in speeds(findings)
    ]
    head = ["model", "px", "mode", "precision", "compiled", "batch", "img/s", "hardware", "how"]
    return [Heading("Throughput"), Table("measured here", head, rows, left=1)] if rows else []


def training(findings: Findings) -> list[Block]:
    """Returns what the runs cost."""
    runs = findings.of("run")
    rows = []
    for each in runs:
        values, config = each.values, each.values["config"]
        weights = config.get("model", {}).get("weights")
        rows.append(
            [
                str(each.path),
                "random weights" if weights is None else str(weights),
                str(config.get("data", {}).get("source")),
                f"{values['steps']:,}" + ("" if values["finished"] else " (not at its end)"),
                f"{values['steps'] * config.get('batch_size', 0):,}",
                plain(days_of(each)),
                hardware(values["environment"]),
                f"[{each.number}]",
            ]
        )
    head = ["run", "from", "data", "steps", "images seen", "device-days", "device", "how"]
    caption = "wall time of the run, with reading and evaluation, times its processes"
    table = Table("measured here", head, rows, left=3, caption=caption)
    return [Heading("Training cost"), table] if rows else []


def sources(findings: Findings) -> list[Block]:
    """Returns how everything was measured, and what was left out."""
    blocks: list[Block] = [Heading("How it was measured")]
    blocks.append(Listing([how(each) for each in findings.measured]))
    named = [each for each in findings.measured if each.kind in NAMED_ONLY]
    if named:
        text = "Studies with tables and figures of their own, in their folders:"
        blocks += [Paragraph(text), Listing([_named(each) for each in named])]
    if findings.left_out:
        blocks.append(Heading("Not understood, and left out", 3))
        blocks.append(Listing([f"{path}: {why}" for path, why in findings.left_out]))
    return blocks


def _named(each: Measured) -> str:
    return f"[{each.number}] {each.kind}: {each.path.parent}"
