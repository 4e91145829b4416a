"""Data sets of the Hugging Face hub: "hf:owner/name[@revision]", through the `datasets` package.

Its files lie in the package's own cache and are read from disk as they are asked for, the images as
they were put in, not decoded. HF_HUB_OFFLINE=1 keeps it to the cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from allmlp.data.classes import Cells, RawLabels
from allmlp.data.source_spec import (
    LABEL_COLUMNS,
    SPLITS,
    SourceSpec,
    choose_column,
    split_named,
)
from allmlp.data.sources.kind import Kind, Records
from allmlp.errors import UserError
from allmlp.io import is_reachable
from allmlp.names import extra

PREFIX = "hf:"


@dataclass
class HubImages:
    """The images of a split; `dataset` gives `column` not decoded: {"bytes": ..., "path": ...}."""

    name: str
    dataset: Any
    column: str

    def __len__(self) -> int:
        return len(self.dataset)

    def item_name(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def read(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = self.dataset[index][self.column] or {}
        data, path = image.get("bytes"), image.get("path")
        if data is None and path:
            try:
                with open(path, "rb") as file:
                    data = file.read()
            except OSError as error:
                what = f"cannot read the file: {error.strerror}: {path}"
                raise UserError(what, where=self.item_name(index)) from error
        if not data:
            raise UserError("the row has no image", where=self.item_name(index))
        return data

    def values_of(self, column: str) -> list[Any] | None:
        """Returns the images' "path"; other columns are not read."""
        if column != "path":
            return None
        names: list[Any] = []
        for batch in self.dataset.with_format("arrow").iter(batch_size=1000):
            for chunk in batch.column(self.column).chunks:
                names += chunk.field("path").to_pylist()
        return names


def open_hub(spec: SourceSpec, labels: bool) -> dict[str, Records]:
    """Returns those splits of a data set that are called train, validation and test."""
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", spec.base)
    if not found:
        fix = "hf:owner/name or hf:owner/name@revision"
        raise UserError(f"not a data set on the hub: {spec.base!r}", fix=fix)
    loaded = _load(found[1], found[2], spec)
    by_split: dict[str, str] = {}
    for theirs in loaded:
        split = split_named(str(theirs))
        if split in by_split:
            what = f"two splits for one: {by_split[split]} and {theirs}"
            raise UserError(what, where=spec.source)
        if split is not None:
            by_split[split] = theirs
    if not by_split:
        what = f"none of the splits is train, validation or test: {', '.join(map(str, loaded))}"
        raise UserError(what, where=spec.source, fix="Save the splits you need as Parquet files")
    splits: dict[str, Records] = {}
    for split in (split for split in SPLITS if split in by_split):
        if len(loaded[by_split[split]]):
            title = f"{spec.source}:{split}"
            splits[split] = _open_split(loaded[by_split[split]], spec, title, labels)
    if not splits:
        raise UserError("the data set has no rows", where=spec.source)
    return splits


def _open_split(dataset: Any, spec: SourceSpec, title: str, labels: bool) -> Records:
    import datasets  # pyright: ignore[reportMissingImports]

    features = dict(dataset.features)
    columns = list(features)
    kinds = {name: type(kind).__name__ for name, kind in features.items()}
    images = [name for name in columns if kinds[name] == "Image"]
    column = choose_column("image", spec, columns, images, ("image", "img"), title)
    if column not in images:
        what = f"column {column!r} is {features[column]}, not of images"
        raise UserError(what, where=title, fix=f"Columns of images: {', '.join(images) or 'none'}")
    undecoded = dataset.select_columns([column])
    undecoded = undecoded.cast_column(column, datasets.Image(decode=False))
    records = HubImages(title, undecoded, column)
    if not labels:
        return Records(records)
    classes = [name for name in columns if kinds[name] == "ClassLabel"]
    named = [name for name in columns if name.casefold() in LABEL_COLUMNS]
    label = choose_column("label", spec, columns, classes or named, ("label",), title)
    values = dataset.select_columns([label])[label][:]
    if label in classes and None not in values:
        return Records(records, RawLabels(np.array(values), list(features[label].names), True))
    cells = Cells()
    codes = np.array([cells.code(value) for value in values])
    return Records(records, RawLabels(codes, cells.values))


def _load(repository: str, revision: str | None, spec: SourceSpec) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        what, fix = "reading data sets of the hub needs the package datasets", extra("data")
        raise UserError(what, where=spec.base, fix=fix) from error
    try:
        with _cache_only_without_network(datasets):
            return datasets.load_dataset(
                repository, spec.options.get("config"), revision=revision, streaming=False
            )
    except Exception as error:  # whatever the package, the hub and the network layer raise
        raise _explained(error, repository, revision, spec) from error


@contextmanager
def _cache_only_without_network(datasets: Any) -> Iterator[None]:
    """Without a network the libraries retry for half a minute; one attempt is enough."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or is_reachable(constants.ENDPOINT):
        yield
        return
    places = [constants, datasets.config]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _explained(
    error: Exception, repository: str, revision: str | None, spec: SourceSpec
) -> UserError:
    text = (str(error) or type(error).__name__).strip()
    chain = [error, error.__cause__, error.__context__]
    kinds = {kind.__name__ for link in chain if link for kind in type(link).__mro__}
    if "Config name is missing" in text or "BuilderConfig" in text:
        known = re.search(r"\[.*?\]", text, re.DOTALL)
        names = re.findall(r"'([^']+)'", known[0]) if known else []
        given = spec.options.get("config")
        what = f"unknown configuration {given!r}" if given else "there are several configurations"
        example = f"'{spec.base}#config={names[0] if names else 'NAME'}'"
        fix = f"Choose one: {example}; known: {', '.join(names[:20]) or 'see its page'}"
    elif "OfflineModeIsEnabled" in kinds or isinstance(error, ConnectionError | TimeoutError):
        command = f"hf download --repo-type dataset {repository}"
        command += f" --revision {revision}" if revision else ""
        what = f"{repository} is not in the cache and the hub cannot be reached"
        fix = f"With a network, and without HF_HUB_OFFLINE: {command}"
    elif "GatedRepoError" in kinds or "gated" in text:
        what = f"{repository} is for registered users only"
        fix = "Ask for access on its page, then: hf auth login"
    elif "RevisionNotFoundError" in kinds or (revision and f"'{revision}'" in text):
        what, fix = f"{repository} has no revision {revision!r}", "Leave @revision out for main"
    elif "DatasetNotFoundError" in kinds or "RepositoryNotFoundError" in kinds:
        what = f"unknown data set {repository!r}, or it is private"
        fix = "For a private one: hf auth login"
    else:
        what = f"cannot load {repository}: {text.splitlines()[0][:300]}"
        fix = f"See https://huggingface.co/datasets/{repository}"
    return UserError(what, where=spec.base, fix=fix)


KIND = Kind(
    "data sets of the hub",
    lambda spec: spec.base.startswith(PREFIX) and not spec.path.exists(),
    open_hub,
    ("label", "image", "config"),
)
