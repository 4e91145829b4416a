"""Checkpoints of two processes: replicated and sharded, failing together, read by one.

The tests run this file twice, as rank 0 and 1: python test_checkpoint_ranks.py WORK RANK FOLDER.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_checkpoint import bits, blank, names, newest, state
from torch import Tensor

from allmlp.errors import UserError
from allmlp.training.checkpoint import Checkpoints
from allmlp.training.dcp_storage import Writer


def run_two(work: str, folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", __file__, work, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        texts = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for text, rank in zip(texts, ranks, strict=True):
        assert text.splitlines()[-1:] == ["done"], text
        assert rank.returncode == 0, text


@pytest.mark.slow
def test_two_processes_save_and_load_and_one_loads_it(tmp_path: Path):
    run_two("replicated", tmp_path)
    folder = tmp_path / "checkpoints"
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(names(folder / "step-00000003"))
    checkpoints = Checkpoints(folder)
    found, tensors = newest(checkpoints), blank(state(3))
    assert (found.step, found.values) == (3, {"rank": 0})
    checkpoints.load(found, tensors)
    assert bits(tensors) == bits(state(3))


def new_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def replicated(rank: int, folder: Path) -> None:
    checkpoints = Checkpoints(folder / "checkpoints", group=new_group())
    assert checkpoints.newest() is None
    checkpoints.save(1, state(1), {"rank": rank})
    # Training goes on meanwhile, in another order than the background's.
    total = torch.ones(1)
    for _ in range(50):
        dist.all_reduce(total)
    assert float(total) == 2.0**50
    tensors = blank(state(1))
    checkpoints.load(newest(checkpoints), tensors)
    assert bits(tensors) == bits(state(1))

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Writer, "write_data", full_disk)
        checkpoints.save(2, state(2), {"rank": rank})
        with pytest.raises(UserError, match="the disk is full: the checkpoint needs"):
            checkpoints.wait()
    assert newest(checkpoints).step == 1
    assert names(folder / "checkpoints") == ["step-00000001"]

    checkpoints.save(3, state(3), {"rank": rank})
    checkpoints.wait()
    assert names(folder / "checkpoints") == ["step-00000001", "step-00000003"]
    checkpoints.save(3, state(4), {"rank": 7})  # there already
    if rank == 1:
        tensors["order"] = tensors["order"].float()
    with pytest.raises(UserError, match=r"order is int64 \(9,\) in it and float32"):
        checkpoints.load(newest(checkpoints), tensors)
    checkpoints.close()


def full_disk(*_: Any) -> Any:
    raise OSError(28, os.strerror(28))


@pytest.mark.slow
def test_shards_of_two_processes_are_whole_tensors_in_one(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "from one")
    checkpoints.save(4, whole(4), {})
    checkpoints.close()
    run_two("sharded", tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    tensors = blank(expected)
    checkpoints.load(newest(checkpoints), tensors)
    assert bits(tensors) == bits(expected)
    assert tensors["model.0.weight"].shape == (7, 5)


def whole(number: int) -> dict[str, Tensor]:
    torch.manual_seed(number)
    return {
        "rows": torch.randn(7, 5),
        "columns": torch.randn(3, 3).bfloat16(),
        "one": torch.ones(1),
    }


def sharded(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    tensors: dict[str, Tensor] = {f"model.{name}": each for name, each in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, each in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = each
    tensors["scalar"] = distribute_tensor(torch.tensor(2.5), mesh, [Replicate()])
    expected = {
        name: (each.full_tensor() if isinstance(each, DTensor) else each).detach().clone()
        for name, each in tensors.items()
    }
    checkpoints = Checkpoints(folder / "checkpoints", group=new_group())
    checkpoints.save(1, tensors, {})
    with torch.no_grad():
        for each in tensors.values():
            (each.to_local() if isinstance(each, DTensor) else each).zero_()
    found = newest(checkpoints)
    checkpoints.load(found, tensors)
    for name, each in tensors.items():
        full = each.full_tensor() if isinstance(each, DTensor) else each
        assert torch.equal(full, expected[name]), name
    if rank == 0:
        torch.save(expected, folder / "expected.pt")

    there = Checkpoints(folder / "from one", group=new_group())
    placed = {"rows": Shard(0), "columns": Shard(1), "one": Shard(0)}
    empty: dict[str, Tensor] = {
        name: distribute_tensor(torch.zeros_like(each), mesh, [placed[name]])
        for name, each in whole(4).items()
    }
    there.load(newest(there), empty)
    for name, each in whole(4).items():
        loaded = empty[name]
        assert isinstance(loaded, DTensor)
        assert torch.equal(loaded.full_tensor(), each), name
    checkpoints.close()
    there.close()


if __name__ == "__main__":
    WORK, RANK, FOLDER = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", f"file://{FOLDER}/meet", rank=RANK, world_size=2)
    {"replicated": replicated, "sharded": sharded}[WORK](RANK, FOLDER)
    dist.destroy_process_group()
    print("done")
