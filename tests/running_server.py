"""A server in a thread of the test, around engines of the test, and the plainest client."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from builders import SPEC, OracleBackend

from runtime.backends.base import Float32, Int32
from runtime.features import VideoFeatures
from runtime.localizer import Localizer
from runtime.serving.options import ServerOptions
from runtime.serving.server import Server

SECONDS = 20.0
"""More than anything takes; a test that waits so long has failed."""
HEADER = "Inference-Header-Content-Length"


class GatedBackend(OracleBackend):
    """The numpy network, which stops in front of every call while the gate is closed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = threading.Event()
        self.gate.set()
        self.calls = threading.Semaphore(0)
        """Released by every call that has begun."""

    def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        self.calls.release()
        assert self.gate.wait(SECONDS)
        return super().infer(visual, audio, lengths)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    server: Server
    host: str
    port: int

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Send one request on a connection of its own. `body`: bytes, or what becomes JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=SECONDS)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, content, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def localize(self, video: VideoFeatures, duration: float | None = None) -> Answer:
        """Ask the localizer, with binary tensors."""
        return self.infer("localizer", localizer_tensors(video, duration))

    def infer(self, model: str, tensors: Mapping[str, Any]) -> Answer:
        """Ask a model, with binary tensors in and JSON out."""
        body, length = binary_request(tensors)
        return self.ask("POST", f"/v2/models/{model}/infer", body, {HEADER: str(length)})


@contextlib.contextmanager
def running(backends: Sequence[Any] = (), *, localizer: Localizer | None = None, **options: Any) -> Iterator[Running]:
    """Serve the numpy network, or a given localizer, until the block ends; the server must have ended then."""
    engines = list(backends) or [OracleBackend()]
    localizer = localizer or Localizer(engines[:1], SPEC)
    server = Server(localizer, ServerOptions(port=0, **options), more=engines[1:] if backends else ())
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(ready.set,))
    thread.start()
    try:
        assert ready.wait(SECONDS)
        host, _, port = server.url.partition("://")[2].rpartition(":")
        yield Running(server, host, int(port))
    finally:
        server.drain()
        thread.join(SECONDS)
        assert not thread.is_alive()


def localizer_tensors(video: VideoFeatures, duration: float | None = None) -> dict[str, Any]:
    tensors: dict[str, Any] = {"visual": video.visual, "audio": video.audio}
    if duration is not None:
        tensors["duration"] = np.array([duration])
    return tensors


def binary_request(tensors: Mapping[str, Any], **head: Any) -> tuple[bytes, int]:
    """Return the body of a request with binary tensors, and the length of its JSON."""
    names = {"<f2": "FP16", "<f4": "FP32", "<f8": "FP64", "<i4": "INT32"}
    inputs = [
        {
            "name": name,
            "datatype": names[array.dtype.str],
            "shape": list(array.shape),
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in tensors.items()
    ]
    text = json.dumps({"inputs": inputs, **head}).encode()
    return text + b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values()), len(text)


def tensors_of(answer: Answer) -> dict[str, Any]:
    """Return the tensors of an answer, flat; binary ones as they say they are."""
    length = int(answer.headers.get(HEADER.lower(), len(answer.body)))
    found: dict[str, Any] = {}
    at = length
    for output in json.loads(answer.body[:length])["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            found[output["name"]] = output["data"]
        elif output["datatype"] == "BYTES":
            found[output["name"]] = answer.body[at : at + size]
        else:
            dtype = {"FP32": "<f4", "FP64": "<f8", "INT64": "<i8"}[output["datatype"]]
            found[output["name"]] = np.frombuffer(answer.body, dtype, size // np.dtype(dtype).itemsize, at)
        at += size or 0
    assert at == len(answer.body)
    return found


def connect(server: Running) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=SECONDS)


def status_line(client: socket.socket) -> int:
    """Return the status of the answer, read to the end of its first line."""
    line = b""
    while b"\r\n" not in line:
        piece = client.recv(1)
        assert piece, "the connection ended without an answer"
        line += piece
    return int(line.split()[1])


def wait_until(condition: Callable[[], bool]) -> None:
    last = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < last, "it never happened"
        time.sleep(0.01)
