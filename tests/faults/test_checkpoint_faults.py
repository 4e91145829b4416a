"""Kills and full disks: what is found is whole, and no older than was promised."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem

from allmlp.errors import UserError
from allmlp.training.checkpoint import Checkpoints
from allmlp.training.manifest import MANIFEST

unix = pytest.mark.skipif(sys.platform == "win32", reason="signals as Unix has them")


def state(number: int) -> dict[str, Tensor]:
    """Large enough that torch.save writes some of it past Python's buffer."""
    return {f"layer.{n}": torch.full((40, 200), float(number)) for n in range(4)} | {
        "step": torch.tensor(number)
    }


def save(folder: Path, *steps: int, **options: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state(step), {"number": step})
    checkpoints.wait()
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def whole_number(folder: Path, lines: list[str] | None = None) -> int:
    """The step of the newest checkpoint, when all that it holds is of this one step."""
    checkpoints = Checkpoints(folder, say=[].append if lines is None else lines.append)
    found = checkpoints.newest()
    assert found is not None
    tensors = {name: torch.zeros_like(each) for name, each in state(0).items()}
    checkpoints.load(found, tensors)
    for each in tensors.values():
        assert (each == found.step).all()
    assert found.values == {"number": found.step}
    assert all(name.startswith("step-") for name in names(folder))  # no leftovers
    return found.step


# Kills


# Imports once, then forks for every script that it is told to run: a kill costs milliseconds.
NURSERY = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from test_checkpoint_faults import *
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)
        exec(json.loads(line))
        os._exit(0)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


class Nursery:
    """Runs scripts in forked processes and kills them, one at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process, self._child = process, 0

    def start(self, script: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(script) + "\n")
        self._process.stdin.flush()
        self._child = int(self.said())

    def said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip()

    def kill(self) -> list[str]:
        """Kills the script; returns what it had said and nobody had read."""
        os.kill(self._child, signal.SIGKILL)
        unread = []
        while (line := self.said()) != "ended":
            assert line
            unread.append(line)
        return unread


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    command = [sys.executable, "-c", NURSERY, str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield Nursery(process)
        process.kill()


SAVER = """
checkpoints = Checkpoints(Path(FOLDER), say=lambda line: None)
found = checkpoints.newest()
number = found.step if found else 0
while True:
    number += 1
    checkpoints.save(number, state(number), {"number": number}, is_best=number % 7 == 0)
    checkpoints.wait()
    print(number, flush=True)
"""


@pytest.mark.slow
@unix
def test_killed_at_twenty_moments_of_a_run(tmp_path: Path, nursery: Nursery):
    chance, partial, newest = random.Random(0), 0, 0
    for _ in range(20):
        nursery.start(SAVER.replace("FOLDER", repr(str(tmp_path))))
        first = int(nursery.said())
        assert first == newest + 1  # it went on with what was found after the kill
        time.sleep(chance.uniform(0.0, 0.06))
        promised = int([str(first), *nursery.kill()][-1])
        partial += any(name.endswith(".partial") for name in names(tmp_path))
        newest = whole_number(tmp_path)
        assert newest >= promised
    assert partial >= 3  # it was caught in the act


STOPPED = """
def stop():
    print("stopped", flush=True)
    time.sleep(60)

def rename(source, target, real=os.rename):
    if Path(target).name == "step-00000003":
        stop()
    real(source, target)

def rmtree(path, *arguments, real=shutil.rmtree, **options):
    if Path(path).name == ".step-00000001.removed":
        (Path(path) / "__0_0.distcp").unlink()
        stop()
    real(path, *arguments, **options)

checkpoints = save(Path(FOLDER), 1, 2)
PATCH
checkpoints.save(3, state(3), {"number": 3})
checkpoints.wait()
"""


@unix
@pytest.mark.parametrize(
    ("patch", "leftover", "newest"),
    [
        ("os.rename = rename", ".step-00000003.partial", 2),
        ("shutil.rmtree = rmtree", ".step-00000001.removed", 3),
    ],
)
def test_killed_before_the_rename_and_in_a_removal(
    tmp_path: Path, nursery: Nursery, patch: str, leftover: str, newest: int
):
    nursery.start(STOPPED.replace("PATCH", patch).replace("FOLDER", repr(str(tmp_path))))
    assert nursery.said() == "stopped"
    nursery.kill()
    assert leftover in names(tmp_path)
    assert (tmp_path / leftover / MANIFEST).exists()  # all of it was there but the name
    lines: list[str] = []
    assert whole_number(tmp_path, lines) == newest
    assert lines == [f"Removed what a killed save left in {tmp_path}: {leftover}"]
    assert whole_number(save(tmp_path, newest + 1).folder) == newest + 1


def test_a_leftover_is_no_obstacle(tmp_path: Path):
    left = tmp_path / ".step-00000001.partial"
    left.mkdir()
    (left / ".metadata").write_bytes(b"of the run before")
    (left / "__7_0.distcp").write_bytes(b"of the run before")
    save(tmp_path, 1)
    assert whole_number(tmp_path) == 1
    assert names(tmp_path / "step-00000001") == [".metadata", "__0_0.distcp", MANIFEST]


# A full disk


class FullDisk(io.FileIO):
    """A file on a disk with so much room left for all files together."""

    room = 0

    def write(self, data: Any) -> int:
        FullDisk.room -= len(data)
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@contextmanager
def stream_on_full_disk(self: object, path: Path, mode: str) -> Iterator[Any]:
    with io.BufferedWriter(FullDisk(str(path), mode)) if "w" in mode else path.open(mode) as stream:
        yield stream


def check_disk_full(folder: Path, checkpoints: Checkpoints) -> None:
    """Saves step 2 in vain beside a whole step 1."""
    needed = sum(each.nbytes for each in state(2).values())
    checkpoints.save(2, state(2), {"number": 2})
    with pytest.raises(UserError) as error:
        checkpoints.wait()
    assert error.value.where == str(folder / "step-00000002")
    start, _, rest = error.value.what.partition(", ")
    assert start == f"the disk is full: the checkpoint needs {needed:,} bytes"
    free = int(rest.removesuffix(" are free").replace(",", ""))
    assert abs(free - shutil.disk_usage(folder).free) < 2**30
    assert names(folder) == ["step-00000001"]
    assert whole_number(folder) == 1


@pytest.mark.parametrize("room", [0, 100, 5_000, 30_000, 70_000, 128_000, 134_500])
def test_the_disk_is_full_at_some_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int):
    checkpoints = save(tmp_path, 1)
    written = sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir())
    assert room < written
    with monkeypatch.context() as patch:
        patch.setattr(FullDisk, "room", room)
        patch.setattr(filesystem.FileSystem, "create_stream", stream_on_full_disk)
        check_disk_full(tmp_path, checkpoints)
    checkpoints.save(2, state(2), {"number": 2})  # with room again
    checkpoints.close()
    assert whole_number(tmp_path) == 2


def test_the_free_space_is_that_beside_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Measured later it would say that more is free than is needed."""
    checkpoints, measure, seen = save(tmp_path, 1), shutil.disk_usage, []

    def noting(path: Path) -> object:
        seen.append((tmp_path / ".step-00000002.partial").is_dir())
        return measure(path)

    with monkeypatch.context() as patch:
        patch.setattr(FullDisk, "room", 5_000)
        patch.setattr(filesystem.FileSystem, "create_stream", stream_on_full_disk)
        patch.setattr(shutil, "disk_usage", noting)
        checkpoints.save(2, state(2), {})
        with pytest.raises(UserError, match="the disk is full"):
            checkpoints.wait()
    assert seen == [True]
    checkpoints.close()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_disk_is_full_when_a_file_is_brought_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    """The tensors, their index, the manifest, the folder."""
    checkpoints, calls, fsync = save(tmp_path, 1), [], os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    check_disk_full(tmp_path, checkpoints)


def test_the_error_of_a_save_comes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints = save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(FullDisk, "room", 1000)
        patch.setattr(filesystem.FileSystem, "create_stream", stream_on_full_disk)
        checkpoints.save(2, state(2), {"number": 2})
        with pytest.raises(UserError, match="the disk is full"):
            checkpoints.save(3, state(3), {"number": 3})
    checkpoints.close()  # it is not said twice
    assert names(tmp_path) == ["step-00000001"]


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state(1), {})
    with pytest.raises(UserError, match="the checkpoint cannot be written: "):
        checkpoints.close()
