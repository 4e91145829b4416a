"""The state of a run on disk: bit for bit, in the background, and only the newest kept."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from allmlp.errors import UserError
from allmlp.training import checkpoint as module
from allmlp.training.checkpoint import MANIFEST, STATE, Checkpoint, Checkpoints


def state(number: int) -> dict[str, Tensor]:
    """Tensors of every kind that a run holds, different for every number."""
    torch.manual_seed(number)
    large = torch.randn(50, 20)
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
        "part": large[10:20, 3:9],
        "empty": torch.empty(0, 3),
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if tensor.numel()
        else b""
        for name, tensor in tensors.items()
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def saved(folder: Path, *steps: int, **options: Any) -> Checkpoints:
    """Checkpoints with these steps in them."""
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()
    return checkpoints


def newest(checkpoints: Checkpoints) -> Checkpoint:
    found = checkpoints.newest()
    assert found is not None
    return found


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
    found = newest(later)
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
    assert module.verify(first.path).values == {"losses": [1.0]}
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
    assert newest(checkpoints).step == 1
    checkpoints.save(2, state(2), {})
    checkpoints.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000009"]


def test_the_same_step_again_replaces_only_a_damaged_one(tmp_path: Path):
    checkpoints = saved(tmp_path, 5)
    before = {path: path.stat() for path in (tmp_path / "step-00000005").iterdir()}
    checkpoints.save(5, state(6), {"step": 6})
    assert newest(checkpoints).values == {"step": 5}
    assert {path: path.stat() for path in (tmp_path / "step-00000005").iterdir()} == before
    flip(tmp_path / "step-00000005" / STATE)
    checkpoints.save(5, state(6), {"step": 6})
    found = newest(checkpoints)
    assert (found.values, names(tmp_path)) == ({"step": 6}, ["step-00000005"])
    tensors = blank(state(6))
    checkpoints.load(found, tensors)
    assert bits(tensors) == bits(state(6))


def test_tensors_of_another_model_are_named_and_not_loaded(tmp_path: Path):
    checkpoints = saved(tmp_path, 1)
    found, good = newest(checkpoints), blank(state(1))
    changes: list[dict[str, Tensor]] = [
        {"tail.weight": torch.zeros(2)},
        {"order": torch.zeros(8, dtype=torch.int64)},
        {"head.bias": torch.zeros(8)},
        {"optimizer.step": torch.zeros(1)},
    ]
    for change in changes:
        tensors = {**good, **change}
        with pytest.raises(UserError) as error:
            checkpoints.load(found, tensors)
        assert next(iter(change)) in error.value.what
        assert error.value.where == str(found.path)
        assert not any(tensor.any() for tensor in tensors.values())
    del good["mask"]
    with pytest.raises(UserError, match="mask is only in it"):
        checkpoints.load(found, good)
