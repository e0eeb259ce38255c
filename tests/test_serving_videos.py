"""Videos through the server: extracted apart, a stated number at a time, with progress; and nothing is left of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("httptools")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")
pytest.importorskip("torch")
pytest.importorskip("av")
pytest.importorskip("PIL")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from builders import LABELS, OracleBackend, features_with
from running_server import SECONDS, Running, running, wait_until
from video_files import write_video

from runtime.errors import BundleError, ConfigError
from runtime.localizer import Localizer
from runtime.serving.options import ExtractorOptions, Limits
from runtime.spec import ModelSpec
from runtime.video.extractor import Extractor
from runtime.video.features import FeatureExtractor
from runtime.video.files import localize_video

SPEC = ModelSpec(length=32, levels=4, visual_dim=128, audio_dim=16, labels=LABELS)
LINES = {"Accept": "application/x-ndjson"}


@contextlib.contextmanager
def serving(extractor: Extractor, queue: int = 4, **limits: Any) -> Iterator[Running]:
    options = ExtractorOptions(folder=str(extractor.folder), threads=1, queue=queue)
    backend = OracleBackend(SPEC)
    localizer = Localizer([backend], SPEC)
    with running([backend], localizer=localizer, extractor=options, limits=Limits(**limits)) as server:
        yield server


@pytest.fixture(scope="module")
def served(extractor: Extractor) -> Iterator[Running]:
    with serving(extractor, queue=1, video_bytes=4_000_000) as server:
        yield server


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("short") / "my clip.mp4", count=41, sound=1.7)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A video of which nobody waits for the end."""
    path = write_video(tmp_path_factory.mktemp("long") / "long.mp4", count=1500, size=(48, 64), sound=60.0)
    return path.read_bytes()


def form(
    content: bytes, name: str = "my clip.mp4", field: str = "video", **fields: str
) -> tuple[bytes, dict[str, str]]:
    parts = [
        b'--edge\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (key.encode(), value.encode())
        for key, value in fields.items()
    ]
    head = f'--edge\r\nContent-Disposition: form-data; name="{field}"; filename="my clip.mp4"\r\n\r\n'.encode()
    body = b"".join(parts) + head + content + b"\r\n--edge--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=edge"}


def begin(server: Running, content: bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """Upload a video and return when its extraction has made progress."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=SECONDS)
    connection.request("POST", "/localize/video", content, LINES)
    response = connection.getresponse()
    while json.loads(response.readline())["stage"] != "picture":
        pass
    return connection, response


def idle(server: Running) -> bool:
    return bool(server.ask("GET", "/status").json()["in_progress"] == 0)


def nameless_files() -> list[str]:
    """Return the files without a name that this process, the server's, has open or mapped."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in (*links, *mapped) if "(deleted)" in line and "/ccnet-" in line]


def extracting() -> list[int]:
    """Return the processes that extract for this one."""
    found = []
    for task in os.listdir("/proc/self/task"):
        for child in Path(f"/proc/self/task/{task}/children").read_text().split():
            with contextlib.suppress(OSError):
                if b"extraction_worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def test_a_video_becomes_its_events(served: Running, extractor: Extractor, short: Path) -> None:
    with FeatureExtractor.load(extractor.folder, threads=1) as extract:
        found = localize_video(Localizer([OracleBackend(SPEC)], SPEC), extract, short)
    expected = {"video_id": "my clip", "duration": 41 / 25, "events": found.to_json()}
    assert expected["events"] != []
    body, headers = form(short.read_bytes())
    answer = served.ask("POST", "/localize/video", body, headers)
    assert answer.status == 200, answer.body
    assert answer.json() == expected
    answer = served.ask("POST", "/localize/video", body, {**headers, **LINES})
    *stages, last = [json.loads(line) for line in answer.body.splitlines()]
    assert last == expected
    assert [stages[0], stages[-1]] == [{"stage": "waiting", "ahead": 0}, {"stage": "events"}]
    assert any(stage["stage"] == "picture" and 0 < stage["seconds"] <= stage["of"] for stage in stages)
    answer = served.ask("POST", "/localize/video?id=v", short.read_bytes())
    assert answer.json() == {**expected, "video_id": "v"}
    assert served.ask("GET", "/status").json()["extractor"].startswith("flow-")
    assert served.ask("GET", "/status").json()["latency"]["p99_ms"] < 1000  # of the network, not of the extraction
    assert 'route="/localize/video",status="200"' in served.ask("GET", "/metrics").body.decode()
    assert nameless_files() == []


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"no video at all", {}, 400, "video: not a video file that FFmpeg can read"),
        (b"", {}, 400, "video: "),
        (*form(b"x", field="file"), 400, "expected one, called video"),
        (*form(b"x", id="../up"), 400, "expected a name without"),
        (*form(b"x", note="y" * 5000), 413, "beside the video"),
        (form(b"x")[0].replace(b"form-data", b"form-data; a=" + b"b" * 20_000), form(b"")[1], 400, "header"),
        (form(b"x")[0][:-10], form(b"")[1], 400, "truncated"),
        (b"--edge--\r\n", form(b"")[1], 400, "form"),
        (bytes(4_000_001), {}, 413, "more than 4000000 bytes"),
        (b"x", {"Content-Encoding": "gzip"}, 415, "Content-Encoding"),
    ],
)
def test_bad_uploads(served: Running, body: bytes, headers: dict[str, str], status: int, message: str) -> None:
    answer = served.ask("POST", "/localize/video", body, headers)
    assert (answer.status, message in answer.json()["error"]) == (status, True), answer.body
    if status == 400 and headers == {}:  # what is known only after the upload is said in the last line
        answer = served.ask("POST", "/localize/video", body, LINES)
        assert answer.status == 200
        last = json.loads(answer.body.splitlines()[-1])
        assert last["status"] == 400
        assert message in last["error"]
    assert nameless_files() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: open("/dev/full", "w+b"))  # noqa: SIM115
    for body, headers in (form(bytes(3_000_000)), form(b"x"), (bytes(3_000_000), {})):
        answer = served.ask("POST", "/localize/video", body, headers)
        assert answer.status == 507
        assert "No space left on device" in answer.json()["error"]


def test_who_goes_away_stops_the_work_and_gives_the_place_to_the_next(
    served: Running, endless: bytes, short: Path
) -> None:
    (before,) = extracting()
    connection, response = begin(served, endless)
    waiting = http.client.HTTPConnection(served.host, served.port, timeout=SECONDS)
    waiting.request("POST", "/localize/video", endless, LINES)
    second = waiting.getresponse()
    assert json.loads(second.readline()) == {"stage": "waiting", "ahead": 0}
    refused = served.ask("POST", "/localize/video", endless)  # one at work, one waits
    assert refused.status == 503
    assert int(refused.headers["retry-after"]) > 0
    # Features do not wait for videos.
    video = features_with(20, [(3, 8, 1, 3.0)], SPEC)
    began = time.monotonic()
    assert served.localize(video).status == 200
    assert time.monotonic() - began < 2

    response.close()
    connection.close()
    second.close()
    waiting.close()
    wait_until(lambda: idle(served))
    answer = served.ask("POST", "/localize/video", *form(short.read_bytes()))
    assert answer.status == 200
    assert extracting() != [before]
    assert 'status="499"' in served.ask("GET", "/metrics").body.decode()
    assert nameless_files() == []


def test_a_process_that_dies_costs_its_video(served: Running, endless: bytes, short: Path) -> None:
    connection, response = begin(served, endless)
    os.kill(extracting()[0], signal.SIGKILL)
    last = json.loads(response.read().splitlines()[-1])
    connection.close()
    assert last["status"] == 500
    assert "its process died (status -9)" in last["error"]
    assert served.ask("POST", "/localize/video", *form(short.read_bytes())).status == 200
    (resting,) = extracting()
    os.kill(resting, signal.SIGKILL)  # while it has nothing to do
    assert served.ask("POST", "/localize/video", *form(short.read_bytes())).status == 200


def test_time_and_the_end_of_the_server_are_bounded(extractor: Extractor, endless: bytes) -> None:
    others = extracting()
    with serving(extractor, video_seconds=0.5, request_seconds=1.0) as server:
        answer = server.ask("POST", "/localize/video", endless)
        assert answer.status == 504
    with serving(extractor, request_seconds=0.5) as server:
        connection, response = begin(server, endless)
        began = time.monotonic()
        server.server.drain()
        last = json.loads(response.read().splitlines()[-1])
        connection.close()
        assert last == {"error": "the server is shutting down", "status": 503}
        assert 0.4 < time.monotonic() - began < 5
    assert extracting() == others
    assert nameless_files() == []


def test_without_an_extractor_there_is_no_such_path(extractor: Extractor, tmp_path: Path) -> None:
    with running() as server:
        assert server.ask("POST", "/localize/video", b"x").status == 404
        assert server.ask("GET", "/status").json()["extractor"] is None
    with (
        pytest.raises(ConfigError, match="visual width: got 128"),
        running(extractor=ExtractorOptions(folder=str(extractor.folder))),
    ):
        pass
    with pytest.raises(BundleError), running(extractor=ExtractorOptions(folder=str(tmp_path))):
        pass
