"""Apple GPUs, as far as a machine without one shows: see apple_gpu.py."""

import contextlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import allmlp as am
from allmlp.runtime.device import choose_device, choose_policy
from allmlp.runtime.world import join_world
from apple_gpu import OPERATIONS, apple_gpu
from conftest import TINY, tiny_config

EVERYTHING = {
    "augment__mixup": 0.5,
    "augment__cutmix": 1.0,
    "optimizer__ema_decay": 0.9,
    "model__overrides": {**TINY, "stochastic_depth": 0.3, "dropout": 0.1},
}


def test_choice(monkeypatch):
    if not torch.cuda.is_available():
        with apple_gpu():
            assert choose_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(am.UserError, match="mps"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = choose_device("mps")
    assert choose_policy(device, "auto", "auto", operations=10**12, num_steps=10**5).precision == (
        "float32"
    )
    with pytest.raises(am.UserError, match="bfloat16"):
        choose_policy(device, "bfloat16", "auto", operations=1, num_steps=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(am.UserError, match="one GPU"), join_world("mps"):
        pass


@pytest.mark.filterwarnings("ignore:.*frobenius_norm")
@pytest.mark.parametrize(
    "changes",
    [
        EVERYTHING,
        pytest.param(
            {"optimizer": {"name": "muon"}, "data__balance": "weights"}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"optimizer__sam_rho": 0.05, "loss": {"name": "sigmoid"}}, marks=pytest.mark.slow
        ),
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
