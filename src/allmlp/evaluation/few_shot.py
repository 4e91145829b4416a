"""Few-shot accuracy: L2-regularised linear regression on frozen features, a few images per class.

Two of Google's protocols:
    big_vision  a few random training images of every class, for each of three seeds; l2 is 1024
    scenic      the older one: the first training images of every class; l2 is swept, and the best
                on the test images is reported: one for all data sets, per number of shots
Source: big_vision evaluators/fewshot_lsr.py; scenic train_lib/transfer/fewshot_utils.py; the
paper's section 3 ("linear 5-shot").

Shapes: N shots of all classes together, C features, K classes, M test images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.console import Reporter, report_bad_images, table_of
from allmlp.data.classes import match_classes
from allmlp.data.source import BadImage, Source, check_one_label, subset
from allmlp.data.sources import open_splits, read_from
from allmlp.errors import UserError, plural
from allmlp.evaluation.features import cache_path, frozen_features, opened_model, with_cache
from allmlp.evaluation.options import FewShotOptions
from allmlp.evaluation.predictor import Outputs, Predictor, predictor_for
from allmlp.evaluation.result_file import check_result_path, measurement, save_result
from allmlp.io import STANDARD_OUTPUT, check_not_inputs, expand
from allmlp.models.catalog import random_weights
from allmlp.models.layers import ImageClassifier
from allmlp.options import make
from allmlp.preprocessing import Preprocessing
from allmlp.weights.load import files_of

SWEEP = tuple(2.0**power for power in range(-10, 20))
BASELINE_SEED = 0
_BIAS_FEATURE = 100.0
_BLOCK = 8192  # images scored at once
OnBatch = Callable[[Outputs], None] | None


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """Few-shot accuracies of a model on one data set.

    Attributes:
        data: name of the data.
        test_split: "test" or "validation".
        num_classes: K.
        num_train: size of the training set that the shots were drawn from.
        num_test: M, decodable test images; all of them count.
        num_computed: images that the model ran on; features of all others were cached.
        protocol: "big_vision" or "scenic".
        preprocessing: of all images.
        precision: of the model's matmuls.
        seeds: of the draws; () for scenic, which draws nothing.
        accuracies: {images per class: {seed: accuracy}}; scenic's only accuracy is under 0.
        l2: {shots: the l2 of the reported accuracies}.
        sweep: of scenic, {shots: {l2: accuracy}}.
        bad: images that could not be decoded.
        notes: lines for the user, e.g. classes with fewer images than shots.
        baseline: the same architecture with random weights, if requested.
    """

    data: str
    test_split: str
    num_classes: int
    num_train: int
    num_test: int
    num_computed: int
    protocol: str
    preprocessing: Preprocessing
    precision: str
    seeds: tuple[int, ...]
    accuracies: dict[int, dict[int, float]]
    l2: dict[int, float]
    sweep: dict[int, dict[float, float]] = field(default_factory=dict)
    bad: list[BadImage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    baseline: FewShot | None = None

    @property
    def chance(self) -> float:
        """Accuracy of random guessing: 1 / K."""
        return 1.0 / self.num_classes

    def mean(self, shots: int) -> float:
        """Returns the mean accuracy over the seeds."""
        return float(np.mean(list(self.accuracies[shots].values())))

    def deviation(self, shots: int) -> float | None:
        """Returns the sample standard deviation over the seeds; None for a single accuracy."""
        values = list(self.accuracies[shots].values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Returns all numbers as JSON values."""
        return {
            "data": self.data,
            "test_split": self.test_split,
            "classes": self.num_classes,
            "train_images": self.num_train,
            "test_images": self.num_test,
            "chance": self.chance,
            "protocol": self.protocol,
            "preprocessing": self.preprocessing.to_json(),
            "precision": self.precision,
            "shots": list(self.accuracies),
            "seeds": list(self.seeds),
            "accuracies": self.accuracies,
            "mean": {shots: self.mean(shots) for shots in self.accuracies},
            "deviation": {shots: self.deviation(shots) for shots in self.accuracies},
            "l2": self.l2,
            "sweep": {
                shots: {f"{l2:g}": accuracy for l2, accuracy in swept.items()}
                for shots, swept in self.sweep.items()
            },
            "bad_images": [{"image": image.name, "error": image.what} for image in self.bad],
            "notes": self.notes,
        }


def few_shot(
    model: ImageClassifier | str | Path,
    data: str | Path | Mapping[str, Source],
    *,
    on_batch: OnBatch = None,
    **fields: Any,
) -> FewShot:
    """Returns the few-shot accuracy of a linear classifier on a model's features.

    The model is not trained and needs no head. Only the training images that are drawn are decoded;
    an undecodable one is replaced by the next of its class.

    Args:
        model: any with `features`, or anything that `load_model` takes. A model object stays on its
            device unless one is given.
        data: a source with a train and a test (or else validation) split, or these splits by name.
        on_batch: called with every batch that the model ran on.
        **fields: those of `FewShotOptions`.

    Raises:
        UserError: an option is out of range, the data lacks a split or has a single class, or the
            features are not finite.
    """
    splits, name = data, "splits"
    if not isinstance(splits, Mapping):
        splits, name = open_splits(str(data)), str(data)
    elif "train" in splits:
        name = splits["train"].name.removesuffix(":train")
    options = make(FewShotOptions, None, {**fields, "data": (name,)})
    return _measure(*opened_model(model, options), {name: splits}, options, on_batch)[0]


def few_shots(
    model: ImageClassifier | str | Path,
    options: FewShotOptions | None = None,
    *,
    report: Reporter | None = None,
    **fields: Any,
) -> list[FewShot]:
    """Returns the few-shot accuracies on several data sets; in scenic they share one l2.

    Args:
        model: as in `few_shot`.
        options: instead of `fields`.
        report: shows progress; None shows nothing.
        **fields: those of `FewShotOptions`.

    Raises:
        UserError: as in `few_shot`; or the output cannot be written.
    """
    options = make(FewShotOptions, options, fields)
    report = report or Reporter(quiet=True)
    cache = cache_path(options)
    target = check_result_path(options.output, overwrite=options.overwrite)
    splits = {name: open_splits(name) for name in options.data}
    inputs = [path for name in options.data for path in read_from(name)]
    inputs += [] if isinstance(model, ImageClassifier) else files_of(str(model))
    check_not_inputs([path for path in (target, cache) if path is not None], inputs)
    total = sum(num_images(opened, options) for opened in splits.values())
    with report.progress(total * (1 + options.random_baseline), "images") as bar:
        net, device = opened_model(model, options)
        results = _measure(net, device, splits, options, lambda batch: bar.advance(len(batch)))
    if options.output is not None:
        baselines = [found.baseline.to_json() for found in results if found.baseline]
        twin = {"weights": "random", "seed": BASELINE_SEED, "results": baselines}
        numbers = {"results": [found.to_json() for found in results]}
        numbers |= {"random_baseline": twin if baselines else None}
        save_result(target, measurement("few-shot", net, numbers))
    return results


def _measure(
    net: ImageClassifier,
    device: str | None,
    data: Mapping[str, Mapping[str, Source]],
    options: FewShotOptions,
    on_batch: OnBatch,
) -> list[FewShot]:
    predictor = predictor_for(options, net, device, resize=options.resize)
    results = [_of_one(predictor, name, data[name], options, on_batch) for name in data]
    results = choose_l2(results) if options.protocol == "scenic" else results
    if not options.random_baseline:
        return results
    options, twin = replace(options, random_baseline=False), random_weights(net, BASELINE_SEED)
    twins = _measure(twin, device, data, options, on_batch)
    return [replace(own, baseline=other) for own, other in zip(results, twins, strict=True)]


def _of_one(
    predictor: Predictor,
    name: str,
    splits: Mapping[str, Source],
    options: FewShotOptions,
    on_batch: OnBatch,
) -> FewShot:
    train, test, test_split = _train_and_test(splits)
    labels, cache, draws = train.labels, cache_path(options), _draws(train, options)
    shown: dict[int, np.ndarray] = {}  # features of the training images drawn so far
    bad: dict[int, BadImage] = {}
    computed, notes = 0, []
    # Replace bad images by the next of their class until all shots are decodable.
    while wanted := sorted(set(_drawn(draws, max(options.shots), bad)) - shown.keys()):
        part = subset(train, np.array(wanted), train.name)
        found = frozen_features(predictor, part, cache, on_batch)
        shown |= {wanted[at]: row for at, row in zip(found.indices, found.values, strict=True)}
        for image in found.bad:
            bad[wanted[image.index]] = replace(image, index=wanted[image.index])
        computed += 0 if found.from_cache else len(found.values)
        notes += found.notes
    if len(np.unique(labels[list(shown)])) < 2:
        raise UserError("fewer than two classes have images that can be decoded", where=train.name)
    seen = frozen_features(predictor, test, cache, on_batch)
    if not len(seen.indices):
        raise UserError("none of the test images can be decoded", where=test.name)
    truth, is_scenic = test.labels[seen.indices], options.protocol == "scenic"
    counts = np.bincount(np.delete(labels, list(bad)), minlength=len(train.class_names))
    accuracies: dict[int, dict[int, float]] = {shots: {} for shots in options.shots}
    sweep, fewer = {}, []
    for shots in options.shots:
        for seed, draw in draws.items():
            chosen = _drawn({seed: draw}, shots, bad)
            values = np.stack([shown[index] for index in chosen])
            l2s = SWEEP if is_scenic else (options.l2,)
            probes = fit_sweep(values, labels[chosen], len(counts), l2s)
            swept = {
                l2: float((probe.predict(seen.values) == truth).mean())
                for l2, probe in zip(l2s, probes, strict=True)
            }
            accuracies[shots][seed] = swept[l2s[0]]
            if is_scenic:
                sweep[shots] = swept
        if few := (counts < shots).sum():
            least = f"{train.class_names[counts.argmin()]!r} has {counts.min():,}"
            what = f"{few:,} of {len(counts):,} classes have fewer training images ({least})"
            fewer.append(f"{shots} shots: {what}; all of them are taken")
    return FewShot(
        data=name,
        test_split=test_split,
        num_classes=len(counts),
        num_train=len(train),
        num_test=len(truth),
        num_computed=computed + (0 if seen.from_cache else len(truth)),
        protocol=options.protocol,
        preprocessing=predictor.preprocessing,
        precision=predictor.precision,
        seeds=() if is_scenic else options.seeds,
        accuracies=accuracies,
        l2=dict.fromkeys(options.shots, options.l2),
        sweep=sweep,
        bad=[*(bad[index] for index in sorted(bad)), *seen.bad],
        notes=[*fewer, *notes, *seen.notes],
    )


def choose_l2(results: Sequence[FewShot]) -> list[FewShot]:
    """Returns scenic's results at the l2 of the highest mean rank; ties go to the larger."""
    chosen: dict[int, float] = {}
    for shots, swept in results[0].sweep.items():
        values = [[result.sweep[shots][l2] for l2 in swept] for result in results]
        ranks = np.argsort(np.argsort(values, kind="stable")).mean(axis=0)
        chosen[shots] = max(zip(ranks, swept, strict=True))[1]
    best = [{shots: {0: r.sweep[shots][chosen[shots]]} for shots in chosen} for r in results]
    return [replace(r, l2=chosen, accuracies=own) for r, own in zip(results, best, strict=True)]


def num_images(splits: Mapping[str, Source], options: FewShotOptions) -> int:
    """Returns how many images need features, if all can be decoded."""
    train, test, _ = _train_and_test(splits)
    return len(_drawn(_draws(train, options), max(options.shots), ())) + len(test)


def _train_and_test(splits: Mapping[str, Source]) -> tuple[Source, Source, str]:
    """Returns the training images, the test images, and the name of the test split."""
    test_split = next((name for name in ("test", "validation") if name in splits), None)
    if "train" not in splits or test_split is None:
        what = "few-shot learns from the train split and is measured on test or validation: the "
        what += f"data has {' and '.join(splits)} only"
        fix = "Name data that has both, without a split behind it, or put images into test/"
        where = " ".join(source.name for source in splits.values())
        raise UserError(what, where=where, fix=fix, code="no-split")
    train, test = splits["train"], splits[test_split]
    check_one_label((train, test), "few-shot classification")
    present = [train.class_names[at] for at in np.unique(train.labels)]
    if len(present) < 2:
        what = f"few-shot needs two classes or more to learn from, got {present}"
        raise UserError(what, where=train.name, code="too-few")
    matched = match_classes(test, train.class_names, owner="train/", allow_missing=True)
    return train, matched, test_split


def _draws(train: Source, options: FewShotOptions) -> dict[int, list[list[int]]]:
    """Returns, per seed (scenic's is 0), the training images of each class in drawing order."""
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    classes = np.split(np.argsort(train.labels, kind="stable"), np.cumsum(counts)[:-1])
    if options.protocol == "scenic":
        return {0: [images.tolist() for images in classes]}
    draws = {}
    for seed in options.seeds:
        random = np.random.default_rng(seed)
        draws[seed] = [random.permutation(images).tolist() for images in classes]
    return draws


def _drawn(draws: dict[int, list[list[int]]], most: int, bad: Collection[int]) -> list[int]:
    """Returns the first `most` images of each class that are not bad, over all draws."""
    orders = (order for classes in draws.values() for order in classes)
    chosen = (islice((at for at in order if at not in bad), most) for order in orders)
    return list(dict.fromkeys(chain.from_iterable(chosen)))


# --- the linear classifier ---


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of features, by L2-regularised regression in float64.

    X   the features minus their mean over the shots, divided by their std + 1e-5, and a constant
        feature of 100, so large that the bias is hardly regularised
    Y   +1 at the class of a shot, -1 at the others
    W   (X'X + l2)^-1 X'Y, which is X'(XX' + l2)^-1 Y: solved in the smaller of the dimensions
    """

    mean: np.ndarray  # float64 (C,), over the shots
    std: np.ndarray  # float64 (C,), including the 1e-5
    weights: np.ndarray  # float64 (C + 1, K); the last row is for the constant feature

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Returns float64 (M, K), higher for more likely classes; features are (M, C)."""
        return _standardized(features, self.mean, self.std) @ self.weights

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns the best classes, int64 (M,), for features (M, C), with M above 0."""
        blocks = range(0, len(features), _BLOCK)
        parts = [self.scores(features[at : at + _BLOCK]).argmax(axis=1) for at in blocks]
        return np.concatenate(parts)


def fit_sweep(
    features: np.ndarray, labels: np.ndarray, num_classes: int, l2s: Sequence[float]
) -> Iterator[LinearProbe]:
    """Yields a classifier for each l2, from a single eigendecomposition of the shots: features
    (N, C), labels (N,) from 0 to K - 1."""
    exact = features.astype(np.float64)
    mean, std = exact.mean(axis=0), exact.std(axis=0) + 1e-5
    x = _standardized(exact, mean, std)  # (N, C + 1)
    y = np.full((len(x), num_classes), -1.0)
    y[np.arange(len(x)), labels] = 1.0
    if x.shape[0] >= x.shape[1]:
        eigenvalues, vectors = np.linalg.eigh(x.T @ x)
        left, right = vectors, vectors.T @ (x.T @ y)
    else:
        eigenvalues, vectors = np.linalg.eigh(x @ x.T)
        left, right = x.T @ vectors, vectors.T @ y
    eigenvalues = np.maximum(eigenvalues, 0.0)  # rounding can make zeros negative
    for l2 in l2s:
        yield LinearProbe(mean, std, (left / (eigenvalues + l2)) @ right)


def _standardized(features: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    x = (features.astype(np.float64) - mean) / std
    return np.concatenate([x, np.full((len(x), 1), _BIAS_FEATURE)], axis=1)


# --- output ---


def command(model: str, options: FewShotOptions) -> list[FewShot]:
    """Runs the measurement with a progress bar on a terminal, and caches the features."""
    report = Reporter(stderr=options.output == STANDARD_OUTPUT)
    return few_shots(model, with_cache(options), report=report)


def show(results: list[FewShot], options: FewShotOptions) -> int:
    """Prints a table per data set; returns the exit code."""
    say, first = Reporter(stderr=options.output == STANDARD_OUTPUT).say, results[0]
    rule = f"seeds {' '.join(map(str, first.seeds))}, l2 {options.l2:g}"
    if first.protocol == "scenic":
        rule = "the first images of each class; the l2 with the best mean rank on the test images"
    say(f"protocol  {first.protocol}: {rule}")
    height, width = first.preprocessing.image_size
    say(f"images    {height}x{width} pixels, {first.preprocessing.summary()}")
    runs = [run for result in results for run in (result, result.baseline) if run]
    computed, cache = sum(run.num_computed for run in runs), cache_path(with_cache(options))
    say(f"features  {first.precision}; {computed:,} computed now; cache {cache or 'off'}")
    if first.baseline:
        say(f"baseline  the same architecture with random weights, seed {BASELINE_SEED}")
    for result in results:
        classes = f"{plural(result.num_classes, 'class')} (chance {result.chance:.2%})"
        counts = f"{result.num_train:,} training, {result.num_test:,} {result.test_split} images"
        say(f"\ndata      {result.data}: {classes}, {counts}")
        twin = result.baseline
        for note in dict.fromkeys([*result.notes, *(twin.notes if twin else ())]):
            say(f"note      {note}")
        rows: list[dict[str, str]] = []
        for shots, by_seed in result.accuracies.items():
            row = {"shots": str(shots)}
            for name, run in (("", result), *([("baseline ", twin)] if twin else ())):
                if run.sweep:
                    row[f"{name}l2"] = f"{run.l2[shots]:g}"
                deviation = run.deviation(shots)
                spread = "" if deviation is None else f" +- {deviation:.2%}"
                row[name.strip() or "accuracy"] = f"{run.mean(shots):.2%}{spread}"
            rows.append(row | {f"seed {seed}": f"{by_seed[seed]:.2%}" for seed in result.seeds})
        say("\n".join(table_of(rows, left=0)))
    if options.output not in (None, STANDARD_OUTPUT):
        say(f"\nwritten   {expand(options.output)}")
    return report_bad_images([image for result in results for image in result.bad])
