"""Data sets from the Hugging Face hub, "hf:owner/name[@revision]", through the `datasets` package.

Files stay in that package's cache; images are read in their original encoding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from allmlp.data.classes import RawLabels
from allmlp.data.source import GROUP, ImageFiles
from allmlp.data.source_spec import LABEL_OPTIONS, SPLITS, SourceSpec, split_named
from allmlp.data.sources.columns import Kind, Rows
from allmlp.data.sources.parquet import arrow_cells, arrow_rows, class_names_of, image_column
from allmlp.errors import UserError
from allmlp.io import is_reachable
from allmlp.names import HUB_NAME, import_extra

PREFIX = "hf:"


@dataclass
class HubImages:
    """The images of a split; `column` of `dataset` is undecoded: {"bytes": ..., "path": ...}."""

    name: str
    dataset: Any
    column: str

    def __len__(self) -> int:
        return len(self.dataset)

    def item_name(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def read(self, index: int) -> bytes:
        image = self.dataset[index][self.column] or {}
        data, path = image.get("bytes"), image.get("path")
        if data is None and path:
            data = ImageFiles([path]).read(0)
        if not data:
            raise UserError("the row has no image", where=self.item_name(index))
        return data

    def values_of(self, column: str) -> list[Any] | None:
        if column != "path":
            return None
        names: list[Any] = []
        for batch in self.dataset.with_format("arrow").iter(batch_size=1000):
            for chunk in batch.column(self.column).chunks:
                names += chunk.field("path").to_pylist()
        return names


def open_hub(spec: SourceSpec, labels: bool) -> list[Rows]:
    found = re.fullmatch(rf"hf:({HUB_NAME})(?:@([\w./-]+))?", spec.base)
    if not found:
        fix = "hf:owner/name or hf:owner/name@revision"
        raise UserError(f"not a data set on the hub: {spec.base!r}", fix=fix)
    loaded = _load(found[1], found[2], spec)
    splits: list[Rows] = []
    for split in SPLITS:
        theirs = [name for name in loaded if split_named(str(name)) == split]
        if len(theirs) > 1:
            raise UserError(f"two splits for one: {' and '.join(theirs)}", where=spec.source)
        splits += [_open_split(loaded[name], spec, split) for name in theirs if len(loaded[name])]
    if not splits:
        what = f"none of the splits train, validation and test has rows: {', '.join(loaded)}"
        raise UserError(what, where=spec.source, fix="Save the splits you need as Parquet files")
    return splits


def _open_split(dataset: Any, spec: SourceSpec, split: str) -> Rows:
    import datasets  # pyright: ignore[reportMissingImports]

    title, schema = f"{spec.source}:{split}", dataset.features.arrow_schema
    column = image_column(spec, schema, title)
    undecoded = dataset.select_columns([column])
    undecoded = undecoded.cast_column(column, datasets.Image(decode=False))

    def cells(name: str) -> RawLabels:
        values = dataset.select_columns([name]).with_format("arrow")[:].column(0)
        return arrow_cells(values, class_names_of(schema, name), name, title)

    images = HubImages(title, undecoded, column)
    return arrow_rows(images, column, schema, cells, split=split, file=title)


def _load(repository: str, revision: str | None, spec: SourceSpec) -> Any:
    what = "reading data sets of the hub needs the package datasets"
    datasets = import_extra("datasets", "data", what, spec.base)
    from huggingface_hub import constants

    config, offline = spec.options.get("config"), constants.HF_HUB_OFFLINE
    try:
        if not (offline or is_reachable(constants.ENDPOINT)):  # or they retry for half a minute
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return datasets.load_dataset(repository, config, revision=revision, streaming=False)
    except Exception as error:  # from the package, the hub or the network
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        fix = f"See https://huggingface.co/datasets/{repository}; if it has several configurations:"
        fix += f" '{spec.base}#config=NAME'; if it is private: hf auth login"
        raise UserError(f"cannot load {repository}: {reason}", where=spec.base, fix=fix) from error
    finally:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline


KIND = Kind(
    "data sets of the hub",
    lambda spec: spec.base.startswith(PREFIX) and not spec.path.exists(),
    open_hub,
    (*LABEL_OPTIONS, "image", GROUP, "config"),
)
