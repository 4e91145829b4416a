"""Throughput of real, tiny models: what is counted, what comes back, what is left as it was."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import allmlp as am
from allmlp.evaluation import throughput as module
from allmlp.evaluation.memory import peak_growth
from allmlp.evaluation.peak import Peak, measure_peak
from allmlp.evaluation.throughput import count_parameters, flops_text
from allmlp.evaluation.timed_model import TimedModel, count_flops
from allmlp.runtime.device import fast_precision
from conftest import TINY, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick_peak(monkeypatch: pytest.MonkeyPatch):
    found = iter([90.0, 100.0] * 4)

    def measured(device, precision, seconds, clock):
        return Peak(next(found), (2, 3, 4), precision)

    monkeypatch.setattr(module, "measure_peak", measured)


def quick(models, **settings):
    given = {"device": "cpu", "batch_sizes": (1, 2), "seconds": 0.001, "rounds": 2}
    return am.throughput(models, **{**given, **settings})


@pytest.mark.parametrize(
    ("name", "size", "changes"),
    [
        ("mixer_b32", (64, 96), {"num_classes": 0}),
        ("mixer_h14", 28, {"in_channels": 1}),
        ("mixer_s16", 8, TINY),
        *((name, None, {}) for name in ("mixer_s32", "cycle_mlp_b1", "vip_s7")),
        *(pytest.param(name, None, {}, marks=pytest.mark.slow) for name in am.list_models()),
    ],
)
def test_flops_equal_torchs_count(name, size, changes):
    with torch.device("meta"):
        model = am.create_model(name, size, **changes).eval()
        images = torch.empty(1, model.config.in_channels, *model.config.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert model.config.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    if name.startswith("mixer"):
        assert model.config.flops == counter.get_total_flops()


def test_flops_are_counted_while_the_model_computes():
    model = tiny_model().train()
    assert count_flops(model) == model.config.flops
    assert model.training


def test_parameters_are_counted():
    model = torch.nn.Linear(3, 5)
    assert count_parameters(model) == 20


def test_flops_in_words():
    assert flops_text(25_203_000_000) == "25.2 GFLOPs"
    assert flops_text(2_770_000) == "2.77 MFLOPs"


@pytest.mark.parametrize(
    ("mode", "precision"), [("inference", "float32"), ("training", "bfloat16")]
)
def test_the_json_of_a_measurement(mode, precision):
    result = quick({"a": tiny_model(), "b": tiny_model}, mode=mode, precision=precision)
    values = json.loads(json.dumps(result.to_json()))
    assert (values["format"], values["kind"]) == ("allmlp measurement", "throughput")
    assert values["environment"]["packages"]["torch"] == torch.__version__
    assert values["interrupted"] is False
    assert [each["name"] for each in values["models"]] == ["a", "b"]
    for each in values["models"]:
        assert each["model"]["architecture"]["patch_size"] == 4
        assert (each["mode"], each["precision"]) == (mode, precision)
        assert (each["compiled"], each["device"], each["error"]) == (False, "cpu", None)
        assert each["threads"] == 1  # so small a batch
        assert each["image_size"] == [8, 8]
        assert [point["batch_size"] for point in each["points"]] == [1, 2]
        rates = [point["images_per_second"] for point in each["points"]]
        assert each["best"]["images_per_second"] == max(rates) > 0
        low, high = each["best"]["spread"]
        assert low <= max(rates) <= high
        assert each["flops"]["formula"] == each["flops"]["counted"] > 0
        passes = 3 if mode == "training" else 1
        share = passes * each["flops"]["formula"] * max(rates) / 100e9
        assert each["peak"]["gflops"] == 100.0  # the better one of before and after
        assert each["peak"]["share"] == pytest.approx(share)
        if mode == "training":
            assert each["latency_ms"] is None
        else:
            found = each["latency_ms"]
            assert 0 < found["p50"] <= found["p90"] <= found["p99"]
            assert found["runs"] >= 10


def test_memory_counts_weights_state_batch_and_step(monkeypatch):
    monkeypatch.setattr("allmlp.evaluation.timed_model.peak_growth", lambda act, device: 1000)
    model = tiny_model()
    weights, image = 4 * count_parameters(model), 4 * 3 * 8 * 8
    kernels = sum(each.numel() for each in model.parameters() if each.dim() > 1)
    (row,) = quick({"a": model}, batch_sizes=[2]).models
    assert row.memory_bytes == weights + 2 * image + 1000
    (row,) = quick({"a": model}, batch_sizes=[2], precision="bfloat16").models
    assert row.memory_bytes == weights + 2 * kernels + 2 * image + 1000
    (row,) = quick({"a": model}, batch_sizes=[2], mode="training").models
    steps = 4 * len(list(model.parameters()))  # AdamW counts them, a float32 each
    assert row.memory_bytes == 3 * weights + steps + 2 * image + 1000
    monkeypatch.setattr("allmlp.evaluation.timed_model.peak_growth", lambda act, device: None)
    (row,) = quick({"a": model}, batch_sizes=[2]).models
    assert row.memory_bytes is None


def test_growth_is_that_of_tensors_of_known_size():
    kept: list[torch.Tensor] = []
    if peak_growth(lambda: None, CPU) is None:
        pytest.skip("the system does not tell the resident set of a process")
    for _ in range(2):  # the second time the memory of the first could be used again
        grown = peak_growth(lambda: torch.ones(2**24).sum(), CPU)
        assert grown == pytest.approx(2**26, rel=0.1)
    grown = peak_growth(lambda: kept.append(torch.ones(2**22)), CPU)
    assert grown == pytest.approx(2**24, rel=0.2)


def test_training_steps_leave_the_model_as_it_was():
    model = tiny_model(stochastic_depth=0.5).eval()
    with torch.no_grad():
        model.head.weight.zero_()
    model.batch_norm = torch.nn.BatchNorm2d(3)
    model.stem.register_forward_pre_hook(lambda stem, images: (model.batch_norm(images[0]),))
    model.stem.bias.grad = torch.full_like(model.stem.bias, 3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = quick({"a": model}, mode="training")
    assert result.models[0].course.error is None
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not model.training
    assert model.stem.bias.grad is not None
    assert torch.equal(model.stem.bias.grad, torch.full_like(model.stem.bias, 3.0))
    assert model.head.weight.grad is None


def test_a_training_step_computes_every_gradient():
    model = tiny_model()
    with torch.no_grad():
        model.head.weight.zero_()  # as a new head is: nothing would come back through it
    timed = TimedModel(model, "training", "float32", compile=False)
    timed.prepare(3)
    timed.run(1)
    for name, each in model.named_parameters():
        if "token_mixing.dense_1.bias" not in name:  # zero but for rounding
            assert each.grad is not None
            assert each.grad.abs().max() > 0, name
    timed.close()
    assert not model.head.weight.any()


@pytest.mark.parametrize(("precision", "kind"), [("float32", "f"), ("bfloat16", "b")])
def test_the_precision_is_that_of_the_products(precision, kind):
    model, seen = tiny_model(), []
    model.blocks[0].channel_mixing.dense_0.register_forward_hook(
        lambda module, given, result: seen.append(str(result.dtype))
    )
    quick({"a": model}, precision=precision)
    assert seen[-1] == f"torch.{precision}"


def test_auto_goes_by_the_rule_of_training():
    model = tiny_model()
    expected, why = fast_precision(CPU, 64 * model.config.flops)
    (row,) = quick({"a": model}, batch_sizes=None, budget=0.01).models
    assert (row.precision, row.why) == (expected, why) == ("float32", "a small model")


def test_torchs_settings_come_back():
    products = torch.backends.mkldnn.matmul
    before = torch.get_num_threads(), products.fp32_precision
    seen = []
    model = tiny_model()
    model.stem.register_forward_hook(lambda *each: seen.append(torch.get_num_threads()))
    assert quick({"a": model}, num_threads=1).threads == 1
    assert set(seen) == {1}
    assert (torch.get_num_threads(), products.fp32_precision) == before


def test_a_model_that_cannot_be_built_is_a_row():
    def too_large():
        raise torch.OutOfMemoryError("Tried to allocate 80 GiB")

    def broken():
        raise ArithmeticError("no")

    result = quick({"large": too_large, "broken": broken, "good": tiny_model})
    large, bad, good = result.models
    assert large.course.error == "out of memory: Tried to allocate 80 GiB"
    assert bad.course.error == "ArithmeticError: no"
    assert good.images_per_second is not None
    said = result.to_json()["models"][0]
    assert (said["best"], said["points"], said["latency_ms"]) == (None, [], None)
    assert said["model"] == {"name": "large"}


def test_training_that_would_not_fit_is_a_row(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 30_000)
    result = quick({"a": tiny_model(), "b": tiny_model()}, mode="training")
    for row in result.models:
        assert row.course.error is not None
        assert row.course.error.startswith("memory: gradients and AdamW of the models so far")


def test_a_stop_gives_what_there_is():
    def stop(line):
        if line == "b, batch 2":
            raise KeyboardInterrupt

    result = quick({"a": tiny_model(), "b": tiny_model()}, tell=stop)
    assert result.interrupted
    assert [len(row.course.points) for row in result.models] == [1, 1]

    def stop_soon(line):
        if line == "b, building":
            raise KeyboardInterrupt

    result = quick({"a": tiny_model(), "b": tiny_model()}, tell=stop_soon)
    assert [row.course.error for row in result.models] == ["stopped before it was measured"] * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # inside of torch
def test_compiled_models_are_compiled_for_every_batch_size(monkeypatch):
    if not module.can_compile(CPU):
        pytest.skip("no C++ compiler here")
    models = {str(depth): tiny_model(num_blocks=depth) for depth in (1, 2)}
    sizes = (1, 2, 3, 4, 5)  # two models, five sizes: more programs than torch allows by itself
    result = quick(models, compile=True, batch_sizes=sizes)
    for row in result.models:
        assert row.course.error is None
        assert len(row.course.points) == 5


def test_the_peak_is_the_best_of_several_products():
    ticks = itertools.count()
    shapes = ((4, 4, 4), (8, 8, 8), (2, 2, 2))
    found = measure_peak(CPU, "bfloat16", 1.0, lambda: float(next(ticks)), shapes)
    assert found == Peak(2 * 8**3 / 1e9, (8, 8, 8), "bfloat16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sizes": (0,)}, "a batch size is from 1 to 65,536, got 0"),
        ({"batch_sizes": (4, 4)}, "given twice"),
        ({"batch_sizes": ()}, "no batch size"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"seconds": float("nan")}, "seconds must be above 0 and below 1,000,000, got nan"),
        ({"budget": -1.0, "batch_sizes": None}, "budget must be above 0"),
        ({"budget": 10.0}, "budget=10 has no effect"),
        ({"rounds": 0}, "rounds must be from 1"),
        ({"num_threads": 0}, "threads=0 must be at least 1"),
        ({"mode": "evaluation"}, "unknown mode 'evaluation'"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(am.UserError, match=message):
        quick({"a": tiny_model}, **settings)


def test_what_a_gpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(module, "choose_device", lambda name: torch.device("cuda:0"))
    with pytest.raises(am.UserError, match="threads=2 has no effect on a GPU"):
        quick({"a": tiny_model}, num_threads=2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(am.UserError, match=r"7\.5, and bfloat16 needs 8\.0"):
        quick({"a": tiny_model}, precision="bfloat16")


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(module, "can_compile", lambda device: False)
    with pytest.raises(am.UserError, match="there is none here"):
        quick({"a": tiny_model}, compile=True)


def test_no_models_and_no_head_are_refused():
    with pytest.raises(am.UserError, match="no model"):
        quick({})
    with pytest.raises(am.UserError, match="a training step needs a head"):
        quick({"a": tiny_model(num_classes=0, num_blocks=1)}, mode="training")
