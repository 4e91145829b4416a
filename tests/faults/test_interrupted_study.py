"""Fine-tuning studies that were killed, stopped or wrong from the start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import allmlp as am
from allmlp import sweep
from allmlp.training import train as loop
from studies import make_place, settings


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_place(tmp_path)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from studies import settings
import allmlp as am
from allmlp.training import train as loop

train_step = loop.Trainer.train_step

def killed(self, number, batch):
    if number == 4 and self.run_folder.path.name == "lr-0.2":
        self.state.checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    train_step(self, number, batch)

loop.Trainer.train_step = killed
am.finetune(settings(Path({place!r}), "killed"), grid=[0.1, 0.2], seeds=[0], quiet=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals as Unix has them")
def test_a_killed_study_resumes_with_what_is_missing(place, monkeypatch):
    tests = Path(__file__).parents[1]
    code = KILLED.format(tests=str(tests), place=str(place))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = am.finetune(settings(place, "whole"), grid=[0.1, 0.2], seeds=[0], quiet=True)

    asked, train = [], sweep.train

    def noted(config, **options):
        asked.append(Path(str(config.output)).name)
        return train(config, **options)

    monkeypatch.setattr(sweep, "train", noted)
    first = place / "killed" / "grid" / "lr-0.1"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    again = am.finetune(settings(place, "killed"), grid=[0.1, 0.2], seeds=[0], quiet=True)
    assert asked == ["lr-0.2", "seed-0"]
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    assert (
        "resumed  after step 3 of 6"
        in (place / "killed" / "grid" / "lr-0.2" / "log.txt").read_text()
    )
    assert (again.grid, again.accuracies) == (whole.grid, whole.accuracies)
    for name in ("grid/lr-0.1", "grid/lr-0.2", "seed-0"):
        weights = [
            (place / run / name / "best" / "model.safetensors").read_bytes()
            for run in ("killed", "whole")
        ]
        assert weights[0] == weights[1], name


def test_a_study_that_is_stopped_in_its_first_run_resumes(place, monkeypatch, capsys):
    train_step = loop.Trainer.train_step

    def stopped(self, number, batch):
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, number, batch)

    monkeypatch.setattr(loop.Trainer, "train_step", stopped)
    with pytest.raises(SystemExit) as end:
        am.finetune(settings(place), grid=[0.1], seeds=[0])
    monkeypatch.undo()
    assert end.value.code == 143
    assert "the study resumes with the same command" in capsys.readouterr().out
    result = am.finetune(settings(place), grid=[0.1], seeds=[0], quiet=True)
    log = (place / "study" / "grid" / "lr-0.1" / "log.txt").read_text()
    assert "resumed  after step 5 of 6" in log
    assert list(result.accuracies) == [0]


@pytest.mark.parametrize(
    ("changes", "grid", "seeds", "message"),
    [
        ({"model__weights": "nowhere"}, [0.1], [0], "nowhere"),
        ({}, [], [], "seed"),
        ({}, [], [0, -1], "seed.*-1"),
        ({}, [0.1, -1.0], [0], "learning_rate.*-1.0"),
        ({"patience": 2}, [0.1], [0], "patience=2"),
        ({"data__holdout": 0.0}, [0.1], [0], "holdout 0"),
        ({"optimizer__warmup": 6}, [0.1], [0], "warm-up"),
        ({"output": None}, [0.1], [0], "named folder"),
        ({"output": "FULL"}, [0.1], [0], "thesis.txt"),
    ],
)
def test_mistakes_write_nothing(place, changes, grid, seeds, message):
    (place / "full").mkdir()
    (place / "full" / "thesis.txt").write_text("x")
    if changes.get("output"):
        changes = {"output": str(place / "full")}
    before = sorted(place.rglob("*"))
    with pytest.raises(am.UserError, match=message):
        am.finetune(settings(place, **changes), grid=grid, seeds=seeds, quiet=True)
    assert sorted(place.rglob("*")) == before
