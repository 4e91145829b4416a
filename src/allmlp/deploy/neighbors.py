"""Nearest neighbours of images: the most similar features, and files of features to search in.

Shapes: N images to search in, Q images to search for, C features.
"""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from allmlp.errors import UserError, one_of
from allmlp.io import expand
from allmlp.names import import_extra
from allmlp.weights.download import sha256_of

_AT_ONCE = 2**24  # similarities in memory
FORMATS = (".csv", ".json", ".jsonl", ".parquet")


class Neighbor(NamedTuple):
    path: str
    row: int  # in the output or the reference, from 0
    similarity: float  # cosine, rounded to 6 decimals


class Neighborhood:
    """Images to search in: their paths and features, (N, C), of which bad images have none."""

    def __init__(self, paths: list[str], features: list[np.ndarray | None], sha: str = "") -> None:
        self._rows = [row for row, values in enumerate(features) if values is not None]
        self._paths, self.sha256 = paths, sha
        found = [values for values in features if values is not None]
        self._units = _units(np.stack(found)) if found else torch.zeros(0, 0)
        self.width = self._units.shape[1]

    def search(self, features: np.ndarray | None, count: int) -> list[list[Neighbor]]:
        """Returns the nearest images for features (Q, C), nearest first, equally near ones by row.

        None searches for the images themselves, which are not their own neighbours.
        """
        queries = self._units if features is None else _units(features)
        count = min(count, len(self._rows) - (features is None))
        if count < 1:
            return [[] for _ in queries]
        found: list[list[Neighbor]] = []
        step = max(1, _AT_ONCE // len(self._rows))
        for start in range(0, len(queries), step):
            # Rounded, because products of equal rows may differ in the last bit.
            similar = (queries[start : start + step] @ self._units.T).round(decimals=6)
            if features is None:
                own = torch.arange(len(similar))
                similar[own, start + own] = -torch.inf
            least = similar.topk(count, dim=1).values[:, -1:]
            query, other = (similar >= least).nonzero(as_tuple=True)  # including ties
            values, query, other = similar[query, other].numpy(), query.numpy(), other.numpy()
            order = np.lexsort((other, -values, query))
            for begin in np.searchsorted(query, np.arange(len(similar))):
                chosen = order[begin : begin + count]
                rows = [self._rows[at] for at in other[chosen]]
                pairs = zip(rows, values[chosen].tolist(), strict=True)
                found.append([Neighbor(self._paths[row], row, round(x, 6)) for row, x in pairs])
        return found


def _units(features: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(features.astype(np.float32)))


def read_features(name: str | Path) -> Neighborhood:
    """Reads a file that predict has written with features."""
    path = expand(name)
    one_of("ending of a file of features", path.suffix, FORMATS, where=path)
    fix = "Write one with predict: features, and an output"
    try:
        rows = _read(path)
        features = [None if values is None else np.array(values, np.float32) for _, values in rows]
        found = Neighborhood([name for name, _ in rows], features, sha256_of(path))
    except OSError as error:
        what = f"cannot read the features: {error.strerror or error}"
        raise UserError(what, where=path, fix=fix) from error
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("not a file of features", where=path, fix=fix) from error
    if not found.width:
        raise UserError("the file has no features", where=path, fix=fix)
    return found


def _read(path: Path) -> list[tuple[str, Any]]:
    """Returns the path of every row, and its features or None."""
    if path.suffix == ".parquet":
        parquet = import_extra("pyarrow.parquet", "data")
        table = parquet.read_table(path, columns=["path", "features"])
        values = table["features"].combine_chunks()
        flat, ends = values.flatten().to_numpy(), values.offsets.to_numpy()
        rows = [flat[a:b] if b > a else None for a, b in pairwise(ends)]
        return list(zip(table["path"].to_pylist(), rows, strict=True))
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        if path.suffix == ".csv":
            header, *table = csv.reader(file)
            first, at = header.index("feature_0"), header.index("path")
            stop = first + sum(column.startswith("feature_") for column in header)
            return [(row[at], row[first:stop] if row[first] else None) for row in table]
        values = json.load(file) if path.suffix == ".json" else map(json.loads, file)
        return [(row["path"], row["features"] or None) for row in values]
