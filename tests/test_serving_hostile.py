"""The server and clients that want to break it: lies about lengths and shapes, floods, and deaths at every stage."""

from __future__ import annotations

import json
import random
import re
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("httptools")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")

from builders import features_with
from running_server import HEADER, Running, binary_request, connect, localizer_tensors, running, status_line, wait_until

from runtime.serving.options import Limits

VIDEO = features_with(20, [(3, 8, 1, 3.0)])
CHUNKED = b"POST /localize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(limits=Limits(pause_seconds=1.0)) as server:
        yield server


def tensor(shape: Any, size: Any, name: str = "visual") -> dict[str, Any]:
    return {"name": name, "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": size}}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ([2, 6], -48),
        ([2, 6], 48.0),
        ([2, 6], "48"),
        ([1, 1], True),
        ([2, 6], 2**64),
        ([2**31, 2**31], 2**64 - 4),
        ([True, 12], 48),
        ([-2, -6], 48),
        ([0, 2**63], 0),
        ([0, 2**40, 2**40], 0),
        ([1] * 9, 4),
        ([], 4),
        ("2", 8),
        (None, 8),
    ],
)
def test_sizes_that_lie(served: Running, shape: Any, size: Any) -> None:
    head = json.dumps({"inputs": [tensor(shape, size), tensor([2, 3], 24, "audio")]}).encode()
    answer = served.ask("POST", "/v2/models/localizer/infer", head + bytes(72), {HEADER: str(len(head))})
    assert answer.status == 400, answer.body
    assert answer.json()["error"]


@pytest.mark.parametrize(
    "data",
    [
        "[NaN]",
        "[1e999]",
        "[" + "9" * 5000 + "]",
        "[" * 900 + "]" * 900,
        "[" * 5000 + "]" * 5000,
        "[[1,2],[3]]",
        '{"a":1}',
        '["1"]',
        "[null]",
        "[true]",
        '"\\ud800"',
    ],
)
def test_json_that_holds_no_numbers(served: Running, data: str) -> None:
    body = f'{{"inputs":[{{"name":"visual","datatype":"FP32","shape":[1,1],"data":{data}}}]}}'.encode()
    assert served.ask("POST", "/v2/models/localizer/infer", body).status == 400


@pytest.mark.parametrize("length", ["-1", "1e3", "", "0x10", "99999999999", "9" * 40])
def test_header_lengths_that_lie(served: Running, length: str) -> None:
    answer = served.ask("POST", "/v2/models/localizer/infer", b"{}", {HEADER: length})
    assert answer.status == 400
    assert HEADER.lower() in answer.json()["error"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /%ff%00%2e%2e/ HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        (b"GET http://a/v2 HTTP/1.1\r\nHost: b\r\n\r\n", 200),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        (b"OPTIONS /v2 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"TRACE /v2 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"HEAD /v2 HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /v2/ HTTP/1.1\r\nHost: elsewhere\r\n\r\n", 404),  # not sent on to whatever the Host header says
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 200),
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", 400),
        (b"POST /localize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 415),
        (b"POST /localize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n", 400),
        (b"POST /localize HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
        (b"POST /localize HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\nabc", 400),
        (b"POST /localize HTTP/1.1\r\nHost: a\r\nContent-Length: %s\r\n\r\nabc" % (b"9" * 30), 400),
        (CHUNKED.replace(b"3\r\n", b"-3\r\n"), 400),
        (CHUNKED.replace(b"3\r\n", b"f" * 20 + b"\r\n"), 400),
    ],
)
def test_odd_requests(served: Running, request_: bytes, status: int) -> None:
    with connect(served) as client:
        client.sendall(request_)
        assert status_line(client) == status


@pytest.mark.parametrize("start", [CHUNKED + b"0\r\nX: ", CHUNKED + b"3;"], ids=["trailers", "chunk extension"])
def test_what_is_sent_beside_the_body_is_bounded(served: Running, start: bytes) -> None:
    flood = b"a" * 100_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with connect(served) as client:
        client.sendall(start)
        with pytest.raises(ConnectionError):
            client.sendall(flood)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB
    assert served.localize(VIDEO).status == 200


def test_pipelined_requests_are_answered_in_order(served: Running) -> None:
    with connect(served) as client:
        client.sendall(
            b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n" * 2000 + b"GET /no HTTP/1.1\r\nHost: a\r\n\r\n"
        )
        received = b""
        while b"no such path" not in received:
            piece = client.recv(1 << 16)
            assert piece
            received += piece
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200"] * 2000 + [b"404"]


def test_metrics_do_not_grow_with_what_clients_write(served: Running) -> None:
    def lines() -> int:
        return len(served.ask("GET", "/metrics").body.splitlines())

    def ask(i: int) -> None:
        served.ask("GET", f"/{i}")
        served.ask("GET", f"/v2/models/m{i}")
        served.ask("GET", f"/v2/models/localizer/versions/{i}")
        served.ask("POST", f"/v2/models/m{i}/infer", b"{}")

    ask(0)
    lines()
    ask(1)  # an answer may be here before it is counted
    before = lines()
    for i in range(2, 20):
        ask(i)
    assert lines() == before


def test_clients_that_die_at_every_stage_leave_nothing() -> None:
    """Cut at random bytes, by a reset or an end: nothing stays held, or the last requests would be refused."""
    body, length = binary_request(localizer_tensors(VIDEO))
    lengths = f"{HEADER}: {length}\r\nContent-Length: {len(body)}"
    head = f"POST /v2/models/localizer/infer HTTP/1.1\r\nHost: a\r\n{lengths}\r\n\r\n"
    whole = head.encode() + body
    draw = random.Random(0)
    limits = Limits(memory_bytes=3 * len(body), queue=4, pause_seconds=2.0)
    with running(limits=limits) as server:

        def die(cut: int, reset: bool) -> None:
            with connect(server) as client:
                client.sendall(whole[:cut])
                if reset:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        cuts = [draw.choice((len(whole), draw.randrange(len(whole)), draw.randrange(len(head)))) for _ in range(150)]
        threads = [threading.Thread(target=die, args=(cut, draw.random() < 0.5)) for cut in cuts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        def settled() -> bool:
            status = server.ask("GET", "/status").json()
            metrics = server.ask("GET", "/metrics").body.decode()
            return status["in_progress"] == status["queue"] == 0 and "ccnet_connections 1.0" in metrics

        wait_until(settled)
        for _ in range(5):
            assert server.localize(VIDEO).status == 200
