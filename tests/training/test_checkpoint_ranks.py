"""Checkpoints of two processes: replicated and sharded, read by one, and the other way around.

The test runs this file twice, as rank 0 and 1: python test_checkpoint_ranks.py RANK FOLDER.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_checkpoint import bits, blank, names, newest, state
from torch import Tensor

from allmlp.errors import UserError
from allmlp.runtime.world import World
from allmlp.training import checkpoint as module
from allmlp.training.checkpoint import Checkpoints


@pytest.mark.slow
def test_two_processes_save_and_load_and_so_does_one(tmp_path: Path):
    one = Checkpoints(tmp_path / "from one")
    one.save(4, whole(4), {})
    one.close()
    command = [sys.executable, "-W", "error::UserWarning", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, **pipes)
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
    for folder, expected in (
        ("replicated", state(3)),
        ("sharded", torch.load(tmp_path / "expected.pt", weights_only=True)),
    ):
        checkpoints, tensors = Checkpoints(tmp_path / folder), blank(expected)
        found = newest(checkpoints)
        checkpoints.load(found, tensors)
        assert bits(tensors) == bits(expected)
        assert found.values == {"rank": 0}


def replicated(world: World, folder: Path) -> None:
    checkpoints = Checkpoints(folder, world=world)
    assert checkpoints.newest() is None
    checkpoints.save(1, state(1), {"rank": world.rank})
    checkpoints.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_tensors", full_disk)
        checkpoints.save(2, state(2), {"rank": world.rank})
        with pytest.raises(UserError, match="the disk is full"):  # on both ranks
            checkpoints.save(3, state(3), {"rank": world.rank})
    assert newest(checkpoints).step == 1
    checkpoints.save(3, state(3), {"rank": world.rank})
    tensors = blank(state(3))
    checkpoints.load(newest(checkpoints), tensors)
    assert bits(tensors) == bits(state(3))
    assert names(folder) == ["step-00000001", "step-00000003"]
    checkpoints.close()


def full_disk(*_: object) -> None:
    raise OSError(28, os.strerror(28))


def whole(number: int) -> dict[str, Tensor]:
    torch.manual_seed(number)
    return {
        "rows": torch.randn(7, 5),
        "columns": torch.randn(3, 3).bfloat16(),
        "one": torch.ones(1),
    }


def sharded(world: World, folder: Path) -> None:
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
    tensors: dict[str, Tensor] = {
        f"model.{name}": tensor for name, tensor in model.named_parameters()
    }
    for name, parameter in model.named_parameters():
        for key, tensor in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = tensor
    tensors["scalar"] = distribute_tensor(torch.tensor(2.5), mesh, [Replicate()])

    def full() -> dict[str, Tensor]:
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
            for name, tensor in tensors.items()
        }

    expected = full()
    checkpoints = Checkpoints(folder / "sharded", world=world)
    checkpoints.save(1, tensors, {"rank": world.rank})
    with torch.no_grad():
        for tensor in tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    checkpoints.load(newest(checkpoints), tensors)
    assert bits(full()) == bits(expected)
    if world.is_main:
        torch.save(expected, folder / "expected.pt")

    there = Checkpoints(folder / "from one", world=world)
    placed = {"rows": Shard(0), "columns": Shard(1), "one": Shard(0)}
    tensors = {
        name: distribute_tensor(torch.zeros_like(tensor), mesh, [placed[name]])
        for name, tensor in whole(4).items()
    }
    there.load(newest(there), tensors)
    assert bits(full()) == bits(whole(4))
    checkpoints.close()
    there.close()


if __name__ == "__main__":
    WORLD, FOLDER = World(int(sys.argv[1]), 2), Path(sys.argv[2])
    dist.init_process_group("gloo", f"file://{FOLDER}/meet", rank=WORLD.rank, world_size=2)
    replicated(WORLD, FOLDER / "replicated")
    sharded(WORLD, FOLDER)
    dist.destroy_process_group()
    print("done")
