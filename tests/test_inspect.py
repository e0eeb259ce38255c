"""`ccnet inspect` and `ccnet doctor`: the truth about a bundle and about this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import engine, make_bundle

from ccnet.cli.doctor import examine
from ccnet.cli.main import main
from runtime.backends.registry import BACKENDS, Registration
from runtime.machine import machine_class

pytest.importorskip("onnx")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    engines = [
        engine(
            "onnxruntime",
            accuracy={"logits_max": 1.5e-6, "tensors": {"a": 1}},
            speed={"ms_per_video": 12.345, "machine": machine_class(gpu=False)},
        ),
        engine("openvino", status="unverified", speed={"ms_per_video": 7.0, "machine": "another machine"}),
    ]
    return make_bundle(tmp_path / "bundle", engines).folder


def test_inspect_shows_spec_model_files_engines_gates_and_speeds(bundle: Path, capsys: Any) -> None:
    assert main(["inspect", str(bundle)]) == 0
    text = capsys.readouterr().out
    for part in (
        "T = 32 steps, 4 levels, 4 classes",
        "one step every 1 s; T covers 32.0 s",
        "model.onnx",
        "opset 17",
        "onnxruntime-fp32",
        "logits_max 1.5e-06",
        "12.35",
        "7.00 (elsewhere)",
        "unverified: built, never compared with the eager network; 'ccnet verify BUNDLE'",
    ):
        assert part in text


def test_inspect_names_every_bad_file_and_fails(bundle: Path, capsys: Any) -> None:
    (bundle / "model.onnx").write_bytes(b"")
    assert main(["inspect", str(bundle)]) == 2
    captured = capsys.readouterr()
    assert "BAD" in captured.out
    assert "model.onnx: 0 bytes, the manifest says" in captured.out
    assert "1 file(s) are not what the manifest says" in captured.err
    assert main(["inspect", str(bundle), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert list(report["problems"]) == ["model.onnx"]
    assert report["manifest"]["spec"]["length"] == 32


def test_inspect_of_something_else(tmp_path: Path, capsys: Any) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "has no bundle.json" in capsys.readouterr().err


def test_doctor_says_what_each_missing_library_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, package, None)
    backends = examine()["backends"]
    assert list(backends) == list(BACKENDS)
    for name, extra in (("openvino", "openvino"), ("onnxruntime", "cpu"), ("onnxruntime-cuda", "gpu")):
        assert not backends[name]["usable"]
        assert f"pip install 'ccnet[{extra}]'" in backends[name]["detail"]
    assert not backends["tensorrt"]["usable"]


def test_doctor_survives_a_broken_library(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise SystemError("initialization of the library failed")

    monkeypatch.setitem(sys.modules, "onnxruntime", Broken())
    monkeypatch.setitem(sys.modules, "openvino", None)
    main(["doctor"])
    assert "initialization of the library failed" in capsys.readouterr().out


def test_doctor_exit_status_says_whether_anything_can_run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Usable:
        @staticmethod
        def probe(name: str) -> str:
            return "fine"

    class Broken:
        @staticmethod
        def probe(name: str) -> str:
            raise RuntimeError("no")

    monkeypatch.setattr(Registration, "load", lambda self: Broken)
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["backends"]["openvino"] == {"usable": False, "detail": "no"}
    monkeypatch.setattr(Registration, "load", lambda self: Usable if "openvino" in self.module else Broken)
    assert main(["doctor"]) == 0
