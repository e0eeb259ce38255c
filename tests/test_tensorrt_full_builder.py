"""A build with full TensorRT where it goes wrong, or differs between 8.6 and 10: the library is a stand-in.

What the library is told is not checked here: a stand-in would agree to anything. Builds that go well are tested with
TensorRT for RTX (tests/test_tensorrt_engine.py) and on a GPU (tests/test_gpu.py).
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
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


class Timings:
    """ITimingCache."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob


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
        cache = Timings(blob)
        kept = weakref.ref(cache)  # the configuration does not keep it: whoever made it has to

        def serialize() -> bytes:
            assert kept() is not None
            return blob + b" and more"

        self.config.get_timing_cache.return_value.serialize = serialize
        return cache


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


class Tensorrt8(Library):
    """8.6, which builds what `works` accepts of a profile and of layers that are bound to their precision."""

    def __init__(self, works: Callable[[int, bool], bool], precision: str = "HALF") -> None:
        super().__init__("8.6.0")
        self.flags: set[str] = set()
        self.works = works
        self.largest = 0
        self.attempted: list[tuple[int, bool]] = []
        names = ("FP16", "TF32", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")
        self.BuilderFlag = SimpleNamespace(**{name: name for name in names})
        self.NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0)
        self.TacticSource = SimpleNamespace(CUBLAS=0, CUBLAS_LT=1, CUDNN=2)
        flags = self.flags
        self.config.configure_mock(set_flag=flags.add, clear_flag=flags.discard, add_optimization_profile=lambda _: 0)
        self.config.get_tactic_sources.return_value = 0
        tensor = SimpleNamespace(name="visual", shape=(-1, 6, 16))
        network = self.builder.create_network.return_value
        network.configure_mock(num_inputs=1, get_input=lambda _: tensor)
        network.get_layer = lambda _: layer("MATRIX_MULTIPLY", precision, precision)
        self.builder.create_optimization_profile.return_value.set_shape = self._profile
        self.builder.create_builder_config.side_effect = self._new_config
        engine = self.Runtime().deserialize_cuda_engine()
        engine.create_engine_inspector().get_engine_information.return_value = '{"Layers": []}'

    def _new_config(self) -> Any:
        self.flags.clear()
        return self.config

    def _profile(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.largest = shapes[-1][0]

    def _build(self, *_: Any) -> memoryview | None:
        self.attempted.append((self.largest, "OBEY_PRECISION_CONSTRAINTS" in self.flags))
        if self.works(*self.attempted[-1]):
            return memoryview(b"plan")
        self.Builder.call_args.args[0].log(Severity.ERROR, f"no implementation for {self.attempted[-1]}")
        return None


@pytest.mark.parametrize(
    ("works", "attempted", "profile"),
    [
        (lambda most, bound: True, [(64, True)], (1, 32, 64)),
        (lambda most, bound: most <= 8, [(64, True), (8, True)], (1, 8, 8)),
        (lambda most, bound: most == 1, [(64, True), (8, True), (1, True)], (1, 1, 1)),
        (lambda most, bound: not bound, [(64, True), (8, True), (1, True), (64, False)], (1, 32, 64)),
        (
            lambda most, bound: most == 1 and not bound,
            [(64, True), (8, True), (1, True), (64, False), (1, False)],
            (1, 1, 1),
        ),
    ],
)
def test_tensorrt_8_is_built_in_the_first_way_that_works(
    build: Any, caplog: pytest.LogCaptureFixture, works: Any, attempted: Any, profile: tuple[int, ...]
) -> None:
    trt = Tensorrt8(works)
    info = build(trt, precision="fp16", profile=(1, 32, 64))
    assert trt.attempted == attempted
    model_file = info.model_file(name="tensorrt-fp16")
    assert (model_file.profile, model_file.max_batch) == (profile, profile[2])  # what the engine takes
    assert tuple(info.options.profile) == (1, 32, 64)  # what a rebuild is to try again
    assert len(info.build.get("refused", {})) == len(attempted) - 1
    assert ("fallback" in info.build) == (len(attempted) > 1) == ("it could not be built" in caplog.text)
    for tried, why in zip(attempted, info.build.get("refused", {}).values(), strict=False):
        assert f"no implementation for {tried}" in why
    if not attempted[-1][1]:
        assert "a preference" in info.build["fallback"]
        assert "PREFER_PRECISION_CONSTRAINTS" in trt.flags


def test_tensorrt_8_that_builds_in_no_way(build: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"(?s)built no engine.*\(64, True\).*\(8, True\).*\(1, True\).*\(1, False\)"):
        build(Tensorrt8(lambda most, bound: False), precision="fp16", profile=(1, 32, 64))
    fp32 = Tensorrt8(lambda most, bound: False, "FLOAT")
    with pytest.raises(ExportError, match="built no engine"):
        build(fp32, profile=(1, 4, 4))
    assert fp32.attempted == [(4, False), (1, False)]  # nothing is bound in an fp32 engine, and 4 is not above 8
    assert not (tmp_path / "e.engine").exists()


def test_a_half_engine_of_tensorrt_8_with_weights_in_full_is_built_in_another_way(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that are bound to fp32 may take a whole region with them, which is seen by the size alone."""
    trt = Tensorrt8(lambda most, bound: True)
    small = trt.builder.build_serialized_network.side_effect

    def built(*_: Any) -> Any:
        plan = small()
        return np.broadcast_to(np.zeros(1, np.uint8), 100 << 20) if trt.attempted[-1][1] else plan

    trt.builder.build_serialized_network.side_effect = built
    monkeypatch.setattr("export.tensorrt.build.graph_bytes", lambda _: 64 << 20)
    info = build(trt, precision="fp16", profile=(1, 32, 64))
    assert trt.attempted == [(64, True), (64, False)]
    assert "as if its weights were fp32" in next(iter(info.build["refused"].values()))


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
