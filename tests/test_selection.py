"""Which engine is taken: the verified, the fastest, the possible; and what is said about the others."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from builders import OracleBackend, engine, make_bundle

from export.parity.check import engines_to_verify
from runtime import machine
from runtime.backends.registry import runs_on_gpu
from runtime.backends.select import matching_engines, open_engine
from runtime.backends.tensorrt import cuda
from runtime.bundle import Bundle, Engine, ModelFile
from runtime.errors import BackendUnavailable, EngineError, EngineMismatch, MissingDependency
from runtime.machine import machine_class, measured_here

pytest.importorskip("onnx")

ENGINE_FILE = ModelFile(
    name="tensorrt-fp16",
    format="tensorrt",
    files=("tensorrt-fp16.engine",),
    precision="fp16",
    max_batch=4,
    library="tensorrt",
    library_version="10.0",
    gpu_name="NVIDIA H200",
    compute_capabilities=("9.0",),
    profile=(1, 1, 4),
)
TENSORRT_ENGINE = engine("tensorrt", "fp16", model_file="tensorrt-fp16")


def test_a_gpu_is_named_by_cuda_and_a_speed_of_no_gpu_counts_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(name: str) -> cuda.Device:
        return cuda.Device(0, name, "9.0", 1 << 34, "13.0")

    def absent(error: Exception) -> cuda.Device:
        raise error

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "gpus", lambda: [{"name": "the whole card"}])
    monkeypatch.setattr(cuda, "probe", lambda: known("card MIG 1g.10gb"))
    assert machine_class(gpu=True) == "card MIG 1g.10gb"
    assert measured_here({"machine": "card MIG 1g.10gb"}, gpu=True)
    assert not measured_here({"machine": "the whole card"}, gpu=True)
    monkeypatch.setattr(cuda, "probe", lambda: absent(MissingDependency("cuda-python", "gpu", "CUDA")))
    assert machine_class(gpu=True) == "the whole card"
    monkeypatch.setattr(machine, "gpus", lambda: None)
    assert machine_class(gpu=True) is None
    monkeypatch.setattr(cuda, "probe", lambda: absent(BackendUnavailable("no driver")))
    for speed in ({"machine": None}, {"machine": "no GPU"}, {}):
        assert not measured_here(speed, gpu=True)


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "Card A"),
        ("0", "Card A"),
        ("1", "Card B"),
        ("1,0", "Card B"),
        ("GPU-bb", "Card B"),
        ("GPU-", None),
        ("", None),
        ("2", None),
        ("-1", None),
        ("MIG-cc", None),
    ],
)
def test_without_the_cuda_bindings_the_visible_gpu_is_named(
    visible: str | None, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> cuda.Device:
        raise MissingDependency("cuda-python", "gpu", "CUDA")

    tool = tmp_path / "nvidia-smi"
    rows = "case $1 in *uuid*) echo 'GPU-aa, Card A'; echo 'GPU-bb, Card B';; *) echo Card A; echo Card B;; esac"
    tool.write_text(f"#!/bin/sh\n{rows}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(cuda, "probe", absent)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine_class(gpu=True) == name


def here(backend: str, milliseconds: float) -> dict[str, Any]:
    return {"ms_per_video": milliseconds, "machine": machine_class(gpu=runs_on_gpu(backend))}


def order(folder: Path, engines: Sequence[Engine], **asked: Any) -> list[str]:
    files = [ENGINE_FILE] if any(r.model_file == ENGINE_FILE.name for r in engines) else []
    bundle = make_bundle(folder, engines, engine_files=files)
    return [f"{r.backend} {r.precision}" for r in matching_engines(bundle, **asked)]


def test_measured_speed_on_this_class_of_machine_decides(tmp_path: Path) -> None:
    engines = [
        engine("onnxruntime", speed=here("onnxruntime", 5.0)),
        engine("openvino", speed=here("openvino", 7.0)),
        engine("openvino", "bf16", speed={"ms_per_video": 1.0, "machine": "another machine"}),
    ]
    assert order(tmp_path, engines) == ["onnxruntime fp32", "openvino fp32", "openvino bf16"]


def test_without_measurements_the_documented_preference_decides(tmp_path: Path) -> None:
    engines = [
        engine("onnxruntime", "fp16"),
        engine("onnxruntime"),
        engine("openvino"),
        engine("openvino", "bf16"),
        TENSORRT_ENGINE,
    ]
    expected = ["tensorrt fp16", "openvino bf16", "openvino fp32", "onnxruntime fp32", "onnxruntime fp16"]
    assert order(tmp_path, engines) == expected


def test_verified_comes_before_unverified_however_fast(tmp_path: Path) -> None:
    engines = [
        engine("openvino", status="unverified", speed=here("openvino", 0.1)),
        engine("onnxruntime", speed=here("onnxruntime", 50.0)),
        engine("onnxruntime", "fp16", status="unverified"),
    ]
    assert order(tmp_path, engines) == ["onnxruntime fp32", "openvino fp32", "onnxruntime fp16"]


def test_what_is_not_in_the_bundle_is_answered_with_what_is(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, [engine("onnxruntime"), engine("openvino", status="unverified")])
    held = r"it has: onnxruntime fp32 \(verified\), openvino fp32 \(unverified\)"
    for asked in ({"backend": "tensorrt"}, {"precision": "fp16"}):
        with pytest.raises(BackendUnavailable, match=held):
            matching_engines(bundle, **asked)  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailable, match="got 'onnx', expected auto or one of tensorrt"):
        open_engine(bundle, "onnx")
    with pytest.raises(BackendUnavailable, match="on_mismatch: got 'ignore'"):
        open_engine(bundle, on_mismatch="ignore")  # type: ignore[arg-type]


def test_auto_takes_the_next_one_when_a_library_is_missing_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, "openvino", None)
    bundle = make_bundle(tmp_path, [engine("openvino"), engine("onnxruntime")])
    opened = open_engine(bundle)
    assert opened.backend.name == "onnxruntime"
    assert opened.engine.name == "onnxruntime-fp32"
    assert len(opened.skipped) == 1
    assert "openvino-fp32: " in opened.skipped[0]
    assert "pip install 'ccnet[openvino]'" in opened.skipped[0]
    with pytest.raises(MissingDependency, match="openvino"):
        open_engine(bundle, "openvino")


def test_when_nothing_can_run_every_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    bundle = make_bundle(tmp_path, [engine("openvino"), engine("onnxruntime")])
    with pytest.raises(BackendUnavailable, match=r"(?s)none of its engines can run.*ccnet\[openvino\].*ccnet\[cpu\]"):
        open_engine(bundle)


def test_an_unverified_engine_runs_with_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    bundle = make_bundle(tmp_path, [engine("onnxruntime", status="unverified")])
    with pytest.warns(RuntimeWarning, match="never verified .* 'ccnet verify BUNDLE'"):
        open_engine(bundle).backend.close()


@pytest.fixture(params=["manifest", "library"])
def foreign_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TensorRT that refuses every engine not built 'here': by its manifest, or only when the library opens it."""

    def refuse(model_file: ModelFile) -> None:
        if model_file.gpu_name != "this GPU":
            raise EngineMismatch(f"{model_file.name}: built on {model_file.gpu_name}, this machine has another GPU")

    def check_engine(name: str, model_file: ModelFile, precision: str) -> None:
        if request.param == "manifest":
            refuse(model_file)

    def load(name: str, path: Path, model_file: ModelFile, spec: Any, *_: Any) -> OracleBackend:
        refuse(model_file)
        return OracleBackend(spec, name="tensorrt")

    module = types.ModuleType("runtime.backends.tensorrt.backend")
    module.__dict__.update(check_engine=check_engine, open_engine=load)
    monkeypatch.setitem(sys.modules, "runtime.backends.tensorrt.backend", module)


@pytest.fixture
def mixed(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", [TENSORRT_ENGINE, engine("onnxruntime")], engine_files=[ENGINE_FILE])


@pytest.mark.usefixtures("foreign_engine")
def test_a_mismatch_is_an_error_by_default(mixed: Bundle) -> None:
    with pytest.raises(EngineMismatch, match="built on NVIDIA H200"):
        open_engine(mixed, "tensorrt")


@pytest.mark.usefixtures("foreign_engine")
def test_a_mismatch_can_fall_back_to_the_onnx_file_with_a_warning(mixed: Bundle) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.warns(RuntimeWarning, match=r"built on NVIDIA H200.*running 'onnxruntime-fp32' instead"):
        opened = open_engine(mixed, "tensorrt", on_mismatch="onnx")
    assert opened.backend.name == "onnxruntime"
    assert "tensorrt-fp16" in opened.skipped[0]


@pytest.mark.usefixtures("foreign_engine")
def test_auto_warns_about_an_engine_that_does_not_fit(mixed: Bundle) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.warns(RuntimeWarning, match="engine 'tensorrt-fp16' is skipped"):
        opened = open_engine(mixed)
    assert opened.backend.name == "onnxruntime"


def test_what_failed_the_parity_check_is_not_run(tmp_path: Path) -> None:
    failed = engine("openvino", "bf16", status="failed")
    bundle = make_bundle(tmp_path, [engine("openvino"), failed])
    assert [r.name for r in matching_engines(bundle, "openvino")] == ["openvino-fp32"]
    with pytest.raises(BackendUnavailable, match=r"openvino bf16 \(failed\); what failed the parity check is not run"):
        matching_engines(bundle, "openvino", precision="bf16")
    assert engines_to_verify(bundle, "openvino", "bf16") == [failed]  # it may be verified again


def test_an_engine_of_an_unknown_backend_is_passed_over(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, [engine("of-tomorrow"), engine("onnxruntime")])
    assert [r.name for r in matching_engines(bundle)] == ["onnxruntime-fp32"]


@pytest.mark.filterwarnings("ignore:engine 'openvino-fp32' is skipped")
def test_auto_takes_the_next_one_when_an_engine_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")

    def broken(*_: Any, **__: Any) -> None:
        raise EngineError("out of memory")

    monkeypatch.setattr("runtime.backends.openvino.OpenVinoBackend.open", broken)
    opened = open_engine(make_bundle(tmp_path, [engine("openvino"), engine("onnxruntime")]))
    assert (opened.backend.name, opened.skipped) == ("onnxruntime", ("openvino-fp32: out of memory",))


def test_a_library_that_is_installed_but_does_not_load_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    broken = tmp_path / "site" / "openvino"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libtbb.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    bundle = make_bundle(tmp_path / "bundle", [engine("openvino"), engine("onnxruntime")])
    opened = open_engine(bundle)
    assert opened.backend.name == "onnxruntime"
    assert "openvino is installed but does not load: libtbb.so.12" in opened.skipped[0]
