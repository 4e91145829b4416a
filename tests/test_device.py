"""Devices: names, which process gets which GPU, and what float32 means on one."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import allmlp as am
from allmlp.data.loader import Batch, choose_workers
from allmlp.data.sources import open_source
from allmlp.evaluation import predictor
from allmlp.models import inference
from allmlp.preprocessing import Preprocessing
from allmlp.runtime import device
from allmlp.runtime.device import choose_device, choose_policy, keep_compiled, torch_settings
from allmlp.runtime.world import World, join_world, parallelize
from conftest import tiny_model


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    absent = () if torch.cuda.is_available() else ("cuda",)
    for name in ("gpu", "mps", "meta", *absent):
        with pytest.raises(am.UserError, match=f"device '{name}'"):
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
    shard = lambda module, *, mesh: meshes.append(mesh)  # noqa: E731
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", shard)
    model = tiny_model()
    parallelize(model, "full", World(0, 2))
    assert meshes == ["cpu"] * (2 + len(model.blocks))


@pytest.mark.parametrize(
    ("operations", "steps", "compiles"),
    [(3 * 10**15, 100, True), (3 * 10**15, 50, False), (10**9, 10**5, False), (1, 10**6, True)],
)
def test_a_gpu_compiles_what_takes_long(monkeypatch, gpus, operations, steps, compiles):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("allmlp.runtime.device.can_compile", lambda _: True)
    device = torch.device("cuda")
    found = choose_policy(device, "auto", "auto", operations=operations, num_steps=steps)
    assert (found.compile, found.precision) == (compiles, "bfloat16")


def test_compiled_kernels_are_the_same_every_time(monkeypatch, tmp_path):
    import torch._inductor.config as inductor

    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(inductor, "deterministic", False)
    keep_compiled(None)
    assert inductor.deterministic
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ  # of each machine, with several processes
    keep_compiled(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def test_inference_on_a_gpu_compiles_one_shape(monkeypatch):
    """The last batch is padded; the weights are rounded once, to what autocast makes of them."""
    model, images = tiny_model().eval(), torch.randn(7, 3, 8, 8)
    plain = inference.Inference(model, "bfloat16")
    expected = plain.logits(images), plain.features(images)
    monkeypatch.setattr(inference, "pays_to_compile", lambda device, operations, steps: steps == 3)
    shapes: list[int | None] = []

    def compiled(function):
        return lambda images: (shapes.append(len(images)), function(images))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    ours = inference.Inference(model, "bfloat16")
    inference._round_weights(ours._network)
    ours.compile_for(8, 4)
    assert torch.equal(ours.logits(images), expected[0])
    ours.compile_for(20, 8)
    assert torch.equal(ours.logits(images), expected[0])
    assert torch.equal(ours.features(images), expected[1])
    assert shapes == [8, 8]
    assert model.blocks[0].channel_mixing.dense_0.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("gpu", "ranks", "workers"), [(True, "2", 11), (True, "24", 1), (False, "2", 8)]
)
def test_loader_processes_share_the_cores_of_a_process(monkeypatch, gpu, ranks, workers):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(24), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    source = open_source("digits:train")
    assert choose_workers(None, source, Preprocessing(image_size=(224, 224))) == workers


def test_results_are_used_while_a_gpu_computes(monkeypatch):
    """A GPU is a queue. 20 batches: 0.5 ms to load one, 6 to compute it, 4 to use its results."""
    clock = {"cpu": 0.0, "gpu": 0.0}

    class Copy:
        def __init__(self, tensors: tuple[torch.Tensor, ...], stream: object) -> None:
            self.arrays, self.ready = tuple(tensor.numpy() for tensor in tensors), clock["gpu"]

        def wait(self) -> tuple[np.ndarray, ...]:
            clock["cpu"] = max(clock["cpu"], self.ready)
            return self.arrays

    def batches(*_: object, **__: object) -> Iterator[Batch]:
        for index in range(20):
            clock["cpu"] += 0.5
            pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
            yield Batch(pixels, torch.zeros(1).long(), torch.tensor([index]))

    def compute(images: torch.Tensor) -> torch.Tensor:
        clock["gpu"] = max(clock["gpu"], clock["cpu"]) + 6.0
        return images[:, 0, 0, :1].float()

    fakes = {"Transfer": Copy, "evaluation_batches": batches, "side_stream": lambda _: "stream"}
    for name, fake in {**fakes, "on_device": lambda batches, _: batches}.items():
        monkeypatch.setattr(predictor, name, fake)
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: batch)
    outputs = predictor.Predictor(tiny_model()).run(open_source("digits:train"), compute)
    indices = []
    for output in outputs:
        indices += output.indices.tolist()
        clock["cpu"] += 4.0
    assert indices == [*range(20)]
    assert clock["cpu"] == 0.5 + 20 * 6.0 + 4.0


def test_free_memory_is_that_of_the_container(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    stat = "anon 600000\nactive_file 60000\ninactive_file 40000\n"
    (tmp_path / "memory.stat").write_text(stat)
    monkeypatch.setattr(device, "_groups", lambda: [tmp_path, tmp_path / "without_a_limit"])
    assert device.free_memory(torch.device("cpu")) == 400_000
