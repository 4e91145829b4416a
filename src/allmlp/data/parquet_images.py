"""The images of Parquet files: held in memory in one buffer, or read by row group.

Up to `HELD_BYTES` a split's encoded images are held in memory, where forked worker processes share
them. A larger split is read by row group as its images are asked for: in order that is as fast as
the disk, in random order every image costs a row group. `mixer data pack` turns such data into tar
shards, which are fast in any order.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from allmlp.errors import UserError
from allmlp.names import extra

HELD_BYTES = 2**30  # of encoded images, for each split
_GROUPS_KEPT = 2  # row groups in memory where a split is not held
# The bytes of many images one after another, uint8, and where each ends, int64 (n + 1,) from 0.
_Packed = tuple[np.ndarray, np.ndarray]


class ParquetImages:
    """The images of one split; see the module for how they are read.

    Args:
        name: what to call it on screen.
        class_names: the classes.
        labels: int64 (num_images,).
        files: the Parquet files.
        column: the images' own.
        groups: int64 (num_groups, 3): of each row group its file, its number in the file and its
            first image in the split.
    """

    def __init__(
        self,
        name: str,
        class_names: list[str],
        labels: np.ndarray,
        files: list[str],
        column: str,
        groups: np.ndarray,
    ) -> None:
        self.name, self.class_names, self.labels = name, class_names, labels
        self._files, self._column, self._groups = files, column, groups
        self._held: _Packed | None = None
        self._kept: OrderedDict[int, _Packed] = OrderedDict()
        self._opened: tuple[int, int, Any] | None = None  # process, file, its reader

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict(), "_opened": None}

    def item_name(self, index: int) -> str:
        at = self._group_of(index)
        file = int(self._groups[at, 0])
        first = int(self._groups[self._groups[:, 0] == file][0, 2])
        return f"{self._files[file]}[{index - first}]"

    def read(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        (buffer, ends), at = self._held or (None, None), index
        if buffer is None or ends is None:
            group = self._group_of(index)
            buffer, ends = self._keep(group)
            at = index - int(self._groups[group, 2])
        data = buffer[ends[at] : ends[at + 1]].tobytes()
        if not data:
            raise UserError("the row has no image", where=self.item_name(index))
        return data

    def original_names(self) -> list[str | None] | None:
        """Returns what each image was called before it was packed; None where no file says it."""
        return self.values_of(f"{self._column}.path")

    def values_of(self, column: str) -> list[Any] | None:
        """Returns another column's values, one for each image; None where a file has it not.

        Args:
            column: its name, with those of the parts of a struct behind it: "image.path".
        """
        values: list[Any] = []
        for file in self._files:
            reader = open_file(file)
            known = {reader.schema.column(at).path for at in range(len(reader.schema.names))}
            if column not in known:
                return None
            with damage_told(file):
                for chunk in reader.read(columns=[column], use_threads=False).column(0).chunks:
                    for part in column.split(".")[1:]:
                        chunk = chunk.field(part)
                    values += chunk.to_pylist()
        return values

    def hold(self) -> bool:
        """Reads the images into memory unless they are too large; returns whether it did.

        Raises:
            UserError: a file is damaged.
        """
        if self._held is not None:
            return True
        if self._stored_bytes() > HELD_BYTES:
            return False
        buffer = np.empty(self._stored_bytes(), dtype=np.uint8)
        ends = np.zeros(len(self) + 1, dtype=np.int64)
        row = used = 0
        for group in range(len(self._groups)):
            part, part_ends = self._read_group(group)
            if used + len(part) > HELD_BYTES:  # stored small, as a file of copies can be
                return False
            if used + len(part) > len(buffer):
                buffer = np.concatenate([buffer[:used], np.empty(2 * len(part), np.uint8)])
            buffer[used : used + len(part)] = part
            ends[row + 1 : row + len(part_ends)] = part_ends[1:] + used
            used, row = used + len(part), row + len(part_ends) - 1
        self._held, self._opened = (buffer[:used], ends), None
        return True

    def _stored_bytes(self) -> int:
        """Bytes of the image column once it is uncompressed, by the files' metadata."""
        total = 0
        for file, group, _ in self._groups.tolist():
            parts = self._reader(file).metadata.row_group(group)
            chunks = [parts.column(at) for at in range(parts.num_columns)]
            wanted = f"{self._column}.bytes"
            total += sum(
                each.total_uncompressed_size for each in chunks if each.path_in_schema == wanted
            )
        return total

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._groups[:, 2], index, side="right")) - 1

    def _keep(self, group: int) -> _Packed:
        found = self._kept.get(group)
        if found is None:
            found = self._kept[group] = self._read_group(group)
        self._kept.move_to_end(group)
        while len(self._kept) > _GROUPS_KEPT:
            self._kept.popitem(last=False)
        return found

    def _read_group(self, group: int) -> _Packed:
        file, number, start = self._groups[group].tolist()
        where = f"{self._files[file]}, row group {number}, from row {self.item_name(start)}"
        with damage_told(where):
            reader = self._reader(file)
            wanted = [f"{self._column}.bytes"]
            table = reader.read_row_group(number, columns=wanted, use_threads=False)
            packed = _pack(table.column(0))
        if len(packed[1]) - 1 != reader.metadata.row_group(number).num_rows:
            raise UserError("the row group is not complete", where=where)
        return packed

    def _reader(self, file: int) -> Any:
        if self._opened is None or self._opened[:2] != (os.getpid(), file):
            self._opened = (os.getpid(), file, open_file(self._files[file]))
        return self._opened[2]


def open_file(file: str) -> Any:
    """Returns pyarrow's reader of a Parquet file.

    Raises:
        UserError: pyarrow is not installed, or the file is not there or damaged.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        fix = extra("data")
        raise UserError("reading Parquet files needs pyarrow", where=file, fix=fix) from error
    with damage_told(file):
        # No threads of its own: it is used in forked worker processes.
        return parquet.ParquetFile(file, memory_map=False, pre_buffer=False)


@contextmanager
def damage_told(where: str) -> Iterator[None]:
    """Turns whatever pyarrow raises of a damaged file into an error of the user's."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        fix = "Fetch or write the file again"
        raise UserError(f"cannot read the Parquet file: {reason}", where=where, fix=fix) from error


def _pack(column: Any) -> _Packed:
    """The bytes of a column struct<bytes>, copied out of Arrow; a null has none."""
    parts: list[np.ndarray] = []
    ends: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    used = 0
    for chunk in column.chunks:
        values = chunk.field("bytes")
        width = np.int64 if "large" in str(values.type) else np.int32
        _, offsets_buffer, data = values.buffers()
        offsets = np.frombuffer(offsets_buffer, dtype=width)
        offsets = offsets[values.offset : values.offset + len(values) + 1].astype(np.int64)
        if len(values) and data is not None:
            parts.append(np.frombuffer(data, dtype=np.uint8)[offsets[0] : offsets[-1]])
        ends.append(offsets[1:] - offsets[0] + used)
        used = int(ends[-1][-1]) if len(values) else used
    buffer = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)
    return buffer, np.concatenate(ends)
