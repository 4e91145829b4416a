"""Images a second of a Mixer on a processor: ours beside timm, Flax, ONNX Runtime and OpenVINO.

    python benchmarks/inference.py --output inference.json
    python benchmarks/inference.py --cases mixer_b16:8 --sides 'ours*' 'timm, as it comes' limit

Each side is a process in an environment of its own, which is made on the first call (benchmarks/
peers.py); the sides take turns, and the medians over the rounds count. All compute the logits of
the same images with the same weights, made here: kernels with a variance of 1 / inputs, small
biases, exact GELU as timm has it. Logits that are not those of our float32 model, to rounding of
the precision, are refused. The share of the limit is against the fastest matrix product of that
precision that torch reached in the same turns.

timm is measured as it comes and with the settings that its users can choose by hand; "flag" is
`torch.backends.mkldnn.matmul.fp32_precision = "bf16"`, which sends float32 products to another
library, still in float32. The ONNX file is torch's own export of timm's model. Ours also scales
the 8-bit pixels; the other sides get numbers that are scaled already.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import figures
import numpy as np
import peers
import torch
import turns

import allmlp as am
from allmlp.models.mixer import FAMILY

BASE = "timm, as it comes"
CASES = ("mixer_b16:1", "mixer_b16:8", "mixer_b16:32", "mixer_s16:8", "mixer_l16:8")
# The side -> its environment and what it is told.
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "ours, as `mixer predict` comes": ("ours", {"side": "ours", "precision": None}),
    "ours, float32": ("ours", {"side": "ours", "precision": "float32"}),
    "ours, bfloat16": ("ours", {"side": "ours", "precision": "bfloat16"}),
    BASE: ("timm", {"side": "timm", "how": []}),
    "timm, flag": ("timm", {"side": "timm", "how": ["flag"]}),
    "timm, flag, compiled, frozen": ("timm", {"side": "timm", "how": ["flag", "compiled"]}),
    "timm, bfloat16 autocast": ("timm", {"side": "timm", "how": ["autocast"]}),
    "timm, bfloat16 weights": ("timm", {"side": "timm", "how": ["weights"]}),
    "timm, bfloat16 weights, compiled, frozen": (
        "timm",
        {"side": "timm", "how": ["weights", "compiled"]},
    ),
    "Flax / XLA": ("flax", {"side": "flax"}),
    "ONNX Runtime": ("onnxruntime", {"side": "onnxruntime"}),
    "OpenVINO, float32": ("openvino", {"side": "openvino", "precision": "float32"}),
    "OpenVINO, bfloat16": ("openvino", {"side": "openvino", "precision": "bfloat16"}),
    "limit": ("ours", {"side": "limit", "warm_up": 1}),
}
LARGEST_ERROR = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest logit
COLUMNS = {
    "side": "left",
    "precision": "left",
    "images/s": "right",
    "least to most": "right",
    "x timm": "right",
    "of the limit": "right",
    "error": "right",
    "first call, s": "right",
    "MB": "right",
}


def build(name: str, num_blocks: int | None, size: int) -> am.ImageClassifier:
    overrides = {} if num_blocks is None else {"num_blocks": num_blocks}
    model = am.create_model(name, size, 1000, gelu="exact", **overrides).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in model.parameters():
            if each.dim() > 1:
                each.normal_(0, each[0].numel() ** -0.5, generator=random)
            else:
                each.add_(0.1 * torch.randn(each.shape, generator=random))
    model.class_names = [f"class {index}" for index in range(1000)]
    return model


@torch.inference_mode()
def write_inputs(model: am.ImageClassifier, batch: int, folder: Path) -> None:
    """Writes the weights, the images and the logits that are expected."""
    size = model.config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, *size), dtype=np.uint8)
    np.save(folder / "pixels.npy", pixels)
    images = torch.from_numpy(pixels).float() / 127.5 - 1
    np.save(folder / "expected.npy", torch.cat([model(each[None]) for each in images]).numpy())
    named = FAMILY.names[0].from_ours(dict(model.state_dict()))
    arrays: dict[str, Any] = {name: each.numpy() for name, each in named.items()}
    np.savez(folder / "weights.npz", **arrays)
    am.save_model(model, folder / "ours")


def one_case(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one model at one batch size; returns its figures."""
    name, _, number = case.partition(":")
    batch = int(number or 8)
    model = build(name, options.num_blocks, options.image_size)
    shape = dataclasses.asdict(model.config)
    job: dict[str, Any] = {key: value for key, value in shape.items() if isinstance(value, int)}
    job |= {"image_size": options.image_size}
    flops = model.config.flops
    print(f"\n{name}, {options.image_size} px, batches of {batch}, {model.config.summary()}")
    chosen = {
        side: SIDES[side]
        for side in SIDES
        if any(fnmatchcase(side, pattern) for pattern in options.sides)
    }
    script = Path(__file__).with_name("inference_sides.py")
    left_out: dict[str, str] = {}
    with (
        tempfile.TemporaryDirectory() as temporary,
        turns.started(script, options.environments, options.threads) as start,
    ):
        job["folder"] = temporary
        write_inputs(model, batch, Path(temporary))
        del model
        sides = []
        for side, (environment, told) in chosen.items():
            try:
                needs_graph = told["side"] in ("onnxruntime", "openvino")
                if needs_graph and not (Path(temporary) / "model.onnx").exists():
                    start("export", "timm", {**job, "side": "export"}).stop()
                found = start(side, environment, {**job, **told})
                check(found)
                sides.append(found)
            except peers.PeerError as error:
                left_out[side] = str(error)
                print(f"left out  {side}: {error}", flush=True)
        answers = turns.take_turns(sides, options.rounds, options.seconds)
        rows = [figures_of(each, answers, batch) for each in sides if each.failed is None]
    left_out |= {each.name: each.failed for each in sides if each.failed is not None}
    limits = best_products(answers)
    for row in rows:
        if limits:
            gflops = row["images_per_second"]["median"] * flops / 1e9
            row["of_limit"] = gflops / limits[row["precision"]]
    kept = [row for row in rows if row["side"] != "limit"]
    return {
        "model": name,
        "image_size": options.image_size,
        "batch_size": batch,
        "flops": flops,
        "blocks": job["num_blocks"],
        "limit_gflops": limits,
        "products_gflops": {} if "limit" not in answers else products(answers["limit"]),
        "rounds": options.rounds,
        "sides": kept,
        "left_out": left_out,
    }


def check(side: turns.Side) -> None:
    """Refuses a side that computes something else.

    Raises:
        PeerError: its logits are not ours.
    """
    error = side.ready.get("error")
    if error is not None and not error <= LARGEST_ERROR[side.ready["precision"]]:
        side.failed = f"wrong logits: they differ by {error:.1e} of the largest"
        side.stop()
        raise peers.PeerError(side.failed)
    print(f"ready     {side.name}: {side.ready['prepared']:.0f} s", flush=True)


def figures_of(side: turns.Side, answers: dict[str, Any], batch: int) -> dict[str, Any]:
    rates = [batch / each["seconds"] for each in answers[side.name]]
    ready = side.ready
    row = {
        "side": side.name,
        "precision": ready.get("precision", "float32"),
        "images_per_second": figures.spread(rates),
        "rounds": rates,
        "error": ready.get("error"),
        "seconds_first_call": ready.get("first"),
        "megabytes": side.memory(),
        "idle_share_of_a_core": side.idle / side.waited if side.waited else 0.0,
        "versions": ready.get("versions", {}),
    }
    if BASE in answers:
        base = [batch / each["seconds"] for each in answers[BASE]]
        row["ratio"] = figures.ratios(rates, base)
    return row


def products(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the best rate of each kind of product, over all rounds."""
    return {kind: max(turn["gflops"][kind] for turn in answers) for kind in answers[0]["gflops"]}


def best_products(answers: dict[str, Any]) -> dict[str, float]:
    """Returns the machine's limit of each precision, in GFLOP/s; {} where it was left out."""
    if "limit" not in answers:
        return {}
    found = products(answers["limit"])
    return {
        precision: max(rate for kind, rate in found.items() if kind.startswith(precision))
        for precision in ("float32", "bfloat16")
    }


def show(found: dict[str, Any]) -> None:
    rows = []
    for each in found["sides"]:
        rate, ratio = each["images_per_second"], each.get("ratio")
        rows.append(
            {
                "side": each["side"],
                "precision": each["precision"],
                "images/s": f"{rate['median']:.2f}",
                "least to most": f"{rate['least']:.2f} to {rate['most']:.2f}",
                "x timm": f"{ratio['median']:.2f}" if ratio else "",
                "of the limit": f"{each['of_limit']:.0%}" if "of_limit" in each else "",
                "error": f"{each['error']:.0e}",
                "first call, s": f"{each['seconds_first_call']:.1f}",
                "MB": f"{each['megabytes']:,.0f}",
            }
        )
    print("\n" + figures.table(COLUMNS, rows))
    told = [f"{kind} {rate:.0f}" for kind, rate in found["products_gflops"].items()]
    if told:
        print(f"\nProducts of torch, GFLOP/s, best of the rounds: {'; '.join(told)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=CASES, help="MODEL:BATCH")
    parser.add_argument("--sides", nargs="+", default=["*"], help="names or patterns of sides")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-blocks", type=int, help="fewer than the model's own, to try it out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=1.0, help="that a turn takes at least")
    parser.add_argument("--environments", type=Path, default=peers.DEFAULT_FOLDER)
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    print(figures.machine(options.threads))
    cases = []
    for case in options.cases:
        cases.append(one_case(case, options))
        show(cases[-1])
        found = {"threads": options.threads, "cases": cases}
        figures.write(options.output, "inference speed", found)  # whole, after every case
    missing = [side for case in cases for side in case["left_out"] if side.startswith("ours")]
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
