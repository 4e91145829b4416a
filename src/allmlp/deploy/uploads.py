"""The images of an HTTP request, within the limits; what is refused and why."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Mapping, Sequence

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import Message, Receive

from allmlp.data.image import EncodedImage
from allmlp.deploy.service import Limits, megabytes
from allmlp.errors import UserError, plural

FIELD = "images"
_SEND = f"send image files as multipart/form-data in the field {FIELD!r}, or one as image/*"
_SECONDS_TO_SEND = 60  # that a client has for its request
_DRAINED, _SECONDS_TO_DRAIN = 400_000_000, 10  # of a refused body


class Refused(Exception):
    """A request that is not answered: the status and the message."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class Room:
    """The memory for what all clients together are sending now.

    Args:
        most: bytes.
    """

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0


class _Body:
    """The body of a request, up to a limit.

    Args:
        receive: of the request.
        most: bytes.
        message: what is said of more.
        room: that it takes.
    """

    def __init__(self, receive: Receive, most: int, message: str, room: Room) -> None:
        self._receive, self.most, self.message, self._room = receive, most, message, room
        self.seen, self._held, self.is_whole = 0, 0, False

    async def receive(self) -> Message:
        message = await self._receive()
        size = len(message.get("body", b""))
        self.seen += size
        self.is_whole = not message.get("more_body", False)
        if self.seen > self.most:
            raise Refused(413, self.message)
        if self._room.taken + size > self._room.most:
            message = "too much is being sent at the same time; try again later"
            raise Refused(503, message, {"Retry-After": "2"})
        self._room.taken += size
        self._held += size
        return message

    def leave(self) -> None:
        """Gives back the room: the body is handed on or dropped."""
        self._room.taken -= self._held
        self._held = 0

    async def drain(self) -> None:
        """Reads on, so that a client that only listens when it has sent all gets its answer."""
        self.most, self._room = sys.maxsize, Room(sys.maxsize)  # it is not kept
        end = self.seen + _DRAINED
        try:
            async with asyncio.timeout(_SECONDS_TO_DRAIN):
                while not self.is_whole and self.seen < end:
                    await self.receive()
        except TimeoutError:
            pass


async def read_images(
    request: Request, limits: Limits, room: Room, *, many: bool
) -> tuple[list[tuple[str, bytes]], bool]:
    """Returns (name, encoded file) of the images of a request, and whether it is one without form.

    Args:
        request: none of whose body has been read.
        limits: of it.
        room: for all requests that are read at the same time.
        many: more images than one are taken.

    Raises:
        Refused: another type of content, no image, too many or too much.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = kind == "multipart/form-data"
    most = limits.request_bytes if is_form else limits.image_bytes
    what = "request" if is_form else "image"
    message = f"the {what} has more than {megabytes(most)}, the limit"
    body = _Body(request.receive, most, message, room)
    length = request.headers.get("content-length", "")
    try:
        if not (is_form or kind.startswith("image/") or kind == "application/octet-stream"):
            shown = f"content of type {kind[:100]!r}" if kind else "content without a type"
            raise Refused(415, f"{shown} is not taken: {_SEND}")
        if length.isdecimal() and int(length) > most:
            raise Refused(413, message)
        async with asyncio.timeout(_SECONDS_TO_SEND):
            reader = Request(request.scope, body.receive)
            if is_form:
                images = await _from_form(reader, limits.images if many else 1)
            else:
                images = [("image", await reader.body())]
    except TimeoutError:
        message = f"the request did not arrive within {_SECONDS_TO_SEND} seconds"
        raise Refused(408, message) from None
    except Refused:
        # curl waits for a word before it sends, and needs no draining.
        body.leave()
        if "expect" not in request.headers:
            await body.drain()
        raise
    finally:
        body.leave()
    if not images or (not is_form and not images[0][1]):
        raise Refused(400, f"no image in the request: {_SEND}")
    pixels = await asyncio.to_thread(_pixels_of, images)
    if pixels > limits.pixels:
        found, allowed = (f"{each / 1e6:,.1f}" for each in (pixels, limits.pixels))
        message = f"the images of a request may have {allowed} megapixels together, got {found}"
        raise Refused(413, message)
    return images, not is_form


def _pixels_of(images: Sequence[tuple[str, bytes]]) -> int:
    """How many pixels the images have by their headers; none is decoded."""
    total = 0
    for name, data in images:
        with contextlib.suppress(UserError):  # it is told when its turn comes, not decoded either
            height, width = EncodedImage(data, name).size
            total += height * width
    return total


class _InMemory(MultiPartParser):
    """Keeps large files in memory too: files on disk take descriptors, which connections need."""

    spool_max_size = sys.maxsize


async def _from_form(request: Request, most: int) -> list[tuple[str, bytes]]:
    try:
        async with contextlib.aclosing(request.stream()) as stream:
            parser = _InMemory(request.headers, stream, max_files=most, max_fields=0)
            form = await parser.parse()
    except MultiPartException as error:
        detail = error.message
        if detail.startswith("Too many files"):
            raise Refused(
                413, f"more than {plural(most, 'image')} in one request, the limit here"
            ) from error
        if detail.startswith("Too many fields"):
            message = f"a field without a file: image files go into the field {FIELD!r}"
            raise Refused(400, message) from error
        raise Refused(400, f"the form cannot be read: {detail}") from error
    try:
        images = []
        for field, file in form.multi_items():
            if field != FIELD:
                message = f"unknown field {field[:100]!r}: image files go into the field {FIELD!r}"
                raise Refused(400, message)
            assert isinstance(file, UploadFile)
            images.append((file.filename or "image", await file.read()))
    finally:
        await form.close()
    return images
