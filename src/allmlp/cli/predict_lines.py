"""What `mixer predict` shows: the bar, the first rows, the bad images, the speed."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from allmlp.cli.arguments import warn_of_bad

if TYPE_CHECKING:
    from allmlp.console import ProgressBar, Reporter
    from allmlp.data.source import BadImage
    from allmlp.deploy.answers import Question
    from allmlp.deploy.rows import Prediction, Rows

_SHOWN = 40  # rows on the screen
NAMED = 20  # bad images
_WINDOW = 30  # batches whose time the rate in the bar is of


@dataclass
class Seen:
    """What is kept of the rows: counts, and the first few.

    Attributes:
        images: how many there were.
        bad: how many of them have an error.
        first: the first good rows.
        first_bad: the first bad images.
    """

    images: int = 0
    bad: int = 0
    first: list[Prediction] = field(default_factory=list)
    first_bad: list[BadImage] = field(default_factory=list)

    def take(self, rows: Rows) -> None:
        """Counts the rows of a batch."""
        from allmlp.data.source import BadImage

        for each in rows:
            if each.error is not None:
                if self.bad < NAMED:
                    self.first_bad.append(BadImage(self.images, each.path, each.error))
                self.bad += 1
            elif len(self.first) < _SHOWN:
                self.first.append(each)
            self.images += 1


def warn(first: list[BadImage], bad: int, images: int) -> int:
    """Names the first bad images on standard error; returns the exit code.

    That is 0 where all were good, 3 where some were bad and 2 where all were.

    Args:
        first: of them.
        bad: how many there are.
        images: good and bad.
    """
    code = warn_of_bad(first)
    if bad > len(first):
        print(f"... and {bad - len(first):,} more bad images", file=sys.stderr)
    return 2 if bad and bad == images else code


def follower(
    bar: ProgressBar, seen: Seen, clock: Callable[[], float] = time.monotonic
) -> Callable[[Rows], None]:
    """Returns a function that counts the rows of a batch and moves the bar on, with images/s.

    Args:
        bar: that runs.
        seen: that counts.
        clock: seconds.
    """
    done, times = 0, deque([(clock(), 0)], maxlen=_WINDOW)

    def follow(rows: Rows) -> None:
        nonlocal done
        seen.take(rows)
        done += len(rows)
        times.append((clock(), done))
        (start, before), (now, _) = times[0], times[-1]
        note = f"{(done - before) / (now - start):,.0f} images/s" if now > start else None
        bar.advance(len(rows), note)

    return follow


def say_rows(report: Reporter, seen: Seen, output: str | None) -> None:
    """Prints the first rows as a table, and where the others are."""
    from allmlp.console import table

    rows = [
        [each.path, *(f"{name} {share:.1%}" for name, share in each.classes)] for each in seen.first
    ]
    if rows and seen.first[0].features is None:
        ranks = [f"{rank}." for rank in range(1, len(rows[0]))]
        for line in table(["image", *ranks], rows, left=len(rows[0])):
            report.say(line)
        more = seen.images - seen.bad - len(rows)
        if more:
            where = f"in {output}" if output else "with --output FILE"
            report.say(f"... and {more:,} more, {where}")


def say_speed(report: Reporter, images: int, seconds: float, question: Question) -> None:
    """Prints how long it took, and in which precision."""
    how = f", {question.precision} ({question.why})" if question.precision else ""
    report.say(f"time     {seconds:,.1f} s: {images / max(seconds, 1e-9):,.1f} images/s{how}")
