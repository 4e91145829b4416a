"""Test accuracy of the digits recipe over seeds: python benchmarks/digits.py --seeds 0 1 2

Prints a Markdown table: a line a seed, then the mean; first on the recipe's own split, the same for
every seed, then with each seed on the split of its own number (digits@1, ...).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import allmlp as am


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    measure(seeds, dict.fromkeys(seeds, "digits"))
    measure(seeds, {seed: f"digits@{seed}" for seed in seeds})


def measure(seeds: list[int], sources: dict[int, str]) -> None:
    accuracies = []
    print("\n| seed | data | validation | test | mistakes | seconds |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            config = am.recipe("digits").with_value("seed", seed)
            config = config.with_value("data.source", sources[seed])
            config = config.with_value("output", str(Path(folder) / "run"))
            started = time.perf_counter()
            result = am.train(config, quiet=True)
            seconds = time.perf_counter() - started
        assert result.test is not None
        test, validation = result.test, result.validation
        mistakes = int((test.predictions != test.labels).sum())
        accuracies.append(test.top1)
        cells = (f"{validation.top1:.2%}", f"{test.top1:.2%}", mistakes, f"{seconds:.0f}")
        print("| " + " | ".join(map(str, (seed, sources[seed], *cells))) + " |", flush=True)
    print(f"| mean | | | {statistics.mean(accuracies):.2%} | | |")


if __name__ == "__main__":
    main()
