"""`mixer data check`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from allmlp.cli.arguments import File, Folder, Number
from allmlp.errors import UserError, plural

if TYPE_CHECKING:
    from allmlp.console import Reporter
    from allmlp.data.check import Report, SplitReport
    from allmlp.data.duplicates import Duplicates

CheckedData = Annotated[Positional[str], arg(metavar="SOURCE")]
Wanted = Annotated[Literal["near", "exact", "off"], arg(metavar="near|exact|off")]
_MOST = 20  # lines of a list on the screen


def check(
    source: CheckedData,
    /,
    *,
    duplicates: Wanted = "near",
    drop_list: File = None,
    output: Folder = None,
    overwrite: bool = False,
    num_workers: Number = None,
) -> int:
    """Look at data before training: what is in it, what is damaged, what is there twice.

    Examples of use:
        mixer data check FOLDER
        mixer data check FOLDER --output report
        mixer data check cifar10.parquet --drop-list copies.txt
        mixer data check FOLDER:test --duplicates off

    Every image is read and decoded, and shards are compared with their sums. Exit code 3 says that
    some images cannot be decoded, or that shards are damaged.

    Args:
        source: the data: FOLDER, digits, ...; all its splits, or with :train, :validation or :test
            behind it that one.
        duplicates: near (encoded again, scaled, lightened, a little cut), exact or off.
        drop_list: a file for the list of images to leave out: those of train that are in validation
            or test too, those of validation that are in test, and later copies in one split; - is
            standard output.
        output: a folder for check.json, bad_files.txt, duplicates.csv and the pictures.
        overwrite: replace those that are there, and the drop list.
        num_workers: processes that read images.
    """
    from allmlp.console import Reporter
    from allmlp.data.check import FILES, check_source
    from allmlp.data.sources import open_splits, read_from
    from allmlp.io import (
        STANDARD_OUTPUT,
        check_not_inputs,
        check_output_file,
        check_output_folder,
        expand,
    )

    if drop_list is not None and duplicates == "off":
        what = "a drop list names duplicates, and --duplicates off looks for none"
        raise UserError(what, where="--drop-list", fix="Leave one of the two out")
    report = Reporter(stderr=drop_list == STANDARD_OUTPUT)
    outputs: list[Path] = []
    folder = None if output is None else expand(output)
    if folder is not None:
        check_output_folder(folder, FILES, overwrite=overwrite)
        outputs += [folder, *map(folder.joinpath, FILES)]
    if drop_list not in (None, STANDARD_OUTPUT):
        check_output_file(expand(drop_list), overwrite=overwrite)
        outputs.append(expand(drop_list))
    splits = open_splits(source)
    items = (each.item_name(at) for each in splits.values() for at in range(len(each)))
    check_not_inputs(outputs, read_from(source), items)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    with report.progress(sum(map(len, splits.values())), "images") as bar:
        result = check_source(
            splits,
            source,
            duplicates=duplicates,
            num_workers=num_workers,
            on_progress=bar.advance,
        )
    print_check(report, result)
    problems = _shard_problems(source)
    if problems == []:
        report.say("\nshards: every tar has the size, the sum and the members that its index says")
    if problems:
        _say_list(report, f"problems of the shards: {len(problems):,}", problems, None)
    if drop_list is not None and result.duplicates is not None:
        _write_list(report, result.duplicates, source, drop_list)
    if folder is None:
        report.say("\nthe whole lists, and pictures of samples and duplicates: --output FOLDER")
    else:
        from allmlp.plots import save_check

        written = [*result.save(folder), *save_check(splits, result.duplicates, folder)]
        report.say(f"\nwritten  {folder}: {', '.join(written)}")
    return 3 if result.unreadable or problems else 0


def print_check(report: Reporter, result: Report) -> None:
    """Prints the report: a table of the splits, what is odd, what is wrong, what is there twice."""
    from allmlp.console import table
    from allmlp.data.check import HUGE_PIXELS, TINY_SIDE, format_bytes
    from allmlp.data.image import DARK

    number = sum(split.num_images for split in result.splits.values())
    size = format_bytes(sum(split.num_bytes for split in result.splits.values()))
    report.say(f"data     {result.source}: {plural(number, 'image')}, {size}\n")
    rows = [_row(name, split) for name, split in result.splits.items()]
    headers = ["split", "images", "classes", "images a class", "bytes", "smallest HxW", "largest"]
    for line in table(headers, rows):
        report.say(line)
    names = [
        *dict.fromkeys(each for split in result.splits.values() for each in split.class_counts)
    ]
    report.say(f"\nclasses: {', '.join(names[:_MOST])}" + _more(names))
    for note in result.notes:
        report.say(f"note: {note}")
    report.say()
    for name, split in result.splits.items():
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in split.formats.items())
        modes = ", ".join(f"{mode} {count:,}" for mode, count in split.modes.items())
        odd = ", ".join(f"{what} {count:,}" for what, count in split.oddities.items() if count)
        report.say(f"{name}: {kinds or 'nothing readable'}; {modes or 'no mode'}")
        report.say(f"  sizes (HxW): {split.size_summary}")
        if odd:
            report.say(f"  special: {odd}")
        missing = split.missing_classes()
        if missing:
            report.say(f"  classes without images: {', '.join(missing[:_MOST])}{_more(missing)}")
    for what, key, place in (
        ("unreadable images", "unreadable", "bad_files.txt"),
        (f"tiny images, a side under {TINY_SIDE} px", "tiny", "check.json"),
        (f"huge images, over {HUGE_PIXELS // 10**6} megapixels or 20 MB", "huge", "check.json"),
        (f"16-bit images, nearly black: no sample above {DARK:,} of 65,535", "dark", "check.json"),
    ):
        lines = [
            f"{name}[{each.index}] {each.name}: {each.what}"
            for name, split in result.splits.items()
            for each in getattr(split, key)
        ]
        if len(lines) == number and key == "tiny":
            report.say(f"\n{what}: all")
        elif lines:
            _say_list(report, f"{what}: {len(lines):,}", lines, place)
            if key == "dark":
                report.say(
                    "  to fix: scale the values up (12 bits: by 16) and save the images again"
                )
    if not result.unreadable:
        report.say("\nunreadable images: none")
    if result.duplicates is not None:
        print_duplicates(report, result.duplicates)


def print_duplicates(report: Reporter, found: Duplicates) -> None:
    """Prints what is there twice: pairs by kind, where they are, those of different classes."""
    import numpy as np

    from allmlp.console import table
    from allmlp.data.duplicates import DISTANCE, KINDS

    if len(found):
        counts = np.bincount(found.kind, minlength=len(KINDS))
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in zip(KINDS, counts, strict=True))
        report.say(
            f"\nduplicates: {plural(len(found), 'pair')} ({kinds}) in "
            f"{plural(len(found.groups()), 'group')}"
        )
        names = list(found.splits)
        rows = [[name, *(f"{found.count_with(name, o):,}" for o in names)] for name in names]
        report.say("images with a duplicate, by where they are and where that is")
        for line in table(["split", *(f"in {name}" for name in names)], rows):
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
        said = "have hardly any texture or fewer than 16 pixels a side"
        report.say(f"{plural(found.num_plain, 'image')} {said}: compared for equal pixels only")
    if found.distance < DISTANCE or found.unchecked:
        report.say(
            f"so many pictures are alike that near duplicates were looked for within"
            f" {found.distance} bits of the hash only, not {DISTANCE};"
            f" {plural(found.unchecked, 'pair')} with equal hashes were not compared"
        )


def _row(name: str, split: SplitReport) -> list[str]:
    from allmlp.data.check import format_bytes

    counts = [count for count in split.class_counts.values() if count] or [0]
    a_class = (
        f"{min(counts):,} to {max(counts):,}" if min(counts) < max(counts) else f"{counts[0]:,}"
    )
    classes = f"{sum(1 for count in split.class_counts.values() if count):,}"
    ends = [
        f"{h}x{w}" for key in ("smallest", "largest") for h, w in [split.sizes.get(key, (0, 0))]
    ]
    return [name, f"{split.num_images:,}", classes, a_class, format_bytes(split.num_bytes), *ends]


def _more(names: list[str]) -> str:
    return f" and {len(names) - _MOST:,} more" if len(names) > _MOST else ""


def _say_list(report: Reporter, title: str, lines: list[str], place: str | None) -> None:
    report.say(f"\n{title}")
    for line in lines[:_MOST]:
        report.say(f"  {line}")
    if len(lines) > _MOST:
        where = f"; all in {place}, with --output FOLDER" if place else ""
        report.say(f"  ... and {len(lines) - _MOST:,} more{where}")


def _write_list(report: Reporter, found: Duplicates, source: str, path: str) -> None:
    from allmlp.data.drop_list import drop_list, to_text, write_drop_list
    from allmlp.io import STANDARD_OUTPUT, expand

    drops = drop_list(found, source)
    if path == STANDARD_OUTPUT:
        print(to_text(drops), end="", flush=True)
    else:
        write_drop_list(drops, expand(path))
    by_split = {
        name: sum(1 for each in drops.dropped if each.split == name) for name in found.splits
    }
    said = ", ".join(f"{count:,} of {name}" for name, count in by_split.items() if count)
    report.say(f"\ndrop list  {path}: {said or 'no images'}")


def _shard_problems(source: str) -> list[str] | None:
    """What is wrong with tar shards of ours; None for other data."""
    from allmlp.data.foreign_shards import verify
    from allmlp.data.shards import has_shards
    from allmlp.data.source_names import parse_name

    folder = Path(os.path.expanduser(parse_name(source).base))
    return verify(folder) if folder.is_dir() and has_shards(folder) else None
