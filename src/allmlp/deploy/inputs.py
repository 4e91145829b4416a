"""Inputs of predict: files, folders, patterns, URLs, a list on standard input, images in memory
(PIL, NumPy arrays, encoded bytes), or a data source."""

from __future__ import annotations

import glob
import http.client
import operator
import os
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from allmlp.data.archive import entries, is_archive
from allmlp.data.image import encoded_image
from allmlp.data.source import ImageFiles, PackedStrings, Source, labelled, unlabelled
from allmlp.data.sources import is_data, open_source
from allmlp.data.sources.arrays import ArrayRows
from allmlp.data.sources.folders import no_images, passed_over_note, scan_images
from allmlp.errors import UserError, between, one_of
from allmlp.names import NAME

STANDARD_INPUT = "-"
AnyImage = str | Path | bytes | np.ndarray | Image.Image
File = tuple[str, bytes]  # name, encoded image
Check = Callable[[int], None]  # called after every batch; raises to abort
_LARGEST_DOWNLOAD, _SECONDS = 2**28, 30  # bytes; timeout


@dataclass(frozen=True)
class GivenImages(ImageFiles):
    """Files and URLs by name, and encoded images in memory by index."""

    encoded: dict[int, bytes] = field(default_factory=dict)

    def read(self, index: int) -> bytes:
        if index in self.encoded:
            return self.encoded[index]
        name = self.item_name(index)
        return _download(name) if is_url(name) else super().read(index)


def is_url(item: object) -> bool:
    return isinstance(item, str) and item.startswith(("http://", "https://"))


def _download(url: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": NAME})  # some refuse Python's
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            content = answer.read(_LARGEST_DOWNLOAD + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the answer
        raise UserError(f"cannot download the image: {error}", where=url) from error
    if len(content) > _LARGEST_DOWNLOAD:
        raise UserError(f"the file is larger than {_LARGEST_DOWNLOAD:,} bytes", where=url)
    return content


def find_images(inputs: Sequence[AnyImage], listed: Sequence[str] | None = None) -> Source:
    """Returns the images given by any number of inputs, in order, or by one data source.

    `listed` are the paths that "-" stands for; None reads them from standard input.
    """
    if not inputs:
        raise UserError("no images given", fix="Give files, folders or patterns such as 'a/*.jpg'")
    if sum(isinstance(item, str) and item == STANDARD_INPUT for item in inputs) > 1:
        raise UserError("'-' is given more than once: standard input is read once", fix="Give one")
    alone = inputs[0] if len(inputs) == 1 else None
    if _are_rows(alone):
        return unlabelled(ArrayRows(np.asarray(alone), "x"), "x")
    if isinstance(alone, str | Path) and not is_url(alone) and is_data(str(alone)):
        return open_source(str(alone), labels="any")
    passed_over: Counter[str] = Counter()
    encoded: dict[int, bytes] = {}
    paths = PackedStrings(_names(inputs, listed, passed_over, encoded))
    return unlabelled(GivenImages(paths, encoded=encoded), "images", passed_over_note(passed_over))


def labelled_images(data: Any, class_names: list[str]) -> Source:
    """Returns images with labels as a source, given as (images, labels) or (image, label) pairs.

    A label is a class's name or number, or a list of these for several labels per image.
    """
    form = "Give (images, labels), or a list of (image, label) pairs"
    try:
        images, labels = data if isinstance(data, tuple) else zip(*data, strict=True)
        images, labels = images if _are_rows(images) else list(images), list(labels)
        if len(images) != len(labels):
            raise ValueError(f"there are {len(images):,} images and {len(labels):,} labels")
    except (TypeError, ValueError) as error:
        raise UserError(f"not images with labels: {error}", fix=form, code="wrong-type") from error
    place = {name: at for at, name in enumerate(class_names)}

    def number_of(label: Any) -> int:
        if isinstance(label, str):
            return place[one_of("class", label, place)]
        try:
            return int(between("a label", operator.index(label), 0, len(class_names) - 1))
        except TypeError as error:
            what = f"a label is a class's name or number, got {label!r}"
            raise UserError(what, fix=form, code="wrong-type") from error

    if any(isinstance(label, list | tuple | set) for label in labels):
        numbers = np.zeros((len(labels), len(class_names)), dtype=bool)
        for row, several in zip(numbers, labels, strict=True):
            row[[number_of(label) for label in several]] = True
    else:
        numbers = np.array([number_of(label) for label in labels], dtype=np.int64)
    if _are_rows(images):
        rows = ArrayRows(np.asarray(images), "x")
        rows.check_finite()
        return labelled(rows, "x", class_names, numbers)
    names, encoded = [], {}
    for at, image in enumerate(images):
        if isinstance(image, str | Path):
            names.append(str(image if is_url(image) else Path(image).expanduser()))
        else:
            names.append(f"images[{at}]")
            encoded[at] = encoded_image(image, f"image {at}")
    given = GivenImages(PackedStrings(names), encoded=encoded)
    return labelled(given, "images", class_names, numbers)


def _are_rows(values: Any) -> bool:
    """Whether these are rows of an array rather than an image, whose pixels are uint8."""
    return isinstance(values, np.ndarray) and values.dtype != np.uint8


def _names(
    inputs: Sequence[AnyImage],
    listed: Sequence[str] | None,
    passed_over: Counter[str],
    encoded: dict[int, bytes],
) -> Iterator[str]:
    """Yields the name of every image; adds those in memory to `encoded`."""
    count = 0
    for position, item in enumerate(inputs):
        if not isinstance(item, str | Path):
            encoded[count] = encoded_image(item, f"image {position}")
            found: Any = [f"images[{position}]"]
        elif str(item) == STANDARD_INPUT:
            found = read_list() if listed is None else listed
        elif is_url(item):
            found = [str(item)]
        elif is_data(str(item)):
            what = f"{str(item)!r} is a data source, which must be the only input"
            raise UserError(what, fix="Give it to a command of its own")
        else:
            found = _files(str(item), passed_over)
        for name in found:
            count += 1
            yield name


def _files(given: str, passed_over: Counter[str]) -> Iterator[str]:
    path = Path(os.path.expanduser(given))
    if path.is_dir() or entries(str(path)) is not None:
        names = scan_images(str(path), passed_over=passed_over)
        found = (os.path.join(path, name) for name in names)
    elif path.exists() or is_archive(path):
        found = iter([str(path)])
    else:
        found = filter(os.path.isfile, sorted(glob.glob(str(path), recursive=True)))
    first = next(found, None)
    if first is not None:
        yield first
        yield from found
    elif path.is_dir() or is_archive(path):
        raise no_images(path)
    else:
        what = f"no such file or folder: {given!r}"
        raise UserError(what, where=path.absolute(), code="not-found")


def read_list() -> PackedStrings:
    """Returns the paths on standard input, separated by newlines or zero bytes."""
    stream = sys.stdin.buffer
    # Paths with newlines need zero bytes as separators.
    data = b"" if stream.isatty() else stream.read()
    lines = data.split(b"\0") if b"\0" in data else data.splitlines()
    paths = PackedStrings(os.fsdecode(line) for line in lines if line)
    if not len(paths):
        fix = "find FOLDER -name '*.jpg' | mixer predict MODEL -"
        raise UserError("there are no images on standard input", where="-", fix=fix)
    return paths
