"""The report: what was measured stands where it belongs, and nowhere else."""

from __future__ import annotations

import csv
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from allmlp.studies import figures
from allmlp.studies.report import report
from measurements import (
    data_scale,
    few_shot,
    imagenet,
    measured,
    model,
    small_evaluation,
    suite,
    throughput,
    write,
)

TABLES = ("Table 1", "Table 2", "Table 3")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[figures.Point]]:
    """Nothing is drawn; the points of ours that would be, by the figure."""
    points: dict[str, list[figures.Point]] = {}

    def blank(name: str) -> Any:
        return lambda panels, ours: points.__setitem__(name, list(ours))

    monkeypatch.setattr(figures, "cost_figure", blank("cost"))
    monkeypatch.setattr(figures, "throughput_figure", blank("throughput"))
    monkeypatch.setattr(figures, "data_scale_figure", lambda *given: None)
    monkeypatch.setattr(figures, "save_picture", lambda figure, path: path.write_bytes(b"png"))
    return points


def sections(folder: Path) -> dict[str, str]:
    """The sections of report.md, by the beginning of their headings."""
    parts = (folder / "report.md").read_text(encoding="utf-8").split("\n## ")
    return {re.split(r"[:\n]", part)[0]: part for part in parts}


def ours(section: str) -> list[list[str]]:
    """The cells of the rows measured here, with the header first."""
    lines = [line for line in section.splitlines() if line.startswith("| measured here |")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")][1:] for line in lines]


def papers(folder: Path) -> list[str]:
    """Every line of the paper's tables."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.startswith("| paper |")]


def made(tmp_path: Path, **files: dict[str, Any]) -> dict[str, str]:
    return sections(report([write(tmp_path / "in", **files)], tmp_path / "out").folder)


@pytest.mark.parametrize(
    ("resize", "at"), [("resize-crop", "Table 2"), ("resmall-crop", "Table 3")]
)
def test_imagenet_stands_beside_the_table_of_its_protocol(tmp_path, drawn, resize, at):
    real = {"accuracy": 0.71, "images": 46_837}
    found = made(tmp_path, e=imagenet(protocol={"resize": resize}, real=real))
    header, row = ours(found[at])
    cells = dict(zip(header, row, strict=True))
    assert cells["ImageNet"] == "61.23"
    assert cells["ReaL"] == "71.00"
    assert cells["model"] == r"mixer\_b16 (mixer\_b16.i21k)"
    assert cells["pre-trained on"] == "ImageNet-21k"
    assert {cells[name] for name in ("Avg 5", "VTAB-1k", "img/s", "device-days")} == {"-"}
    for name, text in found.items():
        assert ("61.23" in text) == (name == at), name
    assert "mixer evaluation as typed; date 2026-11-21" in found["How it was measured"]
    assert "Test CPU, 2 threads" in found["How it was measured"]


NAMES = imagenet()["class_names"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"class_names": NAMES[:999]}, "its classes are 999, not 1000"),
        ({"class_names": None}, "its classes are unknown, not 1000"),
        ({"class_names": [f"class {at}" for at in range(1000)]}, "not those of ImageNet"),
        ({"class_names": [*NAMES[:999], NAMES[0]]}, "not those of ImageNet"),
        ({"images": 49_999}, "49,999 images, not 50,000"),
        ({"images": 10_000}, "10,000 images, not 50,000"),
        ({"per_class": [{"images": 49}, {"images": 51}]}, "not 50 images of each class"),
        ({"per_class": None}, "not 50 images of each class"),
    ],
)
def test_what_is_not_imagenet_stands_in_no_column_of_the_papers(tmp_path, drawn, changes, reason):
    real = {"accuracy": 0.71, "images": 46_837}
    found = made(tmp_path, e=imagenet(data="imagenet:validation", real=real, **changes))
    for name in TABLES:
        assert "61.23" not in found[name]
        assert "71.00" not in found[name]
    assert [row[5] for row in ours(found["Accuracy on other data"])] == ["top-1", "61.23"]
    assert reason in found["How it was measured"]


def test_real_counts_only_over_all_of_its_images(tmp_path, drawn):
    found = made(tmp_path, e=imagenet(real={"accuracy": 0.71, "images": 46_836}))
    header, row = ours(found["Table 3"])
    assert row[header.index("ReaL")] == "-"
    assert "71.00" not in "".join(found.values())


def test_throughput_names_its_hardware_and_is_in_no_column_of_the_papers(tmp_path, drawn):
    found = made(tmp_path, t=throughput(), e=small_evaluation())
    header, row = ours(found["Table 3"])
    assert row[header.index("img/s")] == "12.35 on Test CPU, 2 threads, float32"
    assert row[header.index("ImageNet")] == "-"
    assert row[header.index("model")] == r"mixer\_b16, speed alone"
    assert not ours(found["Table 2"])
    rows = ours(found["Throughput"])
    assert [each[6] for each in rows] == ["img/s", "12.35", "3.21"]  # the third has none
    assert [each[7] for each in rows[1:]] == ["Test CPU, 2 threads"] * 2
    (point,) = drawn["throughput"]
    assert (point.x, point.accuracy, point.is_imagenet) == (12.3456, 0.54321, False)
    assert (point.hardware, point.data) == ("Test CPU, 2 threads", "cifar10:test")


def test_an_older_file_may_lack_newer_settings_of_the_model(tmp_path, drawn):
    newer = {**model()["architecture"], "pyramid": [], "token_groups": 1}
    made(tmp_path, t=throughput(), a=imagenet(model={**model(), "architecture": newer}))
    assert len(drawn["throughput"]) == 1


def test_throughput_joins_the_accuracy_of_the_same_shape_alone(tmp_path, drawn):
    other = model(name="mixer_s16")
    other["architecture"] = {**other["architecture"], "hidden_dim": 512}
    found = made(tmp_path, t=throughput(), a=imagenet(), b=imagenet(model=other, top1=0.4))
    header, first, second, *rest = ours(found["Table 3"])
    assert not rest
    at = header.index("img/s")
    assert [first[at], second[at]] == ["12.35 on Test CPU, 2 threads, float32", "-"]
    assert len(drawn["throughput"]) == 1


def test_two_measurements_of_one_model_are_two_rows(tmp_path, drawn):
    found = made(tmp_path, a=imagenet(), b=imagenet(top1=0.5))
    header, *rows = ours(found["Table 3"])
    assert [row[header.index("ImageNet")] for row in rows] == ["61.23", "50.00"]
    assert [row[header.index("how")] for row in rows] == [r"\[1\]", r"\[2\]"]


def test_few_shot(tmp_path, drawn):
    found = made(tmp_path, f=few_shot())
    header, row, floor = ours(found["Few-shot accuracy"])
    assert header == ["model", "data", "1-shot", "5-shot", "how"]
    assert row == [r"mixer\_b16.i21k", "flowers", "21.11 +- 1.23", "42.22", r"\[1\]"]
    assert floor[0] == "random weights, the same architecture"
    assert floor[2:4] == ["3.33 +- 1.23", "-"]
    for name in TABLES:
        assert "21.11" not in found[name]


def test_means_of_suites(tmp_path, drawn):
    found = made(
        tmp_path,
        whole=suite("vtab", 19, 19),
        part=suite("transfer", 3, 5),
        other=suite("transfer", 5, 5, checkpoint="runs/x", changes=["100 steps, not 500"]),
    )
    header, *rows = ours(found["Table 2"])
    avg5, vtab = header.index("Avg 5"), header.index("VTAB-1k")
    assert {(row[avg5], row[vtab]) for row in rows} == {
        ("70.00 (partial: 3 of 5 tasks)", "70.00"),
        ("70.00 (changed protocol)", "-"),
    }
    text = found["Transfer, task by task"]
    assert "missing: task3, task4" in text
    assert "| measured here | task0 | 70.00 | 1.00 | 3 | folder0 |" in text
    assert not ours(found["Table 3"])


def test_a_suite_that_only_says_that_it_is_whole_is_partial(tmp_path, drawn):
    found = made(tmp_path, v=suite("vtab", 3, 3))
    assert "70.00 (partial: 3 of 19 tasks)" in found["Table 2"]


def test_data_scale(tmp_path, drawn):
    found = made(tmp_path, d=data_scale(partial=True, missing=["cells/x"]))
    text = found["Figure 2, right"]
    assert "partial: 1 run missing" in text
    _, row, *rest = ours(text)
    assert row[:6] == [r"mixer\_s16", "3 %", "1,350", "16.67", "30.30", "5.06 +- 0.20"]
    assert len(rest) == 7
    assert "pictures/data_scale_1.png" in text


def test_a_run_folder(tmp_path, drawn, trained):
    report([trained.run_folder], tmp_path / "out")
    found = sections(tmp_path / "out")
    header, row = ours(found["Training cost"])
    cells = dict(zip(header, row, strict=True))
    seconds = last_second(trained.run_folder)
    assert float(cells["device-days"]) == pytest.approx(seconds / 86_400, rel=0.01)
    assert cells["from"] == "random weights"
    assert cells["images seen"] == f"{64 * len_of_steps(trained.run_folder):,}"
    (point,) = drawn["cost"]
    assert point.accuracy == trained.test.top1
    assert not point.is_imagenet
    assert "digits:test" in found["Accuracy on other data"]


def len_of_steps(run: Path) -> int:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] + 1


def last_second(run: Path) -> float:
    """When the run was last heard of: the evaluation at its end comes after the last step."""
    with (run / "results.csv").open(newline="") as file:
        evaluated = [float(row["seconds"]) for row in csv.DictReader(file)]
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    return max(*evaluated, logged)


def test_a_fine_tuned_run_has_no_cost_of_pre_training(tmp_path, drawn, trained):
    run = tmp_path / "in" / "run"
    shutil.copytree(trained.run_folder, run)
    config = json.loads((run / "config.json").read_text())
    config["model"]["weights"] = "mixer_b16.i21k"
    (run / "config.json").write_text(json.dumps(config))
    (run / "log.txt").write_text("run      recipe digits, seed 0: batch 64, 4 processes on cpu\n")
    report([tmp_path / "in"], tmp_path / "out")
    assert drawn["cost"] == []
    cells = dict(zip(*ours(sections(tmp_path / "out")["Training cost"]), strict=True))
    days = 4 * last_second(run) / 86_400
    assert float(cells["device-days"]) == pytest.approx(days, rel=0.01)


def everything(folder: Path) -> Path:
    return write(
        folder,
        a=imagenet(protocol={"resize": "resize-crop"}),
        b=imagenet(),
        c=small_evaluation(),
        d=few_shot(),
        e=throughput(),
        f=suite("vtab", 19, 19),
        g=suite("transfer", 2, 5),
        h=data_scale(),
        i=measured("ablations", cells={}),
    )


def test_the_papers_rows_are_the_same_whatever_was_measured(tmp_path, drawn):
    report([write(tmp_path / "one", f=few_shot())], tmp_path / "first")
    report([everything(tmp_path / "all")], tmp_path / "second")
    first, second = papers(tmp_path / "first"), papers(tmp_path / "second")
    assert first == second
    assert len(first) == 8 + 11 + 27
    assert not any("Test CPU" in line for line in first)
    text = (tmp_path / "second" / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(re.match(r"\| (paper|measured here|---) \|", line) for line in rows)
    assert "ablations: " in sections(tmp_path / "second")["How it was measured"]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_strings_are_escaped(tmp_path, drawn):
    bad = "<script>alert('a|b')</script> `x` ![i](http://x) \udcff\n# head"
    values = few_shot(model=model(source=bad))
    values["results"][0]["data"] = bad
    task = suite("vtab", 1, 19, checkpoint=bad)
    files = {"e": small_evaluation(data=bad, model=model(name=bad, source=bad)), "f": values}
    scale = data_scale()
    for point in scale["points"]:
        point["label"] = bad
    made(tmp_path, **files, t=task, d=scale, u=measured(bad))
    page = Page()
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page.feed(html)
    assert page.open == []
    assert "script" not in page.tags
    assert "&lt;script&gt;" in html
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "![i](http" not in text
    assert r"a\|b" in text
    assert not any(line.startswith("# head") for line in text.splitlines())
    for rows in (part for part in text.split("\n\n") if part.startswith("| ")):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in rows.splitlines()}
        assert len(counts) == 1, rows


@pytest.mark.slow
def test_the_pictures_and_the_page(tmp_path):
    result = report([everything(tmp_path / "in")], tmp_path / "out")
    assert [each.name for each in result.pictures] == [
        "cost.png",
        "throughput.png",
        "data_scale_8.png",
    ]
    for path in result.pictures:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 500
        assert pixels.std() > 10
        svg = ElementTree.parse(path.with_suffix(".svg"))
        assert svg.getroot().tag.endswith("svg")
    texts = (tmp_path / "out" / "pictures" / "throughput.svg").read_text()
    assert "paper (TPUv3), as printed" in texts
    assert "measured here" in texts
    assert "on Test CPU, 2 threads" in texts
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert len(page.images) == 3
    assert all(each.startswith("data:image/png;base64,iVBOR") for each in page.images)
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_labels_cover_no_point_and_no_other_label():
    from allmlp.studies import paper

    figure = figures.cost_figure([("Figure 2", paper.FIGURE_2)], [])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(paper.FIGURE_2)
    overlaps = [(a, b) for at, a in enumerate(boxes) for b in boxes[:at] if a.overlaps(b)]
    assert not overlaps
