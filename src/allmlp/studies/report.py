"""`mixer report`: the paper's Tables 1, 2 and 3 with what was measured here beside them.

report.md, report.html     the same report; the HTML needs no other file
pictures/                  accuracy against cost and against throughput, data scale: PNG and SVG

The paper's values come from `paper`, ours from files that our verbs wrote. They never share a
table, and never a panel of a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from allmlp.evaluation.throughput import count_parameters
from allmlp.io import atomic_write, check_not_inputs, check_output_folder, expand
from allmlp.models.catalog import create_model
from allmlp.studies import figures, paper
from allmlp.studies import report_sections as sections
from allmlp.studies.findings import Findings, collect
from allmlp.studies.measured_rows import Accuracy, accuracies, speed_of, speeds, table_rows
from allmlp.studies.pages import (
    Block,
    Heading,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)

_OURS_2 = ("pre-trained on", "model", "px", "ImageNet", "ReaL", "Avg 5", "VTAB-1k", "img/s")

_SUITES = "Avg 5 and VTAB-1k as the suites fit pictures, which suite.json names"


@dataclass(frozen=True)
class Report:
    """What a report was made of, and where it lies.

    Attributes:
        folder: of report.md, report.html and pictures/.
        findings: that it shows.
        pictures: that were drawn.
    """

    folder: Path
    findings: Findings
    pictures: list[Path]


def report(
    paths: Sequence[str | Path], output: str | Path = "report", *, overwrite: bool = False
) -> Report:
    """Writes the paper's tables with our measurements beside them, as Markdown and HTML.

    Args:
        paths: run folders, measurement files, and folders that are searched for them.
        output: the folder of the report.
        overwrite: replace a report that is there.

    Raises:
        UserError: nothing to report, a damaged file asked for by name, or the output is a file,
            has a report already, or lies in a run.
    """
    folder = expand(output)
    check_output_folder(folder, ("report.md", "report.html"), overwrite=overwrite)
    check_output_folder(folder / "pictures")
    findings = collect(paths)
    check_not_inputs([folder], (each.path for each in findings.measured))
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    blocks = _blocks(findings, folder / "pictures")
    atomic_write(folder / "report.md", to_markdown(blocks).encode())
    atomic_write(folder / "report.html", to_html(blocks, folder).encode())
    drawn = [folder / each.path for each in blocks if isinstance(each, Picture)]
    return Report(folder, findings, drawn)


def _blocks(findings: Findings, pictures: Path) -> list[Block]:
    return [
        Heading("MLP-Mixer: the paper's tables, and what was measured here", 1),
        Paragraph(
            "Tables and rows named paper are printed in arXiv 2105.01601; speed and cost there are "
            f"of {paper.HARDWARE}. Rows named measured here come from the files at the end of "
            "this page, by the numbers in brackets; their hardware is another, so that their speed "
            "and cost cannot be compared with the paper's. A dash is a value that nobody measured."
        ),
        *_table_1(),
        *_table_2(findings),
        *_table_3(findings),
        *_pictures(findings, pictures),
        *sections.few_shot(findings),
        *sections.data_scale(findings, pictures),
        *sections.suites(findings),
        *sections.other_data(findings),
        *sections.throughput(findings),
        *sections.training(findings),
        *sections.sources(findings),
    ]


def _table_1() -> list[Block]:
    """The architectures; parameters of ours are counted from the models themselves."""
    names = [each.name for each in paper.TABLE_1]
    fields = {
        "layers": "layers",
        "patch P": "patch",
        "hidden size C": "hidden",
        "sequence length S": "sequence",
        "channel MLP D_C": "channels_dim",
        "token MLP D_S": "tokens_dim",
        "parameters (M)": "parameters",
    }
    printed = [
        [title, *(str(getattr(each, field)) for each in paper.TABLE_1)]
        for title, field in fields.items()
    ]
    counted = []
    for each in paper.TABLE_1:
        with torch.device("meta"):
            model = create_model(each.model, 224, 0)
        counted.append(count_parameters(model))
    rows = [
        ["parameters", *(f"{each:,}" for each in counted)],
        ["parameters (M)", *(f"{each / 1e6:.1f}" for each in counted)],
    ]
    caption = "counted from our models at 224 pixels, without the head"
    return [
        Heading("Table 1: architectures"),
        Table("paper", ["224 pixels, without the head", *names], printed, left=1),
        Table("measured here", ["", *names], rows, left=1, caption=caption),
    ]


def _table_2(findings: Findings) -> list[Block]:
    head = ["pre-trained on", "model", "ImageNet", "ReaL", "Avg 5", "VTAB-1k"]
    head += [f"img/s/core ({paper.HARDWARE})", f"{paper.HARDWARE} core-days"]
    rows = [
        [
            *(each.data, each.model, each.imagenet, each.real, each.avg5, each.vtab),
            *(each.throughput, each.core_days),
        ]
        for each in paper.TABLE_2
    ]
    caption = 'top-1 in per cent; Mixer at 448 pixels, evaluated by "resize-crop"'
    return [
        Heading("Table 2: transfer, inference throughput and training cost"),
        Table("paper", head, rows, caption=caption),
        *_ours(findings, 2, f'ImageNet and ReaL by "resize-crop", at any size; {_SUITES}'),
    ]


def _table_3(findings: Findings) -> list[Block]:
    head = ["pre-trained on", "model", "px", "epochs", "ImageNet", "ReaL", "Avg 5"]
    head += [f"img/s/core ({paper.HARDWARE})", f"{paper.HARDWARE} core-days"]
    rows = [
        [
            *(each.data, each.model, str(each.pixels), str(each.epochs)),
            *(each.imagenet, each.real, each.avg5, each.throughput, each.core_days),
        ]
        for each in paper.TABLE_3
    ]
    caption = 'top-1 in per cent, evaluated by "resmall-crop"'
    return [
        Heading("Table 3: model and data scale"),
        Table("paper", head, rows, caption=caption),
        *_ours(
            findings,
            3,
            'ImageNet and ReaL by "resmall-crop", or by what stands in brackets; '
            f"{_SUITES}; and models whose speed alone is known",
        ),
    ]


def _ours(findings: Findings, table: int, caption: str) -> list[Block]:
    rows = [
        [row.data, row.model, row.image_size]
        + [row.cells.get(name) for name in (*_OURS_2[3:], "device-days")]
        + [_refs(row.numbers)]
        for row in table_rows(findings, table)
    ]
    if not rows:
        what = "Nothing measured here belongs beside this table. ImageNet's 50,000 validation "
        what += "images do: mixer evaluate MODEL --data SOURCE --output FOLDER"
        return [Paragraph(what)]
    head = [*_OURS_2, "device-days", "how"]
    return [Table("measured here", head, rows, caption=caption)]


def _refs(numbers: Iterable[int]) -> str:
    return " ".join(f"[{each}]" for each in sorted(numbers))


def _pictures(findings: Findings, folder: Path) -> list[Block]:
    found = accuracies(findings)
    cost = [_point(each, each.days, each.hardware or "") for each in found if each.days is not None]
    all_speeds = speeds(findings)
    fast = [
        _point(each, one.images_per_second, one.hardware)
        for each in found
        for one in speed_of(each.shape, all_speeds).values()
    ]
    panels = [("Figure 2, left: Table 2, and large L/16 of Table 3", paper.FIGURE_2)]
    panels += [("Figure 3, left: JFT-300M, 224 pixels", paper.FIGURE_3)]
    drawn = {
        "cost": figures.cost_figure(panels, cost),
        "throughput": figures.throughput_figure(
            [("Figure 3, right: JFT-300M, 224 pixels", paper.FIGURE_3)], fast
        ),
    }
    for name, figure in drawn.items():
        for kind in ("png", "svg"):
            figures.save_picture(figure, folder / f"{name}.{kind}")
    none = " Nothing was measured here that has both."
    texts = {
        "cost": "Accuracy against training cost. Above: the paper's, in TPUv3 core-days."
        + (_below(cost, "days of wall time on the named device") if cost else none),
        "throughput": "Accuracy against throughput. Above: the paper's, on a TPUv3 core."
        + (_below(fast, "images a second on the named hardware") if fast else none),
    }
    return [
        Heading("Figures 2 and 3: accuracy against cost and throughput"),
        *(Picture(f"pictures/{name}.png", text) for name, text in texts.items()),
    ]


def _point(accuracy: Accuracy, x: float, hardware: str) -> figures.Point:
    label = Path(accuracy.source).name or accuracy.model
    is_imagenet = accuracy.not_imagenet is None
    return figures.Point(label, x, accuracy.top1, hardware, accuracy.data, is_imagenet)


def _below(points: list[figures.Point], unit: str) -> str:
    groups = {(each.hardware, each.data) for each in points}
    left = len(groups) - figures.MOST_PANELS
    more = f" {left} more pairs of hardware and data are in the tables only." if left > 0 else ""
    return f" Below: measured here, in {unit}, a panel for each data and hardware.{more}"
