"""A build with full TensorRT where it goes wrong, or differs between 8.6 and 10: the library is a stand-in.

What the library is told is not checked here: a stand-in would agree to anything. Builds that go well are tested with
TensorRT for RTX (tests/test_tensorrt_engine.py) and on a GPU (tests/test_gpu.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from tensorrt_simulation import DataType, ILogger, Severity, Simulation, install

from export.tensorrt import legacy
from export.tensorrt.build import EngineInfo, build_engine
from export.tensorrt.options import EngineOptions
from runtime.errors import BackendUnavailable, ExportError
from runtime.files import sha256_file

pytest.importorskip("onnx", reason="onnx is not installed")
from builders import write_attention_onnx

KNOWN_TIMINGS = b"timings of this GPU"


def layer(kind: str, taken: str, given: str) -> Any:
    tensors = {"get_input": DataType[taken], "get_output": DataType[given]}
    methods = {name: MagicMock(return_value=SimpleNamespace(dtype=dtype)) for name, dtype in tensors.items()}
    named = SimpleNamespace(name=kind)
    return SimpleNamespace(
        type=named, num_inputs=1, num_outputs=1, precision=None, set_output_type=MagicMock(), **methods
    )


def network(*layers: Any) -> Any:
    return MagicMock(num_layers=len(layers), num_inputs=0, get_layer=lambda index: layers[index])


class Library(MagicMock):
    """`tensorrt`: every call goes well, unless a test says otherwise."""

    def __init__(self, version: str = "10.9.0", *, plan: bytes | None = b"ftrt plan", layers: str = "Float") -> None:
        super().__init__(__version__=version, DataType=DataType)
        self.__name__ = "tensorrt"
        self.ILogger, self.IProgressMonitor = ILogger, type("IProgressMonitor", (), {})
        self.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
        self.OnnxParser().parse_from_file.return_value = True
        self.builder = self.Builder()
        self.config = self.builder.create_builder_config()
        self.builder.create_network.return_value = network(layer("REDUCE", "FLOAT", "FLOAT"))
        self.builder.build_serialized_network.side_effect = self._build
        self.plan = None if plan is None else memoryview(plan)
        engine = self.Runtime().deserialize_cuda_engine()
        engine.num_layers, engine.device_memory_size_v2 = 9, 77
        shown = {"Layers": [{"Name": "a", "Outputs": [{"Format/Datatype": layers}]}]}
        engine.create_engine_inspector().get_engine_information.return_value = json.dumps(shown)
        self.config.create_timing_cache = self._timings
        self.config.set_timing_cache = lambda cache, mismatch: cache.blob in (b"", KNOWN_TIMINGS)

    def _get_child_mock(self, **kwargs: Any) -> MagicMock:
        return MagicMock(**kwargs)

    def _build(self, *_: Any) -> memoryview | None:
        if self.plan is None:
            self.Builder.call_args.args[0].log(Severity.ERROR, "could not find any implementation for node x")
        return self.plan

    def _timings(self, blob: bytes) -> Any:
        self.config.get_timing_cache.return_value.serialize.return_value = blob + b" and more"
        return SimpleNamespace(blob=blob)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    install(monkeypatch, Simulation())

    def call(library: Library, **options: Any) -> EngineInfo:
        monkeypatch.setitem(sys.modules, "tensorrt", library)
        return build_engine(
            write_attention_onnx(tmp_path / "m.onnx", "fp32"), tmp_path / "e.engine", EngineOptions(**options)
        )

    return call


def test_what_is_known_of_a_built_engine(build: Any) -> None:
    info = build(Library(), profile=(1, 2, 4), hardware_compatible=True)
    assert (info.gpu_name, info.compute_capabilities) == ("Simulated GPU", ("9.0",))
    assert info.path.read_bytes() == b"ftrt plan"
    assert info.onnx_sha256 == sha256_file(info.path.parent / "m.onnx")
    facts = {"engine_bytes": 9, "kernels": 9, "scratch_bytes": 77, "delivered_precisions": {"fp32": 1}}
    assert facts.items() <= info.build.items()
    assert info.model_file(name="tensorrt-fp32").options == info.options.to_json()


def test_the_engine_of_lowest_latency(build: Any) -> None:
    library = Library()
    info = build(library, optimization_level=5, tiling="moderate")
    assert library.config.tiling_optimization_level is library.TilingOptimizationLevel.MODERATE
    assert (library.config.builder_optimization_level, library.config.avg_timing_iterations) == (5, 8)
    assert info.options.to_json()["tiling"] == "moderate"
    library = Library("10.3.0")
    del library.TilingOptimizationLevel
    with pytest.raises(ExportError, match=r"10\.3\.0 does not support tiling optimization, which is new in 10\.9"):
        build(library, tiling="fast")


def test_a_version_compatible_engine_needs_the_lean_runtime(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str, mode: int) -> None:
        asked.append(name)
        if "/" not in name:
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", load)
    with pytest.raises(ExportError, match=r"needs libnvinfer_lean\.so\.10.*pip install 'tensorrt_lean==10\.9\.0'"):
        build(Library(), version_compatible=True)
    spec = SimpleNamespace(submodule_search_locations=["/site/tensorrt_lean_libs"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    build(Library(), version_compatible=True)
    assert asked[-1] == "/site/tensorrt_lean_libs/libnvinfer_lean.so.10"


def test_a_library_that_builds_nothing(build: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"(?s)tensorrt 10\.9\.0 built no engine.*could not find any implementation"):
        build(Library(plan=None))
    assert not (tmp_path / "e.engine").exists()


def test_a_profile_that_is_refused(build: Any) -> None:
    library = Library()
    tensor = SimpleNamespace(name="visual", shape=(-1, 6, 16))
    library.builder.create_network.return_value.configure_mock(num_inputs=1, get_input=lambda _: tensor)
    library.config.add_optimization_profile.return_value = -1
    with pytest.raises(ExportError, match=r"refused the profile \(1, 1, 1\)"):
        build(library)


@pytest.mark.parametrize("layers", ["Row major linear FP16 format", "BFloat16"])
def test_a_precision_that_was_not_asked_for_is_not_written(build: Any, tmp_path: Path, layers: str) -> None:
    with pytest.raises(ExportError, match=r"asked for fp32, but the built engine's layers are .*nothing was written"):
        build(Library(layers=layers))
    assert not (tmp_path / "e.engine").exists()


@pytest.mark.parametrize("before", [None, KNOWN_TIMINGS, b"timings of another GPU"])
def test_timings_are_reused_replaced_and_saved(build: Any, tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "t.cache"
    if before is not None:
        path.write_bytes(before)
    build(Library(), timing_cache=path)
    assert path.read_bytes() == (KNOWN_TIMINGS if before == KNOWN_TIMINGS else b"") + b" and more"


def test_without_a_driver_the_library_is_never_entered(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Simulation(device_status=35))
    library = Library()
    library.Builder.reset_mock()
    with pytest.raises(BackendUnavailable, match="driver"):
        build(library)
    assert not library.Builder.called


@pytest.mark.parametrize("kind", ["Builder", "Runtime"])
def test_a_library_that_can_not_start_cuda(build: Any, tmp_path: Path, kind: str) -> None:
    def broken(logger: Any) -> Any:
        logger.log(Severity.ERROR, "CUDA initialization failure with error: 35")
        return MagicMock()

    library = Library()
    getattr(library, kind).side_effect = broken
    with pytest.raises(BackendUnavailable, match=r"(?s)does not start here:.*failure with error: 35"):
        build(library)
    getattr(library, kind).side_effect = TypeError("factory function returned nullptr")
    with pytest.raises(BackendUnavailable, match=r"(?s)does not start here:.*returned nullptr"):
        build(library)
    assert not (tmp_path / "e.engine").exists()


def test_tensorrt_8_keeps_the_float_layers_of_a_half_graph_and_nothing_else() -> None:
    kinds = [("CAST", "FLOAT", "HALF"), ("MATRIX_MULTIPLY", "HALF", "HALF"), ("SHUFFLE", "FLOAT", "FLOAT")]
    layers = [layer(*kind) for kind in (*kinds, ("REDUCE", "FLOAT", "FLOAT"), ("UNARY", "HALF", "FLOAT"))]
    trt = Library("8.6.0")
    trt.TacticSource.configure_mock(CUBLAS=0, CUBLAS_LT=1, CUDNN=2)
    trt.config.get_tactic_sources.return_value = 0b10111
    legacy.configure(trt, network(*layers), trt.config, "fp16")
    assert [each.type.name for each in layers if each.precision is DataType["FLOAT"]] == ["REDUCE"]
    trt.config.set_tactic_sources.assert_called_with(0b10000)


@pytest.mark.parametrize("works", [True, False])
def test_tensorrt_8_without_kernels_for_the_pinned_layers(build: Any, tmp_path: Path, works: bool) -> None:
    trt = Library("8.6.0")
    flags: set[str] = set()
    names = ("FP16", "TF32", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")
    trt.BuilderFlag = SimpleNamespace(**{name: name for name in names})
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0)
    trt.TacticSource = SimpleNamespace(CUBLAS=0, CUBLAS_LT=1, CUDNN=2)
    trt.config.configure_mock(set_flag=flags.add, clear_flag=flags.discard, get_flag=flags.__contains__)
    trt.config.get_tactic_sources.return_value = 0
    trt.builder.create_network.return_value = network(layer("MATRIX_MULTIPLY", "HALF", "HALF"))
    engine = trt.Runtime().deserialize_cuda_engine()
    engine.create_engine_inspector().get_engine_information.return_value = '{"Layers": []}'

    def attempt(*_: Any) -> memoryview | None:
        refused = not works or "OBEY_PRECISION_CONSTRAINTS" in flags
        if refused:
            trt.Builder.call_args.args[0].log(Severity.ERROR, "Could not find any implementation")
        return None if refused else memoryview(b"plan")

    trt.builder.build_serialized_network.side_effect = attempt
    if works:
        assert "preference" in build(trt, precision="fp16").build["fallback"]
        assert "PREFER_PRECISION_CONSTRAINTS" in flags
    else:
        with pytest.raises(ExportError, match=r"(?s)built no engine.*Could not find any implementation"):
            build(trt, precision="fp16")
        assert not (tmp_path / "e.engine").exists()


def test_tensorrt_8_is_asked_for_nothing_that_it_lacks(build: Any) -> None:
    trt = Library("8.6.0")
    del trt.IProgressMonitor
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0)
    trt.BuilderFlag = SimpleNamespace(FP16=0, TF32=7, OBEY_PRECISION_CONSTRAINTS=11, VERSION_COMPATIBLE=14)
    trt.TacticSource = SimpleNamespace(CUBLAS=0, CUBLAS_LT=1, CUDNN=2)
    known = ["add_optimization_profile", "set_flag", "clear_flag", "get_tactic_sources", "set_tactic_sources"]
    config = MagicMock(spec=known, get_tactic_sources=lambda: 0b10111)
    trt.builder.create_builder_config.return_value = config
    engine = MagicMock(spec=["create_engine_inspector", "device_memory_size", "num_layers"], device_memory_size=55)
    trt.Runtime().deserialize_cuda_engine.return_value = engine
    engine.create_engine_inspector().get_engine_information.return_value = '{"Layers": []}'
    assert build(trt).build["scratch_bytes"] == 55
