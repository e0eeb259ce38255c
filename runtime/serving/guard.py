"""The outermost layer of a server: who may ask, what is refused at once, how errors look, and the access log."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.errors import CCNetError, ConfigError, FeatureError, RequestError, VideoError
from runtime.schema import quote
from runtime.serving.bodies import Disconnected, Refusal
from runtime.serving.metrics import Metrics

log = logging.getLogger(__name__)
access_log = logging.getLogger("runtime.serving.access")

CLIENT_CLOSED = 499
"""Status in log and metrics of a request whose client did not wait for the answer."""

_PROBES = ("/v2/health/live", "/v2/health/ready")
"""Asked by whoever runs the server: no token is needed, and they are not logged."""
_OPEN = (*_PROBES, "/")
_WHILE_DRAINING = (*_PROBES, "/metrics", "/status")


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, token: str | None, metrics: Metrics) -> None:
        self.draining = False
        """Whether new requests are refused."""
        self.active = 0
        """Accepted requests that are not answered yet; not those that are refused while draining."""
        self._app, self._metrics = app, metrics
        self._token = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        refused = self.draining and scope["path"] not in _WHILE_DRAINING
        self.active += not refused
        exchange = _Exchange(scope, receive, send, closing=lambda: self.draining)
        scope["app"], scope["ccnet.exchange"] = self, exchange
        try:
            if refused:
                raise RequestError("the server is shutting down", status=503, retry_after=5)
            self._check_token(scope)
            await self._app(scope, exchange.receive, exchange.send)
        except Disconnected:
            exchange.status = CLIENT_CLOSED
            self._metrics.error("ClientClosed")
        except Exception as error:  # noqa: BLE001  every one of them is an answer
            await self._answer(error, exchange)
        finally:
            self.active -= not refused
            self._record(exchange)

    def _check_token(self, scope: Scope) -> None:
        """Raise RequestError (401) where a token is needed and another or none was sent."""
        if self._token is not None and scope["path"] not in _OPEN:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._token):
                raise RequestError("a valid bearer token is needed: Authorization: Bearer TOKEN", status=401)

    def note(self, error: Exception, exchange: _Exchange) -> tuple[int, str]:
        """Put an error into metrics and logs. Returns the status and message that it is answered with."""
        status, message, _ = _describe(error)
        exchange.error = message
        self._metrics.error(type(error).__name__ if status != 500 or isinstance(error, CCNetError) else "Defect")
        if status == 500:
            log.error("%s", message, exc_info=None if isinstance(error, CCNetError) else error)
        return status, message

    async def _answer(self, error: Exception, exchange: _Exchange) -> None:
        status, message = self.note(error, exchange)
        if exchange.status:
            raise error  # in the middle of an answer: all that is left is to cut it
        kind = Response if exchange.has_body_been_read else Refusal
        response = kind(orjson.dumps({"error": message}), status, _describe(error)[2], "application/json")
        await response(exchange.scope, exchange.receive, exchange.send)

    def _record(self, exchange: _Exchange) -> None:
        seconds = time.perf_counter() - exchange.begun
        self._metrics.request(exchange.route, exchange.status, seconds)
        if exchange.scope["path"] not in _PROBES and access_log.isEnabledFor(logging.INFO):
            access_log.info("%s", exchange.line(seconds))


class _Exchange:
    """One request and its answer, as they pass."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, closing: Callable[[], bool]) -> None:
        self.scope = scope
        self.begun = time.perf_counter()
        self.status = 0
        self.error: str | None = None
        self.extracted = 0.0
        """Seconds, upload included, until a video had its features: not the network's latency."""
        self.details: dict[str, Any] = {}
        """What the handler adds to the line of the access log."""
        headers = Request(scope).headers
        self.has_body_been_read = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        self._receive, self._send, self._closing = receive, send, closing
        self._received = self._sent = 0

    @property
    def route(self) -> str:
        """The route with the model, and without what anybody may write into a path, for metrics."""
        path: str = getattr(self.scope.get("route"), "path", "other")
        return path.replace("{model}", self.details.get("model", "other"))

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self.has_body_been_read = self.has_body_been_read or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._closing():
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        else:
            self._sent += len(message.get("body", b""))
        await self._send(message)

    def line(self, seconds: float) -> str:
        """Return the line of the access log: JSON."""
        scope = self.scope
        record = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "client": scope["client"][0] if scope.get("client") else None,
            "method": scope["method"],
            "path": quote(scope["path"]),
            "status": self.status,
            "bytes_in": self._received,
            "bytes_out": self._sent,
            "ms": round(seconds * 1e3, 2),
            **self.details,
        }
        if self.error is not None:
            record["error"] = self.error
        return orjson.dumps(record, default=str).decode()


def _describe(error: Exception) -> tuple[int, str, dict[str, str]]:
    """Return status, message and headers of the answer to an error."""
    if isinstance(error, RequestError):
        headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        return error.status, str(error), headers
    if isinstance(error, FeatureError | ConfigError | VideoError):
        return 400, str(error), {}
    if isinstance(error, HTTPException):
        return error.status_code, error.detail, dict(error.headers or {})
    if isinstance(error, CCNetError):
        return 500, str(error), {}
    return 500, "internal error; the server's log says more", {}
