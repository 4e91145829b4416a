"""`am.find_label_mistakes` and `mixer data mistakes`: images whose label is probably wrong.

A linear probe on frozen features gives out-of-fold probabilities: for every image, by a classifier
that was not fitted to its label. Images are ranked by the probability of their label, and suspected
by `confident_learning` (Northcutt, Jiang and Chuang, Journal of Artificial Intelligence Research
70, 2021); benchmarks/label_mistakes.md measures both. With several labels per image every class is
judged by itself, present or absent, and an image counts by its least probable entry.

Shapes: N images, K classes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from allmlp import plots
from allmlp.console import Reporter, report_bad_images, report_notes
from allmlp.data.fingerprint import exclude_list
from allmlp.data.source import MARK, BadImage, Source, join, relabel
from allmlp.data.sources import notes_of, open_splits, read_from
from allmlp.errors import UserError, plural
from allmlp.evaluation.features import cache_path, frozen_features, opened_model, with_cache
from allmlp.evaluation.options import LabelMistakesOptions
from allmlp.evaluation.predictor import predictor_for
from allmlp.evaluation.probe import out_of_fold
from allmlp.io import atomic_write_all, check_not_inputs, csv_text, expand, made_folder
from allmlp.models.layers import ImageClassifier
from allmlp.options import make
from allmlp.training.own_images import counted
from allmlp.weights.load import files_of

FILES = ("mistakes.csv", "mistakes.png", "exclude.txt")
_ON_SHEET = 49


@dataclass(frozen=True)
class RankedLabel:
    """An image and what is known about its label."""

    split: str
    index: int  # in the split
    name: str
    label: str
    label_probability: float  # out of fold
    suggestion: str  # the most probable other class
    suggestion_probability: float
    suspected: bool  # the label is improbable, and another class confident


@dataclass(frozen=True)
class LabelMistakes:
    """The images of a data set by how probably their label is wrong.

    Attributes:
        data: name of the data.
        ranked: all images that can be decoded, most suspicious first.
        num_classes: K.
        accuracy: fraction of labels that are the probe's most probable class, out of fold.
        splits: the images.
        bad: images that could not be decoded.
        notes: lines for the user.
    """

    data: str
    ranked: list[RankedLabel]
    num_classes: int
    accuracy: float
    splits: Mapping[str, Source]
    bad: list[BadImage]
    notes: list[str]

    @property
    def suspected(self) -> list[RankedLabel]:
        """The images whose label is probably wrong."""
        return [image for image in self.ranked if image.suspected]

    def to_json(self) -> dict[str, Any]:
        """Returns the result, with the suspected images only, as JSON values."""
        return {
            "data": self.data,
            "images": len(self.ranked),
            "classes": self.num_classes,
            "probe_accuracy": self.accuracy,
            "suspected": [asdict(image) for image in self.suspected],
            "bad_images": [{"image": image.name, "error": image.what} for image in self.bad],
            "notes": self.notes,
        }

    def save(self, folder: Path) -> None:
        """Writes the ranking, a list for `exclude` of training, and a contact sheet."""
        table: list[Any] = [[column.name for column in fields(RankedLabel)]]
        for image in self.ranked:
            row = asdict(image) | {"suspected": int(image.suspected)}
            table.append(f"{v:.6f}" if isinstance(v, float) else v for v in row.values())
        rows = ((x.split, x.index, f"{x.label}, probably {x.suggestion}") for x in self.suspected)
        excluded = exclude_list(self.splits, rows, self.data)
        files = {"mistakes.csv": csv_text(table), "exclude.txt": excluded}
        atomic_write_all({folder / name: text for name, text in files.items()})
        cells: list[plots.Cell] = []
        for image in self.ranked[:_ON_SHEET]:
            label, suggestion = plots.shorten(image.label, 20), plots.shorten(image.suggestion, 14)
            caption = f"{label}\n-> {suggestion} {image.suggestion_probability:.0%}"
            pixels = plots.thumbnail(self.splits[image.split], image.index)
            cells.append((pixels, caption, plots.RED if image.suspected else ""))
        title = f"{self.data}: label -> suggestion, {len(self.suspected):,} suspected (red)"
        plots.save(plots.grid(cells, title), folder / "mistakes.png")


def find_label_mistakes(
    model: ImageClassifier | str | Path,
    data: str | Path | LabelMistakesOptions | None = None,
    *,
    report: Reporter | None = None,
    **fields: Any,
) -> LabelMistakes:
    """Ranks the images of a data set by how probably their label is wrong.

    Args:
        model: any with `features`, or anything that `load_model` takes; its classes do not matter.
            A model object stays on its device unless one is given.
        data: a labelled source; or all options as one object.
        report: shows progress; None shows nothing.
        **fields: fields of `LabelMistakesOptions`.

    Raises:
        UserError: no such data, fewer than two classes, an output that exists, or features that are
            not finite.
    """
    options = make(LabelMistakesOptions, data, fields, "data")
    report, cache = report or Reporter(quiet=True), cache_path(options)
    splits = open_splits(options.data)
    names = list(dict.fromkeys(name for split in splits.values() for name in split.class_names))
    splits = {name: relabel(split, names) for name, split in splits.items()}
    source = join(list(splits.values()), options.data)
    if len(np.unique(source.labels)) < 2:
        raise UserError("the images are of fewer than two classes", where=options.data)
    inputs = [*read_from(options.data)]
    inputs += [] if isinstance(model, ImageClassifier) else files_of(str(model))
    check_not_inputs([] if cache is None else [cache], inputs)
    images = map(source.item_name, range(len(source)))
    overwrite = options.overwrite
    folder = made_folder(options.output, FILES, overwrite=overwrite, inputs=inputs, images=images)
    with report.progress(len(source), "images") as bar:
        net, device = opened_model(model, options)
        predictor = predictor_for(options, net, device)
        features = frozen_features(predictor, source, cache, lambda batch: bar.advance(len(batch)))
    if not len(features.indices):
        raise UserError("none of the images can be decoded", where=options.data)
    labels, rows = source.labels[features.indices], np.arange(len(features.indices))
    probabilities = out_of_fold(features.values, labels, len(names))
    if source.is_multi_label:
        own, other, suspected, is_single = _of_several(probabilities, labels)
        changed = labels.copy()
        changed[rows, other] ^= True
        suggestions = [MARK.join(np.array(names)[row].tolist()) for row in changed]
        likely, right = 1.0 - own, (probabilities >= 0.5) == labels
    else:
        other, suspected = confident_learning(probabilities, labels)
        own, likely = probabilities[rows, labels], probabilities[rows, other]
        # No other fold has the label, so nothing could confirm it.
        is_single = np.bincount(labels, minlength=len(names))[labels] < 2
        suggestions = [names[at] for at in other]
        right = probabilities.argmax(axis=1) == labels
    places = [(split, at) for split, images in splits.items() for at in range(len(images))]
    suspected, ranked = suspected & ~is_single, []
    for row in np.argsort(np.where(is_single, np.inf, own), kind="stable").tolist():
        image = int(features.indices[row])
        place = (*places[image], source.item_name(image))
        label = (source.label_text(image), float(own[row]))
        suggestion = (suggestions[row], float(likely[row]))
        ranked.append(RankedLabel(*place, *label, *suggestion, bool(suspected[row])))
    notes = [*notes_of(splits), *features.notes]
    if is_single.any():
        alone = ", ".join([names[at] for at in np.flatnonzero(source.class_counts() == 1)][:8])
        notes.append(f"classes with a single image cannot be judged: {alone}")
    if trained := counted(net.source, source).trained_on:
        about = f"the model was trained on about {trained:,} of these {len(source):,} images"
        notes.append(f"{about}: it may have learned wrong labels, and find fewer of them")
    accuracy = float(right.mean())
    result = LabelMistakes(source.name, ranked, len(names), accuracy, splits, features.bad, notes)
    if folder is not None:
        result.save(folder)
    return result


def _of_several(
    probabilities: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns of each image (N,): how probable its least probable entry is, label or absence; its
    class; whether any entry is suspected; whether that entry is the only label of its class."""
    likely = np.where(labels, probabilities, 1.0 - probabilities)
    flagged = [
        confident_learning(np.stack([1.0 - p, p], axis=1), truth.astype(np.int64))[1]
        for p, truth in zip(probabilities.T, labels.T, strict=True)
    ]
    worst, rows = likely.argmin(axis=1), np.arange(len(labels))
    is_single = labels[rows, worst] & (labels.sum(axis=0)[worst] < 2)
    return likely[rows, worst], worst, np.any(flagged, axis=0), is_single


def confident_learning(
    probabilities: np.ndarray, labels: np.ndarray, unlikely: float = 0.25
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the most probable other class, int64 (N,), and whether the label is suspected.

    `probabilities` are (N, K), out of fold. The image counts for the most probable of the classes
    that reach their mean probability over the images labelled so. A suspected label is of another,
    and its own probability is below `unlikely` / K.
    """
    rows, others = np.arange(len(labels)), probabilities.copy()
    others[rows, labels] = -1.0
    suggestions = others.argmax(axis=1)
    thresholds = np.full(probabilities.shape[1], np.inf)  # of a class without images
    for label in np.unique(labels):
        thresholds[label] = probabilities[labels == label, label].mean()
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    suspected = (confident.argmax(axis=1) != labels) & (confident.max(axis=1) >= 0)
    own = probabilities[rows, labels]
    suspected &= (own < others[rows, suggestions]) & (own * probabilities.shape[1] < unlikely)
    return suggestions, suspected


def command(model: str, options: LabelMistakesOptions) -> LabelMistakes:
    """Searches with a progress bar on a terminal, and caches the features."""
    return find_label_mistakes(model, with_cache(options), report=Reporter())


def show(result: LabelMistakes, options: LabelMistakesOptions) -> int:
    """Prints the first images of the ranking; returns the exit code."""
    report = Reporter()
    report_notes(result.notes)
    images, suspected = len(result.ranked), len(result.suspected)
    report.say(f"data       {result.data}: {plural(images, 'image')}, {result.num_classes} classes")
    report.say(f"probe      {result.accuracy:.1%} of the labels predicted out of fold")
    report.say(f"suspected  {plural(suspected, 'label')} ({suspected / images:.1%})\n")
    names = [image.name for image in result.ranked]
    start = os.path.commonprefix(names).rfind("/") + 1  # noqa: RUF071 - not all names are paths
    rows = (
        {
            "image": image.name[start:],
            "label": f"{image.label} {image.label_probability:.1%}",
            "suggestion": f"{image.suggestion} {image.suggestion_probability:.1%}",
        }
        for image in result.ranked[: options.top]
    )
    report.table(rows, left=3)
    if options.output is None:
        report.say("\nfor the whole ranking, a contact sheet and a list to exclude: set output")
    else:
        report.say(f"\nwritten    {expand(options.output)}: {', '.join(FILES)}")
        report.say("           exclude.txt leaves the suspected images out of training (exclude)")
    return report_bad_images(result.bad)
