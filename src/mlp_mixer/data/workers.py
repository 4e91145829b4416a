"""What the loader's worker processes do about signals, and how their end is noticed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

import cv2
import torch
from torch import Tensor

NICENESS = 5  # below the process that computes: it waits for a core less, and for images as little


def start_worker(watched: Tensor, closing: Tensor, number: int) -> None:
    """Prepares a worker process: who it is, and which signals are not meant for it.

    Ctrl-C and a cluster's SIGTERM reach the whole group of processes. The main process saves the
    run then, and needs its workers until it has; so they go on until it closes them or is gone.

    Args:
        watched: int64 (workers, 3), the table that it writes its process number and time into.
        closing: uint8 (1,) in shared memory, not 0 once a SIGTERM is meant for the worker.
        number: of the worker.
    """
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    watched.numpy()[number] = (os.getpid(), -1, time.monotonic_ns())
    cv2.setNumThreads(0)  # its threads do not survive the fork, and each worker has one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _only_our_own
    if hasattr(signal, "pthread_sigmask"):
        # A thread waits for SIGTERM: a handler would never run where the main thread hangs in C,
        # and the main process would wait for this one for ever.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(closing, os.getppid()), daemon=True).start()


def _only_our_own(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Leaves out the traceback of the thread that was handing an image over as the run ended."""
    if not issubclass(kind, (OSError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end_when_told(closing: Tensor, main_process: int) -> None:
    while True:
        signal.sigwait({signal.SIGTERM})
        if closing.item() or os.getppid() != main_process:
            os._exit(128 + signal.SIGTERM)


def raise_if_one_died(*_: object) -> None:
    """Raises torch's RuntimeError, which names the process, where a worker has ended by itself."""
    torch._C._error_if_any_worker_fails()


def on_child_end(handler: Any) -> Any:
    """Sets what happens when a child process ends; returns what happened before, or None."""
    is_main = threading.current_thread() is threading.main_thread()
    if handler is None or not is_main or not hasattr(signal, "SIGCHLD"):
        return None
    return signal.signal(signal.SIGCHLD, handler)
