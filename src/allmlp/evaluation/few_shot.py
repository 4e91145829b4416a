"""Few-shot accuracy: L2-regularised linear regression on frozen features of a few images a class.

Two protocols of Google's:
    big_vision  for each of three seeds a few random training images of every class; l2 is 1024
    scenic      the older one: the first training images of every class; l2 is swept, and the best
                on the test images is reported, one for all data sets, for each number of shots
Source: big_vision evaluators/fewshot_lsr.py; scenic train_lib/transfer/fewshot_utils.py; the
paper's section 3 ("linear 5-shot").

Legend: N shots of all classes together, C features, K classes, M test images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.batches import Batch
from allmlp.data.classes import match_classes
from allmlp.data.items import BadImage, Source, subset
from allmlp.data.loader import TIMEOUT
from allmlp.data.sources import open_splits
from allmlp.errors import UserError
from allmlp.evaluation.draws import (
    SHOTS,
    Draws,
    Protocol,
    Settings,
    check_settings,
    first_good,
    permuted,
    union,
)
from allmlp.evaluation.features import Features, Precision, frozen_features
from allmlp.evaluation.linear_probe import LinearProbe, fit_linear, fit_sweep
from allmlp.models.layers import ImageClassifier, preprocessing_of
from allmlp.preprocessing import Preprocessing
from allmlp.runtime.device import to_device

SWEEP = tuple(2.0**power for power in range(-10, 20))


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
        protocol: one of `PROTOCOLS`.
        preprocessing: of all images.
        precision: of the model's products.
        shots: images a class.
        seeds: of the draws; () for scenic, which draws nothing.
        accuracies: {shots: {seed: accuracy}}; scenic's one accuracy stands under 0.
        l2: {shots: the l2 of its accuracies}.
        sweep: {shots: {l2: accuracy}} of scenic; empty for big_vision.
        bad: the images that could not be decoded.
        notes: lines for the user, such as classes with fewer images than shots.
    """

    data: str
    test_split: str
    num_classes: int
    num_train: int
    num_test: int
    num_computed: int
    protocol: Protocol
    preprocessing: Preprocessing
    precision: Precision
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    accuracies: dict[int, dict[int, float]]
    l2: dict[int, float]
    sweep: dict[int, dict[float, float]] = field(default_factory=dict)
    bad: list[BadImage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
        """Returns every figure as JSON values; the keys of dictionaries are texts there."""
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
            "bad_images": [{"image": each.name, "error": each.what} for each in self.bad],
            "notes": self.notes,
        }


def few_shot(
    model: ImageClassifier,
    data: str | Path | Mapping[str, Source],
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] | None = None,
    l2: float | None = None,
    protocol: str = "big_vision",
    resize: str = "resize-crop",
    precision: str = "float32",
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str | None = None,
    timeout: float = TIMEOUT,
    cache: Path | None = None,
    on_batch: Callable[[Batch], None] | None = None,
) -> FewShot:
    """Returns how well a linear classifier of a model's features does after a few images a class.

    The model is not trained and needs no head. Only the training images that are drawn are
    decoded; one that cannot be decoded is left out, and the next of its class takes its place.

    Args:
        model: any with `features`.
        data: a source with a train and a test (else validation) split, or these splits by name.
        shots: images a class; a class with fewer gives all of its images.
        seeds: of the draws; None: 0, 1, 2.
        l2: the weight of the squared coefficients; None: 1024.
        protocol: "big_vision" or "scenic"; scenic takes neither seeds nor l2.
        resize: one of `RESIZE_METHODS`; the rest of the preprocessing is the model's.
        precision: "float32" or "bfloat16", of the model's products.
        batch_size: images a batch.
        num_workers: processes that decode; None chooses.
        device: "auto" (the GPU where there is one), "cpu", "cuda"; None: where it is.
        timeout: seconds to wait for images of the workers; 0 waits for ever.
        cache: a folder for the features, see `allmlp.evaluation.features`; None keeps none.
        on_batch: called with every batch that the model ran on.

    Raises:
        UserError: a setting is out of range, the data lacks a split or has one class only, or the
            features are not finite.
    """
    settings = check_settings(
        shots=shots, seeds=seeds, l2=l2, protocol=protocol, resize=resize, precision=precision
    )
    if not isinstance(model, ImageClassifier):
        fix = "am.load_model(...) gives one"
        raise UserError(f"few_shot takes a model, got {model!r}", fix=fix)
    train, test, test_split, name = _splits(data)
    model = to_device(model, device)
    preprocessing = replace(preprocessing_of(model), resize=settings.resize)
    runs: list[Features] = []  # of all parts of the data, for what they say

    def features(source: Source) -> Features:
        found = frozen_features(
            model,
            source,
            preprocessing,
            precision=settings.precision,
            cache=cache,
            batch_size=batch_size,
            num_workers=num_workers,
            timeout=timeout,
            on_batch=on_batch,
        )
        runs.append(found)
        return found

    labels, classes = train.labels, len(train.class_names)
    drawn, shown = _draw(train, settings, features)
    seen = features(test)
    if not len(seen.indices):
        raise UserError("none of the test images can be decoded", where=test.name)
    truth = test.labels[seen.indices]
    accuracies: dict[int, dict[int, float]] = {number: {} for number in settings.shots}
    swept: dict[int, dict[float, float]] = {}
    for number in settings.shots:
        for seed, of_class in drawn.items():
            chosen = np.concatenate([each[:number] for each in of_class])
            given = shown.values[np.searchsorted(shown.indices, chosen)], labels[chosen], classes
            if settings.protocol == "scenic":
                probes = zip(SWEEP, fit_sweep(*given, SWEEP), strict=True)
                swept[number] = {l2: _accuracy(probe, seen, truth) for l2, probe in probes}
            else:
                probe = fit_linear(*given, settings.l2)
                accuracies[number][seed] = _accuracy(probe, seen, truth)
    decoded = np.delete(labels, np.array([each.index for each in shown.bad], dtype=np.int64))
    result = FewShot(
        data=name,
        test_split=test_split,
        num_classes=classes,
        num_train=len(train),
        num_test=len(truth),
        num_computed=sum(len(each.values) for each in runs if not each.from_cache),
        protocol=settings.protocol,
        preprocessing=preprocessing,
        precision=settings.precision,
        shots=settings.shots,
        seeds=settings.seeds,
        accuracies=accuracies,
        l2=dict.fromkeys(settings.shots, settings.l2),
        sweep=swept,
        bad=shown.bad + seen.bad,
        notes=[
            *_fewer_images(train.class_names, decoded, settings.shots),
            *(note for each in runs for note in each.notes),
        ],
    )
    return choose_l2([result])[0] if swept else result


def choose_l2(results: Sequence[FewShot]) -> list[FewShot]:
    """Returns scenic's results of several data sets at the one l2 that suits them together.

    For each number of shots the l2 of the highest mean rank over the data sets; the larger of two
    that are as good. It is chosen by the accuracy on the test images: so that protocol has it.

    Args:
        results: of `few_shot` with protocol "scenic" and the same shots.
    """
    chosen: dict[int, float] = {}
    for shots in results[0].shots:
        ranks = [
            np.argsort(np.argsort([each.sweep[shots][l2] for l2 in SWEEP], kind="stable"))
            for each in results
        ]
        mean = np.mean(ranks, axis=0)
        chosen[shots] = SWEEP[len(SWEEP) - 1 - int(np.argmax(mean[::-1]))]
    return [
        replace(
            each,
            l2=dict(chosen),
            accuracies={shots: {0: each.sweep[shots][l2]} for shots, l2 in chosen.items()},
        )
        for each in results
    ]


def num_images(data: Mapping[str, Source], settings: Settings) -> int:
    """Returns how many images `few_shot` needs the features of, if all can be decoded."""
    train, test, *_ = _splits(data)
    drawn = first_good(permuted(train, settings), max(settings.shots), np.zeros(0, np.int64))
    return len(union(drawn)) + len(test)


def _splits(data: str | Path | Mapping[str, Source]) -> tuple[Source, Source, str, str]:
    """Returns the training and the test images, the name of their split, and that of the data."""
    splits = data if isinstance(data, Mapping) else open_splits(str(data))
    given = next((each.name for each in splits.values()), "none")
    test_split = next((each for each in ("test", "validation") if each in splits), None)
    if "train" not in splits or test_split is None:
        lacking = "train" if "train" not in splits else "test and no validation"
        what = (
            f"few-shot needs images to learn from and others to test: there is no {lacking} split"
        )
        fix = "Name data that has both, without a split behind it, or put test images into test/"
        raise UserError(what, where=given if isinstance(data, Mapping) else data, fix=fix)
    train, test = splits["train"], splits[test_split]
    for each in (train, test):
        if not len(each):
            raise UserError("there are no images", where=each.name)
    present = np.unique(train.labels)
    if len(present) < 2:
        what = f"the training images are of one class only: {train.class_names[present[0]]!r}"
        raise UserError(what, where=train.name, fix="Give data of at least two classes")
    test = match_classes(test, train.class_names, owner="train/", allow_missing=True)
    name = train.name.removesuffix(":train") if isinstance(data, Mapping) else str(data)
    return train, test, test_split, name


def _draw(
    train: Source, settings: Settings, features: Callable[[Source], Features]
) -> tuple[Draws, Features]:
    """Returns the largest number of shots of each draw, and the features of all of them.

    Images that turn out bad are replaced by the next of their class until none is.
    """
    orders, most = permuted(train, settings), max(settings.shots)
    shown = Features(np.zeros((0, 0), np.float32), np.zeros(0, np.int64))
    while True:
        drawn = first_good(
            orders, most, np.array([each.index for each in shown.bad], dtype=np.int64)
        )
        wanted = np.setdiff1d(union(drawn), shown.indices)
        if not len(wanted):
            break
        found = features(subset(train, wanted, train.name))
        shown.bad += [replace(each, index=int(wanted[each.index])) for each in found.bad]
        if len(found.indices):
            indices = np.concatenate([shown.indices, wanted[found.indices]])
            parts = [each for each in (shown.values, found.values) if len(each)]
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
    lines = []
    for number in shots:
        short = int((counts < number).sum())
        if short:
            lines.append(
                f"{number} shots: {short:,} of {len(names):,} classes have fewer training images "
                f"({names[fewest]!r} has {counts[fewest]:,}); all that they have are taken"
            )
    return lines
