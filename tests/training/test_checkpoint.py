"""The state of a run on disk: bit for bit, in the background, and not all of it for ever."""

from __future__ import annotations

import enum
import hashlib
import json
import math
import pickle
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from allmlp.errors import UserError
from allmlp.training.checkpoint import Checkpoint, Checkpoints
from allmlp.training.dcp_storage import Writer


def state(number: int) -> dict[str, Tensor]:
    """Tensors of every kind that a run holds, other ones for every number."""
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
    return {name: torch.zeros_like(each) for name, each in tensors.items()}


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        name: each.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if each.numel()
        else b""
        for name, each in tensors.items()
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
    tensors = blank(state(3))
    addresses = {name: each.data_ptr() for name, each in tensors.items()}
    later.load(found, tensors)
    assert bits(tensors) == bits(state(3))
    assert {name: each.data_ptr() for name, each in tensors.items()} == addresses
    assert not dist.is_initialized()


def test_the_manifest_tells_what_is_there(tmp_path: Path):
    saved(tmp_path, 7)
    folder = tmp_path / "step-00000007"
    content = json.loads((folder / "manifest.json").read_bytes())
    assert (content["format"], content["step"], content["is_best"]) == (1, 7, False)
    assert content["allmlp"] == version("allmlp")
    assert sorted([*content["files"], "manifest.json"]) == names(folder)
    for name, entry in content["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert str(tmp_path).encode() not in (folder / ".metadata").read_bytes()


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch):
    """Writing goes on when this event is set."""
    go_on, write_data = threading.Event(), Writer.write_data

    def wait_and_write(self: Writer, *arguments: Any) -> Any:
        assert go_on.wait(20)
        return write_data(self, *arguments)

    monkeypatch.setattr(Writer, "write_data", wait_and_write)
    yield go_on
    go_on.set()


def test_save_returns_before_it_has_written(tmp_path: Path, slow_disk: threading.Event):
    tensors, values = state(1), {"losses": [1.0]}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors, values)
    with torch.no_grad():
        for each in tensors.values():
            each.zero_()
    values["losses"].append(2.0)
    assert names(tmp_path) in ([], [".step-00000001.partial"])
    slow_disk.set()
    found = newest(checkpoints)
    assert found.values == {"losses": [1.0]}
    checkpoints.load(found, tensors)
    assert bits(tensors) == bits(state(1))


def test_a_save_waits_for_the_one_before(tmp_path: Path, slow_disk: threading.Event):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {})
    second = threading.Thread(target=checkpoints.save, args=(2, state(2), {}))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    slow_disk.set()
    second.join(20)
    checkpoints.close()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_what_is_not_json_is_an_error_at_once(tmp_path: Path):
    with pytest.raises(TypeError):
        Checkpoints(tmp_path).save(1, state(1), {"loss": torch.tensor(1.0)})
    assert names(tmp_path) == []


def test_the_newest_and_the_best_are_kept(tmp_path: Path):
    checkpoints, kept = Checkpoints(tmp_path, keep=2), []
    for step in range(1, 8):
        checkpoints.save(step, state(step), {}, is_best=step in (2, 3))
        checkpoints.wait()
        kept.append([int(name[5:]) for name in names(tmp_path)])
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [3, 6, 7]]
    with pytest.raises(ValueError, match="keep must be 1 or more, not 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_damaged_one_pushes_no_good_one_out(tmp_path: Path):
    saved(tmp_path, 1, 9)
    flip(tmp_path / "step-00000009" / "__0_0.distcp")
    checkpoints = Checkpoints(tmp_path, keep=2, say=lambda line: None)
    assert newest(checkpoints).step == 1
    checkpoints.save(2, state(2), {})
    checkpoints.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000009"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_same_step_again_changes_nothing(tmp_path: Path):
    lines: list[str] = []
    checkpoints = saved(tmp_path, 5, say=lines.append)
    before = {path: path.stat() for path in (tmp_path / "step-00000005").iterdir()}
    checkpoints.save(5, state(6), {"step": 6})
    assert newest(checkpoints).values == {"step": 5}
    assert {path: path.stat() for path in (tmp_path / "step-00000005").iterdir()} == before
    assert (lines, names(tmp_path)) == ([], ["step-00000005"])


def test_the_same_step_again_replaces_a_damaged_one(tmp_path: Path):
    checkpoints = saved(tmp_path, 5)
    flip(tmp_path / "step-00000005" / "__0_0.distcp")
    checkpoints.save(5, state(6), {"step": 6})
    found = newest(checkpoints)
    assert (found.values, names(tmp_path)) == ({"step": 6}, ["step-00000005"])
    tensors = blank(state(6))
    checkpoints.load(found, tensors)
    assert bits(tensors) == bits(state(6))


def test_tensors_of_another_model_are_refused_by_name(tmp_path: Path):
    checkpoints = saved(tmp_path, 1)
    found, good = newest(checkpoints), blank(state(1))
    changes: list[tuple[dict[str, Tensor], str]] = [
        ({"tail.weight": torch.zeros(2)}, "tail.weight is not in it"),
        ({"order": torch.zeros(8, dtype=torch.int64)}, "order is int64 (9,) in it and int64 (8,)"),
        ({"head.bias": torch.zeros(8)}, "head.bias is bfloat16 (8,) in it and float32 (8,) here"),
        ({"optimizer.step": torch.zeros(1)}, "optimizer.step is float32 () in it"),
    ]
    for change, text in changes:
        tensors = {**good, **change}
        with pytest.raises(UserError) as error:
            checkpoints.load(found, tensors)
        assert text in error.value.what
        assert error.value.where == str(found.path)
        assert not any(each.any() for each in tensors.values())
    del good["mask"]
    with pytest.raises(UserError, match="mask is only in it"):
        checkpoints.load(found, good)
    with pytest.raises(UserError, match="and 5 more"):
        checkpoints.load(found, {"another": torch.zeros(1), "seed": good["seed"]})
    assert not any(each.any() for each in good.values())


def test_enums_that_are_pickled_by_name_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As Python 3.11.0 does, through getattr, which must not be allowed as such."""
    by_name = enum.pickle_by_enum_name
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name, raising=False)
    assert b"getattr" in pickle.dumps(_MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT)
    checkpoints = saved(tmp_path, 1)
    assert b"getattr" in (tmp_path / "step-00000001" / ".metadata").read_bytes()
    tensors = blank(state(1))
    checkpoints.load(newest(checkpoints), tensors)
    assert bits(tensors) == bits(state(1))
