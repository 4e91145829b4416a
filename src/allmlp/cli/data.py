"""`mixer data check` and `mixer data pack`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from allmlp.errors import UserError, plural, some_of
from allmlp.options import Done, Options

if TYPE_CHECKING:
    from allmlp.console import Reporter
    from allmlp.data.check import Duplicates

_MOST = 20  # lines shown per list


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Options):
    """Check data before training: contents, damaged images and duplicates.

    Examples:
        mixer data check FOLDER
        mixer data check FOLDER --output report
        mixer data check cifar10.parquet --exclude copies.txt
        mixer data check FOLDER:test --duplicates off

    Checks all splits, or only the one named by :train, :validation or :test. Every image is
    decoded, and checksums of packed data are verified. Exit code 3: some images cannot be decoded,
    or packed data is damaged.
    """

    duplicates: Literal["near", "exact", "off"] = "near"
    """near also finds re-encoded, resized, brightened and slightly cropped copies."""
    exclude: str | None = None
    """Write a list of images to exclude from training: training images that are also in validation
    or test, validation images that are also in test, and repeated copies within a split. - is
    standard output."""
    output: str | None = None
    """Folder for check.json, bad_files.txt, duplicates.csv and figures."""
    overwrite: bool = False
    """Replace existing files."""
    num_workers: int | None = None
    """Number of processes that read images."""

    def __post_init__(self) -> None:
        if self.exclude is not None and self.duplicates == "off":
            what = "the list of images to exclude names duplicates, and duplicates=off finds none"
            raise UserError(what, where="exclude", fix="Leave out one of the two")


def check(source: str, options: CheckOptions) -> Done:
    from allmlp.console import Reporter
    from allmlp.data.check import FILES, check_source, save_report
    from allmlp.data.fingerprint import exclude_list
    from allmlp.data.source_spec import parse_name
    from allmlp.data.sources import open_splits, packed, read_from
    from allmlp.io import (
        STANDARD_OUTPUT,
        atomic_write,
        check_not_inputs,
        check_output_file,
        check_output_folder,
        expand,
    )
    from allmlp.plots import save_check

    report = Reporter(stderr=options.exclude == STANDARD_OUTPUT)
    outputs: list[Path] = []
    folder = None if options.output is None else expand(options.output)
    if folder is not None:
        check_output_folder(folder, FILES, overwrite=options.overwrite)
        outputs += [folder, *map(folder.joinpath, FILES)]
    if options.exclude not in (None, STANDARD_OUTPUT):
        check_output_file(expand(options.exclude), overwrite=options.overwrite)
        outputs.append(expand(options.exclude))
    splits = open_splits(source)
    items = (split.item_name(at) for split in splits.values() for at in range(len(split)))
    check_not_inputs(outputs, read_from(source), items)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # fail early
    with report.progress(sum(map(len, splits.values())), "images") as bar:
        values, duplicates = check_source(
            splits,
            source,
            duplicates=options.duplicates,
            num_workers=options.num_workers,
            on_progress=bar.advance,
        )
    print_check(report, values)
    if duplicates is not None:
        print_duplicates(report, duplicates)
    path, problems = parse_name(source).path, []
    if packed.is_packed(path):
        problems = packed.verify(path)
        _say_list(report, "problems of the packed data", problems)
    if options.exclude is not None and duplicates is not None:
        text = exclude_list(splits, duplicates.to_exclude(), source)
        if options.exclude == STANDARD_OUTPUT:
            print(text, end="", flush=True)
        else:
            atomic_write(expand(options.exclude), text)
        counts = Counter(split for split, *_ in duplicates.to_exclude())
        listed = ", ".join(f"{count:,} of {name}" for name, count in counts.items())
        report.say(f"\nto exclude  {options.exclude}: {listed or 'no images'}")
    if folder is None:
        report.say("\nfor complete lists, and figures of samples and duplicates: --output FOLDER")
    else:
        written = save_report(values, duplicates, folder) + save_check(splits, duplicates, folder)
        report.say(f"\nwritten  {folder}: {', '.join(written)}")
    is_bad = problems or any(split["unreadable"] for split in values["splits"].values())
    return Done({**values, "problems": problems}, 3 if is_bad else 0)


def print_check(report: Reporter, values: Mapping[str, Any]) -> None:
    """Prints a table of the splits, and problems."""
    from rich import filesize

    from allmlp.data.check import HUGE_PIXELS, TINY_SIDE
    from allmlp.data.image import DARK

    splits, rows, details = values["splits"], [], []
    for name, split in splits.items():
        counts = [count for count in split["class_counts"].values() if count] or [0]
        few, many = min(counts), max(counts)
        per_class = f"{few:,}" if few == many else f"{few:,} to {many:,}"
        sizes = [f"{height}x{width}" for height, width in split["sizes"].values()] or [""] * 3
        rows.append(
            {
                "split": name,
                "images": f"{split['num_images']:,}",
                "classes": f"{len(counts):,}",
                "per class": per_class,
                "bytes": filesize.decimal(split["num_bytes"]),
                **dict(zip(("smallest HxW", "median", "largest"), sizes, strict=True)),
            }
        )
        kinds = {**split["formats"], **split["modes"]}
        details.append(f"{name}: {', '.join(f'{kind} {count:,}' for kind, count in kinds.items())}")
        if split["labels_per_image"]:
            numbers = split["labels_per_image"].items()
            per_image = ", ".join(f"{images:,} with {number}" for number, images in numbers)
            details.append(f"  labels per image: {per_image}")
            numbers = [f"{kind} {count:,}" for kind, count in split["class_counts"].items()]
            details.append(f"  images per class: {some_of(numbers, _MOST)}")
        missing = [kind for kind, count in split["class_counts"].items() if not count]
        if missing:
            details.append(f"  classes without images: {some_of(missing, _MOST)}")

    report.say(f"data     {values['source']}\n")
    report.table(rows)
    names = dict.fromkeys(name for split in splits.values() for name in split["class_counts"])
    report.say(f"\nclasses: {some_of(list(names), _MOST)}")
    for line in [*(f"note: {note}" for note in values["notes"]), "", *details]:
        report.say(line)
    dark = f"nearly black: no sample above {DARK:,} of 65,535"
    for key, what in {
        "unreadable": "unreadable images",
        "tiny": f"tiny images, a side under {TINY_SIDE} px",
        "huge": f"huge images, over {HUGE_PIXELS // 10**6} megapixels or 20 MB",
        "dark": f"16-bit images, {dark} (scale 12 bits up by 16, and save the images again)",
    }.items():
        lines = [
            f"{name}[{image['index']}] {image['name']}: {image['what']}"
            for name, split in splits.items()
            for image in split[key]
        ]
        if lines or key == "unreadable":
            _say_list(report, what, lines)
    if values["shared_groups"]:
        _say_list(report, "groups in several splits (leakage)", values["shared_groups"])


def print_duplicates(report: Reporter, found: Duplicates) -> None:
    """Prints the duplicates by kind and by split, and those with different classes."""
    import numpy as np

    from allmlp.data.check import DISTANCE, KINDS

    report.say(f"\nduplicates: {plural(len(found), 'pair')}")
    if len(found):
        counts = np.bincount(found.pairs["kind"], minlength=len(KINDS))
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in zip(KINDS, counts, strict=True))
        report.say(f"{kinds}; images of a split (row) that have a duplicate in a split (column):")
        report.table(
            {"split": name} | {f"in {other}": f"{n:,}" for other, n in row.items()}
            for name, row in found.counts().items()
        )
    different = int(found.other_label().sum())
    if different:
        report.say(f"of different classes: {plural(different, 'pair')} (listed in duplicates.csv)")
    if found.num_plain:
        why = "have hardly any texture or fewer than 16 pixels a side"
        report.say(f"{plural(found.num_plain, 'image')} {why}: compared for equal pixels only")
    if found.distance < DISTANCE:
        how = f"to {found.distance} bits of the hash" if found.distance >= 0 else "to equal pixels"
        report.say(f"very many images are alike: near duplicates were looked for up {how} only")


def _say_list(report: Reporter, title: str, lines: Sequence[str]) -> None:
    report.say(f"\n{title}: {len(lines):,}")
    for line in lines[:_MOST]:
        report.say(f"  {line}")
    if len(lines) > _MOST:
        report.say(f"  ... and {len(lines) - _MOST:,} more")


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class PackOptions(Options):
    """Pack data into a few Arrow files, fast to read in any order and easy to copy.

    Packs all splits or the one named; images keep their bytes and order. Unreadable images are
    skipped and reported, with exit code 3. Needs pyarrow: pip install 'allmlp[data]'.

    Examples:
        mixer data pack photos packed
        mixer data pack 'downloads/cifar10_*.parquet' cifar10
        mixer data pack hf:owner/name packed --shard-size 1GB
        mixer data pack list.csv:train packed
    """

    shard_size: str = field(default="256MB", metadata={"metavar": "BYTES"})
    """Largest size of a file, e.g. 256MB or 1GB."""

    def shard_bytes(self) -> int:
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)", self.shard_size.strip())
        unit = _UNITS.get(found[2].upper()) if found else None
        size = int(float(found[1]) * unit) if found and unit else 0
        if size < 1:
            fix = "For example 256MB, 1GB or 512MiB"
            raise UserError(f"not a size: {self.shard_size!r}", where="shard_size", fix=fix)
        return size


def pack(source: str, folder: str, options: PackOptions) -> Done:
    import shlex

    from allmlp.console import Reporter, report_bad_images, report_notes
    from allmlp.data.source import only_images
    from allmlp.data.sources import notes_of, open_splits, read_from
    from allmlp.data.sources.packed import pack_splits
    from allmlp.io import check_not_inputs, check_output_folder, expand, path_in_errors

    report, target, shard_bytes = Reporter(), expand(folder), options.shard_bytes()
    check_output_folder(target)
    splits = open_splits(source)
    for part in splits.values():
        only_images(part, "packed data")
    report_notes(notes_of(splits))
    check_not_inputs([target], read_from(source))
    with report.progress(sum(map(len, splits.values())), "images") as bar, path_in_errors(target):
        packed = pack_splits(splits, target, shard_bytes=shard_bytes, on_item=bar.advance)
    for split, result in packed.items():
        size = sum(file.size for file in result.files)
        files, images = plural(len(result.files), "file"), plural(result.num_images, "image")
        out = f", {len(result.bad):,} left out" if result.bad else ""
        report.say(f"{split:10} {images} in {files}, {size:,} bytes{out}")
    report.say(f"written    {target}")
    if "train" in packed:
        report.say(f"next       {shlex.join(['mixer', 'train', '--data', str(target)])}")
    code = report_bad_images([bad for result in packed.values() for bad in result.bad])
    splits = {split: {"images": r.num_images, "bad": r.bad} for split, r in packed.items()}
    return Done({"written": target, "splits": splits}, code)
