"""What images are meant: files, folders, patterns, a list on standard input, or a data source."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from allmlp.data.source import ImageFiles, PackedStrings, Source, unlabelled
from allmlp.data.sources import is_data, open_source
from allmlp.data.sources.folders import no_images, passed_over_note, scan_images
from allmlp.errors import UserError

STANDARD_INPUT = "-"
_BLOCK = 2**16  # bytes


def find_images(inputs: Sequence[str | Path], listed: Sequence[str] | None = None) -> Source:
    """Returns the images that files, folders, glob patterns or data sources name, in that order.

    Args:
        inputs: of each kind any number, "-" once at most; or one source of data alone.
        listed: the paths that "-" means; None reads them from standard input.

    Raises:
        UserError: nothing is named, or one of them names nothing.
    """
    given = [str(each) for each in inputs]
    if not given:
        raise UserError("no images given", fix="Give files, folders or patterns such as 'a/*.jpg'")
    if given.count(STANDARD_INPUT) > 1:
        raise UserError("'-' is given more than once: standard input is read once", fix="Give one")
    if len(given) == 1 and is_data(given[0]):
        return open_source(given[0], labels="any")
    passed_over: Counter[str] = Counter()
    paths = PackedStrings(_paths(given, listed, passed_over))
    notes = passed_over_note(passed_over)
    return unlabelled(ImageFiles(paths), "images", notes)


def _paths(
    inputs: list[str], listed: Sequence[str] | None, passed_over: Counter[str]
) -> Iterator[str]:
    for given in inputs:
        if given == STANDARD_INPUT:
            yield from read_list() if listed is None else listed
            continue
        if is_data(given):
            what = f"{given!r} is a source of data, which stands alone"
            raise UserError(what, fix="Give it to a command of its own")
        path, found = Path(os.path.expanduser(given)), 0
        for each in _files(path, passed_over):
            found += 1
            yield each
        if found:
            continue
        if not path.is_dir():
            raise UserError(f"no such file or folder: {given!r}", where=path.absolute())
        if any(path.glob("*.tar")):
            what = f"the folder has tar files and no index of them: {given!r}"
            fix = f"Write one, once: mixer data index {path}"
            fix += " (with --unlabelled where the images have no labels)"
            raise UserError(what, where=path.absolute(), fix=fix)
        raise no_images(path)


def _files(path: Path, passed_over: Counter[str]) -> Iterator[str]:
    if path.is_dir():
        found = scan_images(str(path), passed_over=passed_over)
        yield from (os.path.join(path, name) for name in found)
    elif path.exists():
        yield str(path)
    else:
        yield from filter(os.path.isfile, sorted(glob.glob(str(path), recursive=True)))


def read_list() -> PackedStrings:
    """Returns the paths on standard input: one a line, or with a zero byte behind each.

    A path that is not there becomes a row with an error, as any other bad image.

    Raises:
        UserError: there is none, or somebody would have to type them.
    """
    stream = sys.stdin.buffer
    if stream.isatty():
        what = "'-' reads a list of images, and standard input is a terminal"
        raise UserError(what, fix="find FOLDER -name '*.jpg' | mixer predict MODEL -")
    paths = PackedStrings(_separated(stream))
    if not len(paths):
        raise UserError("no images on standard input", where="-", fix="Give one path a line")
    return paths


def _separated(stream: IO[bytes]) -> Iterator[str]:
    """The paths, as they come; only with zero bytes between them may they hold a newline."""
    block = stream.read(_BLOCK)
    separator, rest = b"\0" if b"\0" in block else b"\n", b""
    while block:
        *whole, rest = (rest + block).split(separator)
        yield from (os.fsdecode(path) for path in map(_bare, whole) if path)
        block = stream.read(_BLOCK)
    if _bare(rest):
        yield os.fsdecode(_bare(rest))


def _bare(path: bytes) -> bytes:
    return path.removesuffix(b"\r")
