"""The state of a run on disk: bit for bit, in the background, only the newest kept; and kills, full
disks and damage, after which what is found is whole, and no older than was promised."""

import errno
import io
import json
import math
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from allmlp.errors import UserError
from allmlp.training import checkpoint as module
from allmlp.training.checkpoint import MANIFEST, STATE, Checkpoint, Checkpoints, verify
from conftest import user_error
from runs import unix


def state(number: int) -> dict[str, Tensor]:
    """Tensors of every kind that a run holds, different for every number."""
    torch.manual_seed(number)
    large = torch.randn(40, 800)  # some of it is written past Python's buffer
    odd = torch.randn(8).bfloat16()
    odd[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    return {
        "head.weight": torch.nn.Parameter(torch.randn(5, 7)),
        "head.bias": odd,
        "optimizer.step": torch.tensor(float(number)),
        "seed": torch.tensor(2**62 + number),
        "order": torch.randperm(9),
        "mask": torch.randn(6) > 0,
        "transposed": torch.randn(3, 4).t(),
        "large": large,
        "part": large[10:20, 3:9],
        "empty": torch.empty(0, 3),
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def bits(tensors: dict[str, Tensor]) -> bytes:
    return save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def saved(folder: Path, *steps: int, **options: Any) -> Checkpoints:
    """Checkpoints with these steps in them."""
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()
    return checkpoints


def whole_number(folder: Path, lines: list[str] | None = None) -> int:
    """The step of the newest checkpoint, when all that it holds is of this one step."""
    checkpoints = Checkpoints(folder, say=[].append if lines is None else lines.append)
    found = checkpoints.newest()
    tensors = blank(state(0))
    checkpoints.load(found, tensors)
    assert bits(tensors) == bits(state(found.step))
    assert found.values == {"step": found.step}
    assert all(name.startswith("step-") for name in names(folder))  # no leftovers
    return found.step


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_every_bit_comes_back(tmp_path: Path):
    values = {"loss": 0.1 + 0.2, "best": -math.inf, "names": ["ä", "b"], "none": None}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    checkpoints.save(12000, state(3), values)
    checkpoints.close()

    later = Checkpoints(tmp_path / "checkpoints")
    found = later.newest()
    assert (found.step, found.values) == (12000, values)
    assert found.path == tmp_path / "checkpoints" / "step-00012000"
    assert names(found.path) == [MANIFEST, STATE]
    tensors = blank(state(3))
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    later.load(found, tensors)
    assert bits(tensors) == bits(state(3))
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == addresses
    assert bits(load_file(found.path / STATE)) == bits(state(3))  # as other programs read it
    assert json.loads((found.path / MANIFEST).read_bytes())["content"]["step"] == 12000


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch):
    """Writing continues when this event is set."""
    proceed, write = threading.Event(), module.write_tensors

    def wait_and_write(*arguments: Any) -> Any:
        assert proceed.wait(20)
        return write(*arguments)

    monkeypatch.setattr(module, "write_tensors", wait_and_write)
    yield proceed
    proceed.set()


def test_save_returns_before_it_has_written(tmp_path: Path, slow_disk: threading.Event):
    tensors, values = state(1), {"losses": [1.0]}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors, values)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    values["losses"].append(2.0)
    assert names(tmp_path) in ([], [".step-00000001.partial"])
    second = threading.Thread(target=checkpoints.save, args=(2, state(2), {}))
    second.start()
    second.join(0.1)
    assert second.is_alive()  # it waits for the one before
    slow_disk.set()
    second.join(20)
    checkpoints.close()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    first = Checkpoint(tmp_path / "step-00000001", 1, {})
    assert verify(first.path).values == {"losses": [1.0]}
    checkpoints.load(first, tensors)
    assert bits(tensors) == bits(state(1))


def test_the_newest_and_the_best_are_kept(tmp_path: Path):
    checkpoints, kept = Checkpoints(tmp_path, keep=2), []
    for step in range(1, 8):
        checkpoints.save(step, state(step), {}, is_best=step in (2, 3))
        checkpoints.wait()
        kept.append([int(name[5:]) for name in names(tmp_path)])
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [3, 6, 7]]


def test_a_damaged_one_pushes_no_good_one_out(tmp_path: Path):
    saved(tmp_path, 1, 9)
    flip(tmp_path / "step-00000009" / STATE)
    checkpoints = Checkpoints(tmp_path, keep=2, say=lambda line: None)
    assert checkpoints.newest().step == 1
    checkpoints.save(2, state(2), {})
    checkpoints.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000009"]


def test_the_same_step_again_replaces_only_a_damaged_one(tmp_path: Path):
    checkpoints = saved(tmp_path, 5)

    def files() -> dict[Path, tuple[int, int]]:
        found = {path: path.stat() for path in (tmp_path / "step-00000005").iterdir()}
        return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}

    before = files()
    checkpoints.save(5, state(6), {"step": 6})
    assert checkpoints.newest().values == {"step": 5}
    assert files() == before
    flip(tmp_path / "step-00000005" / STATE)
    checkpoints.save(5, state(6), {"step": 6})
    found = checkpoints.newest()
    assert (found.values, names(tmp_path)) == ({"step": 6}, ["step-00000005"])
    tensors = blank(state(6))
    checkpoints.load(found, tensors)
    assert bits(tensors) == bits(state(6))


def test_tensors_of_another_model_are_named_and_not_loaded(tmp_path: Path):
    checkpoints = saved(tmp_path, 1)
    found, good = checkpoints.newest(), blank(state(1))
    changes = {
        "tail.weight": torch.zeros(2),
        "order": torch.zeros(8, dtype=torch.int64),
        "head.bias": torch.zeros(8),
        "optimizer.step": torch.zeros(1),
    }
    for name, tensor in changes.items():
        tensors = {**good, name: tensor}
        with pytest.raises(UserError, match=name) as error:
            checkpoints.load(found, tensors)
        assert error.value.where == str(found.path)
        assert not any(tensor.any() for tensor in tensors.values())
    del good["mask"]
    with pytest.raises(UserError, match="mask is BOOL .* in it, not here"):
        checkpoints.load(found, good)


# Kills


def test_a_rename_is_the_last_of_a_save_and_the_first_of_a_removal(tmp_path, monkeypatch):
    """So what a kill leaves has another name, and what has its name is whole."""
    renamed: list[tuple[str, list[str]]] = []
    rename = Path.rename

    def noting(source: Path, target: Path) -> Path:
        renamed.append((Path(target).name, names(source)))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", noting)
    saved(tmp_path, 1, 2, 3)
    new = [f"step-0000000{step}" for step in (1, 2, 3)]
    assert renamed == [(name, [MANIFEST, STATE]) for name in (*new, ".step-00000001.removed")]


def test_what_a_kill_leaves_goes(tmp_path: Path):
    saved(tmp_path, 1, 2, 3)
    (tmp_path / "step-00000003").rename(tmp_path / ".step-00000003.partial")
    (tmp_path / ".step-00000001.removed").mkdir()
    lines: list[str] = []
    assert whole_number(tmp_path, lines) == 2
    left = ".step-00000001.removed, .step-00000003.partial"
    assert lines == [f"Removed what a killed save left in {tmp_path}: {left}"]
    left = tmp_path / ".step-00000003.partial"  # one that nobody has looked for is no obstacle
    left.mkdir()
    (left / "more").write_bytes(b"of the run before")
    saved(tmp_path, 3)
    assert whole_number(tmp_path) == 3
    assert names(tmp_path / "step-00000003") == [MANIFEST, STATE]


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
    checkpoints.save(2, state(2), {"step": 2})
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
    checkpoints = saved(tmp_path, 1)
    assert room < sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir())
    full_disk.setattr(FullDisk, "room", room)
    check_disk_full(tmp_path, checkpoints)
    checkpoints.save(2, state(2), {"step": 2})
    with pytest.raises(UserError, match="the disk is full"):
        checkpoints.save(3, state(3), {"step": 3})  # the error of the one before
    full_disk.setattr(FullDisk, "room", 2**30)
    checkpoints.save(2, state(2), {"step": 2})
    checkpoints.close()
    assert whole_number(tmp_path) == 2


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_disk_is_full_when_a_file_is_brought_to_it(tmp_path, monkeypatch, number):
    """The tensors, the manifest, the folder."""
    checkpoints, calls, fsync = saved(tmp_path, 1), [], os.fsync

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


def block(path: Path) -> None:
    """A pipe in the place of a file, which to read would block."""
    path.unlink()
    os.mkfifo(path)


DAMAGES = [
    flip,
    Path.unlink,
    lambda path: os.truncate(path, path.stat().st_size - 1),
    lambda path: os.truncate(path, 0),
]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in (STATE, MANIFEST) for damage in DAMAGES),
        pytest.param(STATE, block, marks=unix),
    ],
)
def test_what_is_damaged_is_named_and_skipped(tmp_path, name, damage):
    saved(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / name)
    lines: list[str] = []
    assert whole_number(tmp_path, lines) == 1
    (line,) = lines
    assert "step-00000002: " in line
    assert str(tmp_path / "step-00000002" / name) in line


def test_every_byte_of_a_manifest_counts(tmp_path: Path):
    saved(tmp_path, 1)
    path = tmp_path / "step-00000001" / MANIFEST
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        with pytest.raises(UserError):
            verify(path.parent, deep=False)
    path.write_bytes(raw)
    assert verify(path.parent).step == 1


def test_all_are_damaged(tmp_path: Path):
    saved(tmp_path, 1, 2)
    for path in tmp_path.glob(f"*/{STATE}"):
        flip(path)
    lines: list[str] = []
    assert Checkpoints(tmp_path, say=lines.append).newest() is None
    assert len(lines) == 2


def test_a_renamed_folder_and_a_later_format(tmp_path: Path):
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000005")
    with pytest.raises(UserError, match="it holds step 2"):
        verify(tmp_path / "step-00000005")
    folder = tmp_path / "step-00000001"
    content = json.loads((folder / MANIFEST).read_bytes())["content"]
    (folder / MANIFEST).unlink()
    module.write_manifest(folder, {**content, "format": 3})
    with pytest.raises(UserError, match="its format is 3"):
        verify(folder)
    (folder / MANIFEST).write_text('{\n "format": 1,\n "step": 1\n}\n')
    with user_error("old-format", "version 0.1"):
        Checkpoints(tmp_path).newest()


def test_tensors_that_only_their_checksum_calls_whole(tmp_path: Path):
    """Who means harm sets the checksums right; safetensors then checks the header."""
    saved(tmp_path, 1)
    folder = tmp_path / "step-00000001"
    raw = (folder / STATE).read_bytes()
    for bad in (b"\xff" * 8 + raw[8:], raw[:-100], b"", raw[:8] + b"[" * 1000 + raw[1008:]):
        (folder / STATE).write_bytes(bad)
        with pytest.raises(UserError):
            Checkpoints(tmp_path).load(Checkpoint(folder, 1, {}), state(0))
