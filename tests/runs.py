"""Runs for the fault tests: how they are started, stopped and killed, and what they leave.

`start` runs the command in a forked process: this file, run as a script, imports everything once
and forks for every command, so that one costs a second and not five. With arguments the script is
the command itself.
"""

import atexit
import contextlib
import csv
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import allmlp as am
from allmlp import plots
from allmlp.cli.main import main
from allmlp.training import train as loop
from allmlp.training.config import flat
from conftest import TINY, digest, tiny_config

unix = pytest.mark.skipif(sys.platform == "win32", reason="signals and forks as Unix has them")

# All that draws random numbers, and all that is state; dropout alone depends on the world size.
RANDOM = {
    "augment__randaugment": 15.0,
    "augment__mixup": 0.5,
    "augment__cutmix": 1.0,
    "augment__mix_until": 0.8,
    "optimizer__ema_decay": 0.9,
    "optimizer__learning_rate": 0.01,
    "model__overrides": {**TINY, "stochastic_depth": 0.3},
}
DROPOUT = {"model__overrides": {**TINY, "stochastic_depth": 0.3, "dropout": 0.1}}


def run_config(data: Path, output: Path, **changes: object) -> am.TrainConfig:
    """Thirty steps of 8 of the 20 images: an epoch ends within a step."""
    values: dict[str, object] = {**RANDOM, "steps": 30, "evaluate_every": 10, **changes}
    long = {key: values.pop(key) for key in ("steps", "evaluate_every")}
    return tiny_config(str(data), output, **values).with_values(long)


# Runs in this process


def watch_every_step(patch: pytest.MonkeyPatch) -> None:
    """Every step is logged, and the plots, most of a tiny run's time, are left out."""
    patch.setattr(loop, "LOG_EVERY", 1)
    for name in ("curves", "training_batch", "save"):
        patch.setattr(plots, name, lambda *_: None)
    patch.setattr(plots, "save_evaluation", lambda *_: [])


def before_step(patch: pytest.MonkeyPatch, number: int, act: Callable[[Any], None]) -> None:
    """Lets `act` happen, with the Trainer, before the step of that number."""
    train_step = loop.Trainer.train_step

    def acting(self: loop.Trainer, step: int, batch: Any) -> None:
        if step == number:
            act(self)
        train_step(self, step, batch)

    patch.setattr(loop.Trainer, "train_step", acting)


def train(
    config: am.TrainConfig | Path,
    stop_after: int | None = None,
    by: signal.Signals = signal.SIGTERM,
) -> Path:
    """Trains, or resumes a folder, and returns the run folder; a signal stops it after a step."""
    folder = config if isinstance(config, Path) else Path(str(config.output))
    begin: Callable[[Any], object] = functools.partial(
        am.resume if isinstance(config, Path) else am.train, quiet=True
    )
    with pytest.MonkeyPatch.context() as patch:
        watch_every_step(patch)
        if stop_after is None:
            begin(config)
            return folder
        before_step(patch, stop_after - 1, lambda _: os.kill(os.getpid(), by))
        with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
            begin(config)
        stopped = getattr(end.value, "code", 143) == 143  # KeyboardInterrupt has none
        assert stopped == (by in (signal.SIGINT, signal.SIGTERM))
    return folder


def killed(act: Callable[[Callable[[], None]], object], instant: int) -> int:
    """Lets a child `act`, which is killed in the call of this number, from 0 on, of the function
    that it is given; returns how the child ended."""
    if number := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    left = iter(range(instant))

    def step() -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        act(step)
        os._exit(0)
    finally:
        os._exit(1)


# The command in a process of its own


@dataclass
class Process:
    pid: int  # leads a session and a group of its own
    text: Path  # what it says, on both streams
    test: str  # that started it
    code: int | None = None

    def said(self) -> str:
        return self.text.read_text()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Returns the exit code, minus the signal that ended it, or None while it runs."""
        if self.code is None:
            self.code = _ask({"poll": self.pid})
        return self.code

    def wait(self, seconds: float = 60.0) -> int:
        until(lambda: self.poll() is not None, seconds)
        return self.code

    def kill(self) -> int:
        self.send(signal.SIGKILL)
        return self.wait()


def start(
    arguments: am.TrainConfig | list[object],
    text: Path,
    fault: str = "",
    environment: dict[str, str] | None = None,
) -> Process:
    """Starts the command, as typed after `mixer`, which first runs `fault`, Python code with the
    names of this module; what it says goes to `text`."""
    if _started and _started[-1].test != _test():
        kill_what_is_left()
    typed = arguments if isinstance(arguments, list) else typed_settings(arguments)
    text.touch()
    order = {"arguments": [str(word) for word in typed], "text": str(text), "fault": fault}
    pid = _ask({**order, "environment": environment or {}})
    _started.append(Process(pid, text, _test()))
    return _started[-1]


_started: list[Process] = []


def _test() -> str:
    return os.environ.get("PYTEST_CURRENT_TEST", "").partition(" (")[0]


def said_by_all() -> str:
    """Returns what every process of this test has said: one that waits says nothing itself."""
    processes = [process for process in _started if process.test == _test()]
    return "\n".join(f"--- {p.text.name}, exit code {p.poll()}:\n{p.said()}" for p in processes)


def kill_what_is_left() -> None:
    """Kills the groups of processes that the test before has left running, if it failed."""
    for process in _started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    _started.clear()


def start_two(
    config: am.TrainConfig | list[object], text: Path, fault: str = "", size: int = 2
) -> list[Process]:
    """Starts the command as rank 0 and 1, as torchrun would; the texts end in .0 and .1."""
    port = str(next(_free_ports()))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    ranks = ({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size))
    return [
        start(config, text.with_name(f"{text.name}.{own['RANK']}"), fault, own) for own in ranks
    ]


def ended(processes: list[Process], *codes: int, seconds: float = 60.0) -> list[str]:
    """Waits for the processes, which must end with these exit codes; returns what each said."""
    assert [process.wait(seconds) for process in processes] == list(codes), said_by_all()
    return [process.said() for process in processes]


@functools.cache
def _free_ports() -> Iterator[int]:
    """Ports below those that the system gives to any program, other ones in each test process."""
    first = os.getpid() * 100  # neighbours of `pytest -n` have neighbouring numbers
    for number in itertools.count(first):
        with contextlib.suppress(OSError):
            port = 20_000 + number % 10_000
            socket.create_server(("127.0.0.1", port)).close()
            yield port


def typed_settings(config: am.TrainConfig) -> list[object]:
    """Returns what to type after `mixer` for this run."""
    default, values = flat(am.recipe("scratch").to_json()), flat(config.to_json())
    del values["output"]
    changed = [f"{key}={value}" for key, value in values.items() if value != default.get(key)]
    settings = [word for setting in changed for word in ("--set", setting)]
    return ["train", "scratch", "--output", str(config.output), *settings]


def until(true: Callable[[], object], seconds: float) -> None:
    """Waits until something is true; where that takes too long, shows what the processes said."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, said_by_all()
        time.sleep(0.005)


@functools.cache
def _nursery() -> subprocess.Popen[str]:
    """The process that forks the commands."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    nursery = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)
    for last in (nursery.communicate, nursery.kill, kill_what_is_left):  # the other way round
        atexit.register(last)
    return nursery


def _ask(order: dict[str, Any]) -> Any:
    nursery = _nursery()
    nursery.stdin.write(json.dumps(order) + "\n")
    nursery.stdin.flush()
    return json.loads(nursery.stdout.readline())


def _fork_commands() -> None:
    """What the nursery does: one line of JSON in, one out."""
    import torch._dynamo  # noqa: F401  # DDP imports it, which takes seconds

    Image.preinit()
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        child = os.fork()
        if child:
            print(child, flush=True)
            continue
        os.setsid()
        for descriptor, path in ((0, os.devnull), (1, order["text"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
        os.dup2(1, 2)
        os.environ.update(order["environment"])
        command(order["arguments"], order["fault"])


def command(arguments: list[str], fault: str) -> None:
    """The command, with every step logged, no plots and a fault."""
    sys.argv = ["mixer", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        watch_every_step(patch)
        exec(fault, {**globals(), "patch": patch})
        main(arguments)


# What a run leaves


def steps_of(run: Path) -> list[dict[str, float]]:
    """Returns the lines of metrics.jsonl without the times."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def logged(run: Path) -> int:
    """Returns how many steps a run that may have just begun has logged."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def losses_of(run: Path) -> list[float]:
    """Returns the loss of each step; every step must be there once and in order."""
    steps = steps_of(run)
    assert [step["step"] for step in steps] == list(range(len(steps)))
    return [step["loss"] for step in steps]


def results_of(run: Path) -> list[dict[str, str]]:
    """Returns the lines of results.csv without the times."""
    with (run / "results.csv").open(newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


def check_same(run: Path, straight: Path) -> None:
    """Two runs are the same in every logged number, in their last full state and in best/."""
    assert len(losses_of(run)) == len(losses_of(straight))
    assert steps_of(run) == steps_of(straight)
    assert results_of(run) == results_of(straight)
    states = "checkpoints/step-*/state.safetensors"
    last, other = (max(p.parent.name for p in folder.glob(states)) for folder in (run, straight))
    assert last == other
    for name in (f"checkpoints/{last}/state.safetensors", "best/model.safetensors"):
        assert digest(run / name) == digest(straight / name)


if __name__ == "__main__":
    if sys.argv[1:]:  # by torchrun
        command(sys.argv[1:], os.environ.get("FAULT", ""))
    _fork_commands()
