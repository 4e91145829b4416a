"""The tables: what was measured stands where it belongs, and nowhere else."""

import csv
import html
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from allmlp.errors import UserError
from allmlp.paper import figures, published
from allmlp.paper.tables import Tables, tables
from conftest import mixer, refused
from measurements import (
    few_shot,
    imagenet,
    measured,
    model,
    small_evaluation,
    suite,
    throughput,
    write,
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[figures.Point]]:
    """Nothing is drawn; the points of ours that would be, by the figure."""
    points: dict[str, list[figures.Point]] = {}

    def blank(panels: Any, ours: Any, *, throughput: bool) -> None:
        points["throughput" if throughput else "cost"] = list(ours)

    def save(figure: Any, path: Path) -> None:
        path.with_name(f"{path.name}.png").write_bytes(b"png")

    monkeypatch.setattr(figures, "pareto_figure", blank)

    monkeypatch.setattr(figures, "save", save)
    return points


def ours(found: Tables, title: str) -> list[dict[str, Any]]:
    """The rows measured here, of the section that begins with this title."""
    section = next(section for name, section in found.tables.items() if name.startswith(title))
    return [dict(row) for row in section["measured here"]]


def made(tmp_path: Path, **files: dict[str, Any]) -> Tables:
    return tables([write(tmp_path / "in", **files)], output=str(tmp_path / "out"))


def page(tmp_path: Path) -> str:
    return html.unescape((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("resize", "at"), [("resize-crop", "Table 2"), ("resmall-crop", "Table 3")]
)
def test_imagenet_stands_beside_the_table_of_its_protocol(tmp_path, drawn, resize, at):
    real = {"accuracy": 0.71, "images": 46_837}
    some = imagenet(protocol={"resize": resize}, real={**real, "images": 46_836}, model=model("b"))
    found = made(tmp_path, e=imagenet(protocol={"resize": resize}, real=real), f=some)
    cells, other = ours(found, at)
    assert (other["ImageNet"], other["ReaL"]) == ("61.23", None)  # not all images have a label
    assert (cells["ImageNet"], cells["ReaL"]) == ("61.23", "71.00")
    assert cells["model"] == "mixer_b16 (mixer_b16.i21k)"
    assert cells["pre-trained on"] == "ImageNet-21k"
    assert not any(cells[name] for name in ("Avg 5", "VTAB-1k", "img/s", "device-days"))
    for name, section in found.tables.items():
        assert ("61.23" in str(section)) == name.startswith(at), name
    text = page(tmp_path)
    assert all(words in text for words in ("as typed", "2026-11-21", "Test CPU, 2 threads"))


NAMES = imagenet()["class_names"]


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": NAMES[:999]},
        {"class_names": [f"class {at}" for at in range(1000)]},
        {"images": 49_999},
        {"per_class": [{"images": 49}, {"images": 51}]},
    ],
)
def test_what_is_not_imagenet_stands_in_no_column_of_the_papers(tmp_path, drawn, changes):
    real = {"accuracy": 0.71, "images": 46_837}
    found = made(tmp_path, e=imagenet(data="imagenet:validation", real=real, **changes))
    assert not any("61.23" in str(found.tables[name]) for name in found.tables if "Table" in name)
    assert [row["top-1"] for row in ours(found, "Accuracy on other data")] == ["61.23"]
    assert "not ImageNet validation" in page(tmp_path)


def test_throughput_names_its_hardware_and_is_in_no_column_of_the_papers(tmp_path, drawn):
    found = made(tmp_path, t=throughput(), e=small_evaluation())
    assert not any("12.35" in str(found.tables[name]) for name in found.tables if "Table" in name)
    rows = ours(found, "Throughput")
    assert [row["images/s"] for row in rows] == ["12.35", "3.21"]  # the third has none
    assert {row["hardware"] for row in rows} == {"Test CPU, 2 threads"}
    (point,) = drawn["throughput"]
    assert (point.x, point.accuracy) == (12.3456, 0.54321)
    assert (point.hardware, point.data) == ("Test CPU, 2 threads", "cifar10:test")


def test_throughput_joins_the_accuracy_of_the_same_shape_alone(tmp_path, drawn):
    newer = {**model()["architecture"], "pyramid": [], "token_groups": 1}  # as older files lack
    other = model(name="mixer_s16")
    other["architecture"] = {**other["architecture"], "hidden_dim": 512}
    files = {"a": imagenet(model={**model(), "architecture": newer})}
    found = made(tmp_path, t=throughput(), **files, b=imagenet(model=other, top1=0.4), c=imagenet())
    rows = ours(found, "Table 3")
    speed = "12.35 on Test CPU, 2 threads, float32"
    assert [(row["ImageNet"], row["img/s"]) for row in rows] == [
        *[("61.23", speed), ("40.00", ""), ("61.23", speed)]  # two of one model are two rows
    ]
    assert len(drawn["throughput"]) == 2


def test_several_labels_per_image(tmp_path, drawn):
    several = small_evaluation(mean_average_precision=0.5)
    del several["top1"]
    found = made(tmp_path, m=several)
    assert found.left_out == []
    (row,) = ours(found, "Accuracy on other data")
    assert row["mAP"] == "50.00"


def test_few_shot(tmp_path, drawn):
    (row,) = ours(made(tmp_path, f=few_shot()), "Few-shot accuracy")
    assert list(row) == ["model", "data", "1-shot", "5-shot", "how"]
    assert [*row.values()] == ["mixer_b16.i21k", "flowers", "21.11", "42.22", "[1]"]


def test_means_of_suites(tmp_path, drawn):
    found = made(
        tmp_path,
        whole=suite("vtab", 19, 19),
        part=suite("avg5", 3, 5),
        other=suite("avg5", 5, 5, checkpoint="runs/x", changes=["100 steps, not 500"]),
        few=suite("vtab", 3, 3, checkpoint="runs/y"),  # only says that nothing is missing
    )
    rows = ours(found, "Table 2")
    assert {(row["Avg 5"], row["VTAB-1k"]) for row in rows} == {
        ("70.00 (partial: 3 of 5 tasks)", "70.00"),
        ("70.00 (changed protocol)", None),
        (None, "70.00 (partial: 3 of 19 tasks)"),
    }

    assert "70.00" not in str(found.tables["Table 3: scale"])


def last_second(run: Path) -> float:
    """When the run last logged, a step or an evaluation."""
    steps = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    with (run / "results.csv").open(newline="") as file:
        ends = [float(row["seconds"]) for row in csv.DictReader(file)]
    return max(*ends, *(step["seconds"] for step in steps))


def test_a_run_folder(tmp_path, drawn, trained):
    run = shutil.copytree(trained.run_folder, tmp_path / "in" / "run")
    (run / "log.txt").write_text("run      recipe digits, seed 0: batch 64, 4 processes on cpu\n")
    found = tables([tmp_path / "in"], output=str(tmp_path / "out"))
    (point,) = drawn["cost"]
    assert point.x == pytest.approx(4 * last_second(run) / 86_400)
    assert point.accuracy == trained.test.top1
    assert ours(found, "Accuracy on other data")[0]["data"] == "digits:test"
    config = json.loads((run / "config.json").read_text())
    config["model"]["weights"] = "mixer_b16.i21k"  # then this is no cost of pre-training
    (run / "config.json").write_text(json.dumps(config))
    tables([tmp_path / "in"], output=str(tmp_path / "out"), overwrite=True)
    assert drawn["cost"] == []
    with pytest.raises(UserError, match="an input that is read"):
        tables([tmp_path / "in"], output=str(run / "plots"))


def everything(folder: Path) -> Path:
    return write(
        folder,
        a=imagenet(protocol={"resize": "resize-crop"}),
        b=imagenet(format="mlp_mixer measurement"),
        c=small_evaluation(),
        d=few_shot(),
        e=throughput(),
        f=suite("vtab", 19, 19),
        g=suite("avg5", 2, 5),
        h=measured("data-scale", rows=[]),
        i=measured("ablations", cells={}),
    )


def test_the_papers_rows_are_the_same_whatever_was_measured(tmp_path, drawn):
    one = tables([write(tmp_path / "one", f=few_shot())], output=str(tmp_path / "first"))
    every = tables([everything(tmp_path / "all")], output=str(tmp_path / "second"))
    assert len(every.measured) == 9
    first, second = (
        [row for section in found.tables.values() for row in section.get("paper", [])]
        for found in (one, every)
    )
    assert first == second
    assert len(first) == 7 + 10 + 26
    assert "Test CPU" not in str(first)


@pytest.mark.slow
def test_the_figures_and_the_page(tmp_path, real_figures):
    result = tables([everything(tmp_path / "in")], output=str(tmp_path / "out"))
    drawn = [path for path in result.files if path.suffix == ".png"]
    assert [path.name for path in drawn] == ["cost.png", "throughput.png"]
    for path in drawn:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 500
        assert pixels.std() > 10
    texts = (tmp_path / "out" / "figures" / "throughput.svg").read_text()
    assert all(text in texts for text in ("as printed", "measured here", "on Test CPU, 2 threads"))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/png;base64,iVBOR') == 2


@pytest.mark.slow
def test_no_label_hides_another_label_or_a_point():
    ours = [
        figures.Point(f"a model {at}", 10.0 + at % 3, 0.5 + at / 500, "GPU", "x")
        for at in range(12)
    ]
    panels = [("figure 2", published.FIGURE_2), ("figure 3", published.FIGURE_3)]
    for kind in (False, True):
        figure = figures.pareto_figure(panels, ours, throughput=kind)
        figure.draw_without_rendering()
        for axes in figure.axes:
            boxes = [Text.get_window_extent(label) for label in axes.texts]
            for at, box in enumerate(boxes):
                assert not box.count_overlaps(boxes[:at])
                points = [axes.transData.transform(label.xy) for label in axes.texts]
                assert not any(box.contains(x, y) for x, y in points)


def test_the_command(capsys, drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in" / "deep", e=small_evaluation(), f=few_shot(), t=throughput())
    (tmp_path / "in" / "settings.json").write_text("{}")
    (tmp_path / "in" / "other.json").write_text("not JSON")
    code, out, err = mixer(capsys, "paper", "tables", "in", "in/deep/e.json")
    assert (code, err) == (0, "")
    assert "1 evaluation, 1 few-shot, 1 throughput" in out
    assert "report/report.html" in out
    report = tmp_path / "report" / "report.html"
    assert "54.32" in report.read_text()
    assert mixer(capsys, "paper", "tables", "in/deep/f.json", "--overwrite")[0] == 0
    assert "54.32" not in report.read_text()


DAMAGED = json.dumps(few_shot())[:-200]


def test_what_is_not_understood_is_named(drawn, tmp_path, monkeypatch):
    def guarded(path: Path, *mode: Any, **given: Any) -> Any:
        if path.name in ("secret.json", "data_scale.json"):
            raise PermissionError(13, "Permission denied")
        return open(path, *mode, **given)

    monkeypatch.setattr(Path, "open", guarded)
    folder = write(tmp_path / "in", good=few_shot(), new=measured("flights"))
    (folder / "newer.json").write_text(json.dumps({**few_shot(), "version": 2}))
    (folder / "cut.json").write_text(DAMAGED)
    (folder / "less.json").write_text(json.dumps(measured("few-shot", results=[{"data": "x"}])))
    (folder / "more.json").write_text(json.dumps(small_evaluation(top1=1.5)))
    (folder / "nan.json").write_text(json.dumps(small_evaluation(top1=float("nan"))))
    (folder / "gone.json").symlink_to(folder / "nowhere")
    write(folder / "study" / "cells", cell=measured("flights"))  # a study covers its runs
    for file in ("secret.json", "study/data_scale.json"):
        os.close(os.open(folder / file, os.O_CREAT))
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text('{"recipe": "digits"}')
    (folder / "run" / "environment.json").write_text("{")
    result = tables([folder], output=str(tmp_path / "out"))
    names = sorted(Path(text.partition(": ")[0]).stem for text in result.left_out)
    assert names == ["cut", "data_scale", *["less", "more", "nan", "new", "newer", "run", "secret"]]
    assert "cut.json" in page(tmp_path)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "no run"),
        (["in/new.json"], "flights"),
        (["in/good.json", "in/cut.json"], "cut.json"),
        (["in/good.json", "--output", "in/cut.json"], "cut.json"),
    ],
)
def test_mistakes(capsys, tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "in", good=few_shot(), new=measured("flights"))
    (folder / "cut.json").write_text(DAMAGED)
    assert named in refused(capsys, tmp_path, "paper", "tables", *words)
