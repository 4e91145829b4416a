"""SIGTERM and Ctrl-C: the run is saved and says how to go on (fault test 11)."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import allmlp as am
from allmlp.training import train as loop
from runs import (
    DROPOUT,
    check_same,
    ended,
    logged,
    losses_of,
    results_of,
    run_config,
    start,
    train,
    typed_settings,
    unix,
    until,
)

pytestmark = unix

MIXER = Path(sys.executable).with_name("mixer")
LONG = {**DROPOUT, "steps": 150, "evaluate_every": 50, "data__num_workers": 2}


@pytest.fixture
def config(data: Path, tmp_path: Path) -> am.TrainConfig:
    return run_config(data, tmp_path / "run", **DROPOUT)


@pytest.fixture(scope="module")
def long(data: Path) -> Path:
    """A longer run that nothing stopped."""
    return train(run_config(data, data.parent / "long", **LONG))


@contextmanager
def running(command: str) -> Iterator[subprocess.Popen[str]]:
    """Runs a command as a terminal does, at the head of a group of processes."""
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    streams: Any = {"stdout": pipe, "stderr": pipe, "text": True}
    with subprocess.Popen(
        command, shell=True, start_new_session=True, env=environment, **streams
    ) as process:
        try:
            yield process
        finally:
            process.kill()


STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), STOPS)
def test_the_command_itself(data: Path, long: Path, tmp_path: Path, number: int, code: int):
    """Sent to the whole group, as a terminal and a cluster do: the loader workers get it too."""
    run = tmp_path / "run"
    words = [MIXER, *typed_settings(run_config(data, run, **LONG))]
    with running(f"exec {shlex.join(map(str, words))}") as process:
        until(lambda: logged(run) > 2, 60.0)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    assert err.count("stopping: the run saves at the end of this step") == 1
    assert "Traceback" not in out + err
    done = int(re.findall(r"stopped after step (\d+) of 150", out)[0])
    assert (run / "checkpoints" / f"step-{done:08d}" / "manifest.json").exists()
    assert done < 145
    (printed,) = re.findall(r"to resume: (.+)", out)
    with running(printed) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert re.search(r"resumed  after step \d+ of 150", out)
    check_same(run, long)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_second_signal_ends_it_at_once(config, straight, tmp_path, number: int, code: int):
    config = config.with_value("checkpoint_every", 6)
    wait = "before_step(patch, 16, lambda _: (print('waits', flush=True), time.sleep(600)))"
    process = start(config, tmp_path / "said", wait)
    saved = tmp_path / "run" / "checkpoints" / "step-00000012"
    until(lambda: "waits" in process.said() and saved.exists(), 30.0)
    process.send(number)
    until(lambda: "stopping: the run saves" in process.said(), 10.0)
    assert process.poll() is None
    process.send(number)
    (said,) = ended([process], code, seconds=5.0)
    assert said.splitlines()[-1] == "stopped immediately; resume from the last checkpoint"
    check_same(train(config), straight)
    assert "resumed  after step 12 of 30" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_torchrun_passes_on_a_signal_that_came_already(config, straight, tmp_path):
    """Ctrl-C reaches the whole group, and torchrun sends it once more: that is one request."""
    proceed = tmp_path / "proceed"
    wait = f"until(Path({str(proceed)!r}).exists, 30.0)"
    fault = f"before_step(patch, 16, lambda _: (print('waits', flush=True), {wait}))"
    process = start(config, tmp_path / "said", fault, {"TORCHELASTIC_RUN_ID": "none"})
    until(lambda: "waits" in process.said(), 30.0)
    process.send(signal.SIGINT)
    until(lambda: "stopping: the run saves" in process.said(), 10.0)
    process.send(signal.SIGTERM)
    proceed.touch()
    (said,) = ended([process], 130)
    assert "stopped immediately" not in said
    assert "stopped after step 17 of 30" in said
    check_same(train(config), straight)


def test_in_the_middle_of_an_evaluation(config, straight, tmp_path, monkeypatch):
    measure = loop.measure

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "measure", interrupted)
        with pytest.raises(SystemExit) as end:
            train(config)
    assert end.value.code == 143
    assert results_of(tmp_path / "run") == results_of(straight)[:1]
    assert len(losses_of(tmp_path / "run")) == 10
    check_same(train(config), straight)


def test_the_callers_handlers_come_back(config):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train(config, stop_after=2)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.slow
def test_ctrl_c_while_the_plots_are_drawn(config, straight, tmp_path):
    """The training is done then, and the same command measures and draws."""
    # The signal may reach another thread first: the sleep is where it then arrives.
    stop = "(os.kill(os.getpid(), signal.SIGINT), time.sleep(10))"
    fault = f"patch.setattr('allmlp.training.report.load_model', lambda _: {stop})"
    (said,) = ended([start(config, tmp_path / "said", fault)], 130)
    assert said.splitlines()[-1] == "stopped"
    check_same(train(config), straight)
