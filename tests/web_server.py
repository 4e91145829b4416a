"""A web server on loopback that misbehaves on demand."""

import functools
import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@contextmanager
def running(handler: Any) -> Iterator[str]:
    """Runs a server on loopback for the block; gives its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@dataclass
class Behaviour:
    """What the server does with requests of /file, whatever follows in the path."""

    content: bytes
    cut_after: list[int] = field(default_factory=list)  # bytes of an answer; used up one by one
    ranges: bool = True  # whether Range is understood
    status: list[int] = field(default_factory=list)  # answers to HEAD other than the file
    stall: list[float] = field(default_factory=list)  # seconds of silence in the middle of answers
    tag: str = '"one"'  # the file's ETag
    requests: list[str | None] = field(default_factory=list)  # the Range header of every GET


@contextmanager
def serve(behaviour: Behaviour) -> Iterator[str]:
    """Runs the server for the block; gives its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def begin(self, status: int, length: int, content_range: str | None = None) -> None:
            self.send_response(status)
            self.send_header("ETag", behaviour.tag)
            self.send_header("Content-Length", str(length))
            if content_range is not None:
                self.send_header("Content-Range", f"bytes {content_range}/{len(behaviour.content)}")
            self.end_headers()

        def do_HEAD(self) -> None:
            if behaviour.status:
                self.send_error(behaviour.status.pop(0))
            else:
                self.begin(200, len(behaviour.content))

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            behaviour.requests.append(asked)
            rest = behaviour.content
            if asked and behaviour.ranges and self.headers.get("If-Range") in (None, behaviour.tag):
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                rest = behaviour.content[start:]
                if not rest:
                    self.begin(416, 0, "*")
                    return
                self.begin(206, len(rest), f"{start}-{len(behaviour.content) - 1}")
            else:
                self.begin(200, len(rest))
            if behaviour.stall:
                half = len(rest) // 2
                self.wfile.write(rest[:half])
                time.sleep(behaviour.stall.pop(0))
                rest = rest[half:]
            if behaviour.cut_after:
                self.wfile.write(rest[: behaviour.cut_after.pop(0)])
                self.close_connection = True
                self.connection.close()
            else:
                self.wfile.write(rest)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(OSError, ValueError):  # the client has gone, or we have hung up
                super().handle()

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

    with running(Handler) as address:
        yield f"{address}/file"


@contextmanager
def static(folder: Path, agents: list[str | None] | None = None) -> Iterator[str]:
    """Serves a folder, as `python3 -m http.server` does, for the block; gives the address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if agents is not None:
                agents.append(self.headers["User-Agent"])
            super().do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with running(functools.partial(Handler, directory=str(folder))) as address:
        yield address
