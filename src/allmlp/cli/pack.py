"""`mixer data pack` and `mixer data index`."""

from __future__ import annotations

import re
from typing import Annotated

from tyro.conf import Positional, arg

from allmlp.cli.arguments import warn_of_bad, warn_of_notes
from allmlp.errors import UserError, plural

SourceName = Annotated[Positional[str], arg(metavar="SOURCE")]
OutputFolder = Annotated[Positional[str], arg(metavar="FOLDER")]
ByteSize = Annotated[str, arg(metavar="BYTES")]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def pack(source: SourceName, folder: OutputFolder, /, *, shard_size: ByteSize = "256MB") -> int:
    """Write data as tar shards, which are fast to read in any order and few files to copy.

    Every split is packed; images keep their bytes and their order. Those that cannot be read are
    left out and named, and the exit code is 3.

    Examples of use:
        mixer data pack photos packed
        mixer data pack 'downloads/cifar10_*.parquet' cifar10
        mixer data pack hf:owner/name packed --shard-size 1GB
        mixer data pack list.csv:train packed

    Args:
        source: a folder, a list (.csv, .jsonl), Parquet files, hf:owner/name, or SOURCE:SPLIT.
        folder: where the shards go; it is made if it is not there.
        shard_size: the largest size of a tar file, such as 256MB or 1GB.
    """
    import shlex

    from allmlp.console import Reporter
    from allmlp.data.sources import open_splits, read_from
    from allmlp.data.write_shards import pack_splits
    from allmlp.io import check_not_inputs, check_output_folder, expand, path_in_errors

    report = Reporter()
    shard_bytes = parse_bytes(shard_size, "--shard-size")
    target = expand(folder)
    check_output_folder(target)
    splits = open_splits(source)
    warn_of_notes(*splits.values())
    check_not_inputs([target], read_from(source))
    total = sum(len(each) for each in splits.values())
    with report.progress(total, "images") as bar, path_in_errors(target):
        packed = pack_splits(splits, target, shard_bytes=shard_bytes, on_item=bar.advance)
    for split, each in packed.items():
        size = sum(shard.size for shard in each.shards)
        tars = plural(len(each.shards), "shard")
        out = f", {len(each.bad):,} left out" if each.bad else ""
        report.say(f"{split:10} {plural(each.num_images, 'image')} in {tars}, {size:,} bytes{out}")
    report.say(f"written    {target}")
    if "train" in packed:
        report.say(f"next       {shlex.join(['mixer', 'train', '--data', str(target)])}")
    return warn_of_bad([bad for each in packed.values() for bad in each.bad])


def index(folder: OutputFolder, /, *, unlabelled: bool = False) -> None:
    """Write the index that makes WebDataset tars of another tool a source of data.

    Images are KEY.jpg (or .png, ...) with their labels in KEY.cls or KEY.json; the split is read
    from the names of the tars. The tars are not changed.

    Examples of use:
        mixer data index downloads/imagenet-shards
        mixer data index downloads/photos --unlabelled

    Args:
        folder: the folder with the .tar files; the index goes there too.
        unlabelled: the images have no labels: for the verb predict only.
    """
    import os
    from pathlib import Path

    from allmlp.data.foreign_shards import index_shards
    from allmlp.data.shards import load_index

    for path in index_shards(Path(os.path.expanduser(folder)), labels=not unlabelled):
        found = load_index(path)
        tars = plural(len(found.shards), "tar")
        classes = "no labels" if unlabelled else plural(len(found.class_names), "class")
        print(f"written  {path}: {plural(len(found), 'image')} in {tars}, {classes}")


def parse_bytes(text: str, where: str) -> int:
    """Returns the number of bytes that a text such as 256MB, 1.5GiB or 500000 means.

    Raises:
        UserError: it means none, or less than one.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if size < 1:
        raise UserError(f"not a size: {text!r}", where=where, fix="such as 256MB, 1GB or 512MiB")
    return size
