"""How full TensorRT is asked to build, against stand-ins that have the names of 8.6 or of 10, and no others."""

from __future__ import annotations

import enum
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorrt_simulation import IProfiler, Severity, Simulation, TensorIOMode, install

from export.tensorrt.build import EngineInfo, build_engine
from export.tensorrt.options import EngineOptions
from runtime.errors import BackendUnavailable, ExportError
from runtime.files import sha256_file

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from builders import write_attention_onnx  # noqa: E402


class Flag8(enum.IntEnum):
    FP16 = 0
    TF32 = 7
    OBEY_PRECISION_CONSTRAINTS = 11
    VERSION_COMPATIBLE = 14


class Flag10(enum.IntEnum):
    TF32 = 7
    VERSION_COMPATIBLE = 14


class Creation8(enum.IntEnum):
    EXPLICIT_BATCH = 0


class Creation10(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class DataType8(enum.Enum):
    FLOAT = 0
    HALF = 1
    BOOL = 4


class LayerType(enum.Enum):
    CAST = 0
    MATRIX_MULTIPLY = 1
    REDUCE = 2
    SHUFFLE = 3


class TacticSource(enum.IntEnum):
    CUBLAS = 0
    CUBLAS_LT = 1
    CUDNN = 2
    JIT_CONVOLUTIONS = 4


class Tensor:
    def __init__(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype


class Layer:
    def __init__(self, kind: LayerType, takes: Any, gives: Any) -> None:
        self.type, self.num_inputs, self.num_outputs = kind, 1, 1
        self._in, self._out = Tensor("i", (), takes), Tensor("o", (), gives)
        self.precision: Any = None
        self.output_type: Any = None

    def get_input(self, index: int) -> Tensor:
        return self._in

    def get_output(self, index: int) -> Tensor:
        return self._out

    def set_output_type(self, index: int, dtype: Any) -> None:
        self.output_type = dtype


class Library:
    """One stand-in library and everything that was asked of it."""

    def __init__(self, version: str, precision: str = "fp32") -> None:
        self.version = version
        self.old = version.startswith("8.")
        full, half = DataType8.FLOAT, DataType8.HALF
        inner = half if precision == "fp16" else full
        self.layers = [
            Layer(LayerType.CAST, full, inner),
            Layer(LayerType.MATRIX_MULTIPLY, inner, inner),
            Layer(LayerType.SHUFFLE, full, full),
            Layer(LayerType.REDUCE, full, full),
        ]
        self.flags = {"TF32"}
        self.creation = 0
        self.sources = 0b10111
        self.pools: dict[str, int] = {}
        self.profile: dict[str, tuple[Any, ...]] = {}
        self.refuse_profile = False
        self.config: Any = None
        self.plan: bytes | None = b"ftrt plan"
        self.inspector: Any = {
            "Layers": [{"Name": "a", "Outputs": [{"Format/Datatype": "Half" if inner is half else "Float"}]}]
        }
        self.known_timings = b"timings of this GPU"

    def module(self) -> types.ModuleType:
        lib = self
        trt: Any = types.ModuleType("tensorrt")
        trt.__version__ = lib.version
        trt.BuilderFlag, trt.NetworkDefinitionCreationFlag = (Flag8, Creation8) if lib.old else (Flag10, Creation10)
        trt.DataType, trt.LayerType, trt.TacticSource, trt.TensorIOMode = (
            DataType8,
            LayerType,
            TacticSource,
            TensorIOMode,
        )
        trt.MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace")
        trt.ProfilingVerbosity = types.SimpleNamespace(DETAILED="detailed")
        trt.LayerInformationFormat = types.SimpleNamespace(JSON="json")
        trt.HardwareCompatibilityLevel = types.SimpleNamespace(AMPERE_PLUS="ampere+")
        trt.ILogger, trt.IProfiler = type("ILogger", (), {}), IProfiler

        class Network:
            num_layers, num_inputs = len(lib.layers), 2

            def get_layer(self, index: int) -> Layer:
                return lib.layers[index]

            def get_input(self, index: int) -> Tensor:
                return Tensor("visual", (-1, 6, 16), None) if index == 0 else Tensor("fixed", (4, 3), None)

        class Config:
            def __init__(self) -> None:
                lib.config = self
                self.cache: Any = None

            def set_flag(self, flag: enum.IntEnum) -> None:
                lib.flags.add(flag.name)

            def clear_flag(self, flag: enum.IntEnum) -> None:
                lib.flags.discard(flag.name)

            def get_tactic_sources(self) -> int:
                return lib.sources

            def set_tactic_sources(self, sources: int) -> bool:
                lib.sources = sources
                return True

            def set_memory_pool_limit(self, pool: str, nbytes: int) -> None:
                lib.pools[pool] = nbytes

            def add_optimization_profile(self, profile: Any) -> int:
                return -1 if lib.refuse_profile else 0

            def create_timing_cache(self, blob: bytes) -> Any:
                return types.SimpleNamespace(blob=blob, serialize=lambda: blob + b" and more")

            def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
                assert ignore_mismatch is False
                accepted = cache.blob in (b"", lib.known_timings)
                self.cache = cache if accepted else self.cache
                return accepted

            def get_timing_cache(self) -> Any:
                return self.cache

        class Builder:
            def __init__(self, logger: Any) -> None:
                self._logger = logger

            def create_network(self, flags: int) -> Network:
                lib.creation = flags
                return Network()

            def create_builder_config(self) -> Config:
                return Config()

            def create_optimization_profile(self) -> Any:
                return types.SimpleNamespace(set_shape=lambda name, *shapes: lib.profile.update({name: shapes}))

            def build_serialized_network(self, network: Network, config: Config) -> Any:
                if lib.plan is None:
                    self._logger.log(Severity.ERROR, "could not find any implementation for node x")
                return None if lib.plan is None else memoryview(lib.plan)

        class Parser:
            num_errors = 0

            def __init__(self, network: Network, logger: Any) -> None:
                pass

            def parse_from_file(self, path: str) -> bool:
                return True

        class Runtime:
            def __init__(self, logger: Any) -> None:
                pass

            def deserialize_cuda_engine(self, blob: Any) -> Any:
                text = json.dumps(lib.inspector)
                inspector = types.SimpleNamespace(get_engine_information=lambda form: text)
                size = {"device_memory_size": 77} if lib.old else {"device_memory_size_v2": 77}
                return types.SimpleNamespace(create_engine_inspector=lambda: inspector, num_layers=9, **size)

        trt.Builder, trt.OnnxParser, trt.Runtime = Builder, Parser, Runtime
        if not lib.old:
            trt.IProgressMonitor = type("IProgressMonitor", (), {})
        return trt  # type: ignore[no-any-return]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    install(monkeypatch, Simulation(capability=(9, 0)))

    def call(library: Library, precision: str = "fp32", **options: Any) -> EngineInfo:
        monkeypatch.setitem(sys.modules, "tensorrt", library.module())
        graph = write_attention_onnx(tmp_path / "m.onnx", "fp16" if precision == "fp16" else "fp32")
        settings: dict[str, Any] = {"precision": precision, "profile": (1, 2, 4), **options}
        return build_engine(graph, tmp_path / "e.engine", EngineOptions(**settings))

    return call


@pytest.mark.parametrize(("version", "creation"), [("8.6.0", 0b01), ("10.9.0", 0b10)])
def test_types_of_the_network_are_those_of_the_graph(build: Any, version: str, creation: int) -> None:
    library = Library(version)
    info = build(library, profile=(4, 4, 4))
    assert library.creation == creation
    assert library.flags == set()  # no TF32, no half
    assert info.build["delivered_precisions"] == {"fp32": 1}
    assert (info.build["scratch_bytes"], info.build["kernels"]) == (77, 9)
    assert (info.gpu_name, info.compute_capabilities) == ("Simulated GPU", ("9.0",))
    assert info.onnx_sha256 == sha256_file(info.path.parent / "m.onnx")
    assert info.path.read_bytes() == b"ftrt plan"


def test_tf32_is_kept_only_for_tf32(build: Any) -> None:
    library = Library("10.9.0")
    build(library, "tf32", profile=(4, 4, 4))
    assert library.flags == {"TF32"}


def test_tensorrt_8_needs_the_half_flag_and_keeps_the_islands(build: Any) -> None:
    library = Library("8.6.0", "fp16")
    build(library, "fp16", profile=(4, 4, 4))
    assert library.flags == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}
    pinned = [layer.type.name for layer in library.layers if layer.precision is DataType8.FLOAT]
    assert pinned == ["REDUCE"]
    assert library.layers[3].output_type is DataType8.FLOAT


def test_tensorrt_10_takes_half_from_the_graph(build: Any) -> None:
    library = Library("10.9.0", "fp16")
    info = build(library, "fp16", profile=(4, 4, 4))
    assert library.flags == set()
    assert all(layer.precision is None for layer in library.layers)
    assert info.build["delivered_precisions"] == {"fp16": 1}


def test_only_dynamic_inputs_are_in_the_profile(build: Any) -> None:
    library = Library("8.6.0")
    build(library, profile=(4, 4, 4))
    assert library.profile == {"visual": ((4, 6, 16),) * 3}
    with pytest.raises(ExportError, match="'fixed' has a fixed batch of 4"):
        build(library, profile=(1, 4, 4))


def test_options_reach_the_library(build: Any) -> None:
    library = Library("8.6.0")
    options = {"workspace_bytes": 123, "optimization_level": 5, "hardware_compatible": True}
    info = build(library, profile=(4, 4, 4), version_compatible=True, **options)
    assert library.pools == {"workspace": 123}
    assert library.config.builder_optimization_level == 5
    assert library.config.hardware_compatibility_level == "ampere+"
    assert library.config.profiling_verbosity == "detailed"
    assert library.flags == {"VERSION_COMPATIBLE"}
    assert library.sources == 0b10000  # neither cuBLAS nor cuDNN
    assert options.items() <= info.options.to_json().items()


def test_timings_are_reused_replaced_and_saved(build: Any, tmp_path: Path) -> None:
    library, path = Library("8.6.0"), tmp_path / "t.cache"
    for before, after in (
        (None, b" and more"),
        (library.known_timings, library.known_timings + b" and more"),
        (b"timings of another GPU", b" and more"),
    ):
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
        build(library, profile=(4, 4, 4), timing_cache=path)
        assert path.read_bytes() == after


def test_what_the_library_says_is_passed_on(build: Any, tmp_path: Path) -> None:
    library = Library("8.6.0")
    library.plan = None
    with pytest.raises(ExportError, match=r"(?s)tensorrt 8\.6\.0 built no engine.*could not find any implementation"):
        build(library, profile=(4, 4, 4))
    assert not (tmp_path / "e.engine").exists()
    refused = Library("8.6.0")
    refused.refuse_profile = True
    with pytest.raises(ExportError, match="refused the profile"):
        build(refused, profile=(4, 4, 4))


def test_half_that_was_not_delivered(build: Any, tmp_path: Path) -> None:
    library = Library("8.6.0", "fp16")
    library.inspector = {"Layers": [{"Name": "a", "Outputs": [{"Format/Datatype": "Row major linear FP32"}]}]}
    with pytest.raises(ExportError, match=r"asked for fp16, but the built engine's layers are \{'fp32': 1\}"):
        build(library, "fp16", profile=(4, 4, 4))
    assert not (tmp_path / "e.engine").exists()


def test_without_a_driver_the_library_is_never_entered(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Simulation(device_status=35))
    library = Library("8.6.0")
    with pytest.raises(BackendUnavailable, match="driver"):
        build(library)
    assert library.config is None
