"""`am.find_label_mistakes` and `mixer data mistakes`: images whose label is probably wrong.

A linear probe on frozen features gives out-of-fold probabilities: for every image, by a classifier
that was not fitted to its label. Images are ranked by the probability of their label. Suspected are
the images of confident learning (Northcutt, Jiang and Chuang, Journal of Artificial Intelligence
Research 70, 2021), for which another class is as probable as it is on average for the images
labelled so, if their own label has less than a quarter of the probability of chance. Both are
measured in benchmarks/label_mistakes.md.

Shapes: N images, C features, K classes.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from allmlp import plots
from allmlp.console import Reporter, report_bad_images, report_notes, table
from allmlp.data.duplicates import find_duplicates
from allmlp.data.exclude import exclude_list
from allmlp.data.multi_label import check_one_label
from allmlp.data.scan import scan
from allmlp.data.source import BadImage, Source, join, relabel
from allmlp.data.sources import notes_of, open_splits, read_from
from allmlp.errors import UserError, plural
from allmlp.evaluation.features import (
    Features,
    cache_path,
    frozen_features,
    opened_model,
    with_cache,
)
from allmlp.evaluation.options import LabelMistakesOptions
from allmlp.evaluation.predictor import predictor_for
from allmlp.evaluation.probe import out_of_fold
from allmlp.io import atomic_write_all, check_not_inputs, check_output_folder, expand
from allmlp.models.layers import ImageClassifier
from allmlp.options import make
from allmlp.training.own_images import counted
from allmlp.weights.load import files_of

FILES = ("mistakes.csv", "mistakes.png", "exclude.txt")
_ON_SHEET = 49


@dataclass(frozen=True)
class RankedLabel:
    """An image and what is known about its label.

    Attributes:
        split: "train", "validation" or "test".
        index: position in the split.
        name: the image.
        label: its class in the data.
        label_probability: of that class, out of fold.
        suggestion: the most probable other class.
        suggestion_probability: of that class.
        suspected: whether the label is improbable, and another class confident.
        duplicate: a duplicate of the image with another label, and that label; or "".
    """

    split: str
    index: int
    name: str
    label: str
    label_probability: float
    suggestion: str
    suggestion_probability: float
    suspected: bool
    duplicate: str = ""


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
    bad: list[BadImage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def suspected(self) -> list[RankedLabel]:
        """The images whose label is probably wrong."""
        return [image for image in self.ranked if image.suspected]

    def exclude_list(self) -> str:
        """Returns the text of a list of the suspected images, for `exclude` of training."""
        rows = (
            (image.split, image.index, f"{image.label}, probably {image.suggestion}")
            for image in self.suspected
        )
        return exclude_list(self.splits, rows, self.data)

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
        """Writes the files of `FILES`; the folder must exist."""
        file = io.StringIO()
        writer = csv.DictWriter(file, list(RankedLabel.__annotations__), lineterminator="\n")
        writer.writeheader()
        for image in self.ranked:
            row = {k: f"{v:.6f}" if isinstance(v, float) else v for k, v in asdict(image).items()}
            writer.writerow({**row, "suspected": int(image.suspected)})
        texts = {"mistakes.csv": file.getvalue(), "exclude.txt": self.exclude_list()}
        atomic_write_all(
            {folder / name: text.encode(errors="surrogateescape") for name, text in texts.items()}
        )
        plots.save(self.figure(), folder / "mistakes.png")

    def figure(self) -> plots.Figure:
        """Returns the first images of the ranking; the captions of suspected ones are red."""
        shown = self.ranked[:_ON_SHEET]
        captions = [
            f"{plots.shorten(image.label, 20)}\n-> {plots.shorten(image.suggestion, 14)} "
            f"{image.suggestion_probability:.0%}"
            for image in shown
        ]
        colors = [plots.RED if image.suspected else "" for image in shown]
        title = f"{self.data}: label -> suggestion, {len(self.suspected):,} suspected (red)"
        return plots.contact_sheet(
            [(self.splits[image.split], image.index) for image in shown], captions, title, colors
        )


def find_label_mistakes(
    model: ImageClassifier | str | Path,
    data: str | Path | Mapping[str, Source] | LabelMistakesOptions | None = None,
    *,
    report: Reporter | None = None,
    **fields: Any,
) -> LabelMistakes:
    """Ranks the images of a data set by how probably their label is wrong.

    Args:
        model: any with `features`, or anything that `load_model` takes; its classes do not matter.
            A model object stays on its device unless one is given.
        data: a labelled source, or its splits by name; or all options as one object.
        report: shows progress; None shows nothing.
        **fields: fields of `LabelMistakesOptions`.

    Raises:
        UserError: no such data, fewer than two classes, several labels per image, an output that
            exists, or features that are not finite.
    """
    options = data if isinstance(data, LabelMistakesOptions) else None
    opened = data if isinstance(data, Mapping) else None
    if options is None and data is not None:
        first = next(iter(opened.values()), None) if opened is not None else None
        fields["data"] = first.name if first is not None else str(data)
    options = make(LabelMistakesOptions, options, fields)
    report = report or Reporter(quiet=True)
    folder = None if options.output is None else expand(options.output)
    cache = cache_path(options)
    if folder is not None:
        check_output_folder(folder, FILES, overwrite=options.overwrite)
    if cache is not None:
        check_output_folder(cache)
    splits = dict(open_splits(options.data) if opened is None else opened)
    check_one_label(splits.values(), "a search for label mistakes")
    names = list(dict.fromkeys(name for split in splits.values() for name in split.class_names))
    splits = {name: relabel(split, names) for name, split in splits.items()}
    source = join(list(splits.values()), options.data)
    if len(np.unique(source.labels)) < 2:
        raise UserError("the images are of fewer than two classes", where=options.data)
    inputs = [] if opened is not None else list(read_from(options.data))
    inputs += [] if isinstance(model, ImageClassifier) else files_of(str(model))
    outputs = [] if folder is None else [folder, *map(folder.joinpath, FILES)]
    items = map(source.item_name, range(len(source)))
    check_not_inputs([*outputs, *([] if cache is None else [cache])], inputs, items)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # fail early
    total = len(source) * (1 if options.duplicates == "off" else 2)
    with report.progress(total, "images") as bar:
        net, device = opened_model(model, options)
        predictor = predictor_for(options, net, device)
        features = frozen_features(predictor, source, cache, lambda batch: bar.advance(len(batch)))
        conflicts = _conflicts(splits, options, bar.advance)
    result = _judge(splits, source, features, conflicts)
    if trained := counted(net.source, source).trained_on:
        about = f"the model was trained on about {trained:,} of these {len(source):,} images"
        result.notes.append(f"{about}: it may have learned wrong labels, and find fewer of them")
    if folder is not None:
        result.save(folder)
    return result


def _judge(
    splits: Mapping[str, Source], source: Source, features: Features, conflicts: dict[int, str]
) -> LabelMistakes:
    """Ranks the images; `source` joins the splits, `conflicts` are by its indices."""
    names, labels = source.class_names, source.labels[features.indices]
    counts = np.bincount(labels, minlength=len(names))
    if (counts > 1).sum() < 2:
        what = "a search for label mistakes needs two classes of two images that can be decoded"
        raise UserError(what, where=source.name)
    probabilities = out_of_fold(features.values, labels, len(names))
    suggestions, suspected = confident_learning(probabilities, labels)
    scores = probabilities[np.arange(len(labels)), labels]
    single = counts[labels] < 2  # no other fold has the label, so nothing could confirm it
    scores[single], suspected[single] = np.inf, False
    offsets, ranked = np.cumsum([0, *map(len, splits.values())]), []
    for at in np.argsort(scores, kind="stable"):
        image, label, other = int(features.indices[at]), int(labels[at]), int(suggestions[at])
        place = int(np.searchsorted(offsets, image, side="right")) - 1
        ranked.append(
            RankedLabel(
                split=list(splits)[place],
                index=image - int(offsets[place]),
                name=source.item_name(image),
                label=names[label],
                label_probability=float(probabilities[at, label]),
                suggestion=names[other],
                suggestion_probability=float(probabilities[at, other]),
                suspected=bool(suspected[at]),
                duplicate=conflicts.get(image, ""),
            )
        )
    notes = [*notes_of(splits), *features.notes]
    if single.any():
        alone = ", ".join([names[at] for at in np.flatnonzero(counts == 1)][:8])
        notes.append(f"classes with a single image cannot be judged: {alone}")
    accuracy = float((probabilities.argmax(axis=1) == labels).mean())
    return LabelMistakes(source.name, ranked, len(names), accuracy, splits, features.bad, notes)


def confident_learning(
    probabilities: np.ndarray, labels: np.ndarray, unlikely: float = 0.25
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the most probable other class, int64 (N,), and whether the label is suspected.

    `probabilities` are (N, K), out of fold. An image is counted for the most probable of the
    classes whose threshold it reaches: their mean probability over the images with that label. A
    label is suspected only if its probability is below `unlikely` / K.
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


def _conflicts(
    splits: Mapping[str, Source],
    options: LabelMistakesOptions,
    on_progress: Callable[[int], object],
) -> dict[int, str]:
    """Returns, for the images with a duplicate of another label, that duplicate and its label."""
    if options.duplicates == "off":
        return {}
    scans = scan(splits, num_workers=options.num_workers, on_progress=on_progress)
    found = find_duplicates(splits, near=options.duplicates == "near", scans=scans)
    conflicts: dict[int, str] = {}
    for number in np.flatnonzero(found.other_label()):
        pair, ends = found.pair(int(number)), (int(found.first[number]), int(found.second[number]))
        for image, (split, index) in zip(ends, (pair.second, pair.first), strict=True):
            name = found.splits[split].item_name(index)
            conflicts.setdefault(image, f"{pair.kind}: {name} ({found.class_of(split, index)})")
    return conflicts


# --- command --------------------------------------------------------------------------------------


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
    report.say(f"suspected  {plural(suspected, 'label')} ({suspected / images:.1%})")
    conflicts = sum(image.duplicate != "" for image in result.ranked)
    if conflicts:
        report.say(f"           {plural(conflicts, 'image')} with a duplicate of another label")
    names = [image.name for image in result.ranked]
    start = os.path.commonprefix(names).rfind("/") + 1  # noqa: RUF071 - not all names are paths
    rows = [
        [
            image.name[start:],
            f"{image.label} {image.label_probability:.1%}",
            f"{image.suggestion} {image.suggestion_probability:.1%}",
            image.duplicate.replace(image.name[:start], ""),
        ]
        for image in result.ranked[: options.top]
    ]
    if rows:
        report.say()
        for line in table(["image", "label", "suggestion", "duplicate"], rows, left=4):
            report.say(line)
    if options.output is None:
        report.say("\nfor the whole ranking, a contact sheet and a list to exclude: set output")
    else:
        report.say(f"\nwritten    {expand(options.output)}: {', '.join(FILES)}")
        report.say("           exclude.txt leaves the suspected images out of training (exclude)")
    return report_bad_images(result.bad)
