"""Few-shot accuracy: L2-regularised linear regression on frozen features, a few images per class.

Two protocols of Google's:
    big_vision  for each of three seeds a few random training images of every class; l2 is 1024
    scenic      the older one: the first training images of every class; l2 is swept, and the best
                on the test images is reported, one for all data sets, for each number of shots
Source: big_vision evaluators/fewshot_lsr.py; scenic train_lib/transfer/fewshot_utils.py; the
paper's section 3 ("linear 5-shot").

Shapes: N shots of all classes together, C features, K classes, M test images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from allmlp.console import Reporter, report_bad_images, table
from allmlp.data.classes import match_classes
from allmlp.data.loader import TIMEOUT
from allmlp.data.source import BadImage, Source, subset
from allmlp.data.sources import open_splits, read_from
from allmlp.errors import UserError, at_least, between, one_of, plural
from allmlp.evaluation.features import FeatureCache, Features, frozen_features
from allmlp.evaluation.linear_probe import LinearProbe, fit_linear, fit_sweep
from allmlp.evaluation.predictor import Outputs, Predictor
from allmlp.evaluation.result_file import check_result_path, measurement, save_result
from allmlp.io import STANDARD_OUTPUT, check_not_inputs, check_output_folder, expand
from allmlp.models.catalog import random_weights
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.models.resize import ResizeWeights
from allmlp.options import ComputeOptions, ImageSize, Precision, make
from allmlp.preprocessing import RESIZE_METHODS, Preprocessing
from allmlp.weights.download import cache_folder
from allmlp.weights.load import files_of, open_model

SWEEP = tuple(2.0**power for power in range(-10, 20))
BASELINE_SEED = 0
Draws = dict[int, list[np.ndarray]]  # {seed: the indices of each class}; scenic's seed is 0


@dataclass(frozen=True, kw_only=True)
class FewShotOptions(ComputeOptions):
    """Measure how well a model's features serve after a few labelled images per class.

    A linear classifier is fitted to the model's frozen features of some training images and
    measured on all test images. Nothing of the model is trained; it needs no head.

    Examples:
        mixer few-shot runs/mine --data FOLDER
        mixer few-shot mixer_b16.i21k --data FLOWERS PETS --shots 1 5 --random-baseline
        mixer few-shot runs/mine --data FOLDER --protocol scenic --output few_shot.json
    """

    data: tuple[str, ...] = dataclasses.field(metadata={"metavar": "SOURCE ..."})
    """Sources with a train and a test (or validation) split, one or several."""
    precision: Precision = "float32"
    """Of the model's matrix products; the features are float32 either way."""
    shots: tuple[int, ...] = (1, 5, 10, 25)
    """Images per class to learn from; a class with fewer gives all of its images."""
    protocol: Literal["big_vision", "scenic"] = "big_vision"
    """big_vision (random draws, one l2), or scenic, the older one (the first images of each class, and of 30 l2 the one that does best on the test images)."""  # noqa: E501
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the random draws of big_vision, whose mean is reported."""
    l2: float = 1024.0
    """Weight of the squared coefficients, of big_vision."""
    random_baseline: bool = False
    """Measure the same architecture with random weights as well, seed 0."""
    image_size: ImageSize | None = None
    """Measure at another size than the model's own."""
    resize_weights: ResizeWeights = "auto"
    """How to get to another image size."""
    resize: str = "resize-crop"
    """resize-crop (Google's few-shot evaluation), resmall-crop or squash."""
    ignore_exif: bool = False
    """Do not turn photographs upright by EXIF: the paper's protocol."""
    output: str | None = None
    """A .json file for all numbers; - for standard output."""
    overwrite: bool = False
    """Replace an existing file."""
    cache: str | None = None
    """A folder that keeps the features for the next time; the command takes features/ in the folder of the downloads if not given."""  # noqa: E501
    no_cache: bool = False
    """Keep no features and read none."""
    timeout: float = TIMEOUT
    """Seconds to wait for images from the workers; 0 waits forever."""

    def __post_init__(self) -> None:
        one_of("resize", self.resize, RESIZE_METHODS)
        between("l2", self.l2, 0, float("inf"), above=True, below=True)
        for name, numbers, least in (("shots", self.shots, 1), ("seeds", self.seeds, 0)):
            for number in numbers:
                at_least(name, number, least)
        for name in ("data", "shots", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                what = f"{name} needs one value or more, each once, got {values}"
                raise UserError(what, where=name, code="duplicates")


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """The few-shot accuracies of a model on one data set.

    Attributes:
        data: the name of the data.
        test_split: "test" or "validation".
        num_classes: K.
        num_train: training images that the shots were drawn from.
        num_test: M, test images that could be decoded; all of them count.
        num_computed: images that the model ran on; the features of the others were cached.
        protocol: "big_vision" or "scenic".
        preprocessing: of all images.
        precision: of the model's matrix products.
        shots: images per class.
        seeds: of the draws; () for scenic, which draws nothing.
        accuracies: {shots: {seed: accuracy}}; scenic's one accuracy stands under 0.
        l2: {shots: the l2 of its accuracies}.
        sweep: {shots: {l2: accuracy}} of scenic; empty for big_vision.
        bad: the images that could not be decoded.
        notes: lines for the user, such as classes with fewer images than shots.
        baseline: of the same architecture with random weights, if that was asked for.
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
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    accuracies: dict[int, dict[int, float]]
    l2: dict[int, float]
    sweep: dict[int, dict[float, float]] = field(default_factory=dict)
    bad: list[BadImage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    baseline: FewShot | None = None

    @property
    def chance(self) -> float:
        """The accuracy of a guess: 1 / K."""
        return 1.0 / self.num_classes

    def mean(self, shots: int) -> float:
        """Returns the mean accuracy over the seeds."""
        return float(np.mean(list(self.accuracies[shots].values())))

    def deviation(self, shots: int) -> float | None:
        """Returns the sample standard deviation over the seeds; None of a single accuracy."""
        values = list(self.accuracies[shots].values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def metrics(self) -> Iterator[tuple[str, float]]:
        """Yields (name, value): "5shot", the mean, and "5shot-seed-0", each seed's accuracy."""
        for shots in self.shots:
            yield f"{shots}shot", self.mean(shots)
            for seed in self.seeds:
                yield f"{shots}shot-seed-{seed}", self.accuracies[shots][seed]

    def to_json(self) -> dict[str, Any]:
        """Returns all numbers as JSON values; the keys of dictionaries become text."""
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
            "shots": list(self.shots),
            "seeds": list(self.seeds),
            "accuracies": {
                str(shots): {str(seed): value for seed, value in self.accuracies[shots].items()}
                for shots in self.shots
            },
            "mean": {str(shots): self.mean(shots) for shots in self.shots},
            "deviation": {str(shots): self.deviation(shots) for shots in self.shots},
            "l2": {str(shots): self.l2[shots] for shots in self.shots},
            "sweep": {
                str(shots): {f"{l2:g}": value for l2, value in swept.items()}
                for shots, swept in self.sweep.items()
            },
            "bad_images": [{"image": image.name, "error": image.what} for image in self.bad],
            "notes": self.notes,
        }


def few_shot(
    model: ImageClassifier | str | Path,
    data: str | Path | Mapping[str, Source],
    *,
    on_batch: Callable[[Outputs], None] | None = None,
    **fields: Any,
) -> FewShot:
    """Returns how well a linear classifier of a model's features does after a few shots.

    The model is not trained and needs no head. Only the training images that are drawn are
    decoded; one that cannot be decoded is left out, and the next of its class takes its place.

    Args:
        model: any with `features`, or whatever `load_model` takes. A model object stays on its
            device unless one is named.
        data: a source with a train and a test (else validation) split, or these splits by name.
        on_batch: called with every batch that the model ran on.
        **fields: those of `FewShotOptions`.

    Raises:
        UserError: an option is out of range, the data lacks a split or has one class only, or the
            features are not finite.
    """
    splits = open_splits(str(data)) if not isinstance(data, Mapping) else data
    name = str(data) if not isinstance(data, Mapping) else _name(splits)
    options = make(FewShotOptions, None, {**fields, "data": (name,)})
    net = open_model(model, options.image_size, options.resize_weights)
    stays = isinstance(model, ImageClassifier) and options.device == "auto"
    return _measure(net, {name: splits}, options, None if stays else options.device, on_batch)[0]


def few_shots(
    model: ImageClassifier | str | Path,
    options: FewShotOptions | None = None,
    *,
    report: Reporter | None = None,
    **fields: Any,
) -> list[FewShot]:
    """Returns the few-shot accuracies on several data sets; scenic's share one l2.

    Args:
        model: as of `few_shot`.
        options: all at once.
        report: shows progress; None shows nothing.
        **fields: those of `FewShotOptions`.

    Raises:
        UserError: as of `few_shot`; or the output cannot be written.
    """
    options = make(FewShotOptions, options, fields)
    cache = None if options.cache is None or options.no_cache else expand(options.cache)
    if cache is not None:
        check_output_folder(cache)
    target = check_result_path(options.output, overwrite=options.overwrite)
    splits = {name: open_splits(name) for name in options.data}
    inputs = [path for name in options.data for path in read_from(name)]
    inputs += [] if isinstance(model, ImageClassifier) else files_of(str(model))
    check_not_inputs([path for path in (target, cache) if path is not None], inputs)
    total = sum(num_images(opened, options) for opened in splits.values())
    with (report or Reporter(quiet=True)).progress(
        total * (1 + options.random_baseline), "images"
    ) as bar:
        net = open_model(model, options.image_size, options.resize_weights)
        stays = isinstance(model, ImageClassifier) and options.device == "auto"
        device = None if stays else options.device
        results = _measure(net, splits, options, device, lambda outputs: bar.advance(len(outputs)))
    if options.output is not None:
        numbers: dict[str, Any] = {"results": [each.to_json() for each in results], "floor": None}
        if options.random_baseline:
            numbers["floor"] = {
                "weights": "random",
                "seed": BASELINE_SEED,
                "results": [each.baseline.to_json() for each in results if each.baseline],
            }
        save_result(target, measurement("few-shot", net, numbers))
    return results


def _measure(
    net: ImageClassifier,
    data: Mapping[str, Mapping[str, Source]],
    options: FewShotOptions,
    device: str | None,
    on_batch: Callable[[Outputs], None] | None,
) -> list[FewShot]:
    nets = [net, random_weights(net, BASELINE_SEED)] if options.random_baseline else [net]
    preprocessing = replace(preprocessing_of(net), resize=options.resize)
    if options.ignore_exif:
        preprocessing = replace(preprocessing, exif_orientation=False)
    found: list[list[FewShot]] = []
    for one in nets:
        predictor = Predictor(
            one,
            device=device,
            precision=options.precision,
            preprocessing=preprocessing,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            timeout=options.timeout,
        )
        folder = None if options.cache is None or options.no_cache else expand(options.cache)
        cache = None if folder is None else FeatureCache(folder)
        results = [
            _measure_one(
                name,
                splits,
                options,
                predictor.precision,
                lambda source, predictor=predictor, cache=cache: frozen_features(
                    predictor, source, cache, on_batch
                ),
                preprocessing,
            )
            for name, splits in data.items()
        ]
        found.append(choose_l2(results) if options.protocol == "scenic" else results)
    if len(found) == 1:
        return found[0]
    return [replace(mine, baseline=random) for mine, random in zip(*found, strict=True)]


def _measure_one(
    name: str,
    splits: Mapping[str, Source],
    options: FewShotOptions,
    precision: str,
    compute: Callable[[Source], Features],
    preprocessing: Preprocessing,
) -> FewShot:
    runs: list[Features] = []

    def features(source: Source) -> Features:
        runs.append(compute(source))
        return runs[-1]

    train, test, test_split = _train_and_test(name, splits)
    labels, classes = train.labels, len(train.class_names)
    drawn, shown = _draw(train, options, features)
    seen = features(test)
    if not len(seen.indices):
        raise UserError("none of the test images can be decoded", where=test.name)
    truth = test.labels[seen.indices]
    accuracies: dict[int, dict[int, float]] = {number: {} for number in options.shots}
    swept: dict[int, dict[float, float]] = {}
    for number in options.shots:
        for seed, by_class in drawn.items():
            chosen = np.concatenate([indices[:number] for indices in by_class])
            rows = shown.values[np.searchsorted(shown.indices, chosen)]
            given = rows, labels[chosen], classes
            if options.protocol == "scenic":
                probes = zip(SWEEP, fit_sweep(*given, SWEEP), strict=True)
                swept[number] = {l2: _accuracy(probe, seen, truth) for l2, probe in probes}
            else:
                probe = fit_linear(*given, options.l2)
                accuracies[number][seed] = _accuracy(probe, seen, truth)
    decoded = np.delete(labels, np.array([image.index for image in shown.bad], dtype=np.int64))
    return FewShot(
        data=name,
        test_split=test_split,
        num_classes=classes,
        num_train=len(train),
        num_test=len(truth),
        num_computed=sum(len(run.values) for run in runs if not run.from_cache),
        protocol=options.protocol,
        preprocessing=preprocessing,
        precision=precision,
        shots=options.shots,
        seeds=() if options.protocol == "scenic" else options.seeds,
        accuracies=accuracies if not swept else {},
        l2={} if swept else dict.fromkeys(options.shots, options.l2),
        sweep=swept,
        bad=shown.bad + seen.bad,
        notes=[
            *_fewer_images(train.class_names, decoded, options.shots),
            *(note for run in runs for note in run.notes),
        ],
    )


def choose_l2(results: Sequence[FewShot]) -> list[FewShot]:
    """Returns scenic's results of several data sets at the one l2 that suits them together.

    For each number of shots the l2 of the highest mean rank over the data sets; the larger of two
    that are as good. It is chosen by the accuracy on the test images, as that protocol has it.

    Args:
        results: of protocol "scenic" and the same shots.
    """
    chosen: dict[int, float] = {}
    for shots in results[0].shots:
        accuracies = ([result.sweep[shots][l2] for l2 in SWEEP] for result in results)
        ranks = [np.argsort(np.argsort(row, kind="stable")) for row in accuracies]
        mean = np.mean(ranks, axis=0)
        chosen[shots] = SWEEP[len(SWEEP) - 1 - int(np.argmax(mean[::-1]))]
    return [
        replace(
            result,
            l2=dict(chosen),
            accuracies={shots: {0: result.sweep[shots][l2]} for shots, l2 in chosen.items()},
        )
        for result in results
    ]


def num_images(splits: Mapping[str, Source], options: FewShotOptions) -> int:
    """Returns how many images a measurement needs the features of, if all can be decoded."""
    train, test, _ = _train_and_test(_name(splits), splits)
    drawn = _first_good(_permuted(train, options), max(options.shots), np.zeros(0, np.int64))
    return len(_union(drawn)) + len(test)


def _name(splits: Mapping[str, Source]) -> str:
    first = splits.get("train") or next(iter(splits.values()), None)
    return "none" if first is None else first.name.removesuffix(":train")


def _train_and_test(name: str, splits: Mapping[str, Source]) -> tuple[Source, Source, str]:
    """Returns the training and the test images, and the name of their split."""
    test_split = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test_split is None:
        lacking = "train" if "train" not in splits else "test and no validation"
        what = f"few-shot needs images to learn from and others to test: no {lacking} split"
        fix = "Name data that has both, without a split behind it, or put test images into test/"
        raise UserError(what, where=name, fix=fix)
    train, test = splits["train"], splits[test_split]
    for source in (train, test):
        if not len(source):
            raise UserError("there are no images", where=source.name)
    present = np.unique(train.labels)
    if len(present) < 2:
        what = f"the training images are of one class only: {train.class_names[present[0]]!r}"
        raise UserError(what, where=train.name, fix="Give data of at least two classes")
    matched = match_classes(test, train.class_names, owner="train/", allow_missing=True)
    return train, matched, test_split


def _permuted(train: Source, options: FewShotOptions) -> Draws:
    """Returns for each seed the training images of each class in the order of their drawing."""
    by_class = np.argsort(train.labels, kind="stable")
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    members = np.split(by_class, np.cumsum(counts)[:-1])
    if options.protocol == "scenic":
        return {0: members}
    randoms = {seed: np.random.default_rng(seed) for seed in options.seeds}
    return {
        seed: [random.permutation(indices) for indices in members]
        for seed, random in randoms.items()
    }


def _first_good(orders: Draws, most: int, bad: np.ndarray) -> Draws:
    """Returns the first `most` images of each class that are not bad."""
    return {
        seed: [indices[~np.isin(indices, bad)][:most] for indices in order]
        for seed, order in orders.items()
    }


def _union(drawn: Draws) -> np.ndarray:
    """Returns every index that is drawn, ascending and once."""
    return np.unique(np.concatenate([indices for order in drawn.values() for indices in order]))


def _draw(
    train: Source, options: FewShotOptions, features: Callable[[Source], Features]
) -> tuple[Draws, Features]:
    """Returns the largest number of shots of each draw, and the features of all of them.

    Images that turn out bad are replaced by the next of their class until none is.
    """
    orders, most = _permuted(train, options), max(options.shots)
    shown = Features(np.zeros((0, 0), np.float32), np.zeros(0, np.int64))
    while True:
        bad = np.array([image.index for image in shown.bad], dtype=np.int64)
        drawn = _first_good(orders, most, bad)
        wanted = np.setdiff1d(_union(drawn), shown.indices)
        if not len(wanted):
            break
        found = features(subset(train, wanted, train.name))
        shown.bad += [replace(image, index=int(wanted[image.index])) for image in found.bad]
        if len(found.indices):
            indices = np.concatenate([shown.indices, wanted[found.indices]])
            parts = [part for part in (shown.values, found.values) if len(part)]
            order = np.argsort(indices)
            shown.values, shown.indices = np.concatenate(parts)[order], indices[order]
    if len(np.unique(train.labels[shown.indices])) < 2:
        raise UserError("fewer than two classes have images that can be decoded", where=train.name)
    return drawn, shown


def _accuracy(probe: LinearProbe, seen: Features, truth: np.ndarray) -> float:
    return float((probe.predict(seen.values) == truth).mean())


def _fewer_images(names: list[str], labels: np.ndarray, shots: tuple[int, ...]) -> list[str]:
    """Returns a line for each number of shots that some classes do not have."""
    counts = np.bincount(labels, minlength=len(names))
    fewest = int(counts.argmin())
    return [
        f"{number} shots: {(counts < number).sum():,} of {len(names):,} classes have fewer "
        f"training images ({names[fewest]!r} has {counts[fewest]:,}); all that they have are taken"
        for number in shots
        if (counts < number).any()
    ]


def command(model: str, options: FewShotOptions) -> list[FewShot]:
    """Measures with a progress bar on a terminal, and keeps the features."""
    if options.cache is None and not options.no_cache:
        options = replace(options, cache=str(cache_folder() / "features"))
    report = Reporter(stderr=options.output == STANDARD_OUTPUT)
    return few_shots(model, options, report=report)


def show(results: list[FewShot], options: FewShotOptions) -> int:
    """Prints a table for each data set; returns the exit code."""
    report = Reporter(stderr=options.output == STANDARD_OUTPUT)
    first = results[0]
    if first.protocol == "scenic":
        rule = "the first images of each class; the l2 that is best on the test images"
        if len(results) > 1:
            rule += ", by mean rank over the data"
    else:
        rule = f"seeds {' '.join(map(str, first.seeds))}, l2 {options.l2:g}"
    height, width = first.preprocessing.image_size
    report.say(f"protocol  {first.protocol}: {rule}")
    report.say(f"images    {height}x{width} pixels, {first.preprocessing.summary()}")
    runs = [run for result in results for run in (result, result.baseline) if run]
    computed = plural(sum(run.num_computed for run in runs), "image")
    cache = expand(options.cache) if options.cache else cache_folder() / "features"
    where = "no cache" if options.no_cache else f"cache {cache}"
    report.say(f"features  {first.precision}; of {computed} computed now; {where}")
    if first.baseline:
        report.say(f"baseline  the same architecture with random weights, seed {BASELINE_SEED}")
    for result in results:
        _show_one(report, result)
    if options.output not in (None, STANDARD_OUTPUT):
        report.say(f"\nwritten   {expand(options.output)}")
    return report_bad_images([image for result in results for image in result.bad])


def _show_one(report: Reporter, result: FewShot) -> None:
    classes = f"{plural(result.num_classes, 'class')} (chance {result.chance:.2%})"
    counts = plural(result.num_train, "training image")
    counts += f", {plural(result.num_test, f'{result.test_split} image')}"
    report.say(f"\ndata      {result.data}: {classes}, {counts}")
    runs = [run for run in (result, result.baseline) if run]
    for note in dict.fromkeys(note for run in runs for note in run.notes):
        report.say(f"note      {note}")
    scenic = ["l2"] if result.protocol == "scenic" else []
    headers = ["shots", *scenic, "accuracy", *(f"seed {seed}" for seed in result.seeds)]
    headers += [*(["baseline l2"] if scenic else []), "baseline"] if result.baseline else []
    rows: list[list[str]] = []
    for shots in result.shots:
        row = [str(shots)]
        for run in runs:
            deviation = run.deviation(shots)
            row += [f"{run.l2[shots]:g}"] if scenic else []
            row.append(
                f"{run.mean(shots):.2%}" + ("" if deviation is None else f" +- {deviation:.2%}")
            )
            if run is result:
                row += [f"{run.accuracies[shots][seed]:.2%}" for seed in run.seeds]
        rows.append(row)
    for line in table(headers, rows, left=0):
        report.say(line)
