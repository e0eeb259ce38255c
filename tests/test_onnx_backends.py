"""ONNX Runtime and OpenVINO behind the protocol: same numbers as the numpy network, and a clear no otherwise."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders import SPEC, oracle, write_oracle_onnx

from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.backends.openvino import OpenVinoBackend, check_available
from runtime.errors import BackendUnavailable, BundleError, EngineError, FeatureError, MissingDependency

pytest.importorskip("onnx")
Open = Callable[..., Any]


@pytest.fixture(params=["onnxruntime", "openvino"])
def open_it(request: pytest.FixtureRequest) -> Open:
    pytest.importorskip(request.param)
    return OnnxRuntimeBackend.open if request.param == "onnxruntime" else OpenVinoBackend.open


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    write_oracle_onnx(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def inputs(batch: int, seed: int = 0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    shapes = SPEC.input_shapes(batch)
    lengths = rng.integers(1, SPEC.length + 1, shapes["lengths"], dtype=np.int32)
    visual, audio = (rng.normal(size=shapes[name]).astype(np.float32) for name in ("visual", "audio"))
    return visual, audio, lengths


def test_computes_what_the_graph_says_for_every_batch_size(open_it: Open, graph: Path) -> None:
    with open_it(graph, SPEC, max_batch=4, threads=1) as backend:
        for batch in (1, 3, 4, 1):
            given = inputs(batch, seed=batch)
            expected = oracle(*given)
            found = backend.infer(*given)
            for name, a, b in zip(("logits", "offsets"), found, expected, strict=True):
                assert a.shape == SPEC.output_shapes(batch)[name]
                assert a.dtype == np.float32
                # The graph only moves, adds and clips numbers: both libraries must be exact.
                np.testing.assert_array_equal(a, b)


def test_returned_arrays_belong_to_the_caller(open_it: Open, graph: Path) -> None:
    with open_it(graph, SPEC, max_batch=4) as backend:
        first = backend.infer(*inputs(2, seed=1))
        kept = [array.copy() for array in first]
        backend.infer(*inputs(2, seed=2))
        for array, copy in zip(first, kept, strict=True):
            np.testing.assert_array_equal(array, copy)


def test_inputs_with_strides_are_taken(open_it: Open, graph: Path) -> None:
    visual, audio, lengths = inputs(2)
    with open_it(graph, SPEC, max_batch=4) as backend:
        found = backend.infer(np.asfortranarray(visual), audio[:, ::-1][:, ::-1], lengths)
    np.testing.assert_array_equal(found[0], oracle(visual, audio, lengths)[0])


def test_wrong_inputs_are_named(open_it: Open, graph: Path) -> None:
    visual, audio, lengths = inputs(2)
    with open_it(graph, SPEC, max_batch=4) as backend:
        for bad, message in (
            ((visual[..., :5], audio, lengths), r"visual: got float32 \(2, 32, 5\), expected float32 \(2, 32, 6\)"),
            ((visual, audio[:1], lengths), r"audio: got float32 \(1, 32, 3\), expected float32 \(2, 32, 3\)"),
            ((visual, audio, lengths.astype(np.float32)), r"lengths: got float32 .* expected int32"),
            ((visual, audio, lengths * 0), r"lengths: got \[0, 0\], expected 1 to 32 valid steps of each video"),
            ((visual, audio, lengths + 32), r"lengths: got .* expected 1 to 32 valid steps of each video"),
            ((visual.astype(np.float64), audio, lengths), r"visual: got float64"),
            (inputs(5), r"got 5 video\(s\), this engine takes 1 to 4"),
            (tuple(array[:0] for array in (visual, audio, lengths)), r"got 0 video\(s\)"),
        ):
            with pytest.raises(FeatureError, match=message):
                backend.infer(*bad)


def test_a_graph_of_another_network_is_refused(open_it: Open, graph: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"input 'visual' is \[.*32, 6\], the manifest says \['batch', 64, 6\]"):
        open_it(graph, dataclasses.replace(SPEC, length=64))
    import onnx

    model = onnx.load(graph)
    model.graph.input[2].name = "ends_at"
    model.graph.node[1].input[0] = "ends_at"
    onnx.save(model, tmp_path / "renamed.onnx")
    with pytest.raises(BundleError, match=r"inputs are \['audio', 'ends_at', 'visual'\], the manifest says"):
        open_it(tmp_path / "renamed.onnx", SPEC)


def test_a_fixed_batch_must_be_the_one_the_manifest_states(open_it: Open, graph: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(graph)
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "fixed.onnx")
    with pytest.raises(BundleError, match="fixed at 1, the manifest says up to 4"):
        open_it(tmp_path / "fixed.onnx", SPEC, max_batch=4)
    with open_it(tmp_path / "fixed.onnx", SPEC, max_batch=1) as backend:
        assert backend.infer(*inputs(1))[0].shape == SPEC.output_shapes(1)["logits"]


def test_a_damaged_file_is_an_engine_error(open_it: Open, graph: Path) -> None:
    graph.write_bytes(graph.read_bytes()[:500])
    with pytest.raises(EngineError, match=r"model\.onnx"):
        open_it(graph, SPEC)
    with pytest.raises(EngineError, match=r"absent\.onnx: no such ONNX file"):
        open_it(graph.with_name("absent.onnx"), SPEC)


def test_a_closed_backend_says_so(open_it: Open, graph: Path) -> None:
    backend = open_it(graph, SPEC)
    backend.close()
    backend.close()
    with pytest.raises(EngineError, match="closed"):
        backend.infer(*inputs(1))


def test_describe_tells_library_version_and_threads(open_it: Open, graph: Path) -> None:
    with open_it(graph, SPEC, max_batch=4, threads=1) as backend:
        facts = backend.describe()
    assert facts["backend"] == backend.name
    assert facts["precision"] == "fp32"
    assert facts["threads"] == 1
    assert facts["version"]


@pytest.mark.parametrize(("package", "extra"), [("onnxruntime", "cpu"), ("openvino", "openvino")])
def test_a_missing_library_names_its_extra(
    package: str, extra: str, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    opener: Open = OnnxRuntimeBackend.open if package == "onnxruntime" else OpenVinoBackend.open
    with pytest.raises(MissingDependency, match=rf"pip install 'ccnet\[{extra}\]'"):
        opener(graph, SPEC)


def test_cuda_is_never_replaced_by_the_cpu(graph: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(BackendUnavailable, match="without the CUDA provider"):
        OnnxRuntimeBackend.open(graph, SPEC, device="cuda")


class PretendingRuntime:
    """An onnxruntime-gpu on a machine whose CUDA does not start: it claims the provider and runs on the CPU."""

    __version__ = "1.31"
    ExecutionOrder = SimpleNamespace(PRIORITY_BASED=1)

    class SessionOptions:
        log_severity_level = 0

        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_session_config_entry(self, key: str, value: str) -> None:
            self.entries[key] = value

    def __init__(self, *, heeds_option: bool, provider: str = "CPUExecutionProvider", tf32: str = "1") -> None:
        self.heeds_option = heeds_option
        self.provider, self.tf32 = provider, tf32

    def preload_dlls(self) -> None:
        print("Failed to load libcudnn.so.9")

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, path: str, options: Any, providers: Any, enable_fallback: int) -> Any:
        assert not enable_fallback
        if self.heeds_option and options.entries.get("session.disable_cpu_ep_fallback") == "1":
            raise RuntimeError("Failed to create CUDAExecutionProvider: libcublasLt.so.13 not found")
        answers = {"get_providers": [self.provider], "get_provider_options": {self.provider: {"use_tf32": self.tf32}}}
        return SimpleNamespace(**{name: lambda answer=answer: answer for name, answer in answers.items()})


@pytest.mark.parametrize("heeds_option", [True, False])
def test_a_cuda_session_that_fell_back_is_refused(
    heeds_option: bool, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", PretendingRuntime(heeds_option=heeds_option))
    why = "libcublasLt" if heeds_option else "CPUExecutionProvider"
    with pytest.raises(BackendUnavailable, match=rf"{why}.*pip install 'ccnet\[gpu\]' brings the libraries"):
        OnnxRuntimeBackend.open(graph, SPEC, device="cuda")


@pytest.mark.parametrize(("precision", "wanted"), [("fp32", "0"), ("tf32", "1"), ("fp16", "1")])
def test_a_cuda_session_without_its_options_is_refused(
    graph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str, wanted: str
) -> None:
    """The fp32 layers of a half graph may use TF32."""
    other = {"0": "1", "1": "0"}[wanted]
    pretending = PretendingRuntime(heeds_option=False, provider="CUDAExecutionProvider", tf32=other)
    monkeypatch.setitem(sys.modules, "onnxruntime", pretending)
    with pytest.raises(BackendUnavailable, match=f"use_tf32': '{other}'.*expected.*use_tf32': '{wanted}'"):
        OnnxRuntimeBackend.open(graph, SPEC, device="cuda", precision=precision)
    assert capsys.readouterr().out == ""  # results may be piped


def test_openvino_gives_a_video_the_same_alone_and_in_a_batch(graph: Path) -> None:
    pytest.importorskip("openvino")
    visual, audio, lengths = inputs(3)
    with OpenVinoBackend.open(graph, SPEC, max_batch=4, threads=1) as backend:
        together = backend.infer(visual, audio, lengths)
        for i in range(3):
            alone = backend.infer(visual[i : i + 1], audio[i : i + 1], lengths[i : i + 1])
            for a, b in zip(together, alone, strict=True):
                np.testing.assert_array_equal(a[i], b[0])


def test_openvino_runs_a_file_of_fixed_batch_size_at_that_size(graph: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    import onnx

    model = onnx.load(graph)
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "fixed.onnx")
    given = inputs(2)
    with OpenVinoBackend.open(graph, SPEC, max_batch=2) as backend:
        expected = backend.infer(*given)
    with OpenVinoBackend.open(tmp_path / "fixed.onnx", SPEC, max_batch=2) as backend:
        for a, b in zip(backend.infer(*given), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        with pytest.raises(FeatureError, match="got 1 video\\(s\\), this ONNX file takes exactly 2"):
            backend.infer(*inputs(1))


class OtherProcessor:
    """OpenVINO's Core on a processor with the given capabilities."""

    def __init__(self, *capabilities: str) -> None:
        self.capabilities = capabilities

    def get_property(self, device: str, name: str) -> Any:
        return {"OPTIMIZATION_CAPABILITIES": list(self.capabilities), "FULL_DEVICE_NAME": "Some CPU"}[name]


def test_a_precision_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")
    monkeypatch.setattr(openvino, "Core", lambda: OtherProcessor("FP32", "INT8"))
    with pytest.raises(BackendUnavailable, match=r"Some CPU has no bf16 arithmetic .*FP32, INT8"):
        check_available("bf16")
    check_available("fp32")
    check_available("int8")
    monkeypatch.setattr(openvino, "Core", lambda: OtherProcessor("FP32", "BF16"))
    check_available("bf16")
    with pytest.raises(BackendUnavailable, match="expected one of fp32, bf16, int8"):
        check_available("fp8")


def test_int8_of_a_graph_that_is_not_quantized_is_refused(graph: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(BackendUnavailable, match="no (product|matmul) of this graph runs in it"):
        OpenVinoBackend.open(graph, SPEC, precision="int8")


def test_half_precision_that_is_not_delivered_is_refused(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO quietly takes fp32 for bf16 on processors without it; a wrong capability list must not hide it."""
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor computes in bf16")
    monkeypatch.setattr("runtime.backends.openvino.check_available", lambda precision: core)
    with pytest.raises(BackendUnavailable, match=r"asked for bf16, (OpenVINO delivers f32|but no matmul)"):
        OpenVinoBackend.open(graph, SPEC, precision="bf16")


def test_onnx_runtime_does_not_call_home(tmp_path: Path) -> None:
    """It keeps what it would send in the home folder."""
    pytest.importorskip("onnxruntime")
    code = "from runtime.backends.onnxruntime import probe; print(probe('onnxruntime'))"
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("telemetry off")
    assert list(tmp_path.rglob("*onnxruntime*")) == []
