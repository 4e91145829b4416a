"""Flags and keywords from one dataclass: parsed, converted, checked and explained."""

import importlib

import pytest

from allmlp.cli.main import parse
from allmlp.evaluation.options import BenchmarkOptions, EvaluateOptions
from allmlp.options import make
from conftest import user_error


def test_flags_come_from_the_dataclass(monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module("allmlp.benchmark")
    monkeypatch.setattr(module, "command", lambda *given: given)
    monkeypatch.setattr(module, "show", lambda *_: 3)
    line = "benchmark a b --image-size 192x256 --set a=1 --set b=2 --output c"
    options = BenchmarkOptions(image_size=(192, 256), settings=("a=1", "b=2"), output="c")
    assert parse(line.split()) == (3, (("a", "b"), options))


def test_the_help_has_summary_examples_and_the_text_of_each_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["evaluate", "--help"])
    assert not stopped.value.code
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "Measure a trained model: top-1",
        "mixer evaluate runs/flowers --data FOLDER",
        "auto uses bfloat16 if the device is fast at it and the model large enough",
        "(default: 64)",
    ):
        assert part in text
    assert "None" not in text


@pytest.mark.parametrize(
    "line",
    [
        "evaluate a",
        "evaluate --data b",
        "evaluate a --data b --precision int3",
        "evaluate a --data b --image-size 2x2x2",
        f"evaluate a --data b --image-size {'9' * 5000}",
    ],
)
def test_wrong_flags_end_with_exit_code_2(line):
    with user_error("usage"):
        parse(line.split())


def test_make_takes_an_object_keywords_or_both():
    options = make(EvaluateOptions, None, {"data": "x", "batch_size": "3"})
    assert options == EvaluateOptions(data="x", batch_size=3)
    assert make(EvaluateOptions, options, {"batch_size": 5}).batch_size == 5
    assert make(EvaluateOptions, options, {}) == options


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"data": "x", "batchsize": 3}, "unknown-name", "batch_size"),
        ({"data": "x", "num_workers": "few"}, "wrong-type", "few"),
        ({"data": "x", "precision": "float8"}, "unknown-name", "float8"),
        ({"data": "x", "crop": 0}, "out-of-range", "0"),
        ({}, "missing", "data"),
    ],
)
def test_wrong_fields(fields, code, named):
    with user_error(code, named):
        make(EvaluateOptions, None, fields)
