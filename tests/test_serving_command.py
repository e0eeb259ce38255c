"""`ccnet serve` as a process: public command-line clients, signals under load, TLS, and mistakes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from builders import features_with, make_bundle, write_features
from running_server import running

import benchmarks.served
from benchmarks import serving as benchmark
from benchmarks.compare import compare
from benchmarks.served import Setting
from benchmarks.serving_load import exchange, run_load
from ccnet.cli.main import main
from runtime.errors import ConfigError
from runtime.localizer import Localizer
from runtime.profiling.timing import Rules
from runtime.serving.options import Limits, ServerOptions

for package in ("onnx", "onnxruntime", "starlette", "uvicorn", "httptools", "prometheus_client", "python_multipart"):
    pytest.importorskip(package)

TOKEN = "a-token-of-enough-letters"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "bundle"
    make_bundle(folder)
    return folder


class Process:
    """A running `ccnet serve`."""

    def __init__(self, bundle: Path, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "ccnet", "serve", str(bundle), "--port", "0", *options]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  a pipe that nobody empties would stop the server
        self.child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._errors, text=True, env={**os.environ, **environment}
        )
        assert self.child.stdout is not None
        self.first_line = self.child.stdout.readline()
        self.url = self.first_line.partition(": ")[0]
        host, _, port = self.url.partition("://")[2].rpartition(":")
        self.host, self.port = host, int(port or 0)

    def end(self, number: int = signal.SIGTERM) -> str:
        """Send a signal and return as `wait`."""
        self.child.send_signal(number)
        return self.wait()

    def wait(self) -> str:
        """Return what the server wrote to standard error in its life. It must end soon, with status 0."""
        status = self.child.wait(timeout=30)
        self._errors.seek(0)
        errors = self._errors.read()
        assert status == 0, errors
        return errors

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()
        self._errors.close()


@contextlib.contextmanager
def serving(bundle: Path, *options: str, **environment: str) -> Iterator[Process]:
    process = Process(bundle, *options, **environment)
    try:
        yield process
    finally:
        process.close()


def test_curl_and_what_is_logged(bundle: Path, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    features = features_with(20, [(3, 8, 1, 3.0)])
    write_features(tmp_path, "v", features)
    with serving(bundle, "--contexts", "2") as server:
        assert server.first_line.endswith(": onnxruntime-fp32 (parity check: verified)\n")
        files = [f"file=@{tmp_path / name}" for name in ("v_seen.npy", "v_heard.npy")]
        command = ["curl", "-sS", "-F", files[0], "-F", files[1], "-F", "duration=20", "-F", "id=v"]
        done = subprocess.run([*command, f"{server.url}/localize"], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        inputs = [
            {"name": name, "datatype": "FP32", "shape": list(array.shape), "data": array.ravel().tolist()}
            for name, array in zip(("visual", "audio"), features, strict=True)
        ]
        body = tmp_path / "request.json"
        body.write_text(json.dumps({"inputs": inputs}))
        command = ["curl", "-sS", "-d", f"@{body}", f"{server.url}/v2/models/localizer/infer"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        segments = next(out for out in json.loads(done.stdout)["outputs"] if out["name"] == "segments")
        errors = server.end(signal.SIGINT).splitlines()
    assert found["events"][0]["segment"] == [3.5, 8.5]
    assert segments["data"][:2] == [3.5, 8.5]
    records = [json.loads(line) for line in errors if line.startswith("{")]
    assert [record["path"] for record in records] == ["/localize", "/v2/models/localizer/infer"]
    assert errors[-1] == "drained: every accepted request was answered"


def test_sigterm_under_load_loses_nothing_that_was_accepted(bundle: Path) -> None:
    videos = [features_with(10 + i, [(1, 6, i % 4, 1.0)]) for i in range(20)]
    with Localizer.load(bundle) as localizer:
        exchanges = [exchange(video, localizer) for video in videos]
    with serving(bundle) as server:
        threading.Timer(1.0, server.child.send_signal, (signal.SIGTERM,)).start()
        load = run_load(server.host, server.port, itertools.islice(itertools.cycle(exchanges), 100_000), 16)
        errors = server.wait()
    statuses = [json.loads(line)["status"] for line in errors.splitlines() if line.startswith("{")]
    assert load.wrong == 0
    assert set(load.answered) <= {200, 503}
    assert load.answered[200] == statuses.count(200) > 16
    with pytest.raises(ConnectionError):
        socket.create_connection((server.host, server.port), timeout=5)


@pytest.fixture(scope="module")
def certificate_and_key(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make += ["-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, "-keyout", key, "-out", certificate], capture_output=True, check=True)
    return certificate, key


def test_tls_and_a_token_from_a_file(bundle: Path, tmp_path: Path, certificate_and_key: tuple[str, str]) -> None:
    certificate, key = certificate_and_key
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    files = ("--tls-cert", certificate, "--tls-key", key, "--token-file", str(token))
    with serving(bundle, *files) as server:
        assert server.url.startswith("https://")
        request = urllib.request.Request(f"{server.url}/v2", headers={"Authorization": f"Bearer {TOKEN}"})
        context = ssl.create_default_context(cafile=certificate)
        with urllib.request.urlopen(request, context=context, timeout=20) as answer:
            assert json.load(answer)["name"] == "ccnet"
        server.end()


def test_a_client_that_never_shakes_hands_is_let_go(certificate_and_key: tuple[str, str]) -> None:
    certificate, key = certificate_and_key
    limits = Limits(pause_seconds=0.5)
    with running(tls_certificate=certificate, tls_key=key, limits=limits) as server:
        with socket.create_connection((server.host, server.port), timeout=20) as silent:
            assert silent.recv(1) == b""
        with socket.create_connection((server.host, server.port), timeout=20) as halfway:
            halfway.sendall(b"\x16\x03\x01\x02\x00")  # the head of a record, and no more
            assert halfway.recv(1) == b""


def test_a_token_from_the_environment_and_no_access_log(bundle: Path) -> None:
    with serving(bundle, "--quiet", CCNET_TOKEN=TOKEN) as server:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{server.url}/status", timeout=20)
        assert server.end() == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "203.0.113.7"], "can't listen there"),
        (["--host", "no.such.host.invalid"], "can't listen there"),
        (["--batch", "5"], "batch: got 5, expected 1 to 4"),
        (["--tls-cert", "a.pem"], "a certificate and its key"),
        (["--tls-cert", "a.pem", "--tls-key", "b.pem"], "can't be used"),
        (["--port", "70000"], "port: got 70000"),
        (["--token-file", "/no/such/file"], "No such file"),
        (["--token-file", os.devnull], "got a device, expected a file"),
        (["--extractions", "2"], "--extractions goes with --extractor"),
        (["--missing-audio", "silence"], "--missing-audio goes with --extractor"),
        (["--extractor", os.path.dirname(__file__)], "is not an extractor"),
    ],
)
def test_mistakes(bundle: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(bundle), "--port", "0", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(bundle), "--port", str(taken.getsockname()[1])]) == 2
    assert "in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_which_addresses_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert ServerOptions(host=host).is_loopback == loopback


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"limits\.queue"):
        Limits(queue=0)
    assert np.isfinite(list(vars(Limits()).values())).all()


def test_the_benchmark_runs_and_finds_nothing_lost_or_wrong(bundle: Path, tmp_path: Path) -> None:
    rules = Rules(warmup_seconds=0, warmup_calls=1, seconds=0, calls=3)
    options = ("ccnet serve --batch 8", "ccnet serve --batch 4")  # the most that this bundle takes
    servers = {
        name.replace(*options): tuple(o.replace("8", "4") for o in each) for name, each in benchmark.SERVERS.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "SERVERS", servers)
        patch.setattr(benchmarks.served, "KILLED_EVERY", 0.5)
        path = benchmark.run(Setting(bundle, tmp_path, rules, 1, 20, 2000, 0.5))
    data = json.loads(path.read_text())
    assert len(compare(data, data)) == len(data["measurements"])
    assert path.with_suffix(".md").read_text().startswith("# Server")
    bad, ended, full = data["bad_clients"], data["end_under_load"], data["full_queue"]
    assert bad["answers"] >= 2000
    assert bad["answered"]["400"] > 0
    assert bad["killed_clients"] > 0
    assert ended["exit_status"] == ended["lost"] == bad["wrong"] == ended["wrong"] == full["wrong"] == 0
