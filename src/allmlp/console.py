"""Console output: lines on screen and in a log file, and progress bars on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from allmlp.io import path_in_errors


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Re-raises the broken pipe; rich would exit with code 1."""
        raise


class Reporter:
    """Prints lines, unless `quiet`, and logs them to a file."""

    def __init__(self, *, quiet: bool = False, stderr: bool = False) -> None:
        self.console = _Console(
            quiet=quiet, stderr=stderr, highlight=False, soft_wrap=True, emoji=False
        )
        self._log: Path | None = None
        self._said: list[str] = []

    def say(self, text: str = "", style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)
        self.console.file.flush()  # not buffered in a pipe
        self._said.append(text)
        if self._log is not None:
            self.log_to(self._log)

    def table(
        self,
        rows: Iterable[Mapping[str, Any]],
        left: int = 1,
        formats: Mapping[str, str] | None = None,
    ) -> None:
        for line in table_of(rows, left, formats):
            self.say(line)

    def log_to(self, path: Path) -> None:
        """Logs all lines, including earlier ones, to a file."""
        self._log = path
        with (
            path_in_errors(path),
            path.open("a", encoding="utf-8", errors="surrogateescape") as file,
        ):
            file.writelines(f"{line}\n" for line in self._said)
        self._said.clear()

    @contextmanager
    def progress(self, total: int, unit: str, done: int = 0) -> Iterator[ProgressBar]:
        """Shows a progress bar while the block runs; nothing in a pipe."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with bar:
            yield ProgressBar(bar, bar.add_task("", total=total, completed=done, note=""))


class ProgressBar:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, amount: int, note: str = "", description: str | None = None) -> None:
        self._bar.update(self._task, advance=amount, description=description, note=note)


def table(headers: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """Returns the lines of a table: header, rule and rows; the first `left` columns align left."""
    widths = [max(cell_len(row[at]) for row in [headers, *rows]) for at in range(len(headers))]

    def line(cells: list[str]) -> str:
        aligned = []
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            space = " " * (width - cell_len(cell))  # Chinese letters are two columns wide
            aligned.append(cell + space if at < left else space + cell)
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return [line(headers), rule, *(line(row) for row in rows)]


def table_of(
    rows: Iterable[Mapping[str, Any]], left: int = 1, formats: Mapping[str, str] | None = None
) -> list[str]:
    """Returns the lines of a table of rows by column; a dash where a row lacks a value."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(name: str, value: Any) -> str:
        return "-" if value is None else format(value, (formats or {}).get(name, ""))

    return table(names, [[cell(name, row.get(name)) for name in names] for row in rows], left)


def report_bad_images(bad: Sequence[Any], number: int | None = None) -> int:
    """Lists the first 20 of `number` bad images on standard error; returns the exit code."""
    for image in bad[:20]:
        print(f"bad image: {image.name}: {image.what}", file=sys.stderr)
    more = (number or len(bad)) - 20
    if more > 0:
        print(f"... and {more:,} more bad images", file=sys.stderr)
    return 3 if bad else 0


def report_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
