"""Mixers on time series of the UCR and UEA archives that come with the package aeon.

    pip download --no-deps aeon==1.6.0 && unzip -q aeon-*.whl 'aeon/datasets/*' -d PACKAGES
    python benchmarks/sequences.py PACKAGES/aeon/datasets/data --output runs/sequences

The archives' own split, the recipe `arrays` with all training rows (no holdout), five seeds; beside
scikit-learn and 1-NN with dynamic time warping on the same rows. Prints a line per data set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import allmlp as am

SETS = (
    *("ItalyPowerDemand", "GunPoint", "BasicMotions", "ArrowHead"),
    *("JapaneseVowels_eq", "OSULeaf", "ACSF1"),
)


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows, (N, C, T), and the labels of a .ts file."""
    lines = path.read_text().split("@data")[1].split("\n")
    rows = [line.strip().split(":") for line in lines if line.strip()]
    x = np.array([[np.array(part.split(","), float) for part in row[:-1]] for row in rows])
    return x, np.array([row[-1] for row in rows])


def mixer(data: Path, output: Path, seed: int, settings: list[str]) -> float:
    changes = {"data.source": str(data), "output": str(output), "seed": seed, "data.holdout": 0.0}
    result = am.train(am.recipe("arrays").with_values(changes, settings), quiet=True)
    assert result.test is not None
    return result.test.top1


def dynamic_time_warping(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the squared distance of all pairs, without a window, all channels warped alike."""
    length = rows.shape[2]
    before = np.full((length + 1, len(rows), len(others)), np.inf)
    before[0] = 0.0
    for i in range(length):
        after = np.full_like(before, np.inf)
        for j in range(length):
            cost = ((rows[:, None, :, i] - others[None, :, :, j]) ** 2).sum(axis=2)
            best = np.minimum(np.minimum(before[j], before[j + 1]), after[j])
            after[j + 1] = cost + best
        before = after
    return before[length]


def baselines(data: Path) -> dict[str, list[float]]:
    file = np.load(data)
    x, y, test, true = (file[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    flat, flat_test = x.reshape(len(x), -1), test.reshape(len(test), -1)
    found = {
        "1-NN": [KNeighborsClassifier(1)],
        "logistic regression": [make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))],
        "random forest": [RandomForestClassifier(500, random_state=seed) for seed in range(5)],
    }
    scores = {
        name: [float(model.fit(flat, y).score(flat_test, true)) for model in models]
        for name, models in found.items()
    }
    if x.shape[2] <= 500:  # the loops are of Python
        nearest = dynamic_time_warping(test, x).argmin(axis=1)
        scores["1-NN-DTW"] = [float((y[nearest] == true).mean())]
    return scores


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/sequences"))
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.sets:
        file = options.output / f"{name}.npz"
        arrays: dict[str, np.ndarray] = {}
        for part in ("train", "test"):
            ts = options.folder / name.removesuffix("_eq") / f"{name}_{part.upper()}.ts"
            arrays[f"x_{part}"], arrays[f"y_{part}"] = read(ts)
        np.savez(file, **arrays)
        runs = {seed: options.output / f"{name}-{seed}" for seed in range(options.seeds)}
        scores = {"Mixer": [mixer(file, run, seed, options.settings) for seed, run in runs.items()]}
        scores |= baselines(file)
        shown = (
            f"{key} {np.mean(values):.1%}"
            + (f" +- {np.std(values, ddof=1):.1%}" if len(values) > 1 else "")
            for key, values in scores.items()
        )
        print(f"{name} {arrays['x_train'].shape}: {'; '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
