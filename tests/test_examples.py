"""The scripts of examples/ run as their first lines say, and stay short enough to be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from builders import LABELS, features_with, make_bundle, write_features

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle and the features of two videos, in each of which one event is found."""
    folder = tmp_path_factory.mktemp("examples")
    make_bundle(folder / "bundle")
    (folder / "features").mkdir()
    write_features(folder / "features", "first", features_with(30, [(3, 8, 1, 3.0)]))
    write_features(folder / "features", "second", features_with(20, [(12, 16, 1, 3.0)]))
    return folder


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def test_one_video(folder: Path) -> None:
    done = run(folder, "one_video.py", "bundle", "features", "first")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["by onnxruntime-fp32", f"   3.50 s to    8.50 s  0.95  {LABELS[1]}"]


def test_a_folder_with_a_bad_video(folder: Path) -> None:
    done = run(folder, "stream_folder.py", "bundle", "features")
    assert done.returncode == 0, done.stderr
    assert f"      9.0 s  {LABELS[1]}" in done.stdout.splitlines()
    (folder / "features" / "third_seen.npy").write_bytes(b"cut short")
    (folder / "features" / "third_heard.npy").write_bytes(b"cut short")
    done = run(folder, "stream_folder.py", "bundle", "features")
    assert done.returncode == 1
    assert done.stderr.startswith("failed: third: ")
    assert f"      9.0 s  {LABELS[1]}" in done.stdout.splitlines()


def test_a_client_of_the_server(folder: Path) -> None:
    for package in ("starlette", "uvicorn", "prometheus_client", "python_multipart"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "ccnet", "serve", "bundle", "--port", "0", "--quiet"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split(": ")[0]
            done = run(folder, "client.py", url, "features", "first")
            assert done.returncode == 0, done.stderr
            assert done.stdout == f"   3.50 s to    8.50 s  0.95  {LABELS[1]}\n"
            done = run(folder, "client.py", url, "features", "absent")
            assert done.returncode == 1
            assert done.stderr.startswith("400: ")
        finally:
            server.terminate()
    assert server.returncode == 0


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_say_how_to_run_them(script: Path) -> None:
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 60
    assert any(line.startswith(f"python examples/{script.name} ") for line in lines[:6])
