"""Worker processes: start method, shared memory, signals and detection of crashes."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from multiprocessing.queues import Queue
from typing import Any

import cv2
import torch
from torch import Tensor

from allmlp.console import Reporter
from allmlp.errors import UserError

_UNGUARDED = 85  # exit code of a process ended by `check_guard`
_PROBING = "_ALLMLP_PROBES_GUARD"
NICENESS = 5  # below the main process, which then waits less for a core and no longer for images
_SHARED = "/dev/shm"  # shared memory and semaphores on Linux
_reported: list[str] = []

# Called about once a second while waiting for a batch; may raise.
while_waiting: ContextVar[Callable[[], None]] = ContextVar("while_waiting", default=lambda: None)


def worker_context() -> Any:
    default = multiprocessing.get_all_start_methods()[0]
    method = multiprocessing.get_start_method(allow_none=True) or default
    # Python 3.14 no longer forks because of threads; workers use none of their parent's.
    if sys.platform == "linux" and method == default:
        method = "fork"
    return multiprocessing.get_context(method)


def check_guard(num_workers: int | None = None) -> None:
    """Checks that worker processes would not run the script, and train, again."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        if _PROBING in os.environ:
            os._exit(_UNGUARDED)  # the main process reports it
        raise _missing_guard()  # the user's process
    context, is_daemon = worker_context(), multiprocessing.current_process().daemon
    if num_workers != 0 and context.get_start_method() != "fork" and not is_daemon:
        _probe(context)


@functools.cache
def _probe(context: Any) -> None:
    os.environ[_PROBING] = "1"
    probe = context.Process(target=os.getpid, daemon=True)
    try:
        with starting():
            probe.start()
        probe.join()
    except (EOFError, ConnectionError) as error:  # newer fork servers import the script themselves
        raise _missing_guard() from error
    finally:
        del os.environ[_PROBING]
    if probe.exitcode == _UNGUARDED:
        raise _missing_guard()
    if probe.exitcode:
        what = f"a worker process ended with code {probe.exitcode} while it imported the script"
        raise UserError(what, fix="See above; or use num_workers=0")


def _missing_guard() -> UserError:
    what = "each worker process runs the script again from the top"
    fix = "Guard what it does:  if __name__ == '__main__':  (or use num_workers=0)"
    return UserError(what, where=getattr(sys.modules["__main__"], "__file__", None), fix=fix)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Reports why workers cannot start: limits on processes, semaphores or memory."""
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        what = f"worker processes cannot be started: {error}"
        raise UserError(what, fix="A smaller num_workers, or 0") from error


def shared_memory() -> int | None:
    if not os.path.isdir(_SHARED):
        return None
    return shutil.disk_usage(_SHARED).free if os.access(_SHARED, os.W_OK) else 0


def is_room_for(num_bytes: int) -> bool:
    free = shared_memory()
    return free is None or free > num_bytes + 2**20


def workers_that_start(wanted: int, batch_bytes: int = 0, ahead: int = 2) -> int:
    """Returns how many workers can start; says so if shared memory is too small for more."""
    note, can_start = "", True
    if wanted and not is_room_for(4096 * (32 + 4 * wanted) - 2**20):  # a page per semaphore, table
        note, can_start = "is full or read-only: images are decoded without worker processes", False
    elif wanted and not is_room_for((ahead * wanted + 1) * batch_bytes):  # one is in use
        note = "is small: batches that do not fit go through pipes, which is slower"
    if note and not _reported:
        _reported.append(note)
        Reporter(stderr=True).say(f"note     {_SHARED} {note}")
    return wanted if can_start else 0


def start_worker(watched: Tensor, closing: Tensor, number: int) -> None:
    """Initializes a worker; it ignores Ctrl-C and SIGTERM, since the main process ends it."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    watched.numpy()[number] = (os.getpid(), -1, time.monotonic_ns())
    cv2.setNumThreads(0)  # its threads do not survive a fork, and a worker has one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _only_our_own
    # A failure to send a batch would only print a traceback.
    Queue._on_queue_feeder_error = lambda *_: os._exit(1)  # pyright: ignore
    if hasattr(signal, "pthread_sigmask"):
        # A thread waits for SIGTERM: a handler would not run while the main thread hangs in C, and
        # the main process would wait forever.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_on_signal, args=(closing, os.getppid()), daemon=True).start()


def _only_our_own(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Suppresses the traceback of a thread that was sending an image when the run ended."""
    if not issubclass(kind, (OSError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end_on_signal(closing: Tensor, main_process: int) -> None:
    while True:
        signal.sigwait({signal.SIGTERM})
        if closing.item() or os.getppid() != main_process:
            os._exit(128 + signal.SIGTERM)


def raise_if_one_died(*_: object) -> None:
    torch._C._error_if_any_worker_fails()


@contextlib.contextmanager
def on_child_end(handler: Any) -> Iterator[None]:
    """Sets the handler for the end of a child process, where that is possible."""
    before = None
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        before = signal.signal(signal.SIGCHLD, handler)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGCHLD, before)
