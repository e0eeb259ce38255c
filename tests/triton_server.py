"""A real Triton server for tests: the core and Python backend that the wheel nvidia-pytriton carries.

The wheel pins numpy 1, so it lives in an environment of its own: CCNET_PYTRITON is the `site-packages` of one with
`pip install nvidia-pytriton orjson`, of the Python version that runs the tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

_READY_SECONDS = 60


def server_files() -> Path:
    """Return the folder `site-packages` that has the wheel; skip the test, saying why, where there is none."""
    given = os.environ.get("CCNET_PYTRITON")
    found = importlib.util.find_spec("pytriton")
    site = Path(given) if given else Path(str(found.origin)).parents[1] if found is not None else None
    if site is None:
        pytest.skip("needs the wheel nvidia-pytriton: install it into another environment, name it in CCNET_PYTRITON")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not (site / "pytriton" / "tritonserver" / "python_backend_stubs" / version).is_dir():
        pytest.skip(f"the wheel nvidia-pytriton in {site} has no Python backend for Python {version}")
    return site


@contextlib.contextmanager
def running(repository: Path, folder: Path) -> Iterator[str]:
    """Serve a repository on a loopback port; yield `host:port` of its HTTP endpoint once it is ready.

    Skips the test where the server's binary can't run here; fails it, with the server's log, where a model does not
    load.
    """
    site = server_files()
    source = site / "pytriton" / "tritonserver"
    server = folder / "tritonserver"
    shutil.copytree(source, server, ignore=shutil.ignore_patterns("python_backend_stubs"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = source / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, server / "backends" / "python" / "triton_python_backend_stub")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    libraries = [str(path) for path in (site / "nvidia_pytriton.libs", Path(sys.base_prefix) / "lib") if path.is_dir()]
    environment = {
        **os.environ,
        # The models run in the wheel's environment: its Python is the first on the path.
        "PATH": os.pathsep.join([str(site.parents[2] / "bin"), os.environ.get("PATH", "")]),
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
    }
    command = [
        str(server / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={server / 'backends'}",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--exit-on-error=true",
    ]
    log = folder / "server.log"
    with open(log, "wb") as stream:
        try:
            process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        except OSError as error:
            pytest.skip(f"the server of nvidia-pytriton does not start here: {error}")
        try:
            _wait(process, port, log)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _READY_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            text = log.read_text(errors="replace")
            if "error while loading shared libraries" in text or "GLIBC" in text:
                pytest.skip(f"the server of nvidia-pytriton does not run here: {text.strip().splitlines()[-1]}")
            pytest.fail(f"Triton ended with {process.returncode}:\n{text[-3000:]}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            if urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2).status == 200:
                return
        time.sleep(0.1)
    pytest.fail(f"Triton was not ready after {_READY_SECONDS} s:\n{log.read_text(errors='replace')[-3000:]}")
