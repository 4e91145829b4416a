"""Costs: against numbers worked out by hand, and against what autograd is seen to keep."""

from __future__ import annotations

import pytest
import torch

import allmlp as am
from allmlp.evaluation.throughput import count_parameters
from allmlp.models.catalog import model_config
from allmlp.models.mixer_config import MixerConfig
from allmlp.training.cost import (
    TrainingMemory,
    activation_bytes,
    cost_line,
    duration,
    estimate,
    largest_micro_batch,
    num_images_seen,
    operations,
    training_memory,
)
from allmlp.training.kept import kept_of_one_image
from allmlp.training.optimizer import build_optimizers
from conftest import ROOT, TINY, tiny_model
from staged_models import small_cycle, small_permutator

# 4 tokens of 3 channels, one layer of 5 and 7 hidden units, 2 x 2 pixels of one channel, 6 classes.
BY_HAND = MixerConfig(
    image_size=(2, 2),
    patch_size=1,
    hidden_dim=3,
    num_blocks=1,
    tokens_mlp_dim=5,
    channels_mlp_dim=7,
    num_classes=6,
    in_channels=1,
)


def test_operations_by_hand():
    stem, tokens, channels, head = 4 * 1 * 3, 3 * (4 * 5 + 5 * 4), 4 * (3 * 7 + 7 * 3), 3 * 6
    assert BY_HAND.flops == 2 * (stem + tokens + channels + head) == 636
    assert operations(636, images=10) == 3 * 636 * 10
    assert operations(636, images=10, sharpness=1.0) == 6 * 636 * 10
    assert operations(636, images=10, sharpness=0.25) == round(3.75 * 6360)


def test_the_images_of_a_run():
    digits = am.recipe("digits")
    assert num_images_seen(digits, 1293) == 100 * 1293
    assert num_images_seen(am.recipe("finetune_pets"), 3680) == 500 * 512


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (125, "2 min 5 s"),
        (3599.7, "1 h"),
        (12_000, "3 h 20 min"),
        (86_400, "1 day"),
        (90_000, "1 day 1 h"),
        (4.5 * 86_400, "4 days 12 h"),
        (99 * 86_400 + 3600, "99 days 1 h"),
        (100 * 86_400 + 3600, "100 days"),
        (1e8 * 86_400, "100,000,000 days"),
    ],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text
    assert estimate(seconds / 8, 8) == text


def test_a_negative_duration():
    with pytest.raises(ValueError, match="at least 0 s, got -1"):
        duration(-1)


def test_cost_line():
    # 144,000 images of 25.2 GFLOPs: 1.09e16; 4 h at 10 a second.
    line = cost_line(25_200_000_000, 144_000)
    assert line == "1.1e16 operations; at 10 images/s 4 h, at 100 24 min, at 1,000 2 min 24 s"
    assert cost_line(25_200_000_000, 144_000, sharpness=1.0).startswith("2.2e16 operations")


def test_state_by_hand():
    """100 parameters of 4 bytes; SGD has one moment, Adam two, Muon one for blocks' matrices."""
    adam = am.recipe("scratch")

    def state(settings: am.TrainConfig, **more: object) -> dict[str, int]:
        memory = training_memory(BY_HAND, 100, settings, **more)  # pyright: ignore[reportArgumentType]
        parts = ("parameters", "gradients", "optimizer", "average", "copies")
        values = {name: getattr(memory, name) for name in parts}
        assert memory.state == sum(values.values())
        return values

    plain = {"parameters": 400, "gradients": 400, "optimizer": 800, "average": 0, "copies": 0}
    assert state(adam) == plain
    assert state(adam, num_processes=4) == plain
    assert state(adam, bfloat16=True) == {**plain, "copies": 200}
    sharp = adam.with_value("optimizer.average", 0.9).with_value("optimizer.sharpness", 0.1)
    assert state(sharp) == {**plain, "average": 400, "copies": 400}
    matrices = 2 * 4 * 5 + 2 * 3 * 7
    assert state(adam.with_value("optimizer.name", "muon"))["optimizer"] == 800 - 4 * matrices
    sgd = am.recipe("finetune")
    assert state(sgd) == {**plain, "optimizer": 400}
    assert state(sgd.with_value("optimizer.beta1", 0.0))["optimizer"] == 0
    shared = sharp.with_value("sharding", "full")
    quarter = {"parameters": 100, "gradients": 100, "optimizer": 200, "average": 100, "copies": 100}
    assert state(shared, num_processes=4) == quarter


def test_activations_by_hand():
    norm = 4 * (4 * 3 + 2 * 4)
    hidden = 3 * 5 + 4 * 7
    block = 2 * norm + 4 * (2 * 12 + 2 * hidden)
    assert activation_bytes(BY_HAND) == block + norm + 4 * (4 + 3) + 2 * 4 * 6
    half = 2 * norm + 2 * (2 * 12 + 2 * hidden)
    assert activation_bytes(BY_HAND, bfloat16=True) == half + norm + 2 * (4 + 3) + 2 * 4 * 6


def kept_bytes(model: am.ImageClassifier, bfloat16: bool, loss: str) -> float:
    """What autograd keeps of one image: every storage once, no parameter and no copy of one."""
    num_images, size = 4, model.config.image_size
    classes = model.config.num_classes
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images, targets = torch.randn(num_images, 3, *size), torch.full((num_images, classes), 0.5)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        logits = model.train()(images)
        if loss == "sigmoid":
            _ = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        else:
            _ = torch.nn.functional.cross_entropy(logits, targets)
    copies = 2 * sum(each.numel() for each in model.parameters() if each.dim() > 1)
    total = sum(each.untyped_storage().nbytes() for each in kept.values())
    return (total - copies * bfloat16) / num_images


MIDDLE = {
    "patch_size": 4,
    "hidden_dim": 128,
    "num_blocks": 4,
    "tokens_mlp_dim": 64,
    "channels_mlp_dim": 512,
}


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (8, TINY),
        (16, {**TINY, "dropout": 0.1, "stochastic_depth": 0.1}),
        (64, MIDDLE),
        (64, {**MIDDLE, "stochastic_depth": 0.5}),
    ],
)
def test_activations_against_autograd(
    size: int, changes: dict[str, float], loss: str, bfloat16: bool
):
    model = tiny_model(10, size, **changes)
    expected = kept_bytes(model, bfloat16, loss)
    assert activation_bytes(model.config, bfloat16=bfloat16) == pytest.approx(expected, rel=0.15)


def test_the_largest_micro_batch():
    config = tiny_model(10, 64, **MIDDLE).config
    kept, pixels = activation_bytes(config), 4 * 3 * 64 * 64
    assert kept is not None
    largest = max(256 * 512, 128 * 64)
    one = kept + 2 * 4 * largest + 2 * 4 * 256 * 128
    assert largest_micro_batch(config, 24, 24 * (one + pixels)) == 24
    assert largest_micro_batch(config, 24, 24 * (one + pixels) - 1) == 12
    assert largest_micro_batch(config, 24, 11 * one + 24 * pixels) == 8
    assert largest_micro_batch(config, 23, 22 * one + 23 * pixels) == 1
    assert largest_micro_batch(config, 24, one + 24 * pixels) == 1
    with pytest.raises(am.UserError, match=r"0\.01 GB beside the weights[\s\S]*bfloat16"):
        largest_micro_batch(config, 24, one + 24 * pixels - 1)
    with pytest.raises(am.UserError, match=r"0\.00 GB are left"):
        largest_micro_batch(config, 24, -5)
    assert largest_micro_batch(config, 24, 11 * one + 24 * pixels, bfloat16=True) == 12


def test_other_families_are_counted_as_autograd_keeps():
    for model in (small_cycle(10), small_permutator(10), tiny_model(10, 16, gelu="exact")):
        for bfloat16 in (False, True):
            counted, largest = kept_of_one_image(model.config, bfloat16)
            expected = kept_bytes(model, bfloat16, "softmax")
            assert counted == pytest.approx(expected, rel=0.15)
            assert 0 < largest < counted
    config = small_cycle(10).config
    counted, largest = kept_of_one_image(config, False)
    assert activation_bytes(config) == counted
    each, pixels = counted + 4 * largest, 4 * 3 * 16 * 16
    assert largest_micro_batch(config, 8, 8 * (each + pixels)) == 8
    assert largest_micro_batch(config, 8, 8 * (each + pixels) - 1) == 4
    with pytest.raises(am.UserError, match=r"stages of 1, 2 blocks, 9 to 12 channels, 16x16"):
        largest_micro_batch(config, 8, each)


def test_the_count_and_the_formula_agree_on_a_mixer():
    for bfloat16 in (False, True):
        counted, _ = kept_of_one_image(tiny_model(10, 64, **MIDDLE).config, bfloat16)
        formula = activation_bytes(tiny_model(10, 64, **MIDDLE).config, bfloat16=bfloat16)
        assert formula == pytest.approx(counted, rel=0.01)


def test_counting_draws_no_random_number():
    before = torch.get_rng_state()
    kept_of_one_image(small_permutator(3).config, False)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    kept_of_one_image(model_config("vip_s7", 28, 9, depths=(1, 1, 1, 1)), False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


def test_muon_moves_the_dense_weights_of_all_families():
    for model in (small_cycle(10), small_permutator(10)):
        moved = sum(
            each.numel()
            for name, each in model.named_parameters()
            if name.startswith("network.") and each.dim() == 2
        )
        settings = am.recipe("cifar10")
        size = 4 * count_parameters(model)
        memory = training_memory(model.config, count_parameters(model), settings)
        assert memory.optimizer == 2 * size - 4 * moved
        muon, adam = build_optimizers(model, settings.optimizer)
        held = [each for group in muon.param_groups for each in group["params"]]
        assert sum(each.numel() for each in held) == moved
        assert len(adam.param_groups) == 2


def test_an_unknown_architecture():
    assert activation_bytes(object()) is None
    assert largest_micro_batch(object(), 8, 1) is None
    memory = training_memory(object(), 100, am.recipe("cifar10"))
    assert memory.activations is None
    assert memory.optimizer == 800


def test_the_documents_mixer_h14():
    """Every amount of the table in docs/cluster.md that is not an estimate."""
    with torch.device("meta"):
        models = [am.create_model("mixer_h14", num_classes=n) for n in (0, 1000, 18291)]
    counts = [count_parameters(model) for model in models]
    config, settings = models[2].config, am.recipe("jft_h14")

    def memory(num_processes: int, settings: am.TrainConfig = settings) -> TrainingMemory:
        return training_memory(
            config, counts[2], settings, bfloat16=True, num_processes=num_processes
        )

    whole, sharded = memory(8), settings.with_value("sharding", "full")
    rows = {
        "weights, float32": f"{whole.parameters / 1e9:.2f} GB",
        "gradients, float32": f"{whole.gradients / 1e9:.2f} GB",
        "two moments of Adam, float32": f"{whole.optimizer / 1e9:.2f} GB",
        "sum: what DDP keeps on every GPU": f"{whole.state / 1e9:.2f} GB",
    }
    counted = ", ".join(f"{count / 1e6:.1f} M" for count in counts)
    rows["parameters without the head, with that of 1,000 classes, with that of 18,291"] = counted
    parts = ", ".join(f"{memory(size, sharded).state / 1e9:.2f} GB" for size in (8, 64))
    rows["the same with FSDP2 on 8 GPUs, on 64 GPUs"] = parts
    for size, label in ((80, "a GPU of 80 GB, a tenth"), (141, "a GPU of 141 GB, likewise")):
        room = int(0.9 * size * 1e9) - whole.state
        number = largest_micro_batch(config, 512, room, bfloat16=True)
        rows[f"images at once on {label}"] = str(number)
    for bfloat16, label in ((True, "bfloat16 products"), (False, "all float32")):
        kept = activation_bytes(config, bfloat16=bfloat16)
        assert kept is not None
        rows[f"activations of one image, {label}"] = f"{kept / 1e6:.0f} MB"
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    for begins, amount in rows.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {begins}"))
        assert line.split("|")[2].strip() == amount, line
