"""Statistics and problems of a data set; every image is decoded once."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from allmlp.data.duplicates import Duplicates, Scan, find_duplicates, scan
from allmlp.data.groups import shared_groups
from allmlp.data.image import DARK
from allmlp.data.source import BadImage, Source
from allmlp.data.sources import notes_of
from allmlp.io import atomic_write

# Files written by the command.
FILES = ("check.json", "bad_files.txt", "duplicates.csv", "samples.png", "duplicates.png")
TINY_SIDE = 16  # pixels; images with a smaller side are reported as tiny
HUGE_PIXELS, HUGE_BYTES = 20_000_000, 20_000_000  # images above either are reported as huge


def check_source(
    splits: Mapping[str, Source],
    source: str,
    *,
    duplicates: Literal["near", "exact", "off"] = "near",
    num_workers: int | None = None,
    on_progress: Callable[[int], object] = lambda _: None,
) -> tuple[dict[str, Any], Duplicates | None]:
    """Returns what the data set holds, as in check.json, and its duplicates."""
    scans = scan(splits, num_workers=num_workers, on_progress=on_progress)
    found = described = None
    if duplicates != "off":
        found = find_duplicates(splits, near=duplicates == "near", scans=scans)
        described = {
            "pairs": len(found),
            "pairs_of_other_classes": int(found.other_label().sum()),
            "images_with_a_duplicate": found.counts(),
            "compared_for_equality_only": found.num_plain,
            "hash_distance": found.distance,
        }
    return {
        "source": source,
        "splits": {name: _describe(split, scans[name]) for name, split in splits.items()},
        "duplicates": described,
        "notes": notes_of(splits),
        "shared_groups": shared_groups(splits),
    }, found


def _describe(source: Source, scanned: Scan) -> dict[str, Any]:
    """The contents of one split; only image and class counts include unreadable images."""
    places = np.flatnonzero(scanned.facts["readable"])
    fields = ("num_bytes", "height", "width", "format", "mode", "brightest")
    facts = {name: scanned.facts[name][places] for name in fields}  # without thumbnails
    heights, widths = facts["height"].astype(np.int64), facts["width"].astype(np.int64)
    areas, num_bytes, brightest = heights * widths, facts["num_bytes"], facts["brightest"]
    order = np.lexsort((widths, areas))
    ranks = {"smallest": 0, "median": (len(order) - 1) // 2, "largest": len(order) - 1}
    sizes = {
        rank: (int(heights[order[at]]), int(widths[order[at]]))
        for rank, at in ranks.items()
        if len(order)
    }  # by area

    def listed(flags: np.ndarray, what: Callable[[int], str]) -> list[dict[str, Any]]:
        found = ((int(at), int(places[at])) for at in np.flatnonzero(flags))
        return [asdict(BadImage(n, source.item_name(n), what(at))) for at, n in found]

    def size(at: int) -> str:
        return f"{heights[at]}x{widths[at]} pixels, {format_bytes(int(num_bytes[at]))}"

    several = source.labels.sum(axis=1) if source.is_multi_label else np.empty(0)
    return {
        "num_images": len(source),
        "num_bytes": int(num_bytes.sum()),
        "class_counts": dict(zip(source.class_names, source.class_counts().tolist(), strict=True)),
        "formats": _count(facts["format"]),
        "modes": _count(facts["mode"]),
        "sizes": sizes,
        "unreadable": list(map(asdict, scanned.unreadable)),
        "tiny": listed(np.minimum(heights, widths) < TINY_SIDE, size),
        "huge": listed((areas > HUGE_PIXELS) | (num_bytes > HUGE_BYTES), size),
        "dark": listed(
            (brightest >= 0) & (brightest <= DARK),
            lambda at: f"brightest sample {brightest[at]:,} of 65,535",
        ),
        "labels_per_image": dict(sorted(_count(several).items(), key=lambda item: int(item[0]))),
    }


def format_bytes(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} bytes"


def _count(values: np.ndarray) -> dict[str, int]:
    texts = (
        value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist()
    )
    return dict(Counter(texts).most_common())


def save_report(values: Mapping[str, Any], found: Duplicates | None, folder: Path) -> list[str]:
    texts = {"check.json": json.dumps(values, indent=2) + "\n"}
    texts["bad_files.txt"] = "".join(
        f"{name}\t{image['index']}\t{image['name']}\t{image['what']}\n"
        for name, split in values["splits"].items()
        for image in split["unreadable"]
    )
    if found is not None:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        columns = ("split", "index", "name", "class")
        ends = [f"{column}_{end}" for end in (1, 2) for column in columns]
        writer.writerow([*ends, "kind", "difference"])
        for number in found.most_different_first():
            pair, cells = found.pair(int(number)), []
            for split, index in (pair.first, pair.second):
                source = found.splits[split]
                cells += [split, index, source.item_name(index), source.label_text(index)]
            writer.writerow([*cells, pair.kind, f"{pair.difference:.4f}"])
        texts["duplicates.csv"] = file.getvalue()
    for name, text in texts.items():
        atomic_write(folder / name, text.encode(errors="surrogateescape"))
    return list(texts)
