"""Processes that take turns: the sides of a comparison.

Each side is a process in the environment of its package (peers.py). It is started once, prepares
and warms up, then waits on a pipe for its turn and answers with the seconds of so many runs. Only
one computes at a time: what the idle ones take of the processor is measured as well.

This module is read on both ends of the pipe and imports nothing but Python's own library.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import PeerError, last_line, python_of

PAUSE = 0.1  # seconds between turns, in which the threads of the last one stop to spin


@dataclass
class Side:
    """One process of a comparison.

    Attributes:
        name: in the table.
        process: that computes.
        log: what it writes to standard output and error.
        ready: what it told once it was warm: "seconds" of its last run, "prepared" seconds before,
            and what `prepare` gave.
        idle: seconds of processor time that it took outside of its turns.
        waited: seconds that it spent so.
        failed: the reason, once it died.
    """

    name: str
    process: subprocess.Popen[str]
    log: Path
    ready: dict[str, Any] = field(default_factory=dict)
    idle: float = 0.0
    waited: float = 0.0
    failed: str | None = None
    _since: tuple[float, float] | None = None

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Sends a line and returns the answer.

        Raises:
            PeerError: the process ended instead.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._note_idle()
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            code = self.process.wait()
            self.failed = last_line(self.log.read_text(errors="replace")) or f"ended with {code}"
            raise PeerError(self.failed)
        self._since = None
        return json.loads(line)

    def rest(self) -> None:
        """Begins to count what the process takes while it waits."""
        self._since = (time.perf_counter(), _processor_seconds(self.process.pid))

    def _note_idle(self) -> None:
        if self._since is not None:
            self.waited += time.perf_counter() - self._since[0]
            self.idle += _processor_seconds(self.process.pid) - self._since[1]

    def stop(self) -> None:
        """Lets the process end by itself, with those of its own that compile; else kills it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def memory(self) -> float:
        """Returns the most MB that were ever resident; 0 where that is unknown."""
        try:
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024 / 1e6
        except OSError:
            pass
        return 0.0


def _processor_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def started(script: Path, folder: Path, threads: int):
    """Yields a function (name, environment, job) that starts a side and waits until it is warm.

    It raises PeerError where a side cannot be installed or fails; all sides end with the block.

    Args:
        script: run by every side; it calls `serve`.
        folder: of the environments.
        threads: of every side.
    """
    sides: list[Side] = []
    with tempfile.TemporaryDirectory() as temporary:
        variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        variables |= {"OPENBLAS_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}

        def start(name: str, environment: str, job: dict[str, Any]) -> Side:
            python = python_of(environment, folder)
            log = Path(temporary) / f"{len(sides)}.log"
            # Compiling is timed, so that nothing of another side or run may be at hand.
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(Path(temporary) / f"inductor_{len(sides)}")}
            with log.open("w") as output:
                process = subprocess.Popen(
                    [str(python), str(script), "--as-side"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    text=True,
                    env={**os.environ, **variables, **cache},
                )
            side = Side(name, process, log)
            sides.append(side)
            side.ready = side.ask({**job, "threads": threads})
            side.rest()
            return side

        try:
            yield start
        finally:
            for side in sides:
                side.stop()


def take_turns(
    sides: list[Side], rounds: int, seconds: float, say: Callable[[str], None] = print
) -> dict[str, list[dict[str, Any]]]:
    """Lets the sides compute one after the other, so many times; every other round backwards.

    Args:
        sides: that are ready.
        rounds: of turns.
        seconds: that a turn takes at least, by the last run of the warm-up; one run or more.
        say: tells a line, where a side fails or does not rest while others compute.

    Returns:
        For every side that lived, a dict for each round: "seconds" of one run, and what the run
        gave. Turn n of each side belongs to the same round.
    """
    answers: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for turn in range(rounds):
        for side in reversed(sides) if turn % 2 else sides:
            if side.failed is not None:
                continue
            time.sleep(PAUSE)
            runs = max(1, round(seconds / max(side.ready["seconds"], 1e-6)))
            try:
                answers[side.name].append(side.ask({"runs": runs}))
            except PeerError as error:
                say(f"left out  {side.name}: {error}")
                continue
            time.sleep(PAUSE)
            side.rest()
    for side in sides:
        share = side.idle / max(side.waited, 1e-9)
        if share > 0.02:
            say(f"note      {side.name} took {share:.0%} of a core while it waited")
    return {side.name: answers[side.name] for side in sides if side.failed is None}


def serve(prepare: Callable[[dict[str, Any]], tuple[Callable[[], Any], dict[str, Any]]]) -> None:
    """What a side runs: prepares, warms up, then computes whenever it is asked, until it is ended.

    Args:
        prepare: takes the job; returns what is timed, and what to tell. What the timed function
            returns, a dict or None, is told with its seconds.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print does not get into the answers
    job = json.loads(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):  # for runtimes that take a thread for every core
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    began = time.perf_counter()
    run, told = prepare(job)
    run()
    prepared = time.perf_counter() - began
    lasted = prepared
    for _ in range(job.get("warm_up", 2)):
        began = time.perf_counter()
        run()
        lasted = time.perf_counter() - began
    _answer(answers, {"seconds": lasted, "prepared": prepared, **told})
    for line in sys.stdin:
        runs, extra = json.loads(line)["runs"], None
        began = time.perf_counter()
        for _ in range(runs):
            extra = run()
        each = (time.perf_counter() - began) / runs
        _answer(answers, {"seconds": each, "runs": runs, **(extra or {})})


def _answer(pipe: Any, values: dict[str, Any]) -> None:
    pipe.write(json.dumps(values) + "\n")
    pipe.flush()
