"""The server: what it answers, that a batch changes no result, and what it refuses."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from builders import LABELS, SPEC, OracleBackend, features_with, oracle
from running_server import (
    HEADER,
    SECONDS,
    Answer,
    GatedBackend,
    Running,
    binary_request,
    connect,
    localizer_tensors,
    running,
    status_line,
    tensors_of,
    wait_until,
)

from runtime.errors import FeatureError
from runtime.features import VideoFeatures
from runtime.localizer import Localizer

for package in ("starlette", "uvicorn", "httptools", "prometheus_client", "python_multipart"):
    pytest.importorskip(package)

from runtime.serving.options import Limits  # noqa: E402


def video(i: int) -> VideoFeatures:
    """Return one of many videos of different lengths and events, some longer than the network."""
    steps = 10 + (7 * i) % 40
    return features_with(steps, [(1, 6, i % 4, 1.0 + 0.05 * i), (2, 9, (i + 1) % 4, 0.3)])


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(limits=Limits(body_bytes=100_000)) as server:
        yield server


def direct(features: VideoFeatures, duration: float | None = None) -> list[dict[str, Any]]:
    return Localizer([OracleBackend()], SPEC)(features.visual, features.audio, duration).to_json()


def events_of(answer: Answer) -> list[dict[str, Any]]:
    """Return the events of an answer of the localizer as the runtime writes them."""
    assert answer.status == 200, answer.body
    found = tensors_of(answer)
    rows = zip(np.reshape(found["segments"], (-1, 2)), found["labels"], found["scores"], strict=True)
    return [
        {"segment": list(map(float, s)), "label": LABELS[i], "label_id": int(i), "score": float(np.float32(p))}
        for s, i, p in rows
    ]


# What it answers


def test_health_and_metadata(served: Running) -> None:
    assert served.ask("GET", "/v2/health/live").status == 200
    assert served.ask("GET", "/v2/health/ready").status == 200
    assert served.ask("GET", "/v2").json()["extensions"][0] == "binary_tensor_data"
    model = served.ask("GET", "/v2/models/localizer").json()
    assert [tensor["name"] for tensor in model["inputs"]] == ["visual", "audio", "duration"]
    assert served.ask("GET", "/v2/models/network/versions/1").json()["inputs"][0]["shape"] == [-1, 32, 6]
    assert served.ask("GET", "/v2/models/network/versions/1/ready").json() == {"name": "network", "ready": True}
    assert served.ask("GET", "/v2/models/network/config").json()["max_batch_size"] == 4


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/network/versions/2", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", "/no/such/path", 404),
        ("POST", "/v2", 405),
        ("GET", "/v2/models/network/infer", 405),
    ],
)
def test_what_is_not_there(served: Running, method: str, path: str, status: int) -> None:
    answer = served.ask(method, path, b"..." if method == "POST" else None)
    assert answer.status == status
    assert answer.json()["error"]


@pytest.mark.parametrize("duration", [None, 17.5])
def test_the_localizer_says_what_it_says_when_it_is_called(served: Running, duration: float | None) -> None:
    for i in range(8):
        assert events_of(served.localize(video(i), duration)) == direct(video(i), duration)


def test_json_and_binary_tensors_and_every_float_type_give_the_same(served: Running) -> None:
    tensors = localizer_tensors(video(3), 20.0)
    expected = direct(video(3), 20.0)
    inputs = [
        {"name": name, "datatype": "FP64" if name == "duration" else "FP32", "shape": list(a.shape), "data": data}
        for name, a in tensors.items()
        for data in [a.tolist() if name == "visual" else a.ravel().tolist()]  # nested or flat
    ]
    answer = served.ask("POST", "/v2/models/localizer/infer", {"inputs": inputs, "id": "mine"})
    assert answer.json()["id"] == "mine"
    assert events_of(answer) == expected
    wide = {name: array.astype(np.float64) for name, array in tensors.items()}
    assert events_of(served.infer("localizer", wide)) == expected
    body, length = binary_request(tensors, parameters={"binary_data_output": True})
    answer = served.ask("POST", "/v2/models/localizer/infer", body, {HEADER: str(length)})
    assert events_of(answer) == expected
    assert tensors_of(answer)["label_names"][:4] == len(expected[0]["label"]).to_bytes(4, "little")


def test_only_outputs_that_were_asked_for(served: Running) -> None:
    outputs = [{"name": "scores"}, {"name": "labels", "parameters": {"binary_data": True}}]
    body, length = binary_request(localizer_tensors(video(1)), outputs=outputs)
    found = tensors_of(served.ask("POST", "/v2/models/localizer/infer", body, {HEADER: str(length)}))
    assert list(found) == ["scores", "labels"]
    assert isinstance(found["labels"], np.ndarray)


def rows(count: int, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "visual": random.normal(size=(count, 32, 6)).astype(np.float32),
        "audio": random.normal(size=(count, 32, 3)).astype(np.float32),
        "lengths": random.integers(1, 33, count).astype(np.int32),
    }


def test_the_network_gives_what_the_engine_gives(served: Running) -> None:
    for count in (1, 3, 4):
        tensors = rows(count, count)
        found = tensors_of(served.infer("network", tensors))
        for name, expected in zip(("logits", "offsets"), oracle(*tensors.values()), strict=True):
            np.testing.assert_array_equal(np.array(found[name], np.float32), expected.ravel())


def test_a_public_client() -> None:
    client = pytest.importorskip("tritonclient.http", reason="the package tritonclient[http] is not installed")
    with running() as server:
        triton = client.InferenceServerClient(f"{server.host}:{server.port}")
        assert triton.is_server_live()
        assert triton.is_server_ready()
        assert triton.is_model_ready("localizer", "1")
        assert triton.get_model_metadata("network")["outputs"][0]["name"] == "logits"
        assert triton.get_model_config("network")["max_batch_size"] == 4
        for binary in (True, False):
            given = []
            for name, array in localizer_tensors(video(2), 18.0).items():
                given.append(client.InferInput(name, list(array.shape), "FP64" if name == "duration" else "FP32"))
                given[-1].set_data_from_numpy(array, binary_data=binary)
            asked = [client.InferRequestedOutput(name, binary_data=binary) for name in ("segments", "label_names")]
            result = triton.infer("localizer", given, outputs=asked, request_id="7")
            expected = direct(video(2), 18.0)
            assert result.get_response()["id"] == "7"
            assert result.as_numpy("segments").tolist() == [event["segment"] for event in expected]
            names = [name.decode() if binary else name for name in result.as_numpy("label_names").tolist()]
            assert names == [event["label"] for event in expected]
        given = []
        for name, array in rows(2, 0).items():
            given.append(client.InferInput(name, list(array.shape), "INT32" if name == "lengths" else "FP32"))
            given[-1].set_data_from_numpy(array)
        logits = triton.infer("network", given).as_numpy("logits")
        np.testing.assert_array_equal(logits, oracle(*rows(2, 0).values())[0])
        with pytest.raises(client.InferenceServerException, match="audio: missing"):
            triton.infer("localizer", given[:1])
        triton.close()


def test_the_wire_format_of_kserve_s_client(served: Running) -> None:
    """What `kserve.InferenceRESTClient` 0.21 sends, to the byte, and what it reads of the answers."""
    for path, key in (("live", "live"), ("ready", "ready")):
        answer = served.ask("GET", f"/v2/health/{path}")
        assert answer.json()[key] is True
    features = video(2)
    expected = direct(features)
    shapes = [("visual", features.visual), ("audio", features.audio)]
    head = b'{"id":"7","model_name":"localizer","inputs":['
    binary = [
        b'{"name":"%s","shape":[%d,%d],"datatype":"FP32","parameters":{"binary_data_size":%d}}'
        % (name.encode(), *array.shape, array.nbytes)
        for name, array in shapes
    ]
    data = features.visual.tobytes() + features.audio.tobytes()
    names = ("segments", "scores", "labels")
    outputs = b",".join(b'{"name":"%s","parameters":{"binary_data":true}}' % name.encode() for name in names)
    for end in (b'],"parameters":{"binary_data_output":true}}', b'],"outputs":[' + outputs + b"]}"):
        text = head + b",".join(binary) + end
        headers = {HEADER.lower(): str(len(text)), "content-type": "application/octet-stream"}
        answer = served.ask("POST", "/v2/models/localizer/infer", text + data, headers)
        assert events_of(answer) == expected
        length = int(answer.headers[HEADER.lower()])
        response = json.loads(answer.body[:length])
        assert (response["id"], response["model_name"]) == ("7", "localizer")
        assert all({"name", "shape", "datatype", "parameters"} == entry.keys() for entry in response["outputs"])
    inputs = [
        {"name": name, "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist()}
        for name, array in shapes
    ]
    body = {"id": "7", "model_name": "localizer", "inputs": inputs, "parameters": {"binary_data_output": False}}
    answer = served.ask("POST", "/v2/models/localizer/infer", body, {"content-type": "application/json"})
    assert events_of(answer) == expected
    assert HEADER.lower() not in answer.headers
    refused = served.ask("POST", "/v2/models/localizer/infer", {**body, "inputs": inputs[:1]})
    assert refused.headers["content-type"] == "application/json"  # or the client does not show the message
    assert "audio: missing" in refused.json()["error"]


def test_kserve_s_own_client(served: Running) -> None:
    kserve = pytest.importorskip("kserve", reason="the package kserve is not installed", exc_type=ImportError)
    base = f"http://{served.host}:{served.port}"

    def request(model: str, tensors: dict[str, Any], binary: bool) -> Any:
        inputs = []
        for name, array in tensors.items():
            kind = {"<f4": "FP32", "<f8": "FP64", "<i4": "INT32"}[array.dtype.str]
            inputs.append(kserve.InferInput(name, list(array.shape), kind))
            inputs[-1].set_data_from_numpy(array, binary_data=binary)
        return kserve.InferRequest(model, inputs, parameters={"binary_data_output": binary})

    async def talk() -> None:
        async with kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2")) as client:
            assert await client.is_server_live(base)
            assert await client.is_server_ready(base)
            assert await client.is_model_ready(base, "localizer")
            assert not await client.is_model_ready(base, "other")
            for binary in (True, False):
                asked = request("localizer", localizer_tensors(video(2), 18.0), binary)
                found = await client.infer(base, asked, "localizer")
                segments, names = (found.get_output_by_name(name).as_numpy() for name in ("segments", "label_names"))
                expected = direct(video(2), 18.0)
                assert segments.tolist() == [event["segment"] for event in expected]
                assert names.tolist() == [event["label"] for event in expected]
                found = await client.infer(base, request("network", rows(2, 0), binary), "network")
                logits = found.get_output_by_name("logits").as_numpy()
                np.testing.assert_array_equal(logits, oracle(*rows(2, 0).values())[0])

    asyncio.run(talk())


# Batches


def test_a_result_does_not_depend_on_its_batch() -> None:
    engine = GatedBackend()
    with running([engine], batch=4) as server, ThreadPoolExecutor(24) as clients:
        engine.gate.clear()
        videos = [clients.submit(server.localize, video(i)) for i in range(16)]
        tensors = [rows(1 + i % 3, i) for i in range(8)]
        networks = [clients.submit(server.infer, "network", each) for each in tensors]
        wait_until(lambda: in_progress(server) == 24)
        engine.gate.set()
        for i, answer in enumerate(videos):
            assert events_of(answer.result()) == direct(video(i))
        for each, answer in zip(tensors, networks, strict=True):
            logits, _ = oracle(*each.values())
            np.testing.assert_array_equal(np.array(tensors_of(answer.result())["logits"], np.float32), logits.ravel())
    assert max(engine.batches) == 4
    assert sum(engine.batches) == 1 + 16 + sum(len(each["lengths"]) for each in tensors)  # 1: the warm-up


def test_long_videos_in_windows() -> None:
    engine = GatedBackend()
    localizer = Localizer([engine], SPEC, long_videos="windows")
    with running([engine], localizer=localizer, batch=4) as server, ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(server.localize, video(i)) for i in range(12)]
        found = [events_of(answer.result()) for answer in answers]
    assert found == [localizer(*video(i)).to_json() for i in range(12)]


def test_a_long_video_with_a_hole_in_a_later_window(caplog: pytest.LogCaptureFixture) -> None:
    holed = features_with(100)
    holed.visual[70, 2] = np.inf
    engine = OracleBackend()
    localizer = Localizer([engine], SPEC, long_videos="windows")
    with running([engine], localizer=localizer, batch=4) as server:
        answer = server.localize(holed)
        assert answer.status == 400
        assert "inf at step 70, channel 2" in answer.json()["error"]
        assert events_of(server.localize(video(5))) == localizer(*video(5)).to_json()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_request_waits_for_company_no_longer_than_stated() -> None:
    engine = OracleBackend()
    with running([engine], batch=2, max_wait=SECONDS / 4) as server, ThreadPoolExecutor(2) as clients:
        first = clients.submit(server.localize, video(0))
        wait_until(lambda: in_progress(server) == 1)
        begin = time.monotonic()
        assert server.localize(video(1)).status == first.result().status == 200
        assert time.monotonic() - begin < SECONDS / 8  # a full batch goes at once
        assert engine.batches[1:] == [2]
    with running([engine], batch=2, max_wait=0.05) as server:
        assert server.localize(video(0)).status == 200


def test_several_contexts_run_side_by_side() -> None:
    engines = [GatedBackend() for _ in range(3)]
    for engine in engines:
        engine.gate.clear()
        engine.gate.set()
    with running(engines) as server, ThreadPoolExecutor(8) as clients:
        for engine in engines:
            assert engine.calls.acquire(timeout=SECONDS)  # the warm-up
            engine.gate.clear()
        answers = [clients.submit(server.localize, video(i)) for i in range(6)]
        for engine in engines:
            assert engine.calls.acquire(timeout=SECONDS)
        for engine in engines:
            engine.gate.set()
        assert [events_of(answer.result()) for answer in answers] == [direct(video(i)) for i in range(6)]


# What it refuses


def test_bad_features_are_answered_with_the_runtime_s_own_message(served: Running) -> None:
    good = video(1)
    holed = good.visual.copy()
    holed[3, 2] = np.nan
    for visual, audio in ((holed, good.audio), (good.visual[:, :4], good.audio), (good.visual[0], good.audio)):
        with pytest.raises(FeatureError) as error:
            Localizer([OracleBackend()], SPEC)(visual, audio)
        answer = served.infer("localizer", {"visual": visual, "audio": audio})
        assert answer.status == 400
        assert answer.json()["error"] == str(error.value).replace("video 0", "request")
    holed_rows = rows(3, 0)
    holed_rows["audio"][1, 5, 2] = np.inf
    assert served.infer("network", holed_rows).json()["error"].startswith("audio[1]: inf at step 5, channel 2")
    assert "split the batch" in served.infer("network", rows(5, 0)).json()["error"]


@pytest.mark.parametrize("seconds", [0.0, -1.0, np.nan, np.inf])
def test_bad_durations(served: Running, seconds: float) -> None:
    answer = served.localize(video(0), seconds)
    assert answer.status == 400
    assert "seconds above 0" in answer.json()["error"]


def test_a_bad_request_does_not_touch_the_others_of_its_batch() -> None:
    engine = GatedBackend()
    holed = VideoFeatures(np.full((9, 6), np.nan, np.float32), np.zeros((9, 3), np.float32))
    with running([engine], batch=4) as server, ThreadPoolExecutor(12) as clients:
        engine.gate.clear()
        answers = [clients.submit(server.localize, holed if i % 3 == 2 else video(i)) for i in range(12)]
        wait_until(lambda: in_progress(server) == 8)
        engine.gate.set()
        for i, answer in enumerate(answers):
            if i % 3 == 2:
                assert answer.result().status == 400
            else:
                assert events_of(answer.result()) == direct(video(i))


def test_a_full_queue_refuses_and_does_not_grow() -> None:
    engine = GatedBackend()
    with running([engine], workers=1, limits=Limits(queue=3)) as server, ThreadPoolExecutor(20) as clients:
        engine.gate.clear()
        accepted = []
        for i in range(5):  # two threads hold one each, three wait
            accepted.append(clients.submit(server.localize, video(i)))
            wait_until(lambda i=i: in_progress(server) == i + 1)  # type: ignore[misc]
        wait_until(lambda: waiting(server) == 3)
        for _ in range(10):
            answer = server.localize(video(0))
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) >= 1
        assert waiting(server) == 3
        engine.gate.set()
        assert [events_of(answer.result()) for answer in accepted] == [direct(video(i)) for i in range(5)]
        assert server.localize(video(0)).status == 200


def test_bodies_over_the_limit_are_refused_before_they_are_read(served: Running) -> None:
    with connect(served) as stated:
        stated.sendall(b"POST /localize HTTP/1.1\r\nHost: a\r\nContent-Length: 100001\r\n\r\n")
        assert status_line(stated) == 413
    with connect(served) as chunked:
        chunked.sendall(b"POST /localize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(2):
            chunked.sendall(b"%x\r\n%s\r\n" % (60_000, bytes(60_000)))
        assert status_line(chunked) == 413
    # A client that sends without looking gets its answer all the same.
    assert served.ask("POST", "/localize", bytes(3_000_000)).status == 413
    answer = served.ask("POST", "/localize", b"x", {"Content-Encoding": "gzip"})
    assert answer.status == 415


def test_all_bodies_together_have_a_limit() -> None:
    with running(limits=Limits(memory_bytes=10_000)) as server:
        answer = server.ask("POST", "/localize", bytes(20_000))
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert server.localize(video(0)).status == 200


def test_slow_and_half_open_clients_hold_nobody_up() -> None:
    limits = Limits(pause_seconds=0.4, body_seconds=0.8, connections=40)
    with running(limits=limits) as server:
        silent = [connect(server) for _ in range(30)]
        slow_head, slow_body = connect(server), connect(server)
        slow_head.sendall(b"GET / HTTP/1.1\r\nHost:")
        slow_body.sendall(b"POST /localize HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nhalf of it")
        begin = time.monotonic()
        assert server.localize(video(0)).status == 200
        assert time.monotonic() - begin < 0.3
        with slow_body:
            assert status_line(slow_body) == 408
        for each in (*silent, slow_head):
            assert ended(each)
        with connect(server) as dripping:
            dripping.sendall(b"POST /localize HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(6):
                dripping.sendall(b"x")
                time.sleep(0.2)
            assert status_line(dripping) == 408


def test_more_connections_than_the_limit_close_the_one_that_is_idle_longest() -> None:
    with running(limits=Limits(connections=5)) as server:
        idle = [connect(server) for _ in range(5)]
        time.sleep(0.1)
        assert server.localize(video(0)).status == 200
        assert ended(idle[0])
        idle[1].sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        assert status_line(idle[1]) == 200
        for each in idle:
            each.close()


@pytest.mark.parametrize(
    "head",
    [
        b"no http at all\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"a%d: b\r\n" % i for i in range(200)) + b"\r\n",
        b"GET / HTTP/1.1\r\na: " + bytes(70_000).replace(b"\0", b"x") + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\na: " + bytes(400_000).replace(b"\0", b"x"),
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /localize HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["nonsense", "many headers", "a long header", "an endless header", "negative length", "two lengths"],
)
def test_what_is_no_http_is_answered_with_400(served: Running, head: bytes) -> None:
    with connect(served) as client:
        client.sendall(head)
        assert status_line(client) in (200, 400) if b"xxx\r\n\r\n" in head[-8:] else status_line(client) == 400
    assert served.ask("GET", "/v2/health/live").status == 200


def test_clients_that_went_away_are_not_run() -> None:
    engine = GatedBackend()
    with running([engine], workers=1) as server, ThreadPoolExecutor(4) as clients:
        engine.gate.clear()
        kept = [clients.submit(server.localize, video(i)) for i in range(2)]
        wait_until(lambda: in_progress(server) == 2 and waiting(server) == 0)
        body, length = binary_request(localizer_tensors(video(2)))
        gone = [connect(server) for _ in range(5)]
        for each in gone:
            head = (
                f"POST /v2/models/localizer/infer HTTP/1.1\r\nContent-Length: {len(body)}\r\n{HEADER}: {length}\r\n\r\n"
            )
            each.sendall(head.encode() + body)
        wait_until(lambda: waiting(server) == 5)
        for each in gone:
            each.close()
        wait_until(lambda: waiting(server) == 0)
        engine.gate.set()
        assert all(answer.result().status == 200 for answer in kept)
    assert sum(engine.batches) == 1 + 2


def test_a_request_that_takes_too_long() -> None:
    engine = GatedBackend()
    with running([engine], limits=Limits(request_seconds=0.2)) as server:
        engine.gate.clear()
        assert server.localize(video(0)).status == 504
        engine.gate.set()
        assert server.localize(video(0)).status == 200


def test_an_engine_that_fails_is_the_server_s_fault() -> None:
    class Broken(OracleBackend):
        def infer(self, *arrays: Any) -> Any:
            logits, offsets = super().infer(*arrays)
            return (logits, offsets) if len(self.batches) == 1 else (logits * np.nan, offsets)

    with running([Broken()]) as server:
        answer = server.localize(video(0))
        assert answer.status == 500
        assert "not finite" in answer.json()["error"] or "logits" in answer.json()["error"]
        assert server.infer("network", rows(1, 0)).status == 500
        assert 'ccnet_errors_total{kind="EngineError"} 2.0' in server.ask("GET", "/metrics").body.decode()


def test_a_token() -> None:
    token = "correct-horse-battery"
    with running(token=token) as server:
        for path in ("/v2", "/status", "/metrics", "/v2/models/localizer"):
            answer = server.ask("GET", path)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert server.ask("GET", path, headers={"Authorization": "Bearer wrong"}).status == 401
            assert server.ask("GET", path, headers={"Authorization": f"Bearer {token}"}).status == 200
        for path in ("/", "/v2/health/live", "/v2/health/ready"):
            assert server.ask("GET", path).status == 200
        assert server.localize(video(0)).status == 401


# Draining


def test_draining_answers_what_was_accepted_and_refuses_the_rest() -> None:
    engine = GatedBackend()
    with running([engine]) as server, ThreadPoolExecutor(8) as clients:
        engine.gate.clear()
        accepted = [clients.submit(server.localize, video(i)) for i in range(8)]
        wait_until(lambda: in_progress(server) == 8)
        server.server.drain()
        refused = server.localize(video(0))
        assert refused.status == 503
        assert refused.headers["retry-after"]
        assert server.ask("GET", "/v2/health/ready").status == 503
        assert server.ask("GET", "/v2/health/live").status == 200
        engine.gate.set()
        assert [events_of(answer.result()) for answer in accepted] == [direct(video(i)) for i in range(8)]


def test_the_threads_end_with_the_server() -> None:
    before = set(threading.enumerate())
    with running() as server:
        server.localize(video(0))
    assert set(threading.enumerate()) <= before


# Metrics and log


def test_metrics_and_access_log(caplog: pytest.LogCaptureFixture) -> None:
    access = "runtime.serving.access"
    with caplog.at_level(logging.INFO, logger=access), running() as server:
        server.localize(video(0))
        server.localize(VideoFeatures(video(0).visual[:, :2], video(0).audio))
        server.ask("GET", "/v2/health/live")
        text = server.ask("GET", "/metrics").body.decode()
    assert 'ccnet_requests_total{route="/v2/models/localizer/infer",status="200"} 1.0' in text
    assert 'ccnet_requests_total{route="/v2/models/localizer/infer",status="400"} 1.0' in text
    assert 'ccnet_errors_total{kind="FeatureError"} 1.0' in text
    assert 'ccnet_stage_seconds_count{stage="engine"} 1.0' in text
    assert "ccnet_batch_rows_sum 1.0" in text
    assert 'ccnet_queue_length{model="network"} 0.0' in text
    good, bad, metrics = (json.loads(record.message) for record in caplog.records if record.name == access)
    assert (good["status"], good["batch"], good["method"]) == (200, 1, "POST")
    assert good["ms"] >= good["engine_ms"] >= 0
    assert "visual: got shape" in bad["error"]
    assert metrics["path"] == "/metrics"


# Uploads


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def form(parts: dict[str, bytes], **fields: str) -> tuple[bytes, dict[str, str]]:
    lines = b""
    for name, content in parts.items():
        disposition = f'form-data; name="file"; filename="{name}"'
        lines += b"--edge\r\nContent-Disposition: " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"
    for name, text in fields.items():
        lines += f'--edge\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()
    return lines + b"--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}


def npz(save: Callable[..., None] = np.savez, **arrays: Any) -> bytes:
    stream = io.BytesIO()
    save(stream, **arrays)
    return stream.getvalue()


def test_uploads_of_files(served: Running) -> None:
    features = video(1)
    expected = direct(features, 17.0)
    seen, heard = npy(features.visual), npy(features.audio.astype(np.float64))
    uploads = [
        form({"v4_seen.npy": seen, "v4_heard.npy": heard}, duration="17", id="v4"),
        form({"visual.npy": seen, "audio.npy": heard}, duration="17", id="v4"),
        form({"v4.npz": npz(visual=features.visual, audio=features.audio)}, duration="17.0", id="v4"),
    ]
    for body, headers in uploads:
        answer = served.ask("POST", "/localize", body, headers)
        assert answer.json() == {"video_id": "v4", "duration": 17.0, "events": expected}
    for save in (np.savez, np.savez_compressed):
        for names in (("visual", "audio"), ("v4_seen", "v4_heard"), ("seen", "heard")):
            body = npz(save, **dict(zip(names, features, strict=True)))
            answer = served.ask("POST", "/localize?id=v4&duration=17", body)
            assert answer.json() == {"video_id": "v4", "duration": 17.0, "events": expected}
    cut = served.ask("POST", "/localize", npz(visual=features.visual, audio=features.audio[:9]))
    assert cut.json()["video_id"] == "video"
    assert "lengths differ" in cut.json()["note"]


def lying_archive() -> bytes:
    """Return an archive whose list says that a file of zeros is small."""
    packed = bytearray(npz(np.savez_compressed, visual=np.zeros((40_000, 6), np.float32), audio=np.zeros((9, 3))))
    at = packed.index(b"PK\x01\x02")
    packed[at + 24 : at + 28] = (1000).to_bytes(4, "little")
    return bytes(packed)


def many_entries() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for i in range(1000):
            archive.writestr(f"{i}.npy", b"")
    return stream.getvalue()


PICKLED = npy(np.array([{"a": 1}], object))
BAD_UPLOADS: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "not an archive"),
    "no archive": (b"PK\x03\x04" + bytes(1000), 400, "not an archive"),
    "cut off": (npz(visual=np.zeros((9, 6)), audio=np.zeros((9, 3)))[:-30], 400, "not an archive"),
    "damaged": (
        npz(visual=np.zeros((9, 6)), audio=np.zeros((9, 3))).replace(b"visual", b"vi\xffual", 1),
        400,
        "damaged",
    ),
    "a file is missing": (npz(visual=np.zeros((9, 6))), 400, "has no file *_heard.npy"),
    "pickled": (npz(visual=np.array([{}], object), audio=np.zeros((9, 3))), 400, "pickled"),
    "wrong width": (npz(visual=np.zeros((9, 5)), audio=np.zeros((9, 3))), 400, "another extractor"),
    "unpacks to too much": (
        npz(np.savez_compressed, visual=np.zeros((40_000, 6)), audio=np.zeros((9, 3))),
        413,
        "unpacks",
    ),
    "lies about its size": (lying_archive(), 400, "npz"),
    "many entries": (many_entries(), 400, "list of files"),
}


@pytest.mark.filterwarnings("ignore:.*pickle.*")
@pytest.mark.parametrize("kind", BAD_UPLOADS)
def test_bad_archives(served: Running, kind: str) -> None:
    body, status, message = BAD_UPLOADS[kind]
    answer = served.ask("POST", "/localize", body)
    assert (answer.status, message in answer.json()["error"]) == (status, True), answer.body


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (*form({"a_seen.npy": b"nonsense", "a_heard.npy": b""}), "not a .npy file"),
        (*form({"a_seen.npy": PICKLED, "a_heard.npy": b""}), "pickled"),
        (*form({"a_seen.npy": b"", "b_seen.npy": b"", "a_heard.npy": b""}), "has 2 files"),
        (*form({}, duration="soon"), "expected seconds above 0"),
        (*form({}, id="../up"), "expected a name without"),
        (*form({f"{i}": b"" for i in range(40)}), "more than 32 parts"),
        (form({"a_seen.npy": b"x"})[0][:-10], form({})[1], "truncated"),
        (b"--edge\r\nno header\r\n\r\n", form({})[1], "malformed"),
        (b"...", {"Content-Type": "multipart/form-data"}, "form"),
    ],
)
def test_bad_forms(served: Running, body: bytes, headers: dict[str, str], message: str) -> None:
    answer = served.ask("POST", "/localize", body, headers)
    assert answer.status == 400, answer.body
    assert message in answer.json()["error"]


def test_bad_queries(served: Running) -> None:
    assert served.ask("POST", "/localize?id=..", b"").status == 400
    for text in ("x", "1_0", "%D9%A1"):  # Arabic digits, which Python takes for numbers
        assert served.ask("POST", f"/localize?duration={text}", b"").status == 400


# Helpers


def ended(client: socket.socket) -> bool:
    """Wait for the end of a connection without an answer."""
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True
    finally:
        client.close()


def in_progress(server: Running) -> int:
    found: int = server.ask("GET", "/status").json()["in_progress"]
    return found


def waiting(server: Running) -> int:
    found: int = server.ask("GET", "/status").json()["queue"]
    return found
