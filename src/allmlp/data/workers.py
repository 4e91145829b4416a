"""How worker processes start, share their batches, handle signals, and how their end is noticed."""

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

_UNGUARDED = 85  # exit code of a process that `check_guard` ended
_PROBING = "_ALLMLP_PROBES_GUARD"
NICENESS = 5  # below the process that computes: it waits for a core less, and for images no more
_SHARED = "/dev/shm"  # where Linux keeps shared memory and semaphores
_SPARE = 2**20  # bytes that batches leave free there
_reported: list[str] = []

# Called about once a second while a batch is waited for; it may raise.
while_waiting: ContextVar[Callable[[], None]] = ContextVar("while_waiting", default=lambda: None)


def worker_context() -> Any:
    """Returns how worker processes start: as the user has set it, else by fork on Linux.

    Python 3.14 no longer forks by default, because of threads; a worker uses none of its parent's,
    nor its GPU, and forking spares a script its guard.
    """
    default = multiprocessing.get_all_start_methods()[0]
    method = multiprocessing.get_start_method(allow_none=True) or default
    if sys.platform == "linux" and method == default:
        method = "fork"
    return multiprocessing.get_context(method)


def check_guard(num_workers: int | None = None) -> None:
    """Checks that worker processes would not run the script again, and train too.

    Where processes are not forked, each imports the script. One is started here to see where that
    leads: without a guard, to this function again, which ends it.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        if _PROBING in os.environ:
            os._exit(_UNGUARDED)  # the main process reports it
        raise _missing_guard()  # the user's own process
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
    except (EOFError, ConnectionError) as error:  # a newer fork server imports the script itself
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
    """Reports what keeps worker processes from starting: too few processes, semaphores, memory."""
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        what = f"worker processes cannot be started: {error}"
        raise UserError(what, fix="A smaller num_workers, or 0") from error


def shared_memory() -> int | None:
    """Returns how many bytes of shared memory are free; None if the system sets no limit."""
    if not os.path.isdir(_SHARED):
        return None
    return shutil.disk_usage(_SHARED).free if os.access(_SHARED, os.W_OK) else 0


def is_room_for(num_bytes: int) -> bool:
    """Whether a batch fits into shared memory."""
    free = shared_memory()
    return free is None or free > num_bytes + _SPARE


def workers_that_start(wanted: int, batch_bytes: int = 0) -> int:
    """Returns how many workers there can be, and reports what shared memory is too small for."""
    free = shared_memory()
    if free is None or not wanted:
        return wanted
    if free < 4096 * (32 + 4 * wanted):  # semaphores and tables take a page of memory each
        _report_once(f"{_SHARED} is full or read-only: images are decoded without worker processes")
        return 0
    batches = 2 * wanted + 1  # two on their way from each worker, and one in use
    if free < batches * batch_bytes + _SPARE:
        size = f"{free / 2**20:,.0f} MiB free for {batches} x {batch_bytes / 2**20:,.0f}"
        _report_once(
            f"{_SHARED} has {size}: batches that do not fit go through pipes, which is slower"
        )
    return wanted


def _report_once(text: str) -> None:
    if not _reported:
        _reported.append(text)
        Reporter(stderr=True).say(f"note     {text}")


def start_worker(watched: Tensor, closing: Tensor, number: int) -> None:
    """Prepares a worker process: registers it in the table, and ignores signals not meant for it.

    Ctrl-C and a cluster's SIGTERM reach the whole group of processes. The main process saves the
    run then, and needs its workers until it has; so they continue until it closes them or is gone.
    """
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    watched.numpy()[number] = (os.getpid(), -1, time.monotonic_ns())
    cv2.setNumThreads(0)  # its threads do not survive the fork, and each worker has one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _only_our_own
    # If a batch cannot be sent, it would print a traceback and nobody would notice.
    Queue._on_queue_feeder_error = lambda *_: os._exit(1)  # pyright: ignore
    if hasattr(signal, "pthread_sigmask"):
        # A thread waits for SIGTERM: a handler would never run while the main thread hangs in C,
        # and the main process would wait for this one for ever.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        arguments = closing, os.getppid()
        threading.Thread(target=_end_on_signal, args=arguments, daemon=True).start()


def _only_our_own(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Leaves out the traceback of the thread that was sending an image as the run ended."""
    if not issubclass(kind, (OSError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end_on_signal(closing: Tensor, main_process: int) -> None:
    while True:
        signal.sigwait({signal.SIGTERM})
        if closing.item() or os.getppid() != main_process:
            os._exit(128 + signal.SIGTERM)


def raise_if_one_died(*_: object) -> None:
    """Raises torch's RuntimeError, which names the process, if a worker has ended by itself."""
    torch._C._error_if_any_worker_fails()


def on_child_end(handler: Any) -> Any:
    """Sets what happens when a child process ends; returns what happened before, or None."""
    is_main = threading.current_thread() is threading.main_thread()
    if handler is None or not is_main or not hasattr(signal, "SIGCHLD"):
        return None
    return signal.signal(signal.SIGCHLD, handler)
