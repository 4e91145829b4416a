"""Training images a second of Mixer-S/16 at 224 pixels: our default settings against timm's.

    python benchmarks/training.py

Both sides run in this process and take turns; the median of the rounds counts. A step is forward,
backward, clipping at norm 1 and AdamW on one batch of random pixels; reading images is left out on
both sides (benchmarks/images.py has it). Ours is the step of `mixer train` with nothing chosen by
hand. timm's is that of its train.py with its defaults: float32, eager, its own AdamW. Two further
rows say how much of the ratio is a setting that timm's users can choose too. It needs timm and
torchvision beside torch; two operators that torchvision's import asks of a CUDA build are
registered empty.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import mlp_mixer as mm
from mlp_mixer.models.layers import draw_stochastic_depth
from mlp_mixer.training.compute import choose_compute, settings_of_torch
from mlp_mixer.training.distributed import World
from mlp_mixer.training.optimizer import build_optimizers
from mlp_mixer.training.step import Updater

BATCH, CLASSES, DROP = 16, 1000, 0.1
STEPS = 1_000  # of the run that the step is taken from; only the learning rate depends on it


def ours(images: torch.Tensor, labels: torch.Tensor, **changes: str) -> Callable[[int], None]:
    config = mm.recipe("scratch").with_values(
        {
            "model.image_size": 224,
            "model.overrides": {"stochastic_depth": DROP},
            "batch_size": BATCH,
            "device": "cpu",
            **changes,
        }
    )
    model = mm.create_model("mixer_s16", 224, CLASSES, stochastic_depth=DROP)
    device, flops = torch.device("cpu"), model.config.flops
    compute = choose_compute(config, device, flops, STEPS)
    print(f"ours: {compute.why}")
    optimizers = build_optimizers(model, config.optimizer)
    updater = Updater(model, model, optimizers, config, compute, World(), STEPS, print)
    targets = F.one_hot(labels, CLASSES).float()
    random = torch.Generator().manual_seed(0)

    def step(number: int) -> None:
        kept = draw_stochastic_depth(model, BATCH, random)
        with settings_of_torch(compute, config, flops):
            updater(number + 1, images, targets, kept, number)

    return step


def timms(
    images: torch.Tensor, labels: torch.Tensor, *, bfloat16: bool = False
) -> Callable[[int], None]:
    import timm
    from timm.optim import create_optimizer_v2
    from timm.utils import dispatch_clip_grad

    model = timm.create_model("mixer_s16_224", drop_path_rate=DROP).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)

    def step(number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    given = parser.parse_args()
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    random = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 224, 224, generator=random)
    labels = torch.randint(CLASSES, (BATCH,), generator=random)
    sides = {
        "timm, its defaults (float32)": timms(images, labels),
        "ours, our defaults": ours(images, labels),
        "ours, --precision float32": ours(images, labels, precision="float32"),
        "timm, bfloat16 autocast": timms(images, labels, bfloat16=True),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        for number in range(2):
            side(number)
    for _ in range(given.rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            for number in range(given.steps):
                side(number)
            speeds[name].append(given.steps * BATCH / (time.perf_counter() - started))
    baseline = speeds["timm, its defaults (float32)"]
    for name, values in speeds.items():
        ratios = [value / base for value, base in zip(values, baseline, strict=True)]
        print(
            f"{name:30} {statistics.median(values):6.2f} images/s   ratio "
            f"{statistics.median(ratios):.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
