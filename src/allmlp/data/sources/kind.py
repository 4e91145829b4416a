"""What a kind of data source is: a file in this folder and an entry in the list of `KINDS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from allmlp.data.classes import RawLabels
from allmlp.data.source import Images
from allmlp.data.source_spec import SourceSpec


@dataclass(frozen=True)
class Records:
    """One split as its kind gives it; the classes are made later, in one place.

    Attributes:
        images: how to read image i, and its name.
        labels: None where the images have none, or where they are not needed.
        notes: what else was found there, a line each.
        prepare: called once before the images are read, in the main process.
    """

    images: Images
    labels: RawLabels | None = None
    notes: tuple[str, ...] = ()
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Kind:
    """A kind of data source.

    Attributes:
        name: for messages, in the plural: "Parquet files".
        matches: whether data of this name is of this kind.
        open: (spec, whether labels are needed) -> the records of each split.
        options: what "#OPTION=VALUE" may say.
    """

    name: str
    matches: Callable[[SourceSpec], bool]
    open: Callable[[SourceSpec, bool], dict[str, Records]]
    options: tuple[str, ...] = ()
