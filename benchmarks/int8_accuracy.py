"""What int8 costs a Mixer that was really trained: accuracy of the model and of its files.

    python benchmarks/int8_accuracy.py --data '../shared/data/flowers102_34c_*.parquet' \
        --model mixer_s32 --image-size 224 --epochs 60 --output flowers_int8

A Mixer is trained on the training images from random weights (a run that is there already goes on
or is taken as it is), exported in float32 and in int8 for both runtimes, and every file is run by
its own runtime on all images that were held out of training: those of the validation and the test
split together, and those of test alone. int8 is calibrated on training images; whether layers stay
in float32 is decided by the validation images, so the test images decide nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import allmlp as am
from allmlp.data.source import Source, join
from allmlp.data.sources import open_splits
from allmlp.environment import packages, processor

RUNS = ("torch", "onnxruntime", "openvino")  # what computes
FILES = {
    "ONNX Runtime float32": ("float32.onnx", "float32"),
    "ONNX Runtime int8": ("int8.onnx", "int8"),
    "OpenVINO float32": ("float32.xml", "float32"),
    "OpenVINO int8": ("int8.xml", "int8"),
}


def trained(options: argparse.Namespace) -> Path:
    """Returns the run folder, trained to its end."""
    folder = Path(options.output) / "run"
    if (folder / "checkpoints").exists():
        return Path(am.resume(folder).run_folder)
    config = am.recipe("scratch").with_values(
        {
            "data.source": options.data,
            "model.name": options.model,
            "model.image_size": options.image_size,
            "epochs": options.epochs,
            "output": str(folder),
            "device": "cpu",
        },
        options.set,
    )
    return Path(am.train(config).run_folder)


def correct(result: am.Evaluation) -> int:
    return int((result.predictions == result.labels).sum())


def standard_error(exact: am.Evaluation, found: am.Evaluation) -> float:
    """Of the drop in points: both saw the same images, so it is that of the differences."""
    right = [(each.predictions == each.labels).astype(float) for each in (exact, found)]
    return 100.0 * float(np.std(right[0] - right[1], ddof=1)) / len(right[0]) ** 0.5


def print_rows(source: Source, results: dict[str, am.Evaluation], notes: dict[str, str]) -> None:
    print(f"\n{source.name}: {len(source):,} images\n")
    print("| | top-1 | right | drop, points | same class | largest error of a logit | | MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |")
    exact = next(iter(results.values()))
    for name, found in results.items():
        note, _, size = notes.get(name, "").partition("|")
        same = float((found.predictions == exact.predictions).mean())
        error = np.abs(found.logits - exact.logits).max() / np.abs(exact.logits).max()
        drop = f"{100.0 * (exact.top1 - found.top1) + 0.0:+.2f}"
        others = f" ± {standard_error(exact, found):.2f} | {same:.2%} | {error:.1e}"
        cells = f"{drop}{others}" if found is not exact else " | |"
        print(
            f"| {name} | {found.top1:.2%} | {correct(found):,} | {cells} | {note} | {size} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="with train, validation and test")
    parser.add_argument("--model", default="mixer_s32")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--max-accuracy-drop", type=float, default=0.5, help="points")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="training")
    parser.add_argument("--output", required=True, help="a folder for the run and the files")
    options = parser.parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    run = trained(options)
    splits = open_splits(options.data)
    held_out = [splits["validation"], splits["test"]]
    sources = [join(held_out, "validation and test"), splits["test"]]
    model = am.load_model(run)
    files: dict[str, am.ImageClassifier] = {"original, torch float32": model}
    notes: dict[str, str] = {}
    for name, (file, precision) in FILES.items():
        report = am.export(
            model,
            folder / file,
            precision=precision,
            calibration=splits["train"] if precision == "int8" else None,
            data=splits["validation"],
            max_accuracy_drop=options.max_accuracy_drop,
            overwrite=True,
        )
        if not report.passed:
            print(f"{name}: {'; '.join(report.failures)}")
            continue
        files[name] = am.open_exported(folder / file)
        kept = "" if precision != "int8" else f"{len(report.kept)} of {report.num_layers} layers"
        size = sum(report.files.values()) / 2**20
        notes[name] = f"{kept + ' in float32' if kept else ''}|{size:.1f}"
    print(f"{model.config.summary()}, trained on {len(splits['train']):,} images of {options.data}")
    versions = ", ".join(f"{name} {text}" for name, text in packages().items() if name in RUNS)
    print(f"{processor()}, {versions}")
    for source in sources:
        results = {
            name: am.evaluate(each, source, allow_missing_classes=True)
            for name, each in files.items()
        }
        print_rows(source, results, notes)


if __name__ == "__main__":
    main()
