"""What the first eight minutes on a GPU should tell: is it right, how fast, where does it wait.

    python benchmarks/gpu_check.py --output gpu_check          # all stages, on a GPU
    python benchmarks/gpu_check.py --tiny                      # the same code on a CPU, small
    python benchmarks/gpu_check.py --only correct training

Every stage is a process of its own with its own limit: one that fails or hangs costs its own
seconds only. Each figure is a line of results.jsonl; the table comes last. Candidates for a fast
path (tokens first in plain operations, GELU in the epilogue, bfloat16 residual stream, CUDA graphs)
live here until a GPU has decided.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import allmlp as am
from allmlp import plots
from allmlp.data.loader import evaluation_batches, training_batches
from allmlp.data.sampler import Order
from allmlp.data.sources import open_source
from allmlp.deploy.rows import choose_columns, predict_rows
from allmlp.evaluation.predictor import Predictor
from allmlp.models.inference import Inference
from allmlp.models.layers import draw_stochastic_depth, preprocessing_of
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.device import ComputePolicy, exact_matmuls, synchronize, torch_settings
from allmlp.runtime.world import World, shard
from allmlp.training.checkpoint import Checkpoints
from allmlp.training.dataset import Augmentation
from allmlp.training.loggers import Logger
from allmlp.training.optim import build_optimizers
from allmlp.training.step import Updater

TINY = {"num_blocks": 2, "hidden_dim": 32, "tokens_mlp_dim": 16, "channels_mlp_dim": 64}
CIFAR = {"patch_size": 4, "hidden_dim": 256, "tokens_mlp_dim": 128, "channels_mlp_dim": 1024}


@dataclass
class Check:
    """A running stage: its device, its size, and where its figures go."""

    stage: str
    tiny: bool
    output: Path

    def __post_init__(self) -> None:
        is_gpu = torch.cuda.is_available() and not self.tiny
        self.device = torch.device("cuda" if is_gpu else "cpu")
        self.rounds, self.seconds = (2, 0.02) if self.tiny else (5, 0.3)

    def emit(self, name: str, value: Any, unit: str = "", good: bool | None = None) -> None:
        """Notes a figure; `good` is whether it is as it must be, None where nothing is asked."""
        line = {"stage": self.stage, "name": name, "value": value, "unit": unit, "good": good}
        with (self.output / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def model(self, name: str, **overrides: Any) -> am.ImageClassifier:
        """Returns a model with random weights, also of the head; tiny ones have four tokens."""
        torch.manual_seed(0)
        if self.tiny:
            overrides, name = {**TINY, "patch_size": 16}, "mixer_s16"
        size = 32 if self.tiny or overrides.get("patch_size") == 4 else 224
        model = am.create_model(name, size, 10 if self.tiny else 1000, **overrides)
        torch.nn.init.normal_(model.head.weight, std=0.02)
        model.preprocessing = Preprocessing(image_size=(size, size))
        return model

    def compile(self, function: Any) -> Any:
        """Compiles; a tiny check traces only."""
        return torch.compile(function, backend="eager" if self.tiny else "inductor")

    def timed(self, work: Callable[[], object]) -> float:
        """Returns the seconds of one call: the median of rounds, each of many calls."""
        for _ in range(2 if self.tiny else 10):
            work()
        rounds = []
        for _ in range(self.rounds):
            synchronize(self.device)
            began, calls = time.perf_counter(), 0
            while time.perf_counter() - began < self.seconds or not calls:
                for _ in range(1 if self.tiny else 8):
                    work()
                    calls += 1
                synchronize(self.device)
            rounds.append((time.perf_counter() - began) / calls)
        return statistics.median(rounds)

    def images(self, model: am.ImageClassifier, count: int) -> Tensor:
        """Returns random normalised images, channels last in memory."""
        random = torch.Generator().manual_seed(1)
        shape = (count, *preprocessing_of(model).image_size, 3)
        return torch.randn(shape, generator=random).permute(0, 3, 1, 2).to(self.device)


# --- candidates -----------------------------------------------------------------------------------


def tokens_first(
    model: am.ImageClassifier, images: Tensor, *, epilogue: bool, stream: torch.dtype
) -> Tensor:
    """The Mixer's logits with tokens first in memory: both MLPs are products without transposes.

    The parameters are the model's own. `epilogue` computes the GELU in the product, for inference;
    `stream` is the type of the residual stream. The output bias of the token-mixing MLP moves all
    channels of a token alike, which the next LayerNorm takes out again; it is added for equality.
    """
    net: Any = model
    count, channels, height, width = images.shape
    patch, dim = net.config.patch_size, net.config.hidden_dim
    tall, wide = (patch, patch) if isinstance(patch, int) else patch
    rows, columns = height // tall, width // wide
    tokens = rows * columns
    half = torch.bfloat16 if images.is_cuda or stream == torch.bfloat16 else stream

    def norm(layer: Any, x: Tensor) -> Tensor:
        kind = layer.weight.dtype
        return F.layer_norm(x.to(kind), (dim,), layer.weight, layer.bias, layer.eps).to(half)

    def product(dense: Any, x: Tensor, gelu: bool) -> Tensor:
        weight, bias = dense.weight.to(half).t(), dense.bias.to(half)
        if gelu and epilogue and x.is_cuda:
            return torch._addmm_activation(bias, x, weight, use_gelu=True)
        out = torch.addmm(bias, x, weight)
        return F.gelu(out, approximate="tanh") if gelu else out

    x = images.reshape(count, channels, rows, tall, columns, wide).permute(2, 4, 0, 1, 3, 5)
    x = x.reshape(tokens * count, channels * tall * wide).to(half)
    stem = net.stem.weight.reshape(dim, -1).to(half)
    x = torch.addmm(net.stem.bias.to(half), x, stem.t()).to(stream)
    for block in net.blocks:
        mixing, across = block.token_mixing, block.channel_mixing
        hidden = norm(block.layer_norm_0, x).view(tokens, count * dim)
        hidden = product(mixing.dense_0, hidden.t(), True)
        mixed = torch.mm(mixing.dense_1.weight.to(half), hidden.t())
        mixed = mixed + mixing.dense_1.bias.to(half)[:, None]
        x = x + mixed.view(tokens * count, dim).to(stream)
        hidden = product(across.dense_0, norm(block.layer_norm_1, x), True)
        x = x + product(across.dense_1, hidden, False).to(stream)
    last = net.pre_head_layer_norm
    kind = last.weight.dtype
    x = F.layer_norm(x.to(kind), (dim,), last.weight, last.bias, last.eps)
    return net.head(x.view(tokens, count, dim).mean(0))


# --- stages ---------------------------------------------------------------------------------------


def environment(check: Check) -> None:
    """Versions and hardware."""
    for name in ("torch", "numpy", "PIL", "timm", "triton", "simplejpeg"):
        with contextlib.suppress(ImportError):
            check.emit(name, __import__(name).__version__)
    check.emit("cores", len(os.sched_getaffinity(0)))
    check.emit("CUDA", torch.version.cuda or "none")
    if check.device.type == "cuda":
        found = torch.cuda.get_device_properties(0)
        check.emit(found.name, round(found.total_memory / 2**30), "GiB")


def correct(check: Check) -> None:
    """Logits and gradients against float64 on the CPU."""
    exact = check.model("mixer_b16", num_blocks=4).double()
    images = check.images(exact, 8).double().cpu()
    labels = torch.arange(8) % 10
    truth = exact(images)
    F.cross_entropy(truth, labels).backward()
    slopes = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    model = copy.deepcopy(exact).float().to(check.device)
    inputs, labels = images.float().to(check.device), labels.to(check.device)

    def error(found: Tensor, wanted: Tensor) -> float:
        wanted = wanted.detach()
        return float((found.detach().cpu().double() - wanted).norm() / wanted.norm())

    def compared(name: str, logits: Callable[[Tensor], Tensor], limit: float) -> float:
        model.zero_grad()
        found = logits(inputs).float()
        F.cross_entropy(found, labels).backward()
        wrong = error(found, truth)
        check.emit(f"{name}: logits", wrong, good=wrong <= limit)
        kernels = {n: p for n, p in model.named_parameters() if p.dim() > 1 and p.grad is not None}
        worst = max(error(p.grad, slopes[n]) for n, p in kernels.items())  # type: ignore[arg-type]
        check.emit(f"{name}: worst gradient", worst, good=worst <= max(10 * limit, 3e-2))
        return wrong

    def half(images: Tensor) -> Tensor:
        with torch.autocast(check.device.type, torch.bfloat16):
            return model(images)

    if check.device.type == "cuda":
        wrong = error(model(inputs), truth)
        check.emit("float32 with TF32 in cuDNN, torch's default: logits", wrong)
    with exact_matmuls(check.device):
        compared("float32", model, 1e-5)
        plain = compared("bfloat16", half, 1e-2)
        compared("bfloat16 compiled", check.compile(half), 1.5e-2)
        for stream in (torch.float32, torch.bfloat16):
            name = f"tokens first, stream {str(stream).removeprefix('torch.')}"
            limit = max(1.5 * plain, 1e-5)
            first = lambda x, stream=stream: tokens_first(model, x, epilogue=False, stream=stream)  # noqa: E731
            compared(name, first, 1e-2 if stream == torch.bfloat16 else limit)


def ceilings(check: Check) -> None:
    """Products and copies alone, which no program can be faster than."""
    rows, dim, wide, big = (512, 64, 128, 256) if check.tiny else (50_176, 768, 3072, 8192)
    make = lambda *shape: torch.randn(shape, device=check.device, dtype=torch.bfloat16)  # noqa: E731
    x = make(2**16 if check.tiny else 2**28)
    check.emit("copy", 2e-12 * x.nbytes / check.timed(lambda: x.clone()), "TB/s")
    for m, k, n in ((big, big, big), (rows, dim, wide), (rows, wide, dim)):
        left, right = make(m, k), make(k, n)
        rate = 2e-12 * m * k * n / check.timed(lambda left=left, right=right: left @ right)
        check.emit(f"product {m} x {k} x {n}", rate, "TFLOP/s")
    left, right, bias = make(rows, dim), make(dim, wide), make(wide)
    apart = check.timed(lambda: F.gelu(torch.addmm(bias, left, right), approximate="tanh"))
    one = check.timed(lambda: torch._addmm_activation(bias, left, right, use_gelu=True))
    check.emit("GELU in the epilogue, times faster", apart / one)


def inference(check: Check) -> None:
    """Images a second of one batch in memory."""
    for count in (4,) if check.tiny else (256, 1024):
        model = check.model("mixer_b16").eval().to(check.device)
        images = check.images(model, count)
        ours = Inference(model, "bfloat16" if check.device.type == "cuda" else "float32")
        ways: dict[str, Callable[[Tensor], Tensor]] = {"as predict computes": ours.logits}

        def half(images: Tensor, model: am.ImageClassifier = model) -> Tensor:
            with torch.autocast(check.device.type, torch.bfloat16):
                return model(images)

        ways["compiled"] = check.compile(half)
        types = (torch.float32, torch.float32, torch.bfloat16)
        for epilogue, kind in zip((False, True, True), types, strict=True):
            first = lambda x, e=epilogue, k=kind, m=model: tokens_first(m, x, epilogue=e, stream=k)  # noqa: E731
            name = f"tokens first{', epilogue' * epilogue}, stream {str(kind)[6:]}"
            ways[name] = check.compile(first)
        for name, way in ways.items():
            with torch.inference_mode(), exact_matmuls(check.device):
                speed = count / check.timed(lambda way=way, images=images: way(images))
            check.emit(f"B/16, {count} images, {name}", round(speed), "images/s")


def updater(check: Check, name: str, count: int, *, compile: bool, **changes: Any) -> Any:
    """Returns the step of `mixer train` with one batch in memory, and its parts."""
    model = check.model(name, **changes).to(check.device)
    config = am.recipe("scratch").with_values({"batch_size": count, "compile": "off"})
    precision = "bfloat16" if check.device.type == "cuda" else "float32"
    compute = ComputePolicy(check.device, precision, False, "")
    optimizers = build_optimizers(model, config.optimizer)
    update = Updater(*(model, model, optimizers, config, compute, World(), 1000, print))
    update.forward = check.compile(model) if compile else model
    update.micro_batch_size = count
    images, classes = check.images(model, count), model.config.num_classes
    labels = torch.arange(count, device=check.device) % classes
    targets = F.one_hot(labels, classes).float()
    depth = draw_stochastic_depth(model, count, torch.Generator()).to(check.device)
    return update, lambda: update(500, images, targets, depth, 0), (images, targets, depth)


def training(check: Check) -> None:
    """Steps of one batch in memory; how often the host waits for the GPU."""
    for count in (4,) if check.tiny else (256, 512):
        for compiled in (False, True):
            update, step, _ = updater(check, "mixer_b16", count, compile=compiled)
            began = time.perf_counter()
            step()
            name = f"B/16, {count} images, {'compiled' if compiled else 'eager'}"
            check.emit(f"{name}: first step", time.perf_counter() - began, "s")
            with torch_settings(check.device, "float32"):
                check.emit(name, round(count / check.timed(step)), "images/s")
            if check.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() / count / 2**20
                check.emit(f"{name}: memory", peak, "MiB/image")
                torch.cuda.set_sync_debug_mode("warn")
                with warnings.catch_warnings(record=True) as waits:
                    warnings.simplefilter("always")
                    step()
                torch.cuda.set_sync_debug_mode("default")
                places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waits})
                late = len(waits) - (update.refused is None)  # an explicit event is not counted
                check.emit(f"{name}: waits {' '.join(places)}", len(waits), good=late <= 0)


@contextlib.contextmanager
def jpegs(check: Check) -> Iterator[str]:
    """Two classes of blurred noise, about 100 kB an image."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(16 if check.tiny else 512):
            path = Path(folder) / f"{'ab'[number % 2]}/{number}.jpg"
            path.parent.mkdir(exist_ok=True)
            noise = random.integers(0, 256, (375, 500, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((500, 375)).save(path, quality=80)
        yield folder


def loader(check: Check) -> None:
    """Images a second that the worker processes decode and hand over."""
    cores = len(os.sched_getaffinity(0))
    rules = preprocessing_of(check.model("mixer_b16"))
    config = am.recipe("scratch").augment
    with jpegs(check) as folder:
        source = open_source(folder)
        for workers in (1,) if check.tiny else sorted({8, max(1, cores - 4), max(1, cores - 1)}):
            for count in (8,) if check.tiny else (256, 4096):
                steps = range(2 if check.tiny else max(4, 8192 // count))
                order = Order(seed=0, batch_size=count)
                augment = Augmentation(config, rules)
                found = training_batches(source, rules, augment, order, steps, num_workers=workers)
                with contextlib.closing(found):
                    next(found)
                    began, images = time.perf_counter(), 0
                    for batch in found:
                        images += len(batch.labels)
                speed = images / (time.perf_counter() - began)
                name = f"training, {workers} workers, batch {count}"
                check.emit(name, round(speed), "images/s")
            began, images = time.perf_counter(), 0
            for batch in evaluation_batches(source, rules, batch_size=64, num_workers=workers):
                images += len(batch.labels)
            speed = images / (time.perf_counter() - began)
            check.emit(f"evaluation, {workers} workers", round(speed), "images/s")


def predict(check: Check) -> None:
    """`mixer predict` from files to rows, and its classes against the CPU's."""
    model = check.model("mixer_b16").to(check.device)
    model.class_names = [f"class {number}" for number in range(model.config.num_classes)]
    with jpegs(check) as folder:
        source, rows = open_source(folder), {}
        for device in {"cpu", check.device.type}:
            predictor = Predictor(model, device=device, precision="float32", batch_size=64)
            began = time.perf_counter()
            found = predict_rows(predictor, source, choose_columns(model))
            rows[device] = [row.classes[0][0] for batch in found for row in batch]
            speed = len(source) / (time.perf_counter() - began)
            check.emit(f"on {device}, with the start of the workers", round(speed), "images/s")
        pairs = zip(rows["cpu"], rows[check.device.type], strict=True)
        same = np.mean([of_cpu == found for of_cpu, found in pairs])
        check.emit("classes equal to the CPU's", float(same), good=bool(same > 0.99))


def graphs(check: Check) -> None:
    """A small model, whose time is launches: eager, compiled, as a CUDA graph."""
    count = 4 if check.tiny else 1024
    for compiled in (False, True):
        _, step, _ = updater(check, "mixer_s16", count, compile=compiled, num_blocks=8, **CIFAR)
        name = f"CIFAR model, step {'compiled' if compiled else 'eager'}"
        check.emit(name, 1e3 * check.timed(step), "ms")
    model = check.model("mixer_s16").eval().to(check.device)
    image = check.images(model, 1)
    ways: dict[str, Callable[[], object]] = {"eager": lambda: model(image)}
    if check.device.type == "cuda":
        with torch.inference_mode():
            graph = torch.cuda.CUDAGraph()
            for _ in range(3):
                model(image)
            synchronize(check.device)
            with torch.cuda.graph(graph):
                model(image)
        ways["CUDA graph"] = graph.replay
    for name, way in ways.items():
        with torch.inference_mode():
            check.emit(f"S/16, one image, {name}", 1e3 * check.timed(way), "ms")


class _Stop(Logger):
    """Sends SIGTERM to the run after ten steps."""

    def log(self, step: int, values: dict[str, float]) -> None:
        del values
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)


def state(check: Check) -> None:
    """Runs repeat and resume bit for bit; a non-finite batch and too large a one."""
    for name in ("curves", "training_batch", "save", "save_evaluation"):  # most of the time
        setattr(plots, name, lambda *_: [])
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for name, callbacks in (("one", []), ("two", []), ("resumed", [_Stop()])):
            path = Path(folder) / name
            values = {"output": str(path), "device": check.device.type, "epochs": None}
            values |= {"steps": 20, "evaluate_every": 10, "data.num_workers": 0}
            if check.device.type == "cuda":
                values["precision"] = "bfloat16"
            if check.tiny:
                small = {**TINY, "patch_size": 2}
                values |= {"model.overrides": small, "batch_size": 16}
            config = am.recipe("digits").with_values(values)
            try:
                am.train(config, quiet=True, callbacks=callbacks)
            except SystemExit as end:
                check.emit("SIGTERM: exit code", end.code, good=end.code == 143)
                am.resume(path, quiet=True)
            lines = [json.loads(line) for line in (path / "metrics.jsonl").open()]
            runs.append([(line["step"], line["loss"]) for line in lines])
        check.emit("repeated bit for bit", runs[0] == runs[1], good=runs[0] == runs[1])
        check.emit("resumed bit for bit", runs[0] == runs[2], good=runs[0] == runs[2])
    update, step, (images, targets, depth) = updater(check, "mixer_s16", 4, compile=False)
    step()
    before = [parameter.detach().clone() for parameter in update.parameters]
    results = update(501, images * float("nan"), targets, depth, 0) + update.results()
    if update.refused is not None:  # the next step has begun before that is known
        results += update(502, images, targets, depth, 0) + update.results()
    refused = [result.step for result in results if not result.is_finite]
    kept = all(map(torch.equal, before, update.parameters))
    check.emit("a non-finite batch leaves the weights", kept, good=kept and refused == [501])
    if check.device.type == "cuda":
        update, step, (images, targets, depth) = updater(check, "mixer_b16", 256, compile=False)
        torch.cuda.set_per_process_memory_fraction(0.08)
        step()
        size = update.micro_batch_size
        check.emit("micro-batch within 8 % of the memory", size, good=size < 256)


def sharded(check: Check) -> None:
    """FSDP2 and DDP in a group of one: a step, and a checkpoint there and back."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if check.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        model = check.model("mixer_s16").to(check.device)
        blocks: Any = model.blocks
        for block in blocks:
            block.forward = check.compile(block.forward)
        shard(model, 1, "bfloat16")
        with torch.autocast(check.device.type, torch.bfloat16):
            model(check.images(model, 2)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
        checkpoints = Checkpoints(Path(folder) / "checkpoints", world=World())
        checkpoints.save(1, tensors, {})
        before = {name: tensor.full_tensor().clone() for name, tensor in tensors.items()}
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_()
        found = checkpoints.newest()
        assert found is not None
        checkpoints.load(found, tensors)
        checkpoints.close()
        same = all(torch.equal(before[n], tensor.full_tensor()) for n, tensor in tensors.items())
        check.emit("FSDP2: checkpoint there and back", same, good=same)
        network = torch.nn.parallel.DistributedDataParallel(
            check.model("mixer_s16").to(check.device)
        )
        network(check.images(model, 2)).sum().backward()
        check.emit("DDP: a backward pass", True, good=True)
        dist.destroy_process_group()


STAGES: dict[Callable[[Check], None], float] = {  # limit in seconds
    environment: 20,
    correct: 60,
    ceilings: 30,
    inference: 90,
    training: 110,
    loader: 45,
    predict: 30,
    graphs: 30,
    state: 40,
    sharded: 30,
}


def run(stage: Callable[[Check], None], limit: float, tiny: bool, output: Path) -> str | None:
    """Runs a stage in a process of its own, with its CUDA context; returns its failure."""

    def work() -> None:
        os.setsid()
        try:
            stage(Check(stage.__name__, tiny, output))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(limit)
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return f"no result in {limit:.0f} s"
    return f"exit code {process.exitcode}" if process.exitcode else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_check"))
    parser.add_argument("--tiny", action="store_true", help="small, on the CPU")
    parser.add_argument("--only", nargs="+", default=[stage.__name__ for stage in STAGES])
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.jsonl").unlink(missing_ok=True)
    bad = 0
    for stage, limit in STAGES.items():
        if stage.__name__ in options.only:
            began = time.perf_counter()
            failure = run(stage, limit, options.tiny, options.output)
            check = Check(stage.__name__, True, options.output)
            took = round(time.perf_counter() - began, 1)
            check.emit(failure or "took", took, "s", good=False if failure else None)
    for line in map(json.loads, (options.output / "results.jsonl").open()):
        value, mark = line["value"], {True: "ok", False: "WRONG", None: ""}[line["good"]]
        text = f"{value:.4g}" if isinstance(value, float) else f"{value}"
        print(f"{line['stage']:<12} {line['name']:<62} {text:>12} {line['unit']:<10} {mark}")
        bad += line["good"] is False
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
