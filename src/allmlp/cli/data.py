"""`mixer data check` and `mixer data pack`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from allmlp.errors import UserError, plural
from allmlp.options import Done, Options


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
    from allmlp.data.check import FILES, check_source, counted, report_lines, save_report
    from allmlp.data.fingerprint import exclude_list
    from allmlp.data.source_spec import parse_name
    from allmlp.data.sources import open_splits, packed, read_from
    from allmlp.io import (
        STANDARD_OUTPUT,
        atomic_write,
        check_not_inputs,
        check_output_file,
        expand,
        made_folder,
    )
    from allmlp.plots import save_check

    report = Reporter(stderr=options.exclude == STANDARD_OUTPUT)
    splits, overwrite = open_splits(source), options.overwrite
    inputs = list(read_from(source))

    def images() -> Iterator[str]:
        return (split.item_name(at) for split in splits.values() for at in range(len(split)))

    if options.exclude not in (None, STANDARD_OUTPUT):
        check_output_file(expand(options.exclude), overwrite=overwrite)
        check_not_inputs([expand(options.exclude)], inputs, images())
    folder = made_folder(options.output, FILES, overwrite=overwrite, inputs=inputs, images=images())
    with report.progress(sum(map(len, splits.values())), "images") as bar:
        values, duplicates = check_source(
            splits,
            source,
            duplicates=options.duplicates,
            num_workers=options.num_workers,
            on_progress=bar.advance,
        )
    path = parse_name(source).path
    problems = packed.verify(path) if packed.is_packed(path) else None
    for line in report_lines(values, duplicates, problems):
        report.say(line)
    if options.exclude is not None and duplicates is not None:
        excluded = list(duplicates.to_exclude())
        text = exclude_list(splits, excluded, source)
        if options.exclude == STANDARD_OUTPUT:
            print(text, end="", flush=True)
        else:
            atomic_write(expand(options.exclude), text)
        counts = Counter(split for split, *_ in excluded)
        report.say(f"\nto exclude  {options.exclude}: {counted(counts) or 'no images'}")
    if folder is None:
        report.say("\nfor complete lists, and figures of samples and duplicates: --output FOLDER")
    else:
        written = save_report(values, duplicates, folder) + save_check(splits, duplicates, folder)
        report.say(f"\nwritten  {folder}: {', '.join(written)}")
    is_bad = problems or any(split["unreadable"] for split in values["splits"].values())
    return Done({**values, "problems": problems or []}, 3 if is_bad else 0)


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
        from pydantic import ByteSize, Field, TypeAdapter

        text = self.shard_size.strip()
        try:
            if not re.fullmatch(r"\d{1,15}(\.\d{1,9})?\s*([KMGkmg]i?)?[Bb]?", text):
                raise ValueError("ByteSize ignores what follows a size")
            return TypeAdapter(Annotated[ByteSize, Field(gt=0)]).validate_python(text)
        except ValueError as error:
            what, fix = f"not a size: {self.shard_size!r}", "For example 256MB, 1GB or 512MiB"
            raise UserError(what, where="shard_size", fix=fix) from error


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
