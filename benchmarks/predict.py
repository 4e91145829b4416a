"""Predictions at scale: decoding alone, the model alone and the whole command; and memory.

    python benchmarks/predict.py speed 'flowers102_34c_*.parquet' --model mixer_b16
    python benchmarks/predict.py memory --images 1000000

speed: the three take turns in one process, and the median of the rounds counts. Decoding is what
the loader's workers do with nobody waiting; the model answers to one batch again and again, down to
the classes; the whole command reads, decodes, computes and writes a CSV file. It must reach 90 % of
the slower of the two. On a processor both share its cores, so that no program can be faster than
the sum of the two times for an image; that limit is printed as well. Weights are random, for speed
does not depend on them.

memory: a small source repeated, written to a folder of parts; the resident memory of the main
process and of its workers after every twentieth of the images.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import allmlp as am
from allmlp.data.loader import evaluation_batches
from allmlp.data.source import Source, subset
from allmlp.data.sources import open_source
from allmlp.deploy.predict import PredictOptions, write_predictions
from allmlp.deploy.rows import Rows, choose_columns, row_values
from allmlp.evaluation.predictor import Predictor
from allmlp.models.layers import preprocessing_of


def repeated(source: Source, images: int) -> Source:
    return subset(source, np.arange(images) % len(source), f"{source.name}, repeated")


def decoding(model: am.ImageClassifier, source: Source, options: dict[str, int]) -> None:
    for _ in evaluation_batches(source, preprocessing_of(model), **options):
        pass


def computing(predictor: Predictor, source: Source) -> None:
    size, images = predictor.batch_size, len(source)
    height, width = predictor.model.config.image_size
    values = row_values(predictor, choose_columns(predictor.model))
    pixels = torch.randint(0, 256, (size, height, width, 3), dtype=torch.uint8)
    batch = pixels.permute(0, 3, 1, 2)  # channels last in memory, as the loader's are
    for at in range(0, images, size):
        for tensor in values(batch[: min(size, images - at)]):
            tensor.cpu()


def speed(arguments: argparse.Namespace) -> None:
    model = am.create_model(arguments.model, arguments.image_size, 1000)
    torch.nn.init.normal_(model.head.weight)
    model.class_names = [f"class {n}" for n in range(1000)]
    model = model.to(arguments.device).eval()
    source = open_source(arguments.data)
    source = repeated(source, arguments.images or len(source))
    options = {"batch_size": arguments.batch_size, "num_workers": arguments.workers}
    predictor = Predictor(model, precision=arguments.precision or "auto", **options)
    with tempfile.TemporaryDirectory() as folder:
        everything = PredictOptions(
            output=Path(folder) / "predictions.csv",
            overwrite=True,
            precision=arguments.precision or "auto",
            **options,
        )
        sides = {
            "decoding alone": lambda: decoding(model, source, options),
            "model alone": lambda: computing(predictor, source),
            "whole command": lambda: write_predictions(model, source, everything),
        }
        first = repeated(source, arguments.batch_size)
        computing(predictor, first)
        write_predictions(model, first, everything)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(arguments.rounds):
            for name in sorted(sides, reverse=bool(turn % 2)):
                started = time.perf_counter()
                sides[name]()
                rates[name].append(len(source) / (time.perf_counter() - started))
    print(
        f"{arguments.model}, {model.config.summary()}; {len(source):,} images, "
        f"batches of {arguments.batch_size}, {arguments.workers} workers, {predictor.precision}, "
        f"{torch.get_num_threads()} threads, {predictor.device}; {arguments.rounds} rounds"
    )
    median = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name:15} {median[name]:9,.1f} images/s ({min(values):,.1f} to {max(values):,.1f})")
    decode, compute = rates["decoding alone"], rates["model alone"]
    ratios = [
        whole / min(a, b)
        for whole, a, b in zip(rates["whole command"], decode, compute, strict=True)
    ]
    print(
        f"whole / slower of the two: {statistics.median(ratios):.1%} "
        f"({min(ratios):.1%} to {max(ratios):.1%})"
    )
    if predictor.device.type == "cpu":
        limit = 1 / (1 / median["decoding alone"] + 1 / median["model alone"])
        share = median["whole command"] / limit
        print(f"both on the same cores: at most {limit:,.1f} images/s; reached {share:.1%}")


def resident(pid: int | str) -> float:
    """MB of a process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Rss:\s+(\d+) kB", text, flags=re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def memory(arguments: argparse.Namespace) -> None:
    shape = {"patch_size": 4, "hidden_dim": 16, "num_blocks": 1}
    shape |= {"tokens_mlp_dim": 8, "channels_mlp_dim": 16}
    model = am.create_model("mixer_s16", 8, 10, **shape).eval()
    torch.nn.init.normal_(model.head.weight)
    model.class_names = [str(n) for n in range(10)]
    before = resident("self")
    source = repeated(open_source("digits:train"), arguments.images)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    done, started, most = 0, time.perf_counter(), 0.0
    print(
        f"imports and model: {before:.0f} MB; {len(source):,} images to parts of {arguments.kind}"
    )

    def see(rows: Rows) -> None:
        nonlocal done, most
        passed = done * 20 // len(source)
        done += len(rows)
        if done * 20 // len(source) == passed:
            return
        main = resident("self")
        most = max(most, main)
        workers = []
        for pid in children.read_text().split():
            try:
                workers.append(resident(pid))
            except OSError:
                continue  # it has just ended
        rate = done / (time.perf_counter() - started)
        print(
            f"{done:11,} images  main process {main:6.0f} MB  workers "
            f"{' '.join(f'{size:.0f}' for size in workers)} MB  {rate:,.0f} images/s",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        options = PredictOptions(
            output=folder,
            format=arguments.kind,
            batch_size=arguments.batch_size,
            num_workers=arguments.workers,
        )
        write_predictions(model, source, options, on_rows=see)
        written = sum(path.stat().st_size for path in Path(folder).iterdir())
    print(
        f"at most {most:.0f} MB in the main process, {most - before:.0f} MB above the imports; "
        f"{written / 1e6:,.0f} MB written"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("speed")
    one.add_argument("data", help="a source with images of real sizes")
    one.add_argument("--model", default="mixer_b16")
    one.add_argument("--image-size", type=int, default=224)
    one.add_argument("--images", type=int, help="the source is repeated or cut to so many")
    one.add_argument("--device", default="cpu")
    one.add_argument("--precision", default=None)
    one.add_argument("--rounds", type=int, default=5)
    one.set_defaults(run=speed)
    two = parts.add_parser("memory")
    two.add_argument("--images", type=int, default=1_000_000)
    two.add_argument("--kind", default="csv")
    two.set_defaults(run=memory)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
