"""A web server on loopback that misbehaves on demand."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Behaviour:
    """What the server does.

    Attributes:
        content: of /file, whatever follows in the path.
        cut_after: bytes of a response after which the connection ends; used up one by one.
        ranges: whether Range is understood.
        status: answers to HEAD other than the file, used up one by one.
        stall: seconds of silence in the middle of each response, used up one by one.
        tag: the file's ETag.
        requests: the Range header of every GET so far, None where there was none.
    """

    content: bytes
    cut_after: list[int] = field(default_factory=list)
    ranges: bool = True
    status: list[int] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)
    tag: str = '"one"'
    requests: list[str | None] = field(default_factory=list)


@contextmanager
def serve(behaviour: Behaviour) -> Iterator[str]:
    """Runs the server for the block; gives its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            if behaviour.status:
                self.send_error(behaviour.status.pop(0))
                return
            self.send_response(200)
            self.send_header("ETag", behaviour.tag)
            self.send_header("Content-Length", str(len(behaviour.content)))
            self.end_headers()

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            behaviour.requests.append(asked)
            content, start = behaviour.content, 0
            current = self.headers.get("If-Range", behaviour.tag) == behaviour.tag
            if asked and behaviour.ranges and current:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                last = len(content) - 1
                self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("ETag", behaviour.tag)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            rest = content[start:]
            if behaviour.stall:
                half = len(rest) // 2
                self.wfile.write(rest[:half])
                self.wfile.flush()
                time.sleep(behaviour.stall.pop(0))
                rest = rest[half:]
            if behaviour.cut_after:
                self.wfile.write(rest[: behaviour.cut_after.pop(0)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(rest)

        def log_message(self, format: str, *args: object) -> None:
            del format, args

        def handle(self) -> None:
            try:
                super().handle()
            except (OSError, ValueError):  # the client has gone, or we have hung up
                self.close_connection = True

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/file"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
