"""Apple GPUs, as far as a machine without one shows.

A stand-in has tensors that say they are on "mps:0" and compute on the CPU. They refuse what an
Apple GPU cannot do: float64, copies that do not wait or that convert, and operations with a tensor
of the CPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

import allmlp as am
from allmlp.runtime.device import choose_device, choose_policy
from allmlp.runtime.world import join_world
from conftest import TINY, tiny_config

OPERATIONS: set[str] = set()  # that ran on the GPU
_MOVES = ("copy_", "_to_copy")
_META: list[bool] = []  # not empty within `with torch.device("meta")`


class AppleTensor(torch.Tensor):
    """For autograd in C++ it is on "meta": there is no queue for an Apple GPU."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> AppleTensor:
        if value.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        layout = value.shape, value.stride(), value.storage_offset()
        meta = {"dtype": value.dtype, "device": "meta"}
        made = torch.Tensor._make_wrapper_subclass(cls, *layout, **meta)
        made.value = value
        return made

    @property
    def device(self) -> torch.device:
        return torch.device("mps:0")

    def tolist(self) -> Any:
        return self.value.tolist()

    def __repr__(self) -> str:
        return f"AppleTensor({self.value})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    inputs, device = [isinstance(leaf, AppleTensor) for leaf in tensors], kwargs.get("device")
    kind = None if device is None else torch.device(device).type
    if kind == "meta" and not _META:
        kind = "mps"
    on_gpu = kind == "mps" or (any(inputs) and kind is None)
    if not on_gpu and not any(inputs):
        return function(*args, **kwargs)
    with _Factories():  # in inference mode, composite operations come whole
        found = function.decompose(*args, **kwargs)
    if found is not NotImplemented:
        return found
    name = function.overloadpacket.__name__
    OPERATIONS.add(str(function))
    if name in _MOVES:
        before = tensors[-1].dtype
        after = tensors[0].dtype if name == "copy_" else kwargs.get("dtype") or before
        if not all(inputs) or not on_gpu:
            assert before == after, "converts while it copies between devices"
            assert not kwargs.get("non_blocking"), "does not wait"
    else:
        assert all(has or not leaf.dim() for has, leaf in zip(inputs, tensors, strict=True)), (
            f"{function} of tensors on two devices"
        )
    if kind is not None and kind != "cpu":
        kwargs = {**kwargs, "device": "cpu"}
    plain, plain_kwargs = tree_map_only(AppleTensor, lambda leaf: leaf.value, (args, kwargs))
    found = function(*plain, **plain_kwargs)
    if name == "copy_":
        return args[0]
    if not on_gpu:  # to the CPU
        return found.clone() if isinstance(found, Tensor) else found
    found = tree_map_only(Tensor, AppleTensor, found)
    return return_and_correct_aliasing(function, args, kwargs, found) if any(inputs) else found


def _on_device(self: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    is_meta = self.device.type == "meta"
    _META.extend([True] * is_meta)
    try:
        return _PLAIN(self, function, types, args, kwargs)
    finally:
        del _META[len(_META) - is_meta :]


_PLAIN = DeviceContext.__torch_function__


@contextlib.contextmanager
def apple_gpu() -> Iterator[None]:
    """Lets torch find an Apple GPU, "mps:0", within the block."""
    with pytest.MonkeyPatch.context() as patch, _Factories():
        patch.setattr(torch.backends.mps, "is_available", lambda: True)
        patch.setattr(torch.backends.mps, "get_name", lambda: "Apple GPU")
        known = dict.fromkeys(("synchronize", "empty_cache", "set_rng_state", "get_rng_state"))
        known |= {"recommended_max_memory": 2**33, "driver_allocated_memory": 2**20}
        for name, value in known.items():
            patch.setattr(torch.mps, name, lambda *_, value=value: value)
        patch.setattr(DeviceContext, "__torch_function__", _on_device)
        # Built where no mode sees it.
        tensor = torch.tensor
        patch.setattr(torch, "tensor", lambda *a, device=None, **k: tensor(*a, **k).to(device))
        patch.setattr(torch, "Generator", lambda *_, make=torch.Generator: make())
        yield


def test_choice(monkeypatch):
    if not torch.cuda.is_available():
        with apple_gpu():
            assert choose_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = choose_device("mps")
    policy = choose_policy(device, "auto", "auto", operations=10**12, num_steps=10**5)
    assert policy.precision == "float32"
    with pytest.raises(am.UserError, match="bfloat16"):
        choose_policy(device, "bfloat16", "auto", operations=1, num_steps=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(am.UserError, match="one GPU"), join_world("mps"):
        pass


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:.*frobenius_norm")
@pytest.mark.parametrize(
    "changes",
    [
        {
            "augment__mixup": 0.5,
            "augment__cutmix": 1.0,
            "optimizer__ema_decay": 0.9,
            "model__overrides": {**TINY, "stochastic_depth": 0.3, "dropout": 0.1},
        },
        slow({"optimizer": {"name": "muon"}, "data__balance": "weights"}),
        slow({"optimizer__sam_rho": 0.05, "loss": {"name": "sigmoid"}}),
    ],
    ids=["augmented", "muon", "sam"],
)
def test_a_run_equals_that_of_a_cpu(class_folder, tmp_path, changes):
    runs = []
    for device in ("cpu", "mps:0"):
        given = {"device": device, "epochs": 1, **changes}
        config = tiny_config(str(class_folder), tmp_path / device[:3], **given)
        OPERATIONS.clear()
        with contextlib.nullcontext() if device == "cpu" else apple_gpu():
            runs.append(am.train(config, quiet=True).run_folder)
        assert bool(OPERATIONS) == (device != "cpu")
    there = ("convolution", "convolution_backward", "gelu", "gelu_backward")
    assert {f"aten.{name}.default" for name in there} <= OPERATIONS
    with apple_gpu():
        found = am.evaluate(runs[0], data=f"{class_folder}:validation", device="mps:0")
        assert found.precision.startswith("float32")
        assert am.resume(runs[1], quiet=True).run_folder == runs[1]
    expected = am.evaluate(runs[0], data=f"{class_folder}:validation", device="cpu")
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    cpu, gpu = (load_file(run / "best" / "model.safetensors") for run in runs)
    for name, value in cpu.items():
        torch.testing.assert_close(gpu[name], value, rtol=1e-4, atol=1e-6)
