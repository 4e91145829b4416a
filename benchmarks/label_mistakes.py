"""Flips labels on purpose, and measures how many of them a search for label mistakes ranks first.

python benchmarks/label_mistakes.py runs/digits --data "digits:train[60%:]" digits:test
"""

from __future__ import annotations

import argparse

import numpy as np

import allmlp as am
from allmlp.data.source import join
from allmlp.data.sources import open_source
from allmlp.evaluation.features import frozen_features
from allmlp.evaluation.predictor import Predictor
from allmlp.evaluation.probe import out_of_fold
from allmlp.label_mistakes import confident_learning


def flipped(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Labels of which a fraction, drawn at random, are another class, drawn at random."""
    random, changed = np.random.default_rng(seed), labels.copy()
    chosen = random.permutation(len(labels))[: round(fraction * len(labels))]
    classes = labels.max() + 1
    changed[chosen] = (labels[chosen] + random.integers(1, classes, len(chosen))) % classes
    return changed


def scores_of(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Rules for the ranking; the lower, the more suspicious. Thresholds as in Northcutt et al."""
    rows, classes = np.arange(len(labels)), range(probabilities.shape[1])
    thresholds = np.array([probabilities[labels == k, k].mean() for k in classes])
    adjusted = probabilities - thresholds
    return {
        "p(label)": probabilities[rows, labels],
        "p(label) - max p(other)": margin(probabilities, labels),
        "p(label) - threshold": adjusted[rows, labels],
        "the same of the margin": margin(adjusted, labels),
    }


def margin(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    rows, others = np.arange(len(labels)), values.copy()
    others[rows, labels] = -np.inf
    return values[rows, labels] - others.max(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    source = join([open_source(name) for name in options.data], " + ".join(options.data))
    features = frozen_features(Predictor(am.load_model(options.model), num_workers=0), source)
    truth = source.labels[features.indices]
    most = round(options.fraction * len(truth))
    clean = out_of_fold(features.values, truth, len(source.class_names)).argmax(axis=1) == truth
    print(f"{len(truth):,} images, {most} flipped; unflipped, the probe has {clean.mean():.2%}")
    for seed in options.seeds:
        labels = flipped(truth, options.fraction, seed)
        wrong = labels != truth
        probabilities = out_of_fold(features.values, labels, len(source.class_names))
        print(f"seed {seed}, flipped labels among the first {options.fraction:.0%}:")
        for name, scores in scores_of(probabilities, labels).items():
            first = np.argsort(scores, kind="stable")[:most]
            print(f"  {name:24} {wrong[first].sum() / wrong.sum():.1%}")
        for name, unlikely in (("confident learning", np.inf), ("and below chance / 4", 0.25)):
            suspected = confident_learning(probabilities, labels, unlikely)[1]
            caught = (suspected & wrong).sum()
            line = f"{suspected.sum()}, {caught / wrong.sum():.1%} of the flipped labels"
            print(f"  {name}: {line}; {caught / suspected.sum():.1%} of them are flipped")


if __name__ == "__main__":
    main()
