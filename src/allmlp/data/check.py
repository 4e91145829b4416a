"""Statistics and problems of a data set; every image is decoded once."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from allmlp.data.duplicates import Duplicates, find_duplicates
from allmlp.data.groups import shared_groups
from allmlp.data.image import DARK
from allmlp.data.scan import Scan, scan
from allmlp.data.source import BadImage, Source
from allmlp.data.sources import notes_of
from allmlp.io import atomic_write

# Files written by the command.
FILES = ("check.json", "bad_files.txt", "duplicates.csv", "samples.png", "duplicates.png")
TINY_SIDE = 16  # pixels; images with a smaller side are reported as tiny
HUGE_PIXELS, HUGE_BYTES = 20_000_000, 20_000_000  # images above either are reported as huge


@dataclass(frozen=True)
class SplitReport:
    """Contents of one split; only image and class counts include unreadable images."""

    num_images: int
    num_bytes: int  # encoded files
    class_counts: dict[str, int]  # includes classes without images
    formats: dict[str, int]
    modes: dict[str, int]
    sizes: dict[str, tuple[int, int]]  # "smallest", "median", "largest" by area, (H, W)
    unreadable: list[BadImage]
    tiny: list[BadImage]  # a side below 16 pixels
    huge: list[BadImage]  # above 20 megapixels or 20 MB
    dark: list[BadImage]  # 16-bit, but no sample above `DARK`
    labels_per_image: dict[str, int] = field(default_factory=dict)  # number: images; multi-label


@dataclass(frozen=True)
class Report:
    """Contents of a data set; `duplicates` is None if not searched for."""

    source: str
    splits: dict[str, SplitReport]
    duplicates: Duplicates | None
    notes: list[str]
    shared_groups: list[str]  # a line for every two splits that share groups

    def to_json(self) -> dict[str, Any]:
        """Returns the report, without the individual duplicate pairs, as JSON values."""
        found, duplicates = self.duplicates, None
        if found is not None:
            duplicates = {
                "pairs": len(found),
                "pairs_of_other_classes": int(found.other_label().sum()),
                "images_with_a_duplicate": found.counts(),
                "compared_for_equality_only": found.num_plain,
                "hash_distance": found.distance,
            }
        splits = {name: asdict(split) for name, split in self.splits.items()}
        return {
            "source": self.source,
            "splits": splits,
            "duplicates": duplicates,
            "notes": self.notes,
            "shared_groups": self.shared_groups,
        }

    def save(self, folder: Path) -> list[str]:
        """Writes check.json, bad_files.txt and duplicates.csv; returns the names written."""
        texts = {"check.json": json.dumps(self.to_json(), indent=2) + "\n"}
        texts["bad_files.txt"] = "".join(
            f"{name}\t{image.index}\t{image.name}\t{image.what}\n"
            for name, split in self.splits.items()
            for image in split.unreadable
        )
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
    on_progress: Callable[[int], object] = lambda _: None,
) -> Report:
    """Checks a data set; `on_progress` gets the number of images just read."""
    scans = scan(splits, num_workers=num_workers, on_progress=on_progress)
    reports = {name: _describe(split, scans[name]) for name, split in splits.items()}
    found = None
    if duplicates != "off":
        found = find_duplicates(splits, near=duplicates == "near", scans=scans)
    return Report(source, reports, found, notes_of(splits), shared_groups(splits))


def _describe(source: Source, scanned: Scan) -> SplitReport:
    places = np.flatnonzero(scanned.facts["readable"])
    fields = ("num_bytes", "height", "width", "format", "mode", "brightest")
    facts = {name: scanned.facts[name][places] for name in fields}  # without thumbnails
    counts = source.class_counts().tolist()
    several = {}
    if source.is_multi_label:
        sums, images = np.unique(source.labels.sum(axis=1), return_counts=True)
        several = {str(number): int(count) for number, count in zip(sums, images, strict=True)}
    heights, widths = facts["height"].astype(np.int64), facts["width"].astype(np.int64)
    areas, num_bytes = heights * widths, facts["num_bytes"]
    sizes: dict[str, tuple[int, int]] = {}
    if len(places):
        order = np.lexsort((widths, areas))
        ranks = {"smallest": 0, "median": (len(order) - 1) // 2, "largest": len(order) - 1}
        sizes = {k: (int(heights[order[at]]), int(widths[order[at]])) for k, at in ranks.items()}

    def listed(flags: np.ndarray, what: Callable[[int], str]) -> list[BadImage]:
        found = [(int(at), int(places[at])) for at in np.flatnonzero(flags)]
        return [BadImage(place, source.item_name(place), what(at)) for at, place in found]

    def size(at: int) -> str:
        return f"{heights[at]}x{widths[at]} pixels, {format_bytes(int(num_bytes[at]))}"

    def brightest(at: int) -> str:
        return f"brightest sample {facts['brightest'][at]:,} of 65,535"

    is_dark = (facts["brightest"] >= 0) & (facts["brightest"] <= DARK)
    return SplitReport(
        num_images=len(source),
        num_bytes=int(num_bytes.sum()),
        class_counts=dict(zip(source.class_names, counts, strict=True)),
        formats=_count(facts["format"]),
        modes=_count(facts["mode"]),
        sizes=sizes,
        unreadable=scanned.unreadable,
        tiny=listed(np.minimum(heights, widths) < TINY_SIDE, size),
        huge=listed((areas > HUGE_PIXELS) | (num_bytes > HUGE_BYTES), size),
        dark=listed(is_dark, brightest),
        labels_per_image=several,
    )


def format_bytes(number: int) -> str:
    """Returns 12.3 MB for 12,345,678."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} bytes"


def _count(values: np.ndarray) -> dict[str, int]:
    """Counts the values, most frequent first."""
    names, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {names[at].item().decode(): int(counts[at]) for at in order}


def _duplicates_csv(found: Duplicates) -> str:
    """A line per pair, most different first."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    ends = [f"{column}_{end}" for end in (1, 2) for column in ("split", "index", "name", "class")]
    writer.writerow([*ends, "kind", "difference"])
    for number in found.most_different_first():
        pair, cells = found.pair(int(number)), []
        for split, index in (pair.first, pair.second):
            cells += [split, index, found.splits[split].item_name(index)]
            cells.append(found.class_of(split, index))
        writer.writerow([*cells, pair.kind, f"{pair.difference:.4f}"])
    return file.getvalue()
