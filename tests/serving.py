"""`mixer serve` in a thread, on a port that the system chooses."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import allmlp as am
from allmlp.deploy.serve import serve


@contextmanager
def running(model: am.ImageClassifier | Path) -> Iterator[int]:
    """Serves for the block; gives the port."""
    import uvicorn

    servers: list[Any] = []
    ports: queue.Queue[str] = queue.Queue()

    class Kept(uvicorn.Server):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            servers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "Server", Kept)
        options = {"port": 0, "on_ready": lambda url, _: ports.put(url.rpartition(":")[2])}
        thread = threading.Thread(target=serve, args=(model,), kwargs=options)
        thread.start()
        try:
            yield int(ports.get(timeout=60))
        finally:
            servers[0].should_exit = True
            thread.join()
