"""Kills at random moments of a run, and two runs in one folder (the small punisher)."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from runs import (
    DROPOUT,
    check_same,
    ended,
    logged,
    losses_of,
    run_config,
    start,
    train,
    unix,
    until,
)

pytestmark = unix

KILLS = 30
LONG = {**DROPOUT, "steps": 120, "evaluate_every": 16, "checkpoint_every": 5}


@pytest.mark.slow
def test_thirty_kills_change_nothing(data: Path, tmp_path: Path):
    """At any time of a life, after some of its steps, and while a checkpoint is written."""
    chance, run, killed = random.Random(0), tmp_path / "run", 0
    config, startup = run_config(data, run, **LONG), 0.0
    for life in range(KILLS):
        process, begun = start(config, tmp_path / f"life {life}"), time.monotonic()
        end = begun + chance.random() * startup
        before = logged(run)
        more = before + chance.randrange(14) * (life > 0)
        signs = [  # also on a machine that is faster than it was in the first life
            lambda end=end, most=before + 5: time.monotonic() > end or logged(run) > most,
            lambda more=more: logged(run) > more,
            lambda: [*run.glob("checkpoints/.*.partial")],
        ]
        sign = signs[life % 3 if life else 1]
        until(lambda p=process, sign=sign: sign() or p.poll() is not None, 60.0)
        startup = startup or 1.1 * (time.monotonic() - begun)  # to the first step of the first
        time.sleep(chance.uniform(0.0, 0.03) * (life % 3 > 0))
        if process.poll() is None:
            killed += process.kill() == -signal.SIGKILL
        assert "error" not in process.said(), process.said()
    ended([start(config, tmp_path / "last")], 0)
    assert killed >= KILLS - 5
    starts = re.findall(r"resumed  after step (\d+)", (run / "log.txt").read_text())
    assert len(set(starts)) >= 5  # it was killed here and there
    assert [int(start) for start in starts] == sorted(map(int, starts))
    straight = train(run_config(data, tmp_path / "straight", **LONG))
    assert len(losses_of(straight)) == 120
    check_same(run, straight)
    assert not [*run.rglob(".*")]  # nothing half-written
    assert {path.name for path in run.iterdir()} == {path.name for path in straight.iterdir()}


WAITING = """
def wait(trainer):
    print("waiting", flush=True)
    until(lambda: Path(FOLDER, "go").exists(), 60.0)
before_step(patch, 16, wait)
"""


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_an_error(data: Path, straight: Path, tmp_path: Path):
    """With exit code 2, while the first goes on unharmed."""
    config = run_config(data, tmp_path / "run", **DROPOUT)
    fault = WAITING.replace("FOLDER", repr(str(tmp_path)))
    first = start(config, tmp_path / "first", fault)
    until(lambda: "waiting" in first.said(), 60.0)
    second = start(config, tmp_path / "second")
    third = start(["train", "--resume", tmp_path / "run"], tmp_path / "third")
    for said in ended([second, third], 2, 2):
        assert said == (
            "error: another process is training in this run folder\n"
            f"where: {tmp_path / 'run'}\n"
            "to fix: Wait for it or stop it; or choose another output folder\n"
        )
    (tmp_path / "go").touch()
    ended([first], 0)
    check_same(tmp_path / "run", straight)


@pytest.mark.slow
def test_a_killed_run_leaves_no_lock(data: Path, tmp_path: Path):
    """Its workers live on for some seconds; the same command goes on without waiting for them."""
    config = run_config(data, tmp_path / "run", data__num_workers=2, checkpoint_every=5)
    fault = WAITING.replace("FOLDER", repr(str(tmp_path)))
    process = start(config, tmp_path / "first", fault)
    until(lambda: "waiting" in process.said(), 60.0)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    workers = [int(child) for child in children.split()]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # or they might have ended before the next run asks
    assert process.kill() == -signal.SIGKILL
    (tmp_path / "go").touch()
    again = start(config, tmp_path / "again")
    until(lambda: "resumed  after step" in again.said() or again.poll(), 30.0)
    assert all(map(_lives, workers))
    ended([again], 0)
    for worker in workers:
        os.kill(worker, signal.SIGCONT)
    until(lambda: not any(map(_lives, workers)), 20.0)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
