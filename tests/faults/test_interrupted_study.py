"""Fine-tuning studies that were killed, stopped or wrong from the start."""

import os
import signal

import pytest

import allmlp as am
from conftest import digest
from runs import before_step, start, unix
from studies import note_runs, settings

KILLED = """
def kill(trainer):
    if trainer.folder.path.name == "lr-0.2":
        trainer.checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)

before_step(patch, 4, kill)
import studies
am.finetune(studies.settings(Path(PLACE), "killed"), grid=[0.1, 0.2], seeds=[0], quiet=True)
"""


@unix
@pytest.mark.slow
def test_a_killed_study_resumes_with_what_is_missing(place, monkeypatch):
    process = start([], place / "said", KILLED.replace("PLACE", repr(str(place))))
    assert process.wait() == -signal.SIGKILL, process.said()
    whole = am.finetune(settings(place, "whole"), grid=[0.1, 0.2], seeds=[0], quiet=True)
    asked = note_runs(monkeypatch)
    first = place / "killed" / "grid" / "lr-0.1"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    again = am.finetune(settings(place, "killed"), grid=[0.1, 0.2], seeds=[0], quiet=True)
    assert asked == ["grid/lr-0.2", "killed/seed-0"]
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    log = (place / "killed" / "grid" / "lr-0.2" / "log.txt").read_text()
    assert "resumed  after step 3 of 6" in log
    assert (again.grid, again.accuracies) == (whole.grid, whole.accuracies)
    for name in ("grid/lr-0.1", "grid/lr-0.2", "seed-0"):
        weights = f"{name}/best/model.safetensors"
        assert digest(place / "killed" / weights) == digest(place / "whole" / weights), name


def test_a_study_that_is_stopped_in_its_first_run_resumes(place, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        before_step(patch, 4, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as end:
            am.finetune(settings(place), grid=[0.1], seeds=[0])
    assert end.value.code == 143
    assert "the study resumes with the same command" in capsys.readouterr().out
    result = am.finetune(settings(place), grid=[0.1], seeds=[0], quiet=True)
    log = (place / "study" / "grid" / "lr-0.1" / "log.txt").read_text()
    assert "resumed  after step 5 of 6" in log
    assert list(result.accuracies) == [0]


@pytest.mark.parametrize(
    ("changes", "grid", "seeds", "message"),
    [
        ({}, [], [], "seed"),
        ({}, [], [0, -1], "seed.*-1"),
        ({"patience": 2}, [0.1], [0], "patience=2"),
        ({"data__holdout": 0.0}, [0.1], [0], "holdout 0"),
    ],
)
def test_mistakes_write_nothing(place, changes, grid, seeds, message):
    before = sorted(place.rglob("*"))
    with pytest.raises(am.UserError, match=message):
        am.finetune(settings(place, **changes), grid=grid, seeds=seeds, quiet=True)
    assert sorted(place.rglob("*")) == before
