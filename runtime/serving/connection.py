"""Connections that hold nobody up: uvicorn's, with deadlines for headers and for reading answers, and a limit on both.

A slow or half-open client costs a connection and what it has sent, for a stated time. Bodies have deadlines of their
own, see `runtime.serving.bodies`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from runtime.serving.options import Limits

_MOST_HEADER_BYTES = 1 << 16
_MOST_HEADERS = 128
_FLUSH_SECONDS = 5.0


class Connection(HttpToolsProtocol):
    """One connection."""

    def __init__(self, config: Config, server_state: ServerState, *, limits: Limits, **options: Any) -> None:
        super().__init__(config, server_state, **options)
        self._limits = limits
        self._head_bytes = 0  # received since anything was done with them
        self._in_head = False
        self._quiet_since = 0.0  # when the last request ended; 0 while there is one
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._quiet_since = self.loop.time()
        self._await_head()
        if len(self.connections) > self._limits.connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._head_timer)
        self._stop(self._write_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > _MOST_HEADER_BYTES and not self.transport.is_closing():
            if self._in_head:
                self.send_400_response("The headers are too long.")
            else:
                self.transport.abort()  # trailers or an extension of a chunk, while a request is being read or answered

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        if self._head_timer is None:
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= _MOST_HEADERS:
            raise ValueError("too many headers")  # the parser makes a bad request of it
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._quiet_since, self._head_bytes = False, 0.0, 0
        self._stop(self._head_timer)
        self._head_timer = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._head_bytes = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._head_bytes = 0

    def on_response_complete(self) -> None:
        self._quiet_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.pause_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop(self._write_timer)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(_FLUSH_SECONDS, self.transport.abort)

    def _await_head(self) -> None:
        """Start the time that the headers of a request may take."""
        self._head_timer = self.loop.call_later(self._limits.pause_seconds, self.transport.abort)

    def _make_room(self) -> None:
        """Close the connection that has been without a request for longest; there may be none but this one."""
        quiet = [c for c in self.connections if isinstance(c, Connection) and c._quiet_since]
        oldest = min(quiet, key=lambda connection: connection._quiet_since)
        oldest.transport.abort()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
