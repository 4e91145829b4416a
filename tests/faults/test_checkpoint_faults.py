"""Kills, full disks and damage: what is found is whole, and no older than was promised."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allmlp.errors import UserError
from allmlp.training.checkpoint import (
    MANIFEST,
    STATE,
    Checkpoint,
    Checkpoints,
    verify,
    write_manifest,
)
from runs import start, unix, until


def state(number: int) -> dict[str, Tensor]:
    """Large enough that some of it is written past Python's buffer."""
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
    tensors = {name: torch.zeros_like(tensor) for name, tensor in state(0).items()}
    checkpoints.load(found, tensors)
    for tensor in tensors.values():
        assert (tensor == found.step).all()
    assert found.values == {"number": found.step}
    assert all(name.startswith("step-") for name in names(folder))  # no leftovers
    return found.step


# Kills

SAVER = """
from test_checkpoint_faults import *
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
def test_killed_at_twenty_moments_of_a_run(tmp_path: Path):
    chance, partial, newest, folder = random.Random(0), 0, 0, tmp_path / "checkpoints"
    for life in range(20):
        text = tmp_path / f"said {life}"
        process = start([], text, SAVER.replace("FOLDER", repr(str(folder))))
        until(process.said, 30.0)
        assert int(process.said().split()[0]) == newest + 1  # it resumed what the kill had left
        time.sleep(chance.uniform(0.0, 0.06))
        process.kill()
        promised = int(process.said().split()[-1])
        partial += any(name.endswith(".partial") for name in names(folder))
        newest = whole_number(folder)
        assert newest >= promised
    assert partial >= 3  # it was caught in the act


STOPPED = """
from test_checkpoint_faults import *
def stop():
    print("stopped", flush=True)
    time.sleep(60)

def rename(source, target, real=os.rename):
    if Path(target).name == "step-00000003":
        stop()
    real(source, target)

def rmtree(path, *arguments, real=shutil.rmtree, **options):
    if Path(path).name == ".step-00000001.removed":
        (Path(path) / STATE).unlink()
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
@pytest.mark.slow
def test_killed_before_the_rename_and_in_a_removal(
    tmp_path: Path, patch: str, leftover: str, newest: int
):
    folder = tmp_path / "checkpoints"
    script = STOPPED.replace("PATCH", patch).replace("FOLDER", repr(str(folder)))
    process = start([], tmp_path / "said", script)
    until(lambda: "stopped" in process.said(), 30.0)
    process.kill()
    assert leftover in names(folder)
    assert (folder / leftover / MANIFEST).exists()  # all of it was there but the name
    lines: list[str] = []
    assert whole_number(folder, lines) == newest
    assert lines == [f"Removed what a killed save left in {folder}: {leftover}"]
    assert whole_number(save(folder, newest + 1).folder) == newest + 1


def test_a_leftover_is_no_obstacle(tmp_path: Path):
    left = tmp_path / ".step-00000001.partial"
    left.mkdir()
    (left / STATE).write_bytes(b"of the run before")
    (left / "more").write_bytes(b"of the run before")
    save(tmp_path, 1)
    assert whole_number(tmp_path) == 1
    assert names(tmp_path / "step-00000001") == [MANIFEST, STATE]


# A full disk


class FullDisk(io.FileIO):
    """A file on a disk with this much room left for all files together."""

    room = 0

    def write(self, data: Any) -> int:
        FullDisk.room -= len(data)
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    real = Path.open

    def opened(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "x" in mode:
            return io.BufferedWriter(FullDisk(str(self), "x"))
        return real(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", opened)
    return monkeypatch


def check_disk_full(folder: Path, checkpoints: Checkpoints) -> None:
    """Saves step 2 in vain beside a whole step 1."""
    needed = sum(tensor.nbytes for tensor in state(2).values())
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


@pytest.mark.parametrize("room", [0, 5_000, 70_000, 128_000, 128_600])
def test_the_disk_is_full_at_some_byte(tmp_path: Path, full_disk: pytest.MonkeyPatch, room: int):
    full_disk.setattr(FullDisk, "room", 2**30)
    checkpoints = save(tmp_path, 1)
    assert room < sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir())
    full_disk.setattr(FullDisk, "room", room)
    check_disk_full(tmp_path, checkpoints)
    checkpoints.save(2, state(2), {"number": 2})
    with pytest.raises(UserError, match="the disk is full"):
        checkpoints.save(3, state(3), {"number": 3})  # the error of the one before
    full_disk.setattr(FullDisk, "room", 2**30)
    checkpoints.save(2, state(2), {"number": 2})
    checkpoints.close()
    assert whole_number(tmp_path) == 2


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_disk_is_full_when_a_file_is_brought_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    """The tensors, the manifest, the folder."""
    checkpoints, calls, fsync = save(tmp_path, 1), [], os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    check_disk_full(tmp_path, checkpoints)


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state(1), {})
    with pytest.raises(UserError, match="the checkpoint cannot be written: "):
        checkpoints.close()


# Damage


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", [STATE, MANIFEST])
@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_empty, Path.unlink])
def test_what_is_damaged_is_named_and_skipped(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
):
    save(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / name)
    lines: list[str] = []
    assert whole_number(tmp_path, lines) == 1
    (line,) = lines
    assert "step-00000002: " in line
    assert str(tmp_path / "step-00000002" / name) in line


def test_every_byte_of_a_manifest_counts(tmp_path: Path):
    save(tmp_path, 1)
    path = tmp_path / "step-00000001" / MANIFEST
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        with pytest.raises(UserError):
            verify(path.parent, deep=False)
    path.write_bytes(raw)
    assert verify(path.parent).step == 1


@unix
def test_a_pipe_in_the_place_of_a_file_blocks_nobody(tmp_path: Path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / STATE).unlink()
    os.mkfifo(tmp_path / "step-00000002" / STATE)
    assert whole_number(tmp_path, []) == 1


def test_all_are_damaged(tmp_path: Path):
    save(tmp_path, 1, 2)
    for path in tmp_path.glob(f"*/{STATE}"):
        damage_flip(path)
    lines: list[str] = []
    assert Checkpoints(tmp_path, say=lines.append).newest() is None
    assert len(lines) == 2


def test_a_renamed_folder_and_a_later_format(tmp_path: Path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000005")
    with pytest.raises(UserError, match="it holds step 2"):
        verify(tmp_path / "step-00000005")
    folder = tmp_path / "step-00000001"
    content = json.loads((folder / MANIFEST).read_bytes())["content"]
    (folder / MANIFEST).unlink()
    write_manifest(folder, {**content, "format": 3})
    with pytest.raises(UserError, match="its format is 3"):
        verify(folder)


def test_checkpoints_of_version_0_1_are_one_clear_message(tmp_path: Path):
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002" / MANIFEST).write_text('{\n "format": 1,\n "step": 2\n}\n')
    with pytest.raises(UserError, match="version 0.1") as error:
        Checkpoints(tmp_path).newest()
    assert error.value.code == "old-format"


def test_tensors_that_only_their_checksum_calls_whole(tmp_path: Path):
    """Who means harm sets the checksums right; safetensors then checks the header."""
    save(tmp_path, 1)
    folder = tmp_path / "step-00000001"
    raw = (folder / STATE).read_bytes()
    for bad in (b"\xff" * 8 + raw[8:], raw[:-100], b"", raw[:8] + b"[" * 1000 + raw[1008:]):
        (folder / STATE).write_bytes(bad)
        with pytest.raises(UserError):
            Checkpoints(tmp_path).load(Checkpoint(folder, 1, {}), state(0))
