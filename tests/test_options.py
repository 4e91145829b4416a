from dataclasses import dataclass
from pathlib import Path

import pytest

from allmlp.cli.table import Command
from allmlp.errors import at_least
from allmlp.options import ComputeOptions, ImageSize, Repeated, make
from conftest import user_error


@dataclass(frozen=True, kw_only=True)
class ToyOptions(ComputeOptions):
    """Do something.

    Examples:
        mixer toy runs/a --output b
    """

    output: Path
    """The file to write."""
    image_size: ImageSize | None = None
    """Another size than
    its own."""
    set: Repeated = ()
    """More settings."""

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1)


def toy(model: str, options: ToyOptions) -> tuple[str, ToyOptions]:
    return model, options


def show(result: tuple[str, ToyOptions], options: ToyOptions) -> int:
    print(result)
    return 3


COMMAND = Command("toy.ToyOptions toy.toy model", "A toy.")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.import_module", lambda name: __import__("sys").modules[__name__])
    return lambda *words: COMMAND.run("toy", list(words))


def test_flags_come_from_the_dataclass(run, capsys):
    words = ["runs/a", "--output", "b", "--image-size", "192x256", "--set", "a=1", "--set", "b=2"]
    assert run(*words)[0] == 3
    expected = ToyOptions(output=Path("b"), image_size=(192, 256), set=("a=1", "b=2"))
    assert capsys.readouterr().out.strip() == str(("runs/a", expected))


def test_the_help_has_summary_examples_and_the_text_of_each_field(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "Do something.",
        "mixer toy runs/a",
        "Another size than its own.",
        "(default: 64)",
    ):
        assert part in text
    assert "None" not in text


@pytest.mark.parametrize(
    "words",
    [
        ("a",),
        ("--output", "b"),
        ("a", "--output", "b", "--precision", "int3"),
        ("a", "--output", "b", "--image-size", "2x2x2"),
        ("a", "--output", "b", "--image-size", "9" * 5000),
    ],
)
def test_wrong_flags_end_with_exit_code_2(run, words):
    with user_error("usage"):
        run(*words)


def test_make_takes_an_object_keywords_or_both():
    options = make(ToyOptions, None, {"output": "x"})
    assert options.output == Path("x")
    assert make(ToyOptions, options, {"batch_size": 3}).batch_size == 3
    assert make(ToyOptions, options, {}) == options


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"output": "x", "batchsize": 3}, "unknown-name", "batch_size"),
        ({"output": "x", "num_workers": "few"}, "wrong-type", "few"),
        ({"output": "x", "precision": "float8"}, "unknown-name", "float8"),
        ({"output": "x", "batch_size": 0}, "out-of-range", "0"),
        ({}, "missing", "output"),
    ],
)
def test_wrong_fields(fields, code, named):
    with user_error(code, named):
        make(ToyOptions, None, fields)
