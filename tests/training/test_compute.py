"""How a run computes: precision, compiling, threads, micro-batches; said in words, never hidden."""

from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F

import allmlp as am
from allmlp.models.mixer import MlpMixer
from allmlp.runtime import device as compute
from allmlp.runtime.device import ComputePolicy, choose_policy, torch_settings
from allmlp.runtime.world import World
from allmlp.training import step
from conftest import TINY, tiny_run, user_error
from runs import losses_of

pytestmark = pytest.mark.numerics

CPU = torch.device("cpu")
BIG, SMALL = 10**9, 10**6  # operations of an image's forward pass


def policy(flops: int, precision: str = "auto") -> ComputePolicy:
    return choose_policy(CPU, precision, "auto", operations=96 * flops, num_steps=10)


def settings(flops: int, num_threads: int | None = None) -> AbstractContextManager[None]:
    return torch_settings(CPU, "float32", num_threads, step_operations=96 * flops)


@pytest.mark.parametrize(
    ("fast", "flops", "expected", "why"),
    [
        (True, BIG, "bfloat16", "bfloat16 (this processor is fast at it)"),
        (False, BIG, "float32", "float32 (this processor has no fast bfloat16)"),
        (True, SMALL, "float32", "float32 (a small model)"),
    ],
)
def test_precision_auto_goes_by_stated_rules(monkeypatch, fast, flops, expected, why):
    monkeypatch.setattr(compute, "has_fast_bfloat16", lambda: fast)
    found = policy(flops)
    assert (found.precision, found.why, found.compile) == (expected, why, False)
    assert found.autocast()._enabled == (expected == "bfloat16")
    for precision in ("float32", "bfloat16"):  # an explicit one is never changed
        found = policy(flops, precision)
        assert (found.precision, found.why) == (precision, precision)


@pytest.mark.slow
def test_a_compiler_that_fails_is_left_out(class_folder, tmp_path, monkeypatch):
    from torch._inductor.exc import InductorError  # slow to import

    def failing(network):
        def call(images):
            raise InductorError(RuntimeError("InvalidCxxCompiler: no working compiler"), None)

        return call

    monkeypatch.setattr(step.torch, "compile", failing)
    monkeypatch.setattr(compute, "can_compile", lambda device: True)
    plain = tiny_run(class_folder, tmp_path / "plain", epochs=1)
    run = tiny_run(class_folder, tmp_path / "run", compile="on", epochs=1).run_folder
    assert "not compiled after all: " in (run / "log.txt").read_text()
    assert losses_of(run) == losses_of(plain.run_folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # inside of torch
def test_compiled_training_has_the_same_losses(class_folder, tmp_path):
    if not compute.can_compile(CPU):
        pytest.skip("no C++ compiler here")
    settings = {"augment__mixup": 0.5, "model__overrides": {**TINY, "stochastic_depth": 0.3}}
    plain = tiny_run(class_folder, tmp_path / "plain", **settings)
    run = tiny_run(class_folder, tmp_path / "run", compile="on", **settings).run_folder
    log = (run / "log.txt").read_text()
    assert "compiled" in log
    assert "not compiled" not in log
    assert losses_of(run) == pytest.approx(losses_of(plain.run_folder), rel=1e-5)


def test_onednn_is_only_taken_where_it_stays_float32(monkeypatch):
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    with settings(BIG):
        taken = products.fp32_precision
        x = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
        exact = x.double() @ x.double().T
        assert (F.linear(x, x) - exact).abs().max() < 1e-5 * exact.abs().max()
    assert taken in ("bf16", before)

    def rounded(x, w):
        return (x.bfloat16() @ w.bfloat16().T).float()

    monkeypatch.setattr(F, "linear", rounded)
    with settings(BIG):
        assert products.fp32_precision == before


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # inside of torch
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bfloat16_keeps_layer_norm_and_residual_in_float32(compiled):
    """On a processor LayerNorm in bfloat16 gets its bias gradient wrong by tens of per cent."""
    if compiled and not compute.can_compile(CPU):
        pytest.skip("no C++ compiler here")
    size = {"patch_size": 4, "hidden_dim": 64, "tokens_mlp_dim": 32, "channels_mlp_dim": 128}
    model = am.create_model("mixer_s16", 64, 10, num_blocks=2, **size)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    network = torch.compile(model) if compiled else model
    images = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(32) % 10
    gradients = {}
    for precision in ("float32", "bfloat16"):
        model.zero_grad()
        with ComputePolicy(CPU, precision, False, "").autocast():
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()
        gradients[precision] = {name: p.grad.clone() for name, p in model.named_parameters()}
    exact, close = gradients["float32"], gradients["bfloat16"]
    for name in exact:
        if "token_mixing.dense_1.bias" not in name:  # its gradient is zero but for rounding
            error = (close[name] - exact[name]).norm() / exact[name].norm()
            assert error < 0.05, name
    name = "pre_head_layer_norm.bias"
    assert (close[name] - exact[name]).norm() / exact[name].norm() < 0.02
    assert any(not torch.equal(close[name], exact[name]) for name in exact)


def test_micro_batches_add_up_to_the_batch(class_folder, tmp_path, monkeypatch):
    """Those that are asked for, and those that little memory asks for."""

    def run(name: str, **changes: object) -> tuple[list[float], str]:
        given = {"augment__mixup": 0.5, "model__overrides": {**TINY, "stochastic_depth": 0.3}}
        given |= changes
        folder = tiny_run(class_folder, tmp_path / name, **given).run_folder
        return losses_of(folder), (folder / "log.txt").read_text()

    whole, _ = run("whole")
    asked, log = run("asked", micro_batch_size=3)
    assert asked == pytest.approx(whole, abs=1e-6)
    assert log.count("8 images of a step are split into 3 micro-batches of up to 3") == 1
    monkeypatch.setattr(step, "free_memory", lambda device: 100_000)
    little, log = run("little")
    assert little == pytest.approx(whole, abs=1e-6)
    assert "8 images of a step are split into" in log
    monkeypatch.setattr(step, "free_memory", lambda device: 20_000)
    with pytest.raises(am.UserError, match="one image at a time takes"):
        run("none")


def test_a_gpu_that_runs_out_of_memory_gets_smaller_parts(class_folder, tmp_path, monkeypatch):
    whole = tiny_run(class_folder, tmp_path / "whole")
    forward = MlpMixer.forward

    def small(self, images):
        if self.training and len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images)

    monkeypatch.setattr(MlpMixer, "forward", small)
    parts = tiny_run(class_folder, tmp_path / "parts")
    log = (parts.run_folder / "log.txt").read_text()
    assert "4 images at once from here on" in log
    assert "2 images at once from here on" in log
    assert losses_of(parts.run_folder) == pytest.approx(losses_of(whole.run_folder), abs=1e-6)
    enough = lambda self, images: small(self, range(9) if self.training else images)  # noqa: E731
    monkeypatch.setattr(MlpMixer, "forward", enough)
    with pytest.raises(am.UserError, match="1 images at once do not fit into the GPU"):
        tiny_run(class_folder, tmp_path / "none")


def test_processes_agree_on_a_micro_batch_before_the_first_update(
    class_folder, tmp_path, monkeypatch
):
    """6 of this one's 12 images would fit, and 4 of the other's, as the fake collective says."""
    seen: list[step.Updater] = []
    choose = step.Updater.choose_micro_batch
    noting = lambda self: (seen.append(self), choose(self))[1]  # noqa: E731
    monkeypatch.setattr(step.Updater, "choose_micro_batch", noting)
    tiny_run(class_folder, tmp_path / "run", epochs=1)
    updater, forward, limit, tried = seen[-1], MlpMixer.forward, 7, list[int]()

    def small(self, images):
        tried.append(len(images))
        if len(images) > limit:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        return forward(self, images)

    class Other(World):
        def all_reduce_max(self, value: int) -> int:
            return max(value, -4)

    monkeypatch.setattr(MlpMixer, "forward", small)
    updater.world = Other(0, 2)
    before = [parameter.clone() for parameter in updater.parameters]
    assert updater.agreed_size(12, 12) == 4
    assert tried == [12, 4, 4, 4]
    assert all(map(torch.equal, before, updater.parameters))
    limit = 0
    with user_error("memory"):
        updater.agreed_size(12, 12)
