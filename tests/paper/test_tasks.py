"""The table of VTAB's tasks, and how a user's data serves one."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import allmlp as am
from allmlp.data.sources import open_subset
from allmlp.paper.suites import named_tasks, plan_of, resolved
from allmlp.paper.tasks import AVG5, VTAB
from conftest import draw, make_class_folder


def test_the_table():
    assert len(VTAB) == 19
    groups = Counter(task.group for task in VTAB.values())
    assert groups == {"natural": 7, "specialised": 4, "structured": 8}
    assert sum(task.num_classes for task in VTAB.values()) == 940
    assert [name for name, task in VTAB.items() if task.image_size == 224] == [
        *("cifar100", "svhn", "eurosat", "dsprites_x", "dsprites_orientation")
    ]
    assert {task.image_size for task in VTAB.values()} == {224, 448}
    assert [name for name, task in VTAB.items() if not task.crop] == [
        *("clevr_count", "clevr_distance", "dmlab", "kitti_distance", "dsprites_x")
    ]
    assert [name for name, task in VTAB.items() if not task.flip] == [
        *("dsprites_x", "dsprites_orientation", "smallnorb_azimuth")
    ]
    assert len({(task.tfds, task.name) for task in VTAB.values()}) == 19


def test_the_classes_of_the_label_rules():
    rules = {name: task.labels for name, task in VTAB.items() if task.labels is not None}
    assert len(rules) == 5
    for name, rule in rules.items():
        assert rule.num_classes == VTAB[name].num_classes
        assert VTAB[name].number
    vehicle = rules["kitti_distance"].classes_of(np.array([-5.0, 8.0, 8.1, 20.0, 900.0, 1000.0]))
    assert vehicle.tolist() == [0, 0, 1, 1, 2, 3]
    nearest = rules["clevr_distance"].classes_of(np.array([7.0, 8.5, 9.0, 9.5, 10.0, 10.1]))
    assert nearest.tolist() == [0, 1, 2, 3, 4, 5]


def make_list(
    folder: Path, images: dict[str, int], label: Callable[[int], int] = lambda at: at % 7
) -> str:
    """A list of very many images, the first of which is there; returns its name."""
    folder.mkdir(exist_ok=True)
    draw(0).save(folder / f"{next(iter(images))}0.png")
    lines = ["path,label,split"]
    for split, many in images.items():
        lines += [f"{split}{at}.png,{label(at)},{split}" for at in range(many)]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "list.csv")


@pytest.mark.parametrize(
    ("name", "images", "rule", "final", "chosen"),
    [
        # the index ranges of the suite
        ("dtd", {"train": 1880, "val": 1880, "test": 50}, "official", None, "validation[:200]"),
        ("pets", {"train": 3680, "test": 30}, "official", None, "train[2944:3144]"),
        ("smallnorb_azimuth", {"train": 1001, "test": 500}, "official", None, "test[:200]"),
        # 1,000 images and fewer: all of them
        ("pets", {"train": 1000, "test": 30}, "own", ("train[:800]", "train[800:]"), "train[800:]"),
        ("dtd", {"train": 800, "val": 200, "test": 9}, "own", None, "validation[:200]"),
        ("dtd", {"train": 50, "val": 20, "test": 9}, "own", None, "validation[:20]"),
        ("dtd", {"train": 50, "val": 20}, "own", ("train[:40]", "train[40:]"), "train[40:]"),
        # where the ranges do not fit
        ("pets", {"train": 1500, "test": 30}, "first", None, "train[800:1000]"),
        ("pets", {"train": 1500, "val": 300, "test": 30}, "first", None, "validation[:200]"),
        ("pets", {"train": 1500, "val": 30, "test": 30}, "first", None, "train[800:1000]"),
        ("eurosat", {"train": 1500}, "first", None, "train[800:1000]"),
        ("dtd", {"train": 1500, "val": 300}, "first", None, "train[800:1000]"),
    ],
)
def test_what_is_taken(tmp_path, name, images, rule, final, chosen):
    plan = plan_of(VTAB[name], make_list(tmp_path, images))
    assert plan.rule == rule
    assert plan.grid.splits["validation"] == (chosen,)
    assert plan.final.splits["train"] == (*plan.grid.splits["train"], chosen)
    assert final is None or plan.final.splits["train"] == final
    splits, grid = open_subset(plan.final), open_subset(plan.grid)
    number = len(grid["train"]) + len(grid["validation"])
    assert len(splits["train"]) == number == plan.images["train"]
    assert len(splits["test"]) == plan.images["test"] > 0
    assert plan.num_classes == 7
    text = "\n".join(plan.describe())
    assert f"7 classes, not {VTAB[name].num_classes}" in text
    assert ("train images, not 1,000" in text) == (number != 1000)


def test_nothing_that_is_measured_on_is_trained_on(tmp_path):
    """Each row of the list has a class of its own."""
    for name, images in [("eurosat", {"train": 1300}), ("pets", {"train": 900, "val": 40})]:
        plan = plan_of(VTAB[name], make_list(tmp_path, images, lambda at: at))
        train, test = (open_subset(plan.final)[split] for split in ("train", "test"))
        if name == "eurosat":
            assert not set(train.labels) & set(test.labels)
            assert sorted([*train.labels, *test.labels]) == list(range(1300))
        else:
            assert plan.final.splits["test"] == ("validation",)
            assert not any("validation" in part for part in plan.final.splits["train"])


def test_classes_in_order_are_spread(tmp_path):
    """The first 800 images of class folders would be of a class or two."""
    make_class_folder(tmp_path, {"a": 1})
    lines = ["path,label,split"]
    lines += [f"a/{at}.png,{at // 300},train" for at in range(1200)] + ["b/0.png,0,test"] * 4
    (tmp_path / "list.csv").write_text("\n".join(lines))
    plan = plan_of(VTAB["pets"], str(tmp_path / "list.csv"))
    assert np.bincount(open_subset(plan.final)["train"].labels).tolist() == [250] * 4


def test_labels_that_are_numbers(tmp_path):
    raw = make_list(tmp_path / "raw", {"train": 300, "test": 20}, lambda at: at % 40)
    plan = plan_of(VTAB["dsprites_orientation"], raw)
    assert plan.final.labels == VTAB["dsprites_orientation"].labels
    assert plan.num_classes == 16
    assert "labels: label_orientation, 40 values in 16 bins" in plan.notes
    test = open_subset(plan.final)["test"]
    assert test.labels.tolist() == [int(n / 2.5) for n in range(20)]
    done = make_list(tmp_path / "done", {"train": 300, "test": 20}, lambda at: at % 16)
    plan = plan_of(VTAB["dsprites_orientation"], done)
    assert plan.final.labels is None
    assert "labels: the classes 0 to 15, used directly" in plan.notes
    wrong = make_list(tmp_path / "wrong", {"train": 300, "test": 20}, lambda at: at % 41)
    with pytest.raises(am.UserError, match="the label '40' has no class by the rule"):
        plan_of(VTAB["dsprites_orientation"], wrong)


def test_all_of_a_source(tmp_path):
    source = make_list(tmp_path, {"train": 30, "val": 20, "test": 10})
    plan = plan_of(AVG5["flowers102"], source)
    assert plan.final.splits == {"train": ("train", "validation"), "test": ("test",)}
    assert (plan.rule, plan.grid, plan.images["train"]) == ("whole", None, 50)
    source = make_list(tmp_path, {"train": 30, "val": 20})
    plan = plan_of(AVG5["imagenet"], source)
    assert plan.final.splits == {"train": ("train",), "test": ("validation",)}


@pytest.mark.parametrize("task", [VTAB["pets"], AVG5["pets"]], ids=["vtab", "avg5"])
def test_data_that_cannot_serve(tmp_path, task):
    make_class_folder(tmp_path / "data" / "train", {"a": 3, "b": 3})
    with pytest.raises(am.UserError, match="the data has no images to measure on"):
        plan_of(task, str(tmp_path / "data"))
    make_class_folder(tmp_path / "one" / "train", {"a": 30})
    make_class_folder(tmp_path / "one" / "test", {"a": 3})
    with pytest.raises(am.UserError, match="only one class, 'a'"):
        plan_of(task, str(tmp_path / "one"))
    with pytest.raises(am.UserError, match="the data has no train split"):
        plan_of(task, f"{tmp_path / 'one'}:test")


def test_the_names_of_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sub" / "tasks.json"
    file.parent.mkdir()
    file.write_text('{"svhn": "digits", "dtd": "here.csv#label=x", "pets": "hf:a/b"}')
    found = named_tasks(["cifar100=x*.parquet#label=fine_label"], str(file), VTAB)
    assert found == {
        "cifar100": f"{tmp_path}/x*.parquet#label=fine_label",
        "dtd": f"{tmp_path}/sub/here.csv#label=x",
        "pets": "hf:a/b",
        "svhn": "digits",
    }
    assert list(found) == [name for name in VTAB if name in found]
    assert resolved("/abs:test", "/other") == "/abs:test"


@pytest.mark.parametrize(
    ("assignments", "text", "named"),
    [
        (["cifar10=x"], None, "cifar10"),
        (["pets"], None, "pets"),
        (["pets=digits"], '{"pets": "digits"}', "pets"),
        ([], "{}", "no task"),
        ([], '{"pets": 3}', "tasks.json"),
        ([], None, "no.json"),
    ],
)
def test_wrong_names(tmp_path, assignments, text, named):
    file = None
    if text is not None or named == "no.json":
        file = str(tmp_path / ("tasks.json" if text else "no.json"))
        Path(file).write_text(text) if text else None
    with pytest.raises(am.UserError, match=named):
        named_tasks(assignments, file, VTAB)
