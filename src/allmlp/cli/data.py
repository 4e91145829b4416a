"""`mixer data check` and `mixer data pack`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from allmlp.errors import UserError, plural, some_of
from allmlp.options import Done, Options

if TYPE_CHECKING:
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
    for line in _lines(values, duplicates, problems):
        report.say(line)
    if options.exclude is not None and duplicates is not None:
        excluded = list(duplicates.to_exclude())
        text = exclude_list(splits, excluded, source)
        if options.exclude == STANDARD_OUTPUT:
            print(text, end="", flush=True)
        else:
            atomic_write(expand(options.exclude), text)
        counts = Counter(split for split, *_ in excluded)
        report.say(f"\nto exclude  {options.exclude}: {_counted(counts) or 'no images'}")
    if folder is None:
        report.say("\nfor complete lists, and figures of samples and duplicates: --output FOLDER")
    else:
        written = save_report(values, duplicates, folder) + save_check(splits, duplicates, folder)
        report.say(f"\nwritten  {folder}: {', '.join(written)}")
    is_bad = problems or any(split["unreadable"] for split in values["splits"].values())
    return Done({**values, "problems": problems or []}, 3 if is_bad else 0)


def _row_of(name: str, split: Mapping[str, Any]) -> dict[str, str]:
    from rich import filesize

    counts = [count for count in split["class_counts"].values() if count] or [0]
    sizes = {rank: f"{height}x{width}" for rank, (height, width) in split["sizes"].items()}
    return {
        "split": name,
        "images": f"{split['num_images']:,}",
        "classes": f"{len(counts):,}",
        "per class": " to ".join(f"{n:,}" for n in dict.fromkeys((min(counts), max(counts)))),
        "bytes": filesize.decimal(split["num_bytes"]),
        "smallest HxW": sizes.get("smallest", ""),
        "median": sizes.get("median", ""),
        "largest": sizes.get("largest", ""),
    }


def _lines(
    values: Mapping[str, Any], duplicates: Duplicates | None, problems: list[str] | None
) -> Iterator[str]:
    """Yields what there is in the splits, and what is wrong with it."""
    from allmlp.console import table_of
    from allmlp.data.check import HUGE_PIXELS, TINY_SIDE
    from allmlp.data.image import DARK

    splits = values["splits"]
    yield f"data     {values['source']}\n"
    yield from table_of(_row_of(name, split) for name, split in splits.items())
    names = dict.fromkeys(name for split in splits.values() for name in split["class_counts"])
    yield f"\nclasses: {some_of(list(names), _MOST)}"
    yield from (f"note: {note}" for note in values["notes"])
    yield ""
    for name, split in splits.items():
        yield f"{name}: {_counted({**split['formats'], **split['modes']})}"
        if split["labels_per_image"]:
            numbers = split["labels_per_image"].items()
            per_image = ", ".join(f"{images:,} with {number}" for number, images in numbers)
            yield f"  labels per image: {per_image}"
            yield f"  images per class: {_counted(split['class_counts'])}"
        missing = [kind for kind, count in split["class_counts"].items() if not count]
        if missing:
            yield f"  classes without images: {some_of(missing, _MOST)}"
    dark = f"nearly black: no sample above {DARK:,} of 65,535"
    for key, what in {
        "unreadable": "unreadable images",
        "tiny": f"tiny images, a side under {TINY_SIDE} px",
        "huge": f"huge images, over {HUGE_PIXELS // 10**6} megapixels or 20 MB",
        "dark": f"16-bit images, {dark} (scale 12 bits up by 16, and save the images again)",
    }.items():
        images = [(name, image) for name, split in splits.items() for image in split[key]]
        lines = [f"{at}[{im['index']}] {im['name']}: {im['what']}" for at, im in images]
        if lines or key == "unreadable":
            yield from _listed(what, lines)
    if values["shared_groups"]:
        yield from _listed("groups in several splits (leakage)", values["shared_groups"])
    if duplicates is not None:
        yield from _lines_of(duplicates)
    if problems is not None:
        yield from _listed("problems of the packed data", problems)


def _lines_of(found: Duplicates) -> Iterator[str]:
    from allmlp.console import table_of
    from allmlp.data.check import DISTANCE, KINDS

    yield f"\nduplicates: {plural(len(found), 'pair')}"
    if len(found):
        kinds = _counted(Counter(KINDS[kind] for kind in found.pairs["kind"].tolist()))
        yield f"{kinds}; images of a split (row) that have a duplicate in a split (column):"
        yield from table_of(
            {"split": name} | {f"in {other}": f"{n:,}" for other, n in row.items()}
            for name, row in found.counts().items()
        )
        yield f"of different classes: {plural(int(found.other_label().sum()), 'pair')}"
    if found.num_plain:
        why = "have hardly any texture or fewer than 16 pixels a side"
        yield f"{plural(found.num_plain, 'image')} {why}: compared for equal pixels only"
    if found.distance < DISTANCE:
        how = f"to {found.distance} bits of the hash" if found.distance >= 0 else "to equal pixels"
        yield f"very many images are alike: near duplicates were looked for up {how} only"


def _counted(counts: Mapping[Any, int]) -> str:
    return some_of([f"{kind} {count:,}" for kind, count in counts.items()], _MOST)


def _listed(title: str, lines: Sequence[str]) -> Iterator[str]:
    yield f"\n{title}: {len(lines):,}"
    yield from (f"  {line}" for line in lines[:_MOST])
    if len(lines) > _MOST:
        yield f"  ... and {len(lines) - _MOST:,} more"


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
