"""Images a second of a Mixer on a processor: our default predict, and its exported files.

    python benchmarks/deploy.py --model mixer_b16 --threads 2

Every variant runs in a process of its own that waits for its turn, so that no runtime's threads
stand in another's way; the turns alternate, and the median counts. Weights are random (each matrix
with a variance of 1 / inputs) and images are noise, also those that int8 is calibrated with: this
measures speed. What int8 costs in accuracy, `mixer export` says.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import allmlp as am
from allmlp.deploy.formats import FORMATS, info_of
from allmlp.deploy.int8 import Int8
from allmlp.deploy.onnx_graph import graph_module, to_bfloat16, to_onnx
from allmlp.environment import processor
from allmlp.evaluation.predictor import Predictor
from allmlp.runtime.device import torch_settings

# The variant -> the file that it runs, and by which runtime; None is our own model.
VARIANTS = {
    "torch float32": (None, "float32"),
    "torch, predict's auto": (None, "auto"),
    "ONNX Runtime float32": ("float32.onnx", "onnxruntime"),
    "ONNX Runtime bfloat16 weights": ("bfloat16.onnx", "onnxruntime"),
    "ONNX Runtime int8": ("int8.onnx", "onnxruntime"),
    "OpenVINO float32": ("float32.xml", "openvino"),
    "OpenVINO bfloat16": ("bfloat16.xml", "openvino"),
    "OpenVINO int8": ("int8.xml", "openvino"),
}


def build(name: str, size: int, num_blocks: int | None) -> am.ImageClassifier:
    torch.manual_seed(0)
    overrides = {} if num_blocks is None else {"num_blocks": num_blocks}
    model = am.create_model(name, size, **overrides).eval()
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight, std=model.config.hidden_dim**-0.5)
    model.class_names = [f"class {index}" for index in range(model.config.num_classes)]
    return model


def pixels(model: am.ImageClassifier, count: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    shape = (count, model.config.in_channels, *model.config.image_size)
    return torch.randint(0, 256, shape, generator=random).byte()


def write_files(model: am.ImageClassifier, folder: Path, threads: int) -> None:
    graph = to_onnx(*graph_module(model, uint8_input=False))
    info = info_of(model, "float32", uint8_input=False)
    noise = [info.inputs(pixels(model, 8, at + 1)) for at in range(2)]
    int8 = Int8(graph, noise, folder, threads).quantized(0)[0]
    graphs = {"float32": graph, "bfloat16": to_bfloat16(graph), "int8": int8}
    for precision, made in graphs.items():
        info = info_of(model, precision, uint8_input=False)
        for name in ("onnx", "openvino"):
            FORMATS[name].write(made, info, folder / f"{precision}{FORMATS[name].suffix}")


def work(pipe, variant: str, options: argparse.Namespace, folder: Path) -> None:
    """One variant: computes a batch whenever it is asked, and answers with the seconds it took."""
    torch.set_num_threads(options.threads)
    file, how = VARIANTS[variant]
    model = build(options.model, options.image_size, options.num_blocks)
    batch = pixels(model, options.batch_size)
    if file is not None:
        model = am.open_exported(folder / file, runtime=how, num_threads=options.threads)
    with torch_settings(torch.device("cpu"), "float32", options.threads):
        predictor = Predictor(model, precision=None if file else how)
        logits = predictor.logits(batch).float().numpy()
        pipe.send((logits, predictor.precision))
        while pipe.recv():
            started = time.perf_counter()
            predictor.logits(batch)
            pipe.send(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mixer_b16")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-blocks", type=int, help="fewer than the model's own, to try it out")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build(options.model, options.image_size, options.num_blocks)
        write_files(model, folder, options.threads)
        context = multiprocessing.get_context("spawn")
        pipes, workers, exact = {}, [], None
        errors, said = {}, {}
        for variant in VARIANTS:
            pipes[variant], other = context.Pipe()
            workers.append(
                context.Process(target=work, args=(other, variant, options, folder), daemon=True)
            )
            workers[-1].start()
            logits, precision = pipes[variant].recv()
            exact = logits if exact is None else exact
            errors[variant] = np.abs(logits - exact).max() / np.abs(exact).max()
            said[variant] = f"{variant} ({precision})" if "auto" in variant else variant
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for count in range(options.rounds + 1):  # the first is a warm-up
            for variant, pipe in pipes.items():
                pipe.send(True)
                seconds = pipe.recv()
                if count:
                    times[variant].append(seconds)
        for pipe in pipes.values():
            pipe.send(False)
        for worker in workers:
            worker.join()
        print(f"{options.model}, {options.image_size} px, batches of {options.batch_size}")
        print(f"{processor()}, {options.threads} threads, torch {torch.__version__}\n")
        print("| variant | images/s | least | most | MiB | largest error of a logit |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for variant, each in times.items():
            rates = [options.batch_size / seconds for seconds in each]
            file = VARIANTS[variant][0]
            path = None if file is None else (folder / file)
            weights = path and (path.with_suffix(".bin") if path.suffix == ".xml" else path)
            size = f"{weights.stat().st_size / 2**20:.1f}" if weights else ""
            print(
                f"| {said[variant]} | {statistics.median(rates):.1f} | {min(rates):.1f} "
                f"| {max(rates):.1f} | {size} | {errors[variant]:.1e} |"
            )


if __name__ == "__main__":
    main()
