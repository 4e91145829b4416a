"""Devices: names, which process gets which GPU, and what float32 means on one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import allmlp as am
from allmlp.runtime.device import choose_device, torch_settings
from allmlp.runtime.world import World, join_world, parallelize


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    absent = () if torch.cuda.is_available() else ("cuda",)
    for name in ("gpu", "mps", "meta", *absent):
        with pytest.raises(am.UserError):
            choose_device(name)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs; returns those that were made torch's current one."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("allmlp.runtime.world._rendezvous", _Joining.begin)
    return taken


class _Joining(Exception):
    """The process group would be joined now."""

    @classmethod
    def begin(cls, _: object) -> None:
        raise cls


def test_a_single_process_opens_no_context_on_another_gpu(gpus):
    with join_world("cuda:1") as (_, device):
        assert gpus == [device] == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("variables", "visible", "taken"),
    [
        ({"LOCAL_RANK": "1"}, 2, "cuda:1"),
        ({"SLURM_LOCALID": "1"}, 2, "cuda:1"),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "5"}, 1, "cuda:0"),  # --gpus-per-task=1
        ({}, 2, None),
        ({"LOCAL_RANK": "1"}, 1, None),
    ],
)
def test_each_of_several_processes_gets_its_own_gpu(monkeypatch, gpus, variables, visible, taken):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(_Joining if taken else am.UserError), join_world("cuda"):
        pass
    assert gpus == ([torch.device(taken)] if taken else [])


def test_float32_is_float32_on_a_gpu():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    assert cudnn.allow_tf32  # torch's default
    with torch_settings(torch.device("cuda"), "float32"):
        assert not any((cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark))
        assert cudnn.deterministic
        assert not matmul.allow_bf16_reduced_precision_reduction
    assert cudnn.allow_tf32
    assert matmul.allow_bf16_reduced_precision_reduction


def test_a_model_on_the_cpu_is_sharded_there(monkeypatch):
    """Also on a machine with a GPU, whose devices torch would take."""
    meshes: list[str] = []

    def mesh(kind: str, _: object) -> str:
        meshes.append(kind)
        return kind

    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", mesh)
    given = lambda module, *, mesh, **_: meshes.append(mesh)  # noqa: E731
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", given)
    parallelize(nn.Linear(2, 2), "full", World(0, 2))
    assert meshes == ["cpu", "cpu"]
