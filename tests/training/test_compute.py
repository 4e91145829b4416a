"""How a run computes: precision, compiling, threads, micro-batches; said in words, never hidden."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.exc import InductorError

import allmlp as am
from allmlp.benchmark import _Timed
from allmlp.inspection.attribution import occlusion, read_image
from allmlp.models.layers import draw_stochastic_depth, set_stochastic_depth
from allmlp.runtime import device as compute
from allmlp.runtime.device import (
    SMALL_STEP,
    ComputePolicy,
    choose_policy,
    threads_for,
    torch_settings,
)
from allmlp.runtime.world import World
from allmlp.training import step
from conftest import tiny_config, tiny_model
from staged_models import small_cycle, small_permutator

pytestmark = pytest.mark.numerics

CPU = torch.device("cpu")
BIG, SMALL = 10**9, 10**6  # operations of an image's forward pass


def policy(flops: int, precision: str = "auto") -> ComputePolicy:
    return choose_policy(CPU, precision, "auto", operations=96 * flops, num_steps=10)


def settings(flops: int, num_threads: int | None = None) -> AbstractContextManager[None]:
    return torch_settings(CPU, "float32", num_threads, step_operations=96 * flops)


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


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


def test_without_a_compiler_the_run_continues_and_reports_it(class_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    run = am.train(
        tiny_config(str(class_folder), tmp_path / "run", compile="on", epochs=1), quiet=True
    ).run_folder
    assert "not compiled: no C++ compiler here" in (run / "log.txt").read_text()


@pytest.mark.slow
def test_a_compiler_that_fails_is_left_out(class_folder, tmp_path, monkeypatch):
    def failing(network):
        def call(images):
            raise InductorError(RuntimeError("InvalidCxxCompiler: no working compiler"), None)

        return call

    monkeypatch.setattr(step.torch, "compile", failing)
    monkeypatch.setattr(compute, "can_compile", lambda device: True)
    plain = am.train(tiny_config(str(class_folder), tmp_path / "plain", epochs=1), quiet=True)
    run = am.train(
        tiny_config(str(class_folder), tmp_path / "run", compile="on", epochs=1), quiet=True
    ).run_folder
    assert "not compiled after all: " in (run / "log.txt").read_text()
    assert losses(run) == losses(plain.run_folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # inside of torch
def test_compiled_training_has_the_same_losses(class_folder, tmp_path):
    if not compute.can_compile(CPU):
        pytest.skip("no C++ compiler here")
    settings = {
        "epochs": 2,
        "augment__mixup": 0.5,
        "model__overrides": {**tiny_config("x", tmp_path).model.overrides, "stochastic_depth": 0.3},
    }
    plain = am.train(tiny_config(str(class_folder), tmp_path / "plain", **settings), quiet=True)
    run = am.train(
        tiny_config(str(class_folder), tmp_path / "run", compile="on", **settings), quiet=True
    ).run_folder
    log = (run / "log.txt").read_text()
    assert "compiled" in log
    assert "not compiled" not in log
    assert losses(run) == pytest.approx(losses(plain.run_folder), rel=1e-5)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_seen(model: am.ImageClassifier) -> list[int]:
    """A list that grows by torch's number of threads whenever the model computes."""
    seen: list[int] = []
    model.stem.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    return seen


COMMANDS: dict[str, Callable[[am.ImageClassifier, Path], object]] = {
    "predict": lambda model, data: am.predict(model, data),
    "features": lambda model, data: am.predict(model, data, features=True),
    "evaluate": lambda model, data: am.evaluate(model, f"{data}:validation"),
    "few_shot": lambda model, data: am.few_shot(model, data, shots=[2]),
    "map": lambda model, data: occlusion(model, read_image(data / "val/ant/0.png", model)[0]),
    "benchmark": lambda model, _: timed(model, "inference"),
    "training": lambda model, _: timed(model, "training"),
}


def timed(model: am.ImageClassifier, mode: str) -> int:
    """Times a model as `mixer benchmark` does; returns the threads that it reports."""
    found = _Timed(model, mode, "float32", compile=False)
    found.prepare(8)
    found.run()
    return threads_for(found.operations(8))


@pytest.mark.parametrize(("least", "expected"), [(SMALL_STEP, 1), (0, 2)])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_small_batch_takes_one_thread_in_every_verb(
    class_folder, two_threads, monkeypatch, command, least, expected
):
    monkeypatch.setattr(compute, "SMALL_STEP", least)
    model = tiny_model(num_classes=3).to(CPU)
    model.class_names = ["ant", "bee", "cat"]
    seen = threads_seen(model)
    COMMANDS[command](model, class_folder)
    assert set(seen) == {expected}
    assert torch.get_num_threads() == 2


def test_chosen_threads_count_for_small_batches_too(two_threads):
    model = tiny_model()
    seen = threads_seen(model)
    products = torch.backends.mkldnn.matmul.fp32_precision
    with torch_settings(CPU, "float32", 2):
        assert timed(model, "training") == 2
        assert timed(model, "inference") == 2
    assert set(seen) == {2}
    with pytest.raises(am.UserError), torch_settings(CPU, "float32", 100_000):
        pass
    assert timed(model, "inference") == seen[-1] == 1
    assert torch.backends.mkldnn.matmul.fp32_precision == products


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
    model = am.create_model("mixer_s16", 64, 10, num_blocks=4, **size)
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


def test_stochastic_depth_drawn_outside_is_that_of_any_share():
    model = tiny_model(num_blocks=3, stochastic_depth=0.5).train()
    images = torch.randn(8, 3, 8, 8)
    kept = draw_stochastic_depth(model, 8, torch.Generator().manual_seed(3))
    assert kept.shape == (5, 8)  # the first of six MLPs is never dropped
    again = draw_stochastic_depth(model, 8, torch.Generator().manual_seed(3))
    assert torch.equal(kept, again)
    set_stochastic_depth(model, kept)
    whole = model(images)
    parts = []
    for part in (slice(0, 3), slice(3, 8)):
        set_stochastic_depth(model, kept[:, part])
        parts.append(model(images[part]))
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    set_stochastic_depth(model, None)
    torch.manual_seed(0)
    assert not torch.allclose(model(images), whole, atol=1e-3)
    many = draw_stochastic_depth(model, 20_000, torch.Generator().manual_seed(0))
    rates = [1.0 - 0.5 * mlp / 5 for mlp in range(1, 6)]
    assert many.mean(dim=1).tolist() == pytest.approx(rates, abs=0.02)


def test_micro_batches_add_up_to_the_batch(class_folder, tmp_path):
    settings = {
        "augment__mixup": 0.5,
        "model__overrides": {**tiny_config("x", tmp_path).model.overrides, "stochastic_depth": 0.3},
    }
    whole = am.train(tiny_config(str(class_folder), tmp_path / "whole", **settings), quiet=True)
    parts = am.train(
        tiny_config(str(class_folder), tmp_path / "parts", micro_batch_size=3, **settings),
        quiet=True,
    )
    assert losses(parts.run_folder) == pytest.approx(losses(whole.run_folder), abs=1e-6)
    assert "8 images go through the model in 3 x 3" in (parts.run_folder / "log.txt").read_text()


def test_a_batch_that_does_not_fit_is_split(class_folder, tmp_path, monkeypatch):
    whole = am.train(tiny_config(str(class_folder), tmp_path / "whole"), quiet=True)
    monkeypatch.setattr(step, "free_memory", lambda device: 100_000)
    parts = am.train(tiny_config(str(class_folder), tmp_path / "parts"), quiet=True)
    assert "8 images go through the model in" in (parts.run_folder / "log.txt").read_text()
    assert losses(parts.run_folder) == pytest.approx(losses(whole.run_folder), abs=1e-6)
    monkeypatch.setattr(step, "free_memory", lambda device: 20_000)
    with pytest.raises(am.UserError, match="one image at a time takes"):
        am.train(tiny_config(str(class_folder), tmp_path / "none"), quiet=True)


def test_a_gpu_that_runs_out_of_memory_gets_smaller_parts(class_folder, tmp_path, monkeypatch):
    whole = am.train(tiny_config(str(class_folder), tmp_path / "whole"), quiet=True)
    forward = step.Updater.predict

    def small(self, images):
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images)

    monkeypatch.setattr(step.Updater, "predict", small)
    parts = am.train(tiny_config(str(class_folder), tmp_path / "parts"), quiet=True)
    log = (parts.run_folder / "log.txt").read_text()
    assert "4 images at once from here on" in log
    assert "2 images at once from here on" in log
    assert losses(parts.run_folder) == pytest.approx(losses(whole.run_folder), abs=1e-6)
    monkeypatch.setattr(step.Updater, "predict", lambda self, images: small(self, range(9)))
    with pytest.raises(am.UserError, match="1 images at once do not fit into the GPU"):
        am.train(tiny_config(str(class_folder), tmp_path / "none"), quiet=True)


def test_processes_agree_on_a_micro_batch_before_the_first_update(
    class_folder, tmp_path, monkeypatch
):
    """6 of this one's 12 images would fit, and 4 of the other's, as the fake collective says."""
    seen: list[step.Updater] = []
    choose = step.Updater.choose_micro_batch
    noting = lambda self: (seen.append(self), choose(self))[1]  # noqa: E731
    monkeypatch.setattr(step.Updater, "choose_micro_batch", noting)
    am.train(tiny_config(str(class_folder), tmp_path / "run", epochs=1), quiet=True)
    updater, forward, limit, tried = seen[-1], step.Updater.predict, 7, list[int]()

    def small(self, images):
        tried.append(len(images))
        if len(images) > limit:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        return forward(self, images)

    class Other(World):
        def all_reduce_max(self, value: int) -> int:
            return max(value, -4)

    monkeypatch.setattr(step.Updater, "predict", small)
    updater.world = Other(0, 2)
    before = [parameter.clone() for parameter in updater.parameters]
    assert updater.agreed_size(12, 12) == 4
    assert tried == [12, 4, 4, 4]
    assert all(map(torch.equal, before, updater.parameters))
    limit = 0
    with pytest.raises(am.UserError) as none:
        updater.agreed_size(12, 12)
    assert none.value.code == "memory"


def test_a_linear_probe_sees_the_features_of_evaluation(class_folder, tmp_path):
    """Dropped branches would be noise on features that cannot learn to live with it."""
    overrides = {**tiny_config("x", tmp_path).model.overrides, "stochastic_depth": 0.9}
    base = tiny_config(str(class_folder), tmp_path / "base", model__overrides=overrides)
    folder = am.train(base, quiet=True).run_folder
    changes = {"model.name": "", "model.weights": str(folder), "model.trained": "head"}
    changes |= {"model.overrides": {}, "output": str(tmp_path / "probe"), "epochs": 1}
    seen = []
    forward = am.MlpMixer.forward

    def watched(self, images):
        seen.append(self.training)
        return forward(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(am.MlpMixer, "forward", watched)
        am.train(base.with_values(changes), quiet=True)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [lambda: tiny_model(10, 32), small_cycle, small_permutator])
def test_the_bytes_of_an_image(make, precision: str):
    """One image more costs a batch so many bytes more; no random number is drawn."""
    model = make().train()
    compute = ComputePolicy(torch.device("cpu"), precision, False, "")
    image = torch.zeros(1, 3, *model.config.image_size)
    before = torch.get_rng_state()
    found = step.saved_bytes(model, image, compute)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), compute.autocast():
        _ = model(image.repeat(8, 1, 1, 1))
    of_eight = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert of_eight / 8 * 0.5 < found < of_eight / 8 * 2.5
