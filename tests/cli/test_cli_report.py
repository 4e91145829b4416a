"""`mixer report` and `mixer study data-scale` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from allmlp.studies import data_scale as study
from allmlp.studies import figures
from conftest import mixer
from measurements import few_shot, measured, small_evaluation, throughput, write


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cost_figure", "throughput_figure", "data_scale_figure"):
        monkeypatch.setattr(figures, name, lambda *given: None)
    monkeypatch.setattr(figures, "save_picture", lambda figure, path: path.write_bytes(b"png"))


def test_a_report(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in" / "deep", e=small_evaluation(), f=few_shot(), t=throughput())
    (tmp_path / "in" / "settings.json").write_text("{}")
    (tmp_path / "in" / "other.json").write_text("not JSON")
    code, out, err = mixer(capsys, "report", "in", "in/deep/e.json")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "found    1 evaluation, 1 few-shot, 1 throughput",
        "written  report/report.md",
        "written  report/report.html",
        "picture  report/pictures/cost.png",
        "picture  report/pictures/throughput.png",
    ]
    assert "54.32" in (tmp_path / "report" / "report.md").read_text()
    code, _, err = mixer(capsys, "report", "in/deep/f.json")
    assert code == 2
    assert "report.md" in err
    assert "54.32" in (tmp_path / "report" / "report.md").read_text()
    assert mixer(capsys, "report", "in/deep/f.json", "--overwrite")[0] == 0
    assert "54.32" not in (tmp_path / "report" / "report.md").read_text()


def test_a_report_is_no_measurement_and_its_folder_may_be_searched(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "in", e=small_evaluation()))
    assert mixer(capsys, "report", ".")[0] == 0
    before = Path("report/report.md").read_text()
    assert mixer(capsys, "report", ".", "--overwrite")[0] == 0
    assert Path("report/report.md").read_text() == before


def damaged(values: dict[str, Any]) -> str:
    return json.dumps(values)[:-200]


def test_what_is_not_understood_is_named(capsys, tmp_path):
    folder = write(tmp_path / "in", good=few_shot(), new=measured("flights"))
    (folder / "newer.json").write_text(json.dumps({**few_shot(), "version": 2}))
    (folder / "cut.json").write_text(damaged(few_shot()))
    (folder / "less.json").write_text(json.dumps(measured("few-shot", results=[{"data": "x"}])))
    (folder / "more.json").write_text(json.dumps(small_evaluation(top1=1.5)))
    (folder / "nan.json").write_text(json.dumps(small_evaluation(top1=float("nan"))))
    broken = folder / "run"
    broken.mkdir()
    (broken / "config.json").write_text('{"recipe": "digits"}')
    (broken / "environment.json").write_text("{")
    code, out, _ = mixer(capsys, "report", folder, "--output", tmp_path / "out")
    assert code == 0
    left = {line.split(": ")[0].split("/")[-1]: line for line in out.splitlines() if "left" in line}
    assert set(left) == {
        *("new.json", "newer.json", "cut.json", "less.json", "more.json", "nan.json", "run")
    }
    assert "of the unknown kind 'flights'" in left["new.json"]
    assert "written by a newer allmlp (version 2)" in left["newer.json"]
    assert "not a measurement: " in left["cut.json"]
    assert "damaged: what a measurement of the kind 'few-shot' holds" in left["less.json"]
    assert "not a share: 1.5" in left["more.json"]
    assert "not a share: nan" in left["nan.json"]
    assert "not a whole run folder" in left["run"]
    text = (tmp_path / "out" / "report.md").read_text()
    listed = text.partition("### Not understood, and left out")[2]
    assert sum(line.startswith("- ") for line in listed.splitlines()) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no runs and no measurements to report"),
        (["nowhere"], "no such file or folder"),
        (["EMPTY"], "no run and no measurement found"),
        (["UNKNOWN"], "is left out: of the unknown kind 'flights'"),
        (["GOOD", "CUT"], "not a measurement: "),
        (["GOOD", "NEWER"], "written by a newer allmlp (version 2)"),
        (["GOOD", "LESS"], "damaged: what a measurement of the kind 'few-shot' holds"),
        (["GOOD", "TEXT"], "not a measurement"),
        (["GOOD", "--output", "TEXT"], "the output is a file, it must be a folder"),
    ],
)
def test_mistakes(capsys, tmp_path, arguments, message):
    folder = write(tmp_path, good=few_shot(), newer={**few_shot(), "version": 2})
    write(tmp_path, less=measured("few-shot", results=[{"data": "x"}]))
    write(tmp_path / "unknown", new=measured("flights"))
    (tmp_path / "cut.json").write_text(damaged(few_shot()))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("x")
    names = {"EMPTY": "empty", "UNKNOWN": "unknown", "TEXT": "text"}
    names |= {each: f"{each.lower()}.json" for each in ("GOOD", "CUT", "NEWER", "LESS")}
    words = [folder / names[each] if each in names else each for each in arguments]
    words += [] if "--output" in words else ["--output", tmp_path / "out"]
    before = sorted(tmp_path.rglob("*"))
    code, _, err = mixer(capsys, "report", *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before
    if message.startswith("no run and no"):
        assert "mixer evaluate MODEL --data SOURCE --output FOLDER" in err


STUDY = ("study", "data-scale", "--data", "a", "--few-shot-data", "b", "--models", "mixer_b32")
STUDY += ("mixer_l16", "--steps", 100, "--output", "o")


def test_the_study_is_handed_its_settings(capsys, monkeypatch):
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(study, "data_scale", lambda *given, **named: calls.append((*given, named)))
    flags = ("--recipe", "digits", "--image-size", 32, "--set", "model.overrides.patch_size=4")
    assert mixer(capsys, *STUDY, *flags, "--fractions", 0.5, 1, "--seeds", 3, 4)[0] == 0
    ((config, few_shot_data, named),) = calls
    assert (few_shot_data, config.data.source, config.output, config.steps) == ("b", "a", "o", 100)
    assert config.evaluate_every == 5  # steps
    assert config.model.image_size == 32
    # The sizes of the recipe's own model are not those of the models asked for.
    assert config.model.overrides == {"stochastic_depth": 0.1, "patch_size": 4}
    assert named["models"] == ("mixer_b32", "mixer_l16")
    assert (named["fractions"], named["seeds"]) == ((0.5, 1.0), (3, 4))
    assert (named["shots"], named["few_shot_seeds"]) == (5, (0, 1, 2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "model.name=mixer_s16"], "--set model.name has no effect beside --models"),
        (["--set", "seed=4"], "--set seed has no effect beside --seeds"),
        (["--set", "data.fraction=0.5"], "--set data.fraction has no effect beside --fractions"),
        (["--set", "epochs=5"], "--set epochs has no effect beside --steps"),
        (["--recipe", "finetune"], "finetune begins with trained weights"),
        (["--recipe", "jft_b23"], "unknown recipe 'jft_b23'"),
        (["--image-size", "0"], "not an image size: '0'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
    ],
)
def test_mistakes_of_the_study(capsys, flags, message):
    code, _, err = mixer(capsys, *STUDY, *flags)
    assert code == 2
    assert message in err
