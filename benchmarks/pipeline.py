"""Training: reading pictures alone, the step alone, and both together.

    python benchmarks/pipeline.py 'flowers102_34c_*.parquet' --model mixer_s16 --output FILE.json

The data is any source with a train split: a folder of class folders, Parquet files, shards. The
three take turns in one process and the median of the rounds counts. Reading is what `mixer train`
does until a batch of 8-bit pixels is there, with its worker processes and nobody computing; the
step scales the pixels, mixes and moves the weights, on one batch again and again; together they are
what a run does between two evaluations. On a processor both share its cores, so that no program can
be faster than the sum of the two times for an image; how much of that limit is reached is printed.
Each turn of reading begins with new workers, whose start is left out: batches are counted from the
second on.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import figures
import torch

import allmlp as am
from allmlp.data.augment import mix
from allmlp.data.loader import Batch, training_batches
from allmlp.data.sampler import STEP, Order, generator
from allmlp.data.transforms import normalize
from allmlp.models.layers import draw_stochastic_depth, preprocessing_of
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.device import choose_device, choose_policy, torch_settings
from allmlp.runtime.world import World
from allmlp.training.config import TrainConfig
from allmlp.training.dataset import Augmentation, open_training_data
from allmlp.training.optim import build_optimizers
from allmlp.training.step import Updater

STEPS = 1_000  # of the run that the step is taken from; the rate and `auto` go by it
COLUMNS = {"part": "left", "images/s": "right", "least to most": "right"}


def config_of(options: argparse.Namespace) -> TrainConfig:
    overrides = {} if options.num_blocks is None else {"num_blocks": options.num_blocks}
    return am.recipe(options.recipe).with_values(
        {
            "model.name": options.model,
            "model.image_size": options.image_size,
            "model.overrides": overrides,
            "data.source": options.data,
            "data.num_workers": options.workers,
            "batch_size": options.batch_size,
            "num_threads": options.threads,
            "device": options.device,
        }
    )


class Parts:
    """The two parts of a run: its batches and its step."""

    def __init__(self, config: TrainConfig, steps: int) -> None:
        self.config, self.steps, self.turn = config, steps, 0
        self.device = choose_device(config.device)
        self.splits = open_training_data(config.data)
        self.classes = len(self.splits.train.class_names)
        size, overrides = config.model.image_size, config.model.overrides
        torch.manual_seed(0)
        self.model = am.create_model(config.model.name, size, self.classes, **overrides)
        self.model.preprocessing = Preprocessing(image_size=self.model.config.image_size)
        self.model = self.model.to(self.device)
        self.compute = choose_policy(
            self.device,
            config.precision,
            config.compile,
            operations=3 * self.model.config.flops * config.batch_size,
            num_steps=STEPS,
        )
        optimizers = build_optimizers(self.model, config.optimizer)
        self.update = Updater(
            *(self.model, self.model, optimizers, config, self.compute, World(), STEPS, print)
        )
        with contextlib.closing(self.batches(1)) as found:
            self.same = next(found)

    def batches(self, count: int) -> Generator[Batch, None, None]:
        """Yields so many batches, other ones in every turn."""
        config, preprocessing = self.config, preprocessing_of(self.model)
        self.turn += 1
        found = training_batches(
            self.splits.train,
            preprocessing,
            Augmentation(config.augment, preprocessing),
            Order(seed=config.seed + self.turn, batch_size=config.batch_size),
            range(count),
            num_workers=config.data.num_workers,
            device=self.device,
        )
        with contextlib.closing(found):
            yield from found

    def step(self, number: int, batch: Batch) -> None:
        """As in a run: pixels scaled, images mixed, weights moved."""
        config, random = self.config, generator(self.config.seed, STEP, number)
        masks = torch.Generator().manual_seed(number)
        images = normalize(batch.images, preprocessing_of(self.model))
        targets = torch.nn.functional.one_hot(batch.labels, self.classes).float()
        strengths = {"mixup_strength": config.augment.mixup}
        strengths["cutmix_strength"] = config.augment.cutmix
        images, targets = mix(images, targets, random, **strengths)
        kept = draw_stochastic_depth(self.model, config.batch_size, masks).to(self.device)
        self.update(number, images, targets, kept, number)

    def reading(self) -> float:
        """Returns images a second."""
        # More of them: those that the workers have begun when the first is there count for less.
        return self._timed(self.batches(4 * self.steps + 1), lambda number, batch: None)

    def computing(self) -> float:
        """Returns images a second."""
        return self._timed((self.same for _ in range(self.steps + 1)), self.step)

    def together(self) -> float:
        """Returns images a second."""
        return self._timed(self.batches(self.steps + 1), self.step)

    def _timed(self, batches: Iterator[Batch], work: Callable[[int, Batch], None]) -> float:
        began = images = 0
        for number, batch in enumerate(batches):
            work(number, batch)
            if number:
                images += len(batch.labels)
            else:
                began = self._now()
        return images / (self._now() - began)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("data", help="a source with a train split")
    parser.add_argument("--recipe", default="scratch", help="its augmentation and optimizer")
    parser.add_argument("--model", default="mixer_s16")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-blocks", type=int, help="fewer than the model's own, to try it out")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, help="that decode; as `mixer train` chooses")
    parser.add_argument("--threads", type=int, help="of the step; as `mixer train` chooses")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="of each part in a round")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    config = config_of(options)
    parts = Parts(config, options.steps)
    sides = {
        "reading alone": parts.reading,
        "step alone": parts.computing,
        "both together": parts.together,
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    with torch_settings(
        parts.device,
        parts.compute.precision,
        config.num_threads,
        step_operations=3 * parts.model.config.flops * config.batch_size,
    ):
        parts.computing()
        for turn in range(options.rounds):
            for name in sorted(sides, reverse=bool(turn % 2)):
                rates[name].append(sides[name]())
        threads = torch.get_num_threads()
    found = {name: figures.spread(values) for name, values in rates.items()}
    pairs = list(zip(rates["reading alone"], rates["step alone"], strict=True))
    of_slower = figures.ratios(rates["both together"], [min(pair) for pair in pairs])
    sums = [1 / (1 / reading + 1 / step) for reading, step in pairs]
    of_sum = figures.ratios(rates["both together"], sums)
    print(figures.machine(threads))
    print(f"{options.model}, {parts.model.config.summary()}, {options.image_size} px, ", end="")
    print(f"batch {options.batch_size}; {parts.compute.why}; {len(parts.splits.train):,} images\n")
    rows = [
        {
            "part": name,
            "images/s": f"{each['median']:,.1f}",
            "least to most": f"{each['least']:,.1f} to {each['most']:,.1f}",
        }
        for name, each in found.items()
    ]
    print(figures.table(COLUMNS, rows))
    print(f"\nboth / slower of the two: {of_slower['median']:.1%}", end="")
    print(f" ({of_slower['least']:.1%} to {of_slower['most']:.1%})")
    if parts.device.type == "cpu":
        print(f"both / the sum of both on the same cores: {of_sum['median']:.1%}", end="")
        print(f" ({of_sum['least']:.1%} to {of_sum['most']:.1%})")
    values: dict[str, Any] = {
        "data": options.data,
        "batch_size": options.batch_size,
        "threads": threads,
        "why": parts.compute.why,
        "images_per_second": found,
        "rounds": rates,
        "both_over_slower": of_slower,
        "both_over_sum": of_sum,
    }
    figures.write(options.output, "input pipeline", values, parts.model)


if __name__ == "__main__":
    main()
