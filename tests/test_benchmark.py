"""The benchmark of real, tiny models: what is counted, what comes back, what is left alone."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import allmlp as am
from allmlp.benchmark import ModelBenchmark, _Timed, peak_growth
from allmlp.evaluation.result_file import read_measurement
from allmlp.training.recipes import RECIPES
from conftest import mixer, ran, refused, tiny_model

CPU = torch.device("cpu")
QUICK = ("--device", "cpu", "--seconds", "0.001", "--rounds", "1", "--batch-sizes", "1", "2")


@pytest.fixture(autouse=True)
def _quick_peak(monkeypatch: pytest.MonkeyPatch):
    found = iter([90.0, 100.0] * 8)
    peak = lambda *_: (next(found), (2, 3, 4))  # noqa: E731
    monkeypatch.setitem(am.benchmark.__globals__, "measure_peak", peak)


def quick(models: Any, **fields: Any) -> am.Benchmark:
    given = {"device": "cpu", "batch_sizes": (1, 2), "seconds": 0.001, "rounds": 2}
    return am.benchmark(models, **{**given, **fields})


def patched(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    for name, value in changes.items():
        monkeypatch.setitem(am.benchmark.__globals__, name, value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return am.save_model(tiny_model(), tmp_path / "tiny").parent


@pytest.mark.parametrize(
    ("mode", "precision"), [("inference", "float32"), ("training", "bfloat16")]
)
@pytest.mark.slow
def test_the_json_of_a_measurement(mode, precision):
    result = quick({"a": tiny_model(), "b": tiny_model()}, mode=mode, precision=precision)
    values = json.loads(json.dumps(result.to_json()))
    assert (values["format"], values["kind"]) == ("allmlp measurement", "throughput")
    assert values["environment"]["packages"]["torch"] == torch.__version__
    assert [row["name"] for row in values["models"]] == ["a", "b"]
    for row in values["models"]:
        assert row["model"]["architecture"]["patch_size"] == 4
        known = {"mode": mode, "precision": precision, "compiled": False, "device": "cpu"}
        known |= {"error": None, "threads": 1, "image_size": [8, 8]}  # so small a batch
        assert {name: row[name] for name in known} == known
        assert [point["batch_size"] for point in row["points"]] == [1, 2]
        best = max(point["images_per_second"] for point in row["points"])
        assert row["best"]["images_per_second"] == best > 0
        low, high = row["best"]["spread"]
        assert low <= best <= high
        assert row["flops"] == row["model"]["flops"] > 0
        passes = 3 if mode == "training" else 1
        assert row["peak"]["gflops"] == 100.0  # the better one of before and after
        fraction = passes * row["flops"] * best / 100e9
        assert row["peak"]["fraction"] == pytest.approx(fraction)
        if mode == "training":
            assert row["latency_ms"] is None
        else:
            found = row["latency_ms"]
            assert 0 < found["p50"] <= found["p90"] <= found["p99"]
            assert found["runs"] >= 10


def test_memory_counts_weights_state_batch_and_step(monkeypatch):
    patched(monkeypatch, peak_growth=lambda act, device: act() or 1000)
    model = tiny_model()
    weights, images = 4 * model.num_parameters, 2 * 4 * 3 * 8 * 8
    kernels = sum(value.numel() for value in model.parameters() if value.dim() > 1)
    (row,) = quick({"a": model}, batch_sizes=[2]).models
    assert row.memory_bytes == weights + images + 1000
    (row,) = quick({"a": model}, batch_sizes=[2], precision="bfloat16").models
    assert row.memory_bytes == weights + 2 * kernels + images + 1000
    (row,) = quick({"a": model}, batch_sizes=[2], mode="training").models
    steps = 4 * len(list(model.parameters()))  # AdamW counts them, a float32 each
    assert row.memory_bytes == 3 * weights + steps + images + 1000


@pytest.mark.slow
def test_growth_is_that_of_tensors_of_known_size():
    if peak_growth(lambda: None, CPU) is None:
        pytest.skip("the system does not report the resident set of a process")
    for _ in range(2):  # the second time the memory of the first could be used again
        assert peak_growth(lambda: torch.ones(2**24).sum(), CPU) == pytest.approx(2**26, rel=0.1)


def test_a_training_step_computes_every_gradient_and_moves_no_weight():
    model = tiny_model()
    torch.nn.init.zeros_(model.head.weight)  # as a new head is: nothing would come back through it
    timed = _Timed(model, ModelBenchmark("a", "training", precision="float32"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    timed.prepare(3)
    timed.run()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        if "token_mixing.dense_1.bias" not in name:  # zero but for rounding
            assert parameter.grad.abs().max() > 0, name


def test_batches_double_until_the_rate_no_longer_rises(monkeypatch):
    seconds = iter([1.0, 1.0, 2.0, 4.0, 8.0, *[1.0] * 9])  # rates 1, 2, 2, 2
    patched(monkeypatch, _time_latency=lambda *_: None)
    monkeypatch.setattr(_Timed, "seconds", lambda *_: next(seconds))
    (row,) = quick({"a": tiny_model()}, batch_sizes=None, rounds=1, budget=1e5).models
    assert [point.batch_size for point in row.points] == [1, 2, 4, 8]
    assert (row.ended, row.best) == ("the rate no longer rises", row.points[1])
    monkeypatch.setattr(_Timed, "seconds", lambda *_: 1.0)
    (row,) = quick({"a": tiny_model()}, batch_sizes=None, budget=0.01).models
    assert (len(row.points), row.ended) == (1, "the budget of 0.01 s")


def test_models_that_fail_are_rows(monkeypatch):
    broken = tiny_model()
    broken.stem.register_forward_hook(lambda *_: 1 / 0)
    failed, good = (result := quick({"broken": broken, "good": tiny_model()})).models
    assert failed.error == "ZeroDivisionError: division by zero"
    assert good.best is not None
    row = result.to_json()["models"][0]
    assert (row["best"], row["points"], row["latency_ms"]) == (None, [], None)
    patched(monkeypatch, free_memory=lambda device: 30_000)
    (row,) = quick({"a": tiny_model()}, mode="training").models
    assert "memory" in row.error.lower()


def test_a_batch_that_will_not_fit_ends_the_sweep(monkeypatch):
    steps = lambda act, device: act() or 10**6  # noqa: E731
    patched(monkeypatch, free_memory=lambda device: 2 * 10**6, peak_growth=steps)
    (row,) = quick({"a": tiny_model()}, batch_sizes=[1, 2]).models
    assert [point.batch_size for point in row.points] == [1]
    assert row.ended == "MemoryError: 2 images would take about 0.0 GB, 0.0 GB are free"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # inside of torch
def test_compiled_models_are_compiled_for_every_batch_size(monkeypatch):
    """Their graphs; kernels for them would take minutes."""
    graphs = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", graphs)
    patched(monkeypatch, can_compile=lambda device: True)
    models = {str(depth): tiny_model(num_blocks=depth) for depth in (1, 2)}
    sizes = (1, 2, 3, 4, 5)  # two models, five sizes: more programs than torch allows by itself
    for row in quick(models, compile=True, batch_sizes=sizes).models:
        assert (row.error, len(row.points)) == (None, 5)


def test_what_cannot_be_measured(monkeypatch):
    with pytest.raises(am.UserError, match="a training step needs a head"):
        quick({"a": tiny_model(num_classes=0, num_blocks=1)}, mode="training")
    patched(monkeypatch, can_compile=lambda device: False)
    with pytest.raises(am.UserError, match="compiler"):
        quick({"a": tiny_model()}, compile=True)


def test_a_table_and_a_file(capsys, saved, tmp_path, trained):
    target, run = tmp_path / "new" / "speed.json", trained.run_folder
    out, _ = ran(capsys, "benchmark", saved, run, *QUICK, "--output", target)
    assert "float32: 100 GFLOP/s, 2x3 by 3x4" in out
    assert "images/s at batch" in out
    assert out.splitlines()[-1] == f"written  {target}"
    values = read_measurement(target)
    assert [row["name"] for row in values["models"]] == [str(saved), str(run)]
    assert [row["model"]["source"] for row in values["models"]] == [str(saved), str(run)]
    assert quick(saved).to_json()["models"][0]["name"] == str(saved)  # not a list of names


def test_the_command_fails_if_nothing_was_measured(capsys, saved, monkeypatch):
    patched(monkeypatch, free_memory=lambda device: 10)
    code, out, _ = mixer(capsys, "benchmark", saved, *QUICK, "--mode", "training")
    assert code == 2
    assert f"failed   {saved}: MemoryError: gradients and moments take" in out


@pytest.mark.slow
def test_what_a_recipe_takes(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "cifar10", RECIPES["digits"])
    target = tmp_path / "cost.json"
    out, _ = ran(capsys, "benchmark", "--recipe", "cifar10", *QUICK, "--output", target)
    assert "recipe   cifar10: 100 epochs of 45,000 images (CIFAR-10" in out
    assert " days" in out
    found = json.loads(target.read_text())
    cost, (model,) = found["recipe"], found["models"]
    assert (model["mode"], cost["images_seen"]) == ("training", 4_500_000)
    rate = model["best"]["images_per_second"]
    assert cost["device_days"] == pytest.approx(4_500_000 / rate / 86_400)
    assert cost["operations"] == 3 * model["flops"] * 4_500_000
    again = quick((), recipe="digits", images=1000).recipe
    assert again["images_seen"] == 100_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give models"),
        (("mixer_s23",), "unknown model 'mixer_s23'"),
        (("mixer_s32", "mixer_s32"), "each once"),
        (("mixer_s32", "--batch-sizes", "0"), "batch_sizes"),
        (("mixer_s32", "--seconds", "nan"), "seconds"),
        (("mixer_s32", "--images", "5"), "images needs recipe"),
        (("mixer_s32", "--image-size", "100"), "not divisible by the patch size 32"),
        (("mixer_s32", "--output", "speed.csv"), "not a .json file: 'speed.csv'"),
        (("--recipe", "scratch"), "how many training images scratch has is unknown"),
        (("--recipe", "finetune_pets"), "fine-tunes a model of your choice"),
    ],
)
def test_mistakes_come_before_any_measurement(capsys, tmp_path, monkeypatch, arguments, message):
    patched(monkeypatch, measure_peak=None)
    assert message in refused(capsys, tmp_path, "benchmark", *arguments)
