"""`mixer data pack`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from allmlp.errors import UserError, plural
from allmlp.options import Done, Options

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
        """Returns the size in bytes."""
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)", self.shard_size.strip())
        unit = _UNITS.get(found[2].upper()) if found else None
        size = int(float(found[1]) * unit) if found and unit else 0
        if size < 1:
            fix = "For example 256MB, 1GB or 512MiB"
            raise UserError(f"not a size: {self.shard_size!r}", where="shard_size", fix=fix)
        return size


def pack(source: str, folder: str, options: PackOptions) -> Done:
    """Packs data and prints a summary."""
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
    total = sum(map(len, splits.values()))
    with report.progress(total, "images") as bar, path_in_errors(target):
        packed = pack_splits(splits, target, shard_bytes=shard_bytes, on_item=bar.advance)
    for split, result in packed.items():
        size = sum(file.size for file in result.files)
        files, out = plural(len(result.files), "file"), ""
        if result.bad:
            out = f", {len(result.bad):,} left out"
        images = plural(result.num_images, "image")
        report.say(f"{split:10} {images} in {files}, {size:,} bytes{out}")
    report.say(f"written    {target}")
    if "train" in packed:
        report.say(f"next       {shlex.join(['mixer', 'train', '--data', str(target)])}")
    code = report_bad_images([bad for result in packed.values() for bad in result.bad])
    splits = {split: {"images": r.num_images, "bad": r.bad} for split, r in packed.items()}
    return Done({"written": target, "splits": splits}, code)
