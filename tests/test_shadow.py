"""A user's own files are not taken for modules of this project, or are named where Python takes them first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import make_bundle

import ccnet
from runtime.profiling.cold_start import measure_cold_start

ROOT = str(Path(ccnet.__file__).parents[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("runtime", "export", "json", "numpy", "ccnet"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user was run')\n")
    return tmp_path


def run(folder: Path, *command: str, path: str = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_current_folder_is_not_searched(folder: Path) -> None:
    (folder / "ccnet.py").unlink()  # what `-m ccnet` itself finds is Python's choice
    done = run(folder, "-m", "ccnet", "predict", "--help")
    assert done.returncode == 0, done.stderr


def test_children_do_not_search_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    make_bundle(folder / "bundle")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", ROOT)
    (found,) = measure_cold_start(folder / "bundle", "onnxruntime-fp32", repeats=1)["runs"]
    assert found["total_s"] > 0


def test_a_module_that_is_found_first_is_named(folder: Path) -> None:
    for name in ("json", "numpy", "ccnet"):
        (folder / f"{name}.py").unlink()
    path = os.pathsep.join((str(folder), ROOT))
    done = run(folder, "-c", "import ccnet; ccnet.Localizer", path=path)
    assert f"ImportError: {folder / 'runtime.py'}: not the package 'runtime'" in done.stderr
    done = run(folder, "-c", "from ccnet.cli.main import main", path=path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"ccnet: error: {folder / 'runtime.py'}: not the package")
    assert "Traceback" not in done.stderr
