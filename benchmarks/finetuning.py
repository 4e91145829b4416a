"""Fine-tuning a checkpoint on other images at a larger size, against the same model from scratch.

    python benchmarks/finetuning.py CHECKPOINT 'cifar100_subset_*.parquet#label=fine_label' \
        --image-size 48 --steps 200 --batch-size 64 --output runs/cifar100

Both sides have the same architecture (that of the grown checkpoint), optimiser, augmentation,
steps and grid of learning rates; only the weights that they begin with differ. The rate is chosen
for each side on a tenth of the training images, with seed 0; then every seed trains on all
training images, and the test images are measured once with the last weights. The same command
again goes on where it was stopped. What it printed is in benchmarks/finetuning.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import allmlp as am
from allmlp.models.catalog import config_to_json

RATES = (3e-4, 1e-3, 3e-3)


def common(given: argparse.Namespace) -> am.TrainConfig:
    return am.recipe("scratch").with_values(
        {
            "steps": given.steps,
            "evaluate_every": given.steps,
            "batch_size": given.batch_size,
            "augment.mixup": 0.0,
            "optimizer.warmup": 0.1,
            "keep_checkpoints": 1,
            "num_threads": given.threads,
        }
    )


def begun_with(side: str, given: argparse.Namespace) -> am.TrainConfig:
    if side == "fine-tuned":
        return common(given).with_values(
            {
                "model.weights": given.checkpoint,
                "model.name": "",
                "model.image_size": given.image_size,
                "model.overrides": {"stochastic_depth": 0.0},
            }
        )
    grown = config_to_json(am.load_model(given.checkpoint, given.image_size, quiet=True).config)
    sizes = ("patch_size", "hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")
    return common(given).with_values(
        {
            "model.image_size": given.image_size,
            "model.overrides": {name: grown[name] for name in sizes},
        }
    )


def run(config: am.TrainConfig, output: Path) -> float:
    result = am.train(config.with_value("output", str(output)), quiet=True)
    shown = result.test or result.validation
    assert shown is not None
    return shown.top1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", default=["fine-tuned", "from scratch"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    for side in given.sides:
        config, folder = begun_with(side, given), given.output / side.replace(" ", "-")
        started, held_out = time.perf_counter(), {}
        for rate in RATES:
            changes = {"data.source": f"{given.data}:train", "data.holdout": 0.1}
            cell = config.with_values({**changes, "optimizer.learning_rate": rate})
            held_out[rate] = run(cell, folder / f"rate-{rate:g}")
        best = max(held_out, key=lambda rate: (held_out[rate], -rate))
        reached = []
        for seed in given.seeds:
            changes = {"data.source": given.data, "data.holdout": 0.0, "seed": seed}
            cell = config.with_values({**changes, "optimizer.learning_rate": best})
            reached.append(run(cell, folder / f"seed-{seed}"))
        spread = statistics.stdev(reached) if len(reached) > 1 else 0.0
        print(
            f"{side:12}  {statistics.fmean(reached):.2%} +- {spread:.2%}  "
            f"({', '.join(f'{each:.2%}' for each in reached)}; rate {best:g}; held out: "
            f"{', '.join(f'{rate:g} {each:.2%}' for rate, each in held_out.items())}; "
            f"{time.perf_counter() - started:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
