"""The runtime in an environment that has numpy, orjson and ONNX Runtime, and nothing else: no torch, no exporter."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import SPEC, features_with, make_bundle, write_features

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("numpy", "orjson", "onnxruntime")
ABSENT = ("torch", "onnx", "onnxscript", "safetensors", "openvino", "tensorrt", "tensorrt_rtx", "tqdm", "export")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with links to the runtime's libraries, `runtime` and `ccnet`: all that the child process can import."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name in LIBRARIES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        (folder / name).symlink_to(package)
        bundled = package.with_name(f"{name}.libs")  # shared libraries that the wheel of numpy brings
        if bundled.is_dir():
            (folder / bundled.name).symlink_to(bundled)
    for name in ("runtime", "ccnet"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def child(site: Path, code: str) -> Any:
    """Run `code` without site-packages and user settings; what it assigns to `result` comes back."""
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r}); result = None\n{code}\nimport json; print(json.dumps(result))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_environment_is_as_bare_as_it_claims(site: Path) -> None:
    code = f"import importlib.util\nresult = [n for n in {ABSENT!r} if importlib.util.find_spec(n)]"
    assert child(site, code) == []


def test_importing_the_runtime_loads_no_engine(site: Path) -> None:
    code = (
        "import runtime, runtime.bundle, runtime.features, runtime.backends, runtime.localizer, runtime.evaluation\n"
        "result = sorted({m.partition('.')[0] for m in sys.modules} & {'onnxruntime', 'torch'})"
    )
    assert child(site, code) == []


def test_import_runtime_alone_does_not_even_load_numpy(site: Path) -> None:
    assert child(site, "import runtime\nresult = 'numpy' in sys.modules") is False


def test_a_bundle_runs_without_torch(site: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    features = features_with(20, [(3, 8, 1, 3.0)])
    write_features(tmp_path, "v", features)
    code = f"""
import numpy as np
from runtime import Localizer
with Localizer.load({str(tmp_path / "bundle")!r}) as localizer:
    visual, audio = (np.load({str(tmp_path)!r} + name) for name in ("/v_seen.npy", "/v_heard.npy"))
    found = localizer(visual, audio, duration=20.0)
    (streamed,) = localizer.stream([("v", (visual, audio), 20.0)])
assert streamed.detections.to_json() == found.to_json()
result = found.to_json()
"""
    (event,) = child(site, code)
    assert event["segment"] == [3.5, 8.5]
    assert event["label"] == SPEC.labels[1]


def test_the_commands_of_the_runtime_work_and_the_others_name_their_extra(site: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "features").mkdir()
    write_features(tmp_path / "features", "v", features_with(20, [(3, 8, 1, 3.0)]))
    bundle, out = str(tmp_path / "bundle"), str(tmp_path / "events.jsonl")
    code = f"""
import contextlib, io
from ccnet.cli.main import main
errors = io.StringIO()
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
    result = [
        main(["predict", {bundle!r}, "--features", {str(tmp_path / "features")!r}, "--out", {out!r}]),
        main(["inspect", {bundle!r}]),
        main(["doctor"]),
        main(["train", "--preset", "demo", "--annotations", "a", "--features", "f", "--out", "o"]),
    ]
result.append(errors.getvalue())
"""
    *statuses, errors = child(site, code)
    assert statuses == [0, 0, 0, 2]
    assert "pip install 'ccnet[train]'" in errors
    assert json.loads(Path(out).read_text())["events"][0]["segment"] == [3.5, 8.5]
