"""SIGTERM and Ctrl-C: the run saves after the current step; a second signal ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from allmlp.data.workers import while_waiting

# torchrun forwards a signal that the whole process group has already received.
_SAME_SIGNAL = 3.0  # seconds


class NoBatchCame(Exception):
    """A signal arrived while waiting for a batch that may never come."""


class StopRequest:
    """Catches SIGTERM and SIGINT inside its block; a waiting loader raises `NoBatchCame`."""

    def __init__(self, *, saves: bool = True) -> None:
        self.signal, self.saves = 0, saves  # number of the received signal, 0 for none
        self._came = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._notice)
        self._token = while_waiting.set(self._stop_waiting)
        return self

    def __exit__(self, *_: object) -> None:
        while_waiting.reset(self._token)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _stop_waiting(self) -> None:
        if self.signal:
            raise NoBatchCame

    def _notice(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._came = number, now
            what = b"the run saves" if self.saves else b"the run stops"
            os.write(2, b"\nstopping: " + what + b" at the end of this step\n")
        elif "TORCHELASTIC_RUN_ID" not in os.environ or now - self._came > _SAME_SIGNAL:
            os.write(2, b"\nstopped immediately; resume from the last checkpoint\n")
            os._exit(128 + number)


@contextlib.contextmanager
def ending_at_once(end: Callable[[int], NoReturn]) -> Iterator[None]:
    """SIGTERM calls `end` even in the middle of a step: for work that leaves nothing to save."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, _: end(number)) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def end(number: int) -> NoReturn:
    """Exits as the signal would have: KeyboardInterrupt, or exit code 143."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
