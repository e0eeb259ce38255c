"""Bodies of requests: read with a limit on size, on time, and on the memory of all of them together."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from runtime.errors import RequestError
from runtime.schema import show
from runtime.serving.options import Limits

_LINGER_SECONDS = 2.0


class Disconnected(Exception):
    """The client is gone; nobody waits for an answer."""


class Bodies:
    """The bodies that a server holds."""

    def __init__(self, limits: Limits) -> None:
        self.held = 0
        """Bytes."""
        self._limits = limits

    @contextlib.contextmanager
    def hold(self) -> Iterator[Body]:
        """Return a body to be read; what it holds counts until the block ends."""
        body = Body(self, self._limits)
        try:
            yield body
        finally:
            self.held -= body.held


class Body:
    """The body of one request."""

    def __init__(self, bodies: Bodies, limits: Limits) -> None:
        self.held = 0
        self._bodies, self._limits = bodies, limits

    async def read(self, request: Request) -> bytearray:
        """Read the whole body. Raises as `pieces`, and RequestError (503) where all bodies together take too much."""
        content = bytearray()
        async for piece in self.pieces(request, self._limits.body_bytes):
            self._take(len(piece))
            content += piece
        return content

    async def pieces(self, request: Request, limit: int) -> AsyncIterator[bytes]:
        """Yield the body as it comes, up to `limit` bytes of it.

        Raises RequestError: 413 where it is too large, at once where its length is stated; 415 where it is compressed;
        408 where it does not come. Raises Disconnected.
        """
        if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
            raise RequestError(f"Content-Encoding: got {show(encoding)}; send the body as it is", status=415)
        if (transfer := request.headers.get("transfer-encoding", "chunked")).lower() != "chunked":
            raise RequestError(f"Transfer-Encoding: got {show(transfer)}; send the body as it is", status=415)
        stated = request.headers.get("content-length")
        _check_size(int(stated) if stated is not None and stated.isdigit() else 0, limit)
        begin, received = time.monotonic(), 0
        more = True
        while more:
            # A body as large as a video's has as much more time, but only for what has come of it.
            last = begin + self._limits.body_seconds * max(1.0, received / self._limits.body_bytes)
            left = min(self._limits.pause_seconds, last - time.monotonic())
            try:
                message = await asyncio.wait_for(request.receive(), max(0.001, left))
            except asyncio.TimeoutError:
                raise RequestError(f"the body did not come in time; {received} bytes did", status=408) from None
            if message["type"] == "http.disconnect":
                raise Disconnected
            piece = message.get("body", b"")
            received += len(piece)
            _check_size(received, limit)
            yield piece
            more = message.get("more_body", False)

    def _take(self, size: int) -> None:
        if self._bodies.held + size > self._limits.memory_bytes:
            raise RequestError("the server holds as many bytes of requests as it may", status=503, retry_after=1)
        self._bodies.held += size
        self.held += size


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise RequestError(f"the body has more than {limit} bytes, the most taken", status=413)


class Refusal(Response):
    """An answer to a request whose body has not been read, and will not be.

    The connection is closed, but not while the client is still sending: it would never see the answer. For a moment
    what it sends is thrown away.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), _LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b""})


async def _discard(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass
