"""What a data set is made of and what is wrong with it: every image is read and decoded once."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from allmlp.data.duplicates import Duplicates, find_duplicates
from allmlp.data.image import DARK
from allmlp.data.items import BadImage, Source
from allmlp.data.scan import Scan, scan
from allmlp.data.sources import notes_of
from allmlp.io import atomic_write

# What the verb writes into a folder.
FILES = ("check.json", "bad_files.txt", "duplicates.csv", "samples.png", "duplicates.png")
TINY_SIDE = 16  # pixels; below it an image is named as tiny
HUGE_PIXELS, HUGE_BYTES = 20_000_000, 20_000_000  # above either, as huge


@dataclass(frozen=True)
class SplitReport:
    """What one split is made of; of sizes and formats only the readable images count.

    Attributes:
        name: of its source.
        num_images: all, with the unreadable ones.
        num_bytes: of the encoded files that can be decoded.
        class_counts: images of each class, those without images too.
        formats, modes: so many images of each.
        sizes: "smallest", "median" and "largest" by area, (H, W) each; empty where nothing is
            readable.
        size_summary: how the sizes are spread, in words.
        oddities: how many images are turned by EXIF, have alpha, are 16-bit, CMYK or animated.
        tiny, huge, dark: (index, name, what) of images with a side under 16 pixels, of images above
            20 megapixels or 20 MB, of 16-bit images without a sample above `DARK`.
        unreadable: images that cannot be decoded.
    """

    name: str
    num_images: int
    num_bytes: int
    class_counts: dict[str, int]
    formats: dict[str, int]
    modes: dict[str, int]
    sizes: dict[str, tuple[int, int]]
    size_summary: str
    oddities: dict[str, int]
    tiny: list[BadImage]
    huge: list[BadImage]
    dark: list[BadImage]
    unreadable: list[BadImage]

    def missing_classes(self) -> list[str]:
        """Returns the classes that have no image in this split."""
        return [name for name, count in self.class_counts.items() if not count]


@dataclass(frozen=True)
class Report:
    """What a data set is made of.

    Attributes:
        source: what the data was called.
        splits: a report each.
        duplicates: None where they were not looked for.
        notes: what else was found, a line each.
    """

    source: str
    splits: dict[str, SplitReport]
    duplicates: Duplicates | None
    notes: list[str] = field(default_factory=list)

    @property
    def unreadable(self) -> dict[str, list[BadImage]]:
        """The images that cannot be decoded, by split; only splits that have some."""
        return {name: each.unreadable for name, each in self.splits.items() if each.unreadable}

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the single pairs of duplicates, as JSON can hold it."""
        splits = {}
        for split, report in self.splits.items():
            values = dict(vars(report))
            for key in ("tiny", "huge", "dark", "unreadable"):
                values[key] = [vars(each) for each in values[key]]
            splits[split] = {**values, "missing_classes": report.missing_classes()}
        duplicates = None if self.duplicates is None else _duplicates_json(self.duplicates)
        found = {"splits": splits, "duplicates": duplicates, "notes": self.notes}
        return {"source": self.source, **found}

    def save(self, folder: Path) -> list[str]:
        """Writes check.json, bad_files.txt and duplicates.csv; returns the names written."""
        texts = {"check.json": json.dumps(self.to_json(), indent=2) + "\n"}
        bad = [
            f"{split}\t{each.index}\t{each.name}\t{each.what}\n"
            for split, images in self.unreadable.items()
            for each in images
        ]
        texts["bad_files.txt"] = "".join(bad)
        if self.duplicates is not None:
            texts["duplicates.csv"] = _duplicates_csv(self.duplicates)
        for name, text in texts.items():
            atomic_write(folder / name, text.encode(errors="surrogateescape"))
        return list(texts)


def check_source(
    splits: Mapping[str, Source],
    source: str,
    *,
    duplicates: Literal["near", "exact", "off"] = "near",
    num_workers: int | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> Report:
    """Returns what the data is made of and what is wrong with it.

    Args:
        splits: the data.
        source: what to call it.
        duplicates: which to look for.
        num_workers: processes that read; 0 reads in this one, None chooses.
        on_progress: is called with the number of images read since the last call.

    Raises:
        UserError: fewer than 0 workers.
    """
    scans = scan(splits, num_workers=num_workers, on_progress=on_progress)
    reports = {name: describe_split(each, scans[name]) for name, each in splits.items()}
    found = None
    if duplicates != "off":
        near = duplicates == "near"
        found = find_duplicates(splits, near=near, num_workers=num_workers, scans=scans)
    return Report(source, reports, found, notes_of(splits))


def describe_split(source: Source, scanned: Scan) -> SplitReport:
    """Returns the report of one split that has been read."""
    places = np.flatnonzero(scanned.facts["readable"])
    facts = scanned.facts[places]
    counts = np.bincount(source.labels, minlength=len(source.class_names)).tolist()
    heights, widths = facts["height"].astype(np.int64), facts["width"].astype(np.int64)
    areas = heights * widths
    sizes: dict[str, tuple[int, int]] = {}
    if len(facts):
        order = np.lexsort((widths, areas))
        ranks = {"smallest": 0, "median": (len(order) - 1) // 2, "largest": len(order) - 1}
        for key, rank in ranks.items():
            sizes[key] = (int(heights[order[rank]]), int(widths[order[rank]]))

    def named(flags: np.ndarray, what: Callable[[int], str]) -> list[BadImage]:
        found = [(int(at), int(places[at])) for at in np.flatnonzero(flags)]
        return [BadImage(place, source.item_name(place), what(at)) for at, place in found]

    def size(at: int) -> str:
        return f"{heights[at]}x{widths[at]} pixels, {format_bytes(int(facts['num_bytes'][at]))}"

    modes = _count(facts["mode"])
    oddities = {
        "turned by EXIF": int(facts["turned"].sum()),
        "alpha": int(facts["alpha"].sum()),
        "16-bit": int(facts["deep"].sum()),
        "CMYK": modes.get("CMYK", 0),
        "animated": int(facts["animated"].sum()),
    }
    return SplitReport(
        name=source.name,
        num_images=len(source),
        num_bytes=int(facts["num_bytes"].sum()),
        class_counts=dict(zip(source.class_names, counts, strict=True)),
        formats=_count(facts["format"]),
        modes=modes,
        sizes=sizes,
        size_summary=_spread(heights, widths),
        oddities=oddities,
        tiny=named(np.minimum(heights, widths) < TINY_SIDE, size),
        huge=named((areas > HUGE_PIXELS) | (facts["num_bytes"] > HUGE_BYTES), size),
        dark=named(
            facts["deep"] & (facts["brightest"] <= DARK),
            lambda at: f"brightest sample {facts['brightest'][at]:,} of 65,535",
        ),
        unreadable=scanned.unreadable,
    )


def format_bytes(number: int) -> str:
    """Returns 12.3 MB of 12,345,678."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} bytes"


def _count(values: np.ndarray) -> dict[str, int]:
    """How many of each, the most frequent first."""
    names, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {bytes(names[at]).decode(): int(counts[at]) for at in order}


def _spread(heights: np.ndarray, widths: np.ndarray) -> str:
    """How sizes are spread, in words; H x W as everywhere."""
    if not len(heights):
        return "none readable"
    different = len(np.unique(np.stack([heights, widths], axis=1), axis=0))
    if different == 1:
        return f"all {heights[0]}x{widths[0]}"
    low, middle, high = np.percentile(np.minimum(heights, widths), [5, 50, 95]).astype(int)
    shape = np.select([widths > heights, widths < heights], ["wide", "tall"], "square")
    shapes = ", ".join(f"{count / len(shape):.0%} {name}" for name, count in _shapes(shape))
    sides = f"shorter side {middle} px in the middle, {low} to {high} px for nine in ten"
    return f"{different:,} different; {sides}; {shapes}"


def _shapes(shape: np.ndarray) -> list[tuple[str, int]]:
    names, counts = np.unique(shape, return_counts=True)
    return sorted(zip(names.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])


def _duplicates_json(found: Duplicates) -> dict[str, Any]:
    names = list(found.splits)
    return {
        "pairs": len(found),
        "pairs_of_other_classes": int(found.other_label().sum()),
        "groups": len(found.groups()),
        "images_with_a_duplicate": {
            split: {other: found.count_with(split, other) for other in names} for split in names
        },
        "compared_for_equality_only": found.num_plain,
        "hash_distance": found.distance,
        "pairs_not_compared": found.unchecked,
    }


def _duplicates_csv(found: Duplicates) -> str:
    """A line a pair, the most different first."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    ends = [f"{column}_{end}" for end in (1, 2) for column in ("split", "index", "name", "class")]
    writer.writerow([*ends, "kind", "difference"])
    for number in found.most_different_first():
        pair, cells = found.pair(int(number)), []
        for split, index in (pair.first, pair.second):
            data = found.splits[split]
            label = data.class_names[int(data.labels[index])]
            cells += [split, index, data.item_name(index), label]
        writer.writerow([*cells, pair.kind, f"{pair.difference:.4f}"])
    return file.getvalue()
