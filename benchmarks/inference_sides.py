"""One side of benchmarks/inference.py, in the environment of its package.

A job names the folder with the weights (weights.npz by timm's names, ours/ as `am.save_model`
writes it), the images (pixels.npy, uint8), and which side this is. Every side computes the logits
of the same images with the same weights; all but ours get pixels that are scaled already.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
import turns

Run = Callable[[], np.ndarray]  # -> float32 logits (N, K)


def scaled(job: dict[str, Any]) -> np.ndarray:
    pixels = np.load(Path(job["folder"]) / "pixels.npy")
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def onednn_for_float32() -> None:
    """The setting that sends float32 products to oneDNN, refused where they get less exact."""
    import torch

    products: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    products.fp32_precision = "bf16"
    random = torch.Generator().manual_seed(0)
    x, w = (torch.randn(512, 512, generator=random) for _ in range(2))
    exact = x.double() @ w.double().T
    if (x @ w.T - exact).abs().max() > 1e-5 * exact.abs().max():
        raise SystemExit("Error: here the setting makes float32 products less exact")


def ours(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """What `mixer predict` does with a batch that is decoded, up to the logits."""
    import torch

    import allmlp as am
    from allmlp.evaluation.predictor import Predictor

    model = am.load_model(Path(job["folder"]) / "ours", quiet=True)
    pixels = torch.from_numpy(np.load(Path(job["folder"]) / "pixels.npy"))
    # channels last in memory, as the loader's batches are
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    predictor = Predictor(model, precision=job["precision"] or "auto")

    def run() -> np.ndarray:
        return predictor.logits(pixels).numpy()

    return run, {"precision": predictor.precision, **of_torch()}


def of_torch() -> dict[str, Any]:
    import torch

    return {"versions": peers.versions("torch", "timm", "allmlp"), "of": torch.__version__}


def timms_model(job: dict[str, Any]) -> Any:
    """timm's Mixer with the job's weights."""
    import torch

    model = peers.timms_mixer(job)
    arrays = np.load(Path(job["folder"]) / "weights.npz")
    model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return model.eval()


def timm(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import torch

    model, images = timms_model(job), torch.from_numpy(scaled(job))
    how = job["how"]  # of: flag, autocast, weights, compiled
    if "flag" in how:
        onednn_for_float32()
    if "weights" in how:
        model, images = model.bfloat16(), images.bfloat16()
    network: Any = model
    if "compiled" in how:
        import torch._inductor.config

        torch._inductor.config.freezing = True
        network = torch.compile(model, dynamic=False)

    @torch.inference_mode()
    def eager() -> np.ndarray:
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in how):
            return network(images).float().numpy()

    @torch.no_grad()  # freezing does not work in inference mode
    def compiled() -> np.ndarray:
        return network(images).float().numpy()

    precision = "bfloat16" if {"weights", "autocast"} & set(how) else "float32"
    run = compiled if "compiled" in how else eager
    return run, {"precision": precision, **of_torch()}


def export_onnx(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """Writes timm's model as an ONNX file, the way that torch's users do, and computes nothing."""
    import torch

    model, images = timms_model(job), torch.from_numpy(scaled(job))
    path = str(Path(job["folder"]) / "model.onnx")
    torch.onnx.export(model, (images,), path, dynamo=True, input_names=["x"], verbose=False)
    return lambda: np.zeros(0, np.float32), {"precision": "float32", **of_torch()}


def onnxruntime(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job["threads"], 1
    # Threads that spin between the turns would take time from the other sides.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(
        str(Path(job["folder"]) / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    images = scaled(job)
    told = {"precision": "float32", "versions": peers.versions("onnxruntime", "numpy")}
    return lambda: session.run(None, {"x": images})[0], told


def openvino(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import openvino as ov

    core = ov.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": job["threads"],
        "INFERENCE_PRECISION_HINT": "bf16" if job["precision"] == "bfloat16" else "f32",
    }
    model = core.compile_model(str(Path(job["folder"]) / "model.onnx"), "CPU", settings)
    images = scaled(job)
    told = {"precision": job["precision"], "versions": peers.versions("openvino", "numpy")}
    return lambda: model([images])[0].astype(np.float32, copy=False), told


def flax(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import flax_mixer
    import jax

    images = jax.numpy.asarray(scaled(job).transpose(0, 2, 3, 1))  # (N, H, W, channels)
    arrays = np.load(Path(job["folder"]) / "weights.npz")
    network = flax_mixer.Mixer(
        patch=job["patch_size"],
        dim=job["hidden_dim"],
        blocks=job["num_blocks"],
        tokens_dim=job["tokens_mlp_dim"],
        channels_dim=job["channels_mlp_dim"],
        classes=job["num_classes"],
    )
    weights = jax.device_put(flax_mixer.from_timm(arrays, job["num_blocks"]))
    compute = jax.jit(network.apply)
    told = {"precision": "float32", "versions": peers.versions("flax", "jax", "jaxlib")}
    return lambda: np.asarray(compute(weights, images)), told


# (rows, inputs, outputs): the channel mixing of B/16 with 8 images, and a square one.
SHAPES = ((1568, 768, 3072), (1568, 3072, 768), (2048, 2048, 2048))


def limit(job: dict[str, Any]) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    """The machine's best matrix products, in GFLOP/s, of each way that torch has."""
    import torch
    import torch.nn.functional as F

    random = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(m, k, generator=random), torch.randn(n, k, generator=random))
        for m, k, n in SHAPES
    ]
    products: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]

    def best(of: list[tuple[Callable[[], Any], int]]) -> float:
        rates = []
        for product, operations in of:
            product()
            for _ in range(2):
                began = time.perf_counter()
                product()
                rates.append(operations / (time.perf_counter() - began) / 1e9)
        return max(rates)

    def linear(dtype: torch.dtype) -> list[tuple[Callable[[], Any], int]]:
        cast = [(x.to(dtype), w.to(dtype)) for x, w in pairs]
        return [(functools.partial(F.linear, x, w), 2 * x.numel() * len(w)) for x, w in cast]

    def packed(dtype: torch.dtype) -> list[tuple[Callable[[], Any], int]]:
        found, own = [], torch.ops.mkldnn
        for x, w in pairs:
            x, packed_w = x.to(dtype), own._reorder_linear_weight(w.to(dtype), len(x))
            multiply = functools.partial(own._linear_pointwise, x, packed_w, None, "none", [], "")
            found.append((multiply, 2 * x.numel() * len(w)))
        return found

    @torch.no_grad()
    def run() -> dict[str, Any]:
        found = {}
        for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
            products.fp32_precision = "none"
            found[f"{name} F.linear"] = best(linear(dtype))
            if dtype == torch.float32:
                products.fp32_precision = "bf16"
                found[f"{name} F.linear, oneDNN"] = best(linear(dtype))
            try:
                found[f"{name} packed weights, oneDNN"] = best(packed(dtype))
            except (RuntimeError, AttributeError):  # no public operators: not in every torch
                continue
        return {"gflops": found}

    return run, of_torch()


SIDES = {
    "ours": ours,
    "timm": timm,
    "export": export_onnx,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "flax": flax,
}


def prepare(job: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    if job["side"] == "limit":
        return limit(job)
    run, told = SIDES[job["side"]](job)
    if job["side"] == "export":
        return lambda: None, told
    expected = np.load(Path(job["folder"]) / "expected.npy")
    began = time.perf_counter()
    logits = run()
    first = time.perf_counter() - began
    assert logits.shape == expected.shape, (logits.shape, expected.shape)
    error = float(np.abs(logits - expected).max() / np.abs(expected).max())

    def timed() -> None:
        run()

    return timed, {**told, "error": error, "first": first}


if __name__ == "__main__":
    turns.serve(prepare)
