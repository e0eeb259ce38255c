"""A server from start to drained end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import numpy as np

from runtime.backends.base import Backend
from runtime.errors import ConfigError
from runtime.localizer import Localizer
from runtime.packages import import_package
from runtime.serving.options import ServerOptions
from runtime.spec import AUDIO, VISUAL

log = logging.getLogger(__name__)

_DRAIN_TICK = 0.02
_CLOSE_SECONDS = 5
"""For clients that do not read their last answer."""


class Server:
    """A localizer on the network. `run` it in one thread; `drain` from any."""

    def __init__(self, localizer: Localizer, options: ServerOptions, *, more: Sequence[Backend] = ()) -> None:
        """Warm the engine up, and take the address. `more`: further execution contexts of the same engine.

        Both stay the caller's to close. Raises MissingDependency for the extra `serve`, ConfigError for an address or
        TLS files that can't be used or a batch that the engine does not take, EngineError when it does not run.
        """
        for package in ("starlette", "uvicorn", "httptools", "prometheus_client", "python_multipart"):
            import_package(package, "ccnet serve", distribution=package.replace("_", "-"))
        from runtime.serving.app import Service

        backends = [*localizer.backends, *more]
        for backend in backends:
            warm_up(backend)
        self._options = options
        self._socket = _listen(options)
        try:
            self._service = Service(localizer, backends, options)
        except BaseException:
            self._socket.close()
            raise
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()

    @property
    def url(self) -> str:
        """Where it listens; with the port that was taken where 0 was asked for."""
        host, scheme = self._options.host, "http" if self._options.tls_certificate is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._socket.getsockname()[1]}"

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM, SIGHUP, Ctrl-C or `drain`; then answer what was accepted, refuse the rest, and return.

        `on_ready` is called once requests are answered. A second Ctrl-C ends it at once. Signals reach it in the main
        thread only. Raises ConfigError for TLS files that can't be used.
        """
        try:
            asyncio.run(self._serve(on_ready))
        finally:
            self._socket.close()
            self._service.close()

    def drain(self) -> None:
        """Let `run` end as after SIGTERM. Returns at once."""
        self._service.app.draining = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._stopping.set)

    async def _serve(self, on_ready: Callable[[], None]) -> None:
        app = self._service.app
        server = _uvicorn_server(app, self._options, self.drain)
        self._loop = asyncio.get_running_loop()
        if (
            self._options.tls_certificate is not None
        ):  # uvicorn leaves asyncio's minute, and nobody counts those clients
            handshake = partial(self._loop.create_server, ssl_handshake_timeout=self._options.limits.pause_seconds)
            self._loop.create_server = handshake  # type: ignore[method-assign,assignment]
        hangs_up = threading.current_thread() is threading.main_thread()
        if hangs_up and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            self._loop.add_signal_handler(signal.SIGHUP, self.drain)
        self._service.connections = lambda: len(server.server_state.connections)
        running = asyncio.create_task(server.serve([self._socket]))
        while not (server.started or running.done()):
            await asyncio.sleep(0.005)
        if server.started:
            on_ready()
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not running.done():
            log.info("draining: %d requests are not answered yet, new ones are refused", app.active)
            last = self._loop.time() + self._options.limits.request_seconds
            while app.active and not server.force_exit:
                await asyncio.sleep(_DRAIN_TICK)
                if self._loop.time() > last:  # a video may have hours to go
                    self._service.stop_videos()
            server.should_exit = True
        await running


def warm_up(backend: Backend) -> None:
    """Run the smallest batch, so that no request waits for what an engine does at its first call."""
    shapes = backend.spec.input_shapes(1)
    visual, audio = (np.ones(shapes[name], np.float32) for name in (VISUAL, AUDIO))
    backend.infer(visual, audio, np.ones(1, np.int32))


def _uvicorn_server(app: Any, options: ServerOptions, drain: Callable[[], None]) -> Any:
    """Return uvicorn's server, whose signals drain, and do not end the process once more when it has ended."""
    import uvicorn

    from runtime.serving.connection import Connection

    class UvicornServer(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if app.draining and sig == signal.SIGINT:
                self.should_exit = self.force_exit = True
            drain()

    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=partial(Connection, limits=options.limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=options.limits.idle_seconds,  # type: ignore[arg-type]
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        ssl_certfile=options.tls_certificate,
        ssl_keyfile=options.tls_key,
    )
    try:
        config.load()
    except OSError as error:  # SSLError is one
        files = f"{options.tls_certificate}, {options.tls_key}"
        raise ConfigError(f"tls: {files}: can't be used ({error.strerror or error})") from None
    # What is no HTTP is answered by uvicorn, which says so each time, to whoever floods the server with it.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    return UvicornServer(config)


def _listen(options: ServerOptions) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise ConfigError(f"{options.host}, port {options.port}: can't listen there ({error.strerror})") from None
    return listening
