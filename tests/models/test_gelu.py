"""The compiled tanh GELU of long runs on a CPU: exact, and chosen by a rule."""

import copy

import pytest
import torch
import torch.nn.functional as F

import allmlp as am
from allmlp.models.gelu import compile_gelu
from allmlp.runtime import device as compute
from allmlp.runtime.device import Compiler, can_compile, choose_policy

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not can_compile(CPU), reason="needs a C++ compiler")


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # inside of torch
@pytest.mark.parametrize(
    "compiles", [False, pytest.param(True, marks=[pytest.mark.slow, needs_compiler])]
)
def test_compiled_gelu_equals_the_tanh_gelu(compiles: bool):
    torch.manual_seed(0)
    model = am.create_model("mixer_s16", num_blocks=1, image_size=32, num_classes=3)
    plain = copy.deepcopy(model)
    notes = []
    compile_gelu(model, Compiler(notes.append) if compiles else lambda function: function)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        gelu = model.blocks[0].channel_mixing.gelu
        for shape in ((1, 7), (3, 5, 33), (2, 64, 100)):
            x = (torch.randn(shape) * 4).to(dtype)
            x.view(-1)[:7] = torch.tensor([0, -0.0, 40, -40, 1e-30, 300, -300])
            y, exact = x.clone().requires_grad_(), x.double().requires_grad_()
            gradient = torch.randn(shape).to(dtype)
            found, wanted = gelu(y), F.gelu(exact, approximate="tanh")
            found.backward(gradient)
            wanted.backward(gradient.double())
            assert found.dtype == y.grad.dtype == dtype
            for ours, theirs in ((found, wanted), (y.grad, exact.grad)):
                torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():  # inference is torch's own
        assert torch.equal(model.features(images), plain.features(images))
    for network in (model, plain):
        network.features(images).square().sum().backward()
    compared = 0
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None and theirs.grad.abs().max() > 1e-3:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared > 5
    assert not notes  # it did compile


@pytest.mark.parametrize(
    ("steps", "precision", "compiles"),
    [(100, "bfloat16", False), (10_000, "bfloat16", True), (10_000, "float32", False)],
)
def test_long_runs_in_bfloat16_compile_the_gelu(monkeypatch, steps, precision, compiles):
    monkeypatch.setattr(compute, "can_compile", lambda _: True)
    for name, expected in (("auto", compiles), ("off", False), ("on", False)):
        found = choose_policy(CPU, precision, name, operations=10**10, num_steps=steps)
        assert (found.compile_gelu, found.compile) == (expected, name == "on")
        # The time estimate must not take the first step, which compiles, for all others.
        assert found.compiles == (expected or name == "on")
        assert ("compiled" in found.why) == found.compiles
