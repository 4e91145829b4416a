"""`mixer data check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from allmlp.errors import UserError, plural
from allmlp.options import Options

if TYPE_CHECKING:
    from allmlp.console import Reporter
    from allmlp.data.check import Report, SplitReport
    from allmlp.data.duplicates import Duplicates

_MOST = 20  # lines of a list on the screen


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Options):
    """Look at data before training: what it contains, what is damaged, and duplicates.

    Examples:
        mixer data check FOLDER
        mixer data check FOLDER --output report
        mixer data check cifar10.parquet --exclude copies.txt
        mixer data check FOLDER:test --duplicates off

    All splits are checked, or with :train, :validation or :test that one. Every image is read and
    decoded, and the checksums of packed data are verified. Exit code 3: some images cannot be
    decoded, or packed data is damaged.
    """

    duplicates: Literal["near", "exact", "off"] = "near"
    """Near: also encoded again, resized, brightened, or slightly cropped."""
    exclude: str | None = None
    """File for the list of images to exclude from training: those of train that are also in validation or test, those of validation that are in test, and later copies in one split; - is standard output."""  # noqa: E501
    output: str | None = None
    """Folder for check.json, bad_files.txt, duplicates.csv and figures."""
    overwrite: bool = False
    """Replace files that exist."""
    num_workers: int | None = None
    """Processes that read images."""

    def __post_init__(self) -> None:
        if self.exclude is not None and self.duplicates == "off":
            what = "the list of images to exclude names duplicates, and duplicates=off finds none"
            raise UserError(what, where="exclude", fix="Leave out one of the two")


def check(source: str, options: CheckOptions) -> int:
    """Checks data and prints what was found; returns the exit code."""
    from allmlp.console import Reporter
    from allmlp.data.check import FILES, check_source
    from allmlp.data.exclude import exclude_list
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
        folder.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    with report.progress(sum(map(len, splits.values())), "images") as bar:
        result = check_source(
            splits,
            source,
            duplicates=options.duplicates,
            num_workers=options.num_workers,
            on_progress=bar.advance,
        )
    print_check(report, result)
    path, problems = parse_name(source).path, []
    if path.is_dir() and packed.is_packed(path):
        problems = packed.verify(path)
        if problems:
            _say_list(report, f"problems of the packed data: {len(problems):,}", problems, None)
        else:
            report.say("\npacked data: all files have their sizes and checksums")
    if options.exclude is not None and result.duplicates is not None:
        excluded = exclude_list(result.duplicates, source)
        if options.exclude == STANDARD_OUTPUT:
            print(excluded.to_text(), end="", flush=True)
        else:
            text = excluded.to_text().encode(errors="surrogateescape")
            atomic_write(expand(options.exclude), text)
        counts = {name: sum(image.split == name for image in excluded.images) for name in splits}
        listed = ", ".join(f"{count:,} of {name}" for name, count in counts.items() if count)
        report.say(f"\nto exclude  {options.exclude}: {listed or 'no images'}")
    if folder is None:
        report.say("\nfor complete lists, and figures of samples and duplicates: --output FOLDER")
    else:
        written = [*result.save(folder), *save_check(splits, result.duplicates, folder)]
        report.say(f"\nwritten  {folder}: {', '.join(written)}")
    return 3 if result.unreadable or problems else 0


def print_check(report: Reporter, result: Report) -> None:
    """Prints a table of the splits, what is unusual or wrong, and duplicates."""
    from allmlp.console import table
    from allmlp.data.check import HUGE_PIXELS, TINY_SIDE, format_bytes
    from allmlp.data.image import DARK

    number = sum(split.num_images for split in result.splits.values())
    size = format_bytes(sum(split.num_bytes for split in result.splits.values()))
    report.say(f"data     {result.source}: {plural(number, 'image')}, {size}\n")
    rows = [_row(name, split) for name, split in result.splits.items()]
    headers = ["split", "images", "classes", "per class", "bytes", "smallest HxW", "largest"]
    for line in table(headers, rows):
        report.say(line)
    names = list(dict.fromkeys(n for split in result.splits.values() for n in split.class_counts))
    report.say(f"\nclasses: {_some(names)}")
    for note in result.notes:
        report.say(f"note: {note}")
    report.say()
    for name, split in result.splits.items():
        kinds, modes, odd = (
            ", ".join(f"{what} {count:,}" for what, count in counts.items() if count)
            for counts in (split.formats, split.modes, split.oddities)
        )
        report.say(f"{name}: {kinds or 'nothing readable'}; {modes or 'no mode'}")
        report.say(f"  sizes (HxW): {split.size_summary}")
        if odd:
            report.say(f"  special: {odd}")
        if split.missing_classes:
            report.say(f"  classes without images: {_some(split.missing_classes)}")
    for what, key, file in (
        ("unreadable images", "unreadable", "bad_files.txt"),
        (f"tiny images, a side under {TINY_SIDE} px", "tiny", "check.json"),
        (f"huge images, over {HUGE_PIXELS // 10**6} megapixels or 20 MB", "huge", "check.json"),
        (f"16-bit images, nearly black: no sample above {DARK:,} of 65,535", "dark", "check.json"),
    ):
        lines = [
            f"{name}[{image.index}] {image.name}: {image.what}"
            for name, split in result.splits.items()
            for image in getattr(split, key)
        ]
        if len(lines) == number and key == "tiny":
            report.say(f"\n{what}: all")
        elif lines:
            _say_list(report, f"{what}: {len(lines):,}", lines, file)
            if key == "dark":
                fix = "scale the values up (12 bits: by 16) and save the images again"
                report.say(f"  to fix: {fix}")
    if not result.unreadable:
        report.say("\nunreadable images: none")
    if result.duplicates is not None:
        print_duplicates(report, result.duplicates)


def print_duplicates(report: Reporter, found: Duplicates) -> None:
    """Prints pairs of duplicates by kind, where they are, and those of different classes."""
    import numpy as np

    from allmlp.console import table
    from allmlp.data.duplicates import DISTANCE, KINDS

    if len(found):
        counts = np.bincount(found.kind, minlength=len(KINDS))
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in zip(KINDS, counts, strict=True))
        groups = plural(len(found.groups()), "group")
        report.say(f"\nduplicates: {plural(len(found), 'pair')} ({kinds}) in {groups}")
        report.say("images of a split (row) that have a duplicate in a split (column)")
        rows = [[name, *(f"{n:,}" for n in row.values())] for name, row in found.counts().items()]
        for line in table(["split", *(f"in {name}" for name in found.splits)], rows):
            report.say(line)
    else:
        report.say("\nduplicates: none")
    lines = []
    for number in np.flatnonzero(found.other_label()):
        pair, ends = found.pair(int(number)), []
        for split, index in (pair.first, pair.second):
            data = found.splits[split]
            label = data.class_names[int(data.labels[index])]
            ends.append(f"{split}[{index}] {data.item_name(index)} ({label})")
        lines.append(f"{' and '.join(ends)}: {pair.kind}")
    if lines:
        title = f"duplicates of different classes: {plural(len(lines), 'pair')}"
        _say_list(report, title, lines, "duplicates.csv")
    if found.num_plain:
        why = "have hardly any texture or fewer than 16 pixels a side"
        report.say(f"{plural(found.num_plain, 'image')} {why}: compared for equal pixels only")
    if found.distance < DISTANCE or found.unchecked:
        report.say(
            f"very many images are alike: near duplicates were looked for within"
            f" {found.distance} bits of the hash only, not {DISTANCE};"
            f" {plural(found.unchecked, 'pair')} with equal hashes were not compared"
        )


def _row(name: str, split: SplitReport) -> list[str]:
    from allmlp.data.check import format_bytes

    counts = [count for count in split.class_counts.values() if count] or [0]
    per_class = f"{min(counts):,}"
    if min(counts) < max(counts):
        per_class += f" to {max(counts):,}"
    classes = f"{len(split.class_counts) - len(split.missing_classes):,}"
    ends = (split.sizes.get(key, (0, 0)) for key in ("smallest", "largest"))
    sizes = [f"{height}x{width}" for height, width in ends]
    size = format_bytes(split.num_bytes)
    return [name, f"{split.num_images:,}", classes, per_class, size, *sizes]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST:,} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more


def _say_list(report: Reporter, title: str, lines: list[str], file: str | None) -> None:
    report.say(f"\n{title}")
    for line in lines[:_MOST]:
        report.say(f"  {line}")
    if len(lines) > _MOST:
        where = f"; all in {file}, with --output FOLDER" if file else ""
        report.say(f"  ... and {len(lines) - _MOST:,} more{where}")
