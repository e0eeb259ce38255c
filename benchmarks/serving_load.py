"""Clients that load a server: many connections in one process, requests made beforehand, every answer checked.

`python -m benchmarks.serving_load HOST PORT EXCHANGES COUNT CONCURRENCY SEED` does it in a process of its own, which
can be killed, and reports after every few answers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from runtime.errors import CCNetError
from runtime.features import VideoFeatures
from runtime.localizer import Localizer
from runtime.serving.models import LOCALIZER, VERSION, event_outputs
from runtime.serving.protocol import HEADER_LENGTH, InferRequest, infer_response

REPORTED = 20
"""Answers after which a process reports."""


@dataclass(frozen=True)
class Exchange:
    """A request as bytes, and the answer that is right."""

    request: bytes
    status: int
    body: bytes | None
    """None: of an error, whose text is not compared."""


@dataclass
class Load:
    """What became of the requests."""

    answered: Counter[int] = field(default_factory=Counter)
    """Answers by status."""
    wrong: int = 0
    """Answers that are not the right ones; a refusal (503) is none."""
    unanswered: int = 0
    """Requests whose connection ended instead."""
    seconds: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"answered": dict(self.answered), "wrong": self.wrong, "unanswered": self.unanswered}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Load:
        answered = Counter({int(status): count for status, count in data["answered"].items()})
        return cls(answered, data["wrong"], data["unanswered"])


def exchange(video: VideoFeatures, localizer: Localizer) -> Exchange:
    """Return the request to localize a video, as binary tensors, and what the localizer called directly says."""
    duration = localizer.spec.time_base.covered_seconds(video.steps)
    arrays = {"visual": video.visual, "audio": video.audio, "duration": np.array([duration])}
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": {4: "FP32", 8: "FP64"}[array.itemsize],
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in arrays.items()
    ]
    head = orjson.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}})
    body = head + b"".join(array.tobytes() for array in arrays.values())
    request = (
        f"POST /v2/models/{LOCALIZER}/infer HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Length: {len(body)}\r\n{HEADER_LENGTH}: {len(head)}\r\n\r\n"
    ).encode() + body
    try:
        found = localizer(video.visual, video.audio, duration)
    except CCNetError:
        return Exchange(request, 400, None)
    pieces, _ = infer_response(LOCALIZER, VERSION, InferRequest({}, {}, binary=True), event_outputs(found))
    return Exchange(request, 200, b"".join(pieces))


def write_exchanges(path: Path, exchanges: Sequence[Exchange]) -> None:
    """Write exchanges for `serving_load` in a process of its own."""
    named = {}
    for i, each in enumerate(exchanges):
        named[f"{i}_{each.status}_request"] = np.frombuffer(each.request, np.uint8)
        named[f"{i}_{each.status}_body"] = np.frombuffer(each.body or b"", np.uint8)
    np.savez(path, **named)  # type: ignore[arg-type]


def read_exchanges(path: Path) -> list[Exchange]:
    with np.load(path, allow_pickle=False) as file:
        contents = {name: file[name].tobytes() for name in file.files}
    names = [name.removesuffix("_request") for name in contents if name.endswith("_request")]
    return [
        Exchange(contents[f"{name}_request"], int(name.split("_")[1]), contents[f"{name}_body"] or None)
        for name in names
    ]


def run_load(
    host: str,
    port: int,
    exchanges: Iterator[Exchange],
    concurrency: int,
    *,
    report: Callable[[Load], None] | None = None,
) -> Load:
    """Send requests on `concurrency` connections until there are none left, or nobody listens any more."""
    return asyncio.run(_run(host, port, exchanges, concurrency, report))


async def _run(
    host: str,
    port: int,
    exchanges: Iterator[Exchange],
    concurrency: int,
    report: Callable[[Load], None] | None,
) -> Load:
    load, loop = Load(), asyncio.get_running_loop()

    async def client() -> None:
        for first in exchanges:
            done: asyncio.Future[None] = loop.create_future()
            rest = itertools.chain([first], exchanges)
            try:
                await loop.create_connection(lambda: _Client(load, rest, done, report), host, port)  # noqa: B023
            except OSError:
                load.unanswered += 1
                return
            await done

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return load


class _Client(asyncio.Protocol):
    """One connection: sends a request, checks its answer, sends the next one."""

    def __init__(
        self,
        load: Load,
        exchanges: Iterator[Exchange],
        done: asyncio.Future[None],
        report: Callable[[Load], None] | None,
    ) -> None:
        self._load, self._exchanges, self._done = load, exchanges, done
        self._report = report
        self._transport: Any = None
        self._exchange: Exchange | None = None
        self._received = bytearray()
        self._begun = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        self._load.unanswered += self._exchange is not None
        if not self._done.done():
            self._done.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._received[:end]).lower()
        size = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        if len(self._received) < end + 4 + size:
            return
        self._check(int(head[9:12]), bytes(self._received[end + 4 :]))
        self._exchange = None
        self._received.clear()
        if b"connection: close" in head:
            self._transport.close()
        else:
            self._next()

    def _next(self) -> None:
        self._exchange = next(self._exchanges, None)
        if self._exchange is None:
            self._transport.close()
            return
        self._begun = time.perf_counter()
        self._transport.write(self._exchange.request)

    def _check(self, status: int, body: bytes) -> None:
        load, expected = self._load, self._exchange
        assert expected is not None
        load.seconds.append(time.perf_counter() - self._begun)
        load.answered[status] += 1
        right = status == expected.status and expected.body in (None, body)
        load.wrong += not right and status != 503
        if self._report is not None:
            self._report(load)


def main(arguments: Sequence[str]) -> int:
    host, port, path, count, concurrency, seed = arguments
    pool = read_exchanges(Path(path))
    chance = random.Random(int(seed))

    def report(load: Load) -> None:
        if sum(load.answered.values()) % REPORTED == 0:
            print(json.dumps(load.to_json()), flush=True)

    endless = (chance.choice(pool) for _ in range(int(count)))
    print(json.dumps(run_load(host, int(port), endless, int(concurrency), report=report).to_json()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
