"""`mixer vtab` and `mixer transfer` as a user types them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import allmlp as am
from allmlp.studies import transfer as suites
from conftest import make_class_folder, mixer, tiny_model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: weights, and data with train/ and test/."""
    torch.manual_seed(0)
    am.save_model(tiny_model(4), tmp_path / "weights")
    make_class_folder(tmp_path / "data" / "train", {"ant": 6, "bee": 6})
    make_class_folder(tmp_path / "data" / "test", {"ant": 3, "bee": 3}, start=100)
    monkeypatch.chdir(tmp_path)
    return tmp_path


Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls: Calls = []
    for name in ("vtab", "transfer"):
        monkeypatch.setattr(suites, name, lambda *args, **given: calls.append((args, given)))
    return calls


def test_the_list(capsys):
    code, out, err = mixer(capsys, "vtab", "--list")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) > 19
    assert "clevr_count           structured         8     448   no       yes" in out
    assert "objects: n - 3" in out
    code, _, err = mixer(capsys, "vtab", "weights", "--list")
    assert code == 2
    assert "--list goes alone" in err


@pytest.mark.slow
def test_one_task(capsys, place):
    line = ("vtab", "weights", "--task", "pets=data", "--output", "out", "--image-size", 8)
    line += ("--steps", 2, "--batch-size", 4, "--grid", 0.01, "--seeds", 0, "--device", "cpu")
    code, out, _ = mixer(capsys, *line)
    assert code == 0
    first, *rest = out.splitlines()
    assert first == "suite    VTAB-1k, protocol paper: 1 of 19 tasks, seed 0"
    changed = "changed  not the official protocol: steps 2, batch size 4, image size 8, grid 0.01, "
    assert rest[0].startswith(changed)
    assert f"task     pets: {place}/data" in rest
    assert (
        "         the source's own splits: 12 images to train (train[:10], train[10:]), 2 of them "
        "to choose by (train[10:]), 6 to measure on (test)"
    ) in rest
    assert "         2 classes, where the task has 37" in rest
    assert "##### pets: task 1 of 1 to measure" in rest
    assert any(line.startswith("pets  own") for line in rest)
    assert any(line.startswith("mean of 1 of 19 tasks, partial: ") for line in rest)
    assert rest[-1] == "written  out/suite.json"
    again = mixer(capsys, *line)
    assert again[0] == 0
    assert again[1].splitlines()[-8:] == rest[-8:]
    assert "=====" not in again[1]


def test_what_is_handed_over(capsys, place, handed_over):
    (place / "tasks.json").write_text('{"dtd": "data"}')
    line = ("vtab", "w", "--tasks", "tasks.json", "--task", "svhn=digits", "--output", "o")
    code, _, err = mixer(capsys, *line, "--protocol", "lightweight", "--seeds", 4, 5)
    assert (code, err) == (0, "")
    line = ("transfer", "w", "--task", "pets=data", "--output", "o", "--image-size", "448")
    line += ("--resize", "resize-crop", "--device", "cpu", "--set", "num_threads=1")
    code, _, err = mixer(capsys, *line)
    assert (code, err) == (0, "")
    (first, vtab), (second, transfer) = handed_over
    assert first == ("w", {"dtd": f"{place}/data", "svhn": "digits"}, "o")
    assert (vtab["protocol"], vtab["seeds"], vtab["grid"]) == ("lightweight", (4, 5), ())
    assert second == ("w", {"pets": f"{place}/data"}, "o")
    assert (transfer["image_size"], transfer["resize"]) == (448, "resize-crop")
    assert transfer["changes"] == {"device": "cpu"}
    assert transfer["settings"] == ("num_threads=1",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("vtab", "no checkpoint is named"),
        ("vtab weights", "a suite of many runs needs a folder with a name"),
        ("vtab weights --output o", "no task is named"),
        ("vtab weights --output o --task", "--task"),
        ("vtab weights --output o --task petz=data", "Did you mean pets"),
        ("vtab weights --output o --task pets=nowhere", "task pets: no such data: "),
        ("vtab weights --output o --task pets=data --task pets=data", "named twice"),
        ("vtab weights --output o --tasks nowhere.json", "cannot read the file"),
        ("vtab weights --output o --task pets=data --protocol x", "unknown protocol 'x'"),
        ("vtab weights --output o --task pets=data --grid", "--grid has no values"),
        ("vtab weights --output o --task pets=data --image-size 9", "not divisible by the patch"),
        ("vtab weights --output o --task pets=data --image-size big", "not an image size: 'big'"),
        ("vtab weights --output data --task pets=data", "the folder holds something else"),
        ("vtab nowhere --output o --task pets=data", "no such model: 'nowhere'"),
        ("transfer weights --output o", "no task is named"),
        ("transfer weights --output o --task svhn=data", "unknown task 'svhn'"),
        ("transfer weights --output o --suite vtab --task pets=data", "unknown suite 'vtab'"),
        ("transfer weights --task pets=data", "a suite of many runs needs a folder"),
        ("transfer weights --output o --task pets=data --steps 0", "steps must be at least 1"),
        ("transfer weights --output o --task pets=data --set seed=1", "--seeds N"),
    ],
)
def test_mistakes(capsys, place, arguments, message):
    before = sorted(place.rglob("*"))
    code, out, err = mixer(capsys, *arguments.split())
    assert code == 2
    assert message in out + err
    assert "Traceback" not in err
    assert sorted(place.rglob("*")) == before
