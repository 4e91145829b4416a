"""Data sets of the Hugging Face hub: "hf:owner/name[@revision]", through the `datasets` package.

Its files lie in the package's own cache and are read from the disk as they are asked for; the
images come out as they were put in, not decoded. HF_HUB_OFFLINE=1 keeps it to the cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from allmlp.data.classes import Cells, check_labels, labels_of_values
from allmlp.data.folders import SPLIT_FOLDERS, split_named
from allmlp.data.items import no_labels
from allmlp.data.source_names import LABEL_COLUMNS, SourceName, choose_column
from allmlp.errors import UserError
from allmlp.io import is_reachable
from allmlp.names import extra

PREFIX = "hf:"


@dataclass
class HubImages:
    """The images of one split of a data set of the hub.

    Attributes:
        name: what to call it on screen.
        class_names: the classes.
        labels: int64 (num_images,).
        dataset: a map-style one that gives `column` not decoded, as {"bytes": ..., "path": ...}.
        column: the images' own.
    """

    name: str
    class_names: list[str]
    labels: np.ndarray
    dataset: Any
    column: str

    def __len__(self) -> int:
        return len(self.labels)

    def item_name(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def original_names(self) -> list[str | None]:
        """Returns what each image was called before it was packed."""
        names: list[str | None] = []
        for batch in self.dataset.with_format("arrow").iter(batch_size=1000):
            for chunk in batch.column(self.column).chunks:
                names += chunk.field("path").to_pylist()
        return names

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


def open_hub(name: SourceName, *, labels: bool = True) -> dict[str, HubImages]:
    """Returns the splits of a data set of the hub, those called train, validation and test.

    Args:
        name: hf:owner/name or hf:owner/name@revision, with `config`, `image` and `label` as
            options.
        labels: whether they are needed; without them no column of labels is looked for.

    Raises:
        UserError: `datasets` is not installed, there is no such data set, revision, configuration
            or column, no network, or none of its splits has labels.
    """
    name.refuse_options(("label", "image", "config"), "data sets of the hub")
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name.base)
    if not found:
        fix = "hf:owner/name or hf:owner/name@revision"
        raise UserError(f"not a data set on the hub: {name.base!r}", fix=fix)
    loaded = _load(found[1], found[2], name)
    by_split: dict[str, str] = {}
    for theirs in loaded:
        split = split_named(str(theirs))
        if split is not None and split in by_split:
            what = f"two splits for one: {by_split[split]} and {theirs}"
            raise UserError(what, where=name.source)
        if split is not None:
            by_split[split] = theirs
    if not by_split:
        what = f"none of the splits is train, validation or test: {', '.join(map(str, loaded))}"
        raise UserError(what, where=name.source, fix="Save the splits you need as Parquet files")
    splits: dict[str, HubImages] = {}
    for split in (each for each in SPLIT_FOLDERS if each in by_split):
        dataset, title = loaded[by_split[split]], f"{name.source}:{split}"
        source = (_open_split if labels else _open_unlabelled)(dataset, name, title)
        if source is not None:
            splits[split] = source
    if not splits:
        what = "none of the images has a label" if labels else "the data set has no rows"
        raise UserError(what, where=name.source)
    return splits


def _load(repository: str, revision: str | None, name: SourceName) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        fix = extra("data")
        what = "reading data sets of the hub needs the package datasets"
        raise UserError(what, where=name.base, fix=fix) from error
    try:
        with _cache_only_without_network(datasets):
            return datasets.load_dataset(
                repository, name.options.get("config"), revision=revision, streaming=False
            )
    except Exception as error:  # whatever the package, the hub and the network layer raise
        raise _explained(error, repository, revision, name) from error


@contextmanager
def _cache_only_without_network(datasets: Any) -> Iterator[None]:
    """Without a network the libraries try again and again for half a minute; one look is enough."""
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
    error: Exception, repository: str, revision: str | None, name: SourceName
) -> UserError:
    text = (str(error) or type(error).__name__).strip()
    chain = [error, error.__cause__, error.__context__]
    kinds = {kind.__name__ for each in chain if each for kind in type(each).__mro__}
    if "Config name is missing" in text or "BuilderConfig" in text:
        known = re.search(r"\[.*?\]", text, re.DOTALL)
        names = re.findall(r"'([^']+)'", known[0]) if known else []
        given = name.options.get("config")
        what = f"no configuration {given!r}" if given else "the data set has several configurations"
        example = f"'{name.base}#config={names[0] if names else 'NAME'}'"
        fix = f"Choose one: {example}; known: {', '.join(names[:20]) or 'see its page'}"
        return UserError(what, where=name.base, fix=fix)
    if "OfflineModeIsEnabled" in kinds or isinstance(error, ConnectionError | TimeoutError):
        command = f"hf download --repo-type dataset {repository}"
        command += f" --revision {revision}" if revision else ""
        what = f"{repository} is not in the cache and the hub cannot be reached"
        fix = f"With a network, and without HF_HUB_OFFLINE: {command}"
        return UserError(what, where=name.base, fix=fix)
    if "GatedRepoError" in kinds or "gated" in text:
        what = f"{repository} is given to registered users only"
        return UserError(what, where=name.base, fix="Ask on its page, then: hf auth login")
    if "RevisionNotFoundError" in kinds or (revision and f"'{revision}'" in text):
        what = f"{repository} has no revision {revision!r}"
        return UserError(what, where=name.base, fix="Leave @revision out for main")
    if "DatasetNotFoundError" in kinds or "RepositoryNotFoundError" in kinds:
        what = f"no data set {repository!r}, or it is private"
        return UserError(what, where=name.base, fix="For a private one: hf auth login")
    what = f"cannot load {repository}: {text.splitlines()[0][:300]}"
    return UserError(what, where=name.base, fix=f"See https://huggingface.co/datasets/{repository}")


def _open_unlabelled(dataset: Any, name: SourceName, title: str) -> HubImages | None:
    column = _image_column(dataset, name, title)
    if not len(dataset):
        return None
    return HubImages(title, *no_labels(len(dataset)), _undecoded(dataset, column), column)


def _image_column(dataset: Any, name: SourceName, title: str) -> str:
    features = dict(dataset.features)
    images = [each for each, kind in features.items() if type(kind).__name__ == "Image"]
    columns = list(features)
    column = choose_column("image", name, columns, images, ("image", "img"), title)
    if column not in images:
        what = f"column {column!r} is {features[column]}, not of images"
        raise UserError(what, where=title, fix=f"Columns of images: {', '.join(images) or 'none'}")
    return column


def _undecoded(dataset: Any, column: str) -> Any:
    import datasets  # pyright: ignore[reportMissingImports]

    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _open_split(dataset: Any, name: SourceName, title: str) -> HubImages | None:
    column = _image_column(dataset, name, title)
    features = dict(dataset.features)
    columns = list(features)
    classes = [each for each, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    named = [each for each in columns if each.casefold() in LABEL_COLUMNS]
    label = choose_column("label", name, columns, classes or named, ("label",), title)

    values = dataset.select_columns([label])[label][:]
    if not values:
        return None
    if label in classes and None not in values:
        names = list(features[label].names)
        labels = check_labels(np.array(values), names, lambda at: f"{title}[{at}]")
    else:
        cells = Cells()
        codes = np.array([cells.code(value) for value in values])
        if cells.values == [-1]:
            return None
        labels, names = labels_of_values(codes, cells.values, lambda at: f"{title}[{at}]")
    if labels is None:
        return None
    return HubImages(title, names, labels, _undecoded(dataset, column), column)
