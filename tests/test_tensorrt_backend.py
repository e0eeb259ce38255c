"""The TensorRT backend's control flow against stand-ins for the library and CUDA; its refusals for real."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import importlib.util
import re
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import numpy as np
import pytest
from tensorrt_simulation import (
    ENGINE_FILE,
    ENGINE_SPEC,
    SCRATCH_OF_A_VIDEO,
    Engine,
    Simulation,
    assert_right,
    engine_bytes,
    inputs,
    tensorrt_module,
    write_engine,
)

from runtime.backends.select import open_engine
from runtime.backends.tensorrt import cuda
from runtime.backends.tensorrt.backend import TensorRTBackend
from runtime.backends.tensorrt.context import RunOptions
from runtime.backends.tensorrt.engine import check_engine
from runtime.errors import (
    BackendUnavailable,
    BundleError,
    EngineError,
    EngineMismatch,
    FeatureError,
    MissingDependency,
)


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_every_batch_size_gives_its_own_outputs(sim: Simulation, engine_path: Path, cuda_graph: bool) -> None:
    with TensorRTBackend.open(
        engine_path, ENGINE_FILE, ENGINE_SPEC, running=RunOptions(cuda_graph=cuda_graph)
    ) as backend:
        for seed, batch in enumerate((1, 3, 4, 1, 2, 3)):
            arrays = inputs(batch, seed)
            assert_right(backend.infer(*arrays), arrays)
        assert (sim.launches > 0) == cuda_graph
        assert set(backend.describe()["cuda_graphs"].values()) == {"replayed" if cuda_graph else "off"}
    assert sim.held == {}


def test_a_graph_is_captured_once_per_batch_size_after_one_plain_run(sim: Simulation, engine_path: Path) -> None:
    with TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC) as backend:
        # of batch 2 and of 1: plain at load, replay compared with it, first request
        assert (sim.plain_runs, sim.launches) == (2, 4)
        for _ in range(5):
            backend.infer(*inputs(2))
        assert (sim.plain_runs, sim.launches) == (2, 9)
        backend.infer(*inputs(3))
        assert (sim.plain_runs, sim.launches) == (3, 11)
        assert backend.describe()["cuda_graphs"] == {1: "replayed", 2: "replayed", 4: "replayed"}
        backend.infer(*inputs(2))  # the larger batch took the buffers of its graph
        assert (sim.plain_runs, sim.launches) == (4, 13)
        for batch in (2, 4, 3, 2):
            backend.infer(*inputs(batch))
        assert (sim.plain_runs, sim.launches) == (4, 17)


def test_outputs_belong_to_the_caller(sim: Simulation, engine_path: Path) -> None:
    with TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC) as backend:
        first_inputs = inputs(2, 1)
        first = backend.infer(*first_inputs)
        backend.infer(*inputs(2, 2))
        assert_right(first, first_inputs)


def test_forks_share_the_engine_and_outlive_the_first(sim: Simulation, engine_path: Path) -> None:
    first = TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC)
    forks = [first.fork() for _ in range(3)]
    assert sim.engines == 1
    first.close()
    results: dict[int, bool] = {}

    def work(index: int) -> None:
        arrays = inputs(3, index)
        assert_right(forks[index].infer(*arrays), arrays)
        forks[index].close()
        results[index] = True

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: True, 1: True, 2: True}
    assert sim.held == {}


def test_a_fork_has_recorded_what_the_engine_is_tuned_for(sim: Simulation, engine_path: Path) -> None:
    with TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC) as first, first.fork() as fork:
        assert fork.describe()["cuda_graphs"] == first.describe()["cuda_graphs"] == {2: "replayed", 1: "replayed"}
        runs = sim.plain_runs
        fork.infer(*inputs(2))
        assert sim.plain_runs == runs
        sim.faults = {"cudaMalloc": 2}
        with pytest.raises(EngineError, match="cudaMalloc"):
            first.fork()
        sim.faults = {}
    assert sim.held == {}


def test_threads_record_new_batch_sizes_at_the_same_time(sim: Simulation, engine_path: Path) -> None:
    """Memory that one thread allocates while another one captures would end the capture."""
    failures: list[BaseException] = []

    def work(backend: TensorRTBackend, seed: int) -> None:
        try:
            with backend:
                for batch in (1, 2, 4):
                    arrays = inputs(batch, seed)
                    assert_right(backend.infer(*arrays), arrays)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            failures.append(error)

    with TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC) as first:
        threads = [threading.Thread(target=work, args=(first.fork(), seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
    assert sim.held == {}


def test_batches_below_the_profile_are_filled_up(sim: Simulation, engine_path: Path) -> None:
    model_file = dataclasses.replace(ENGINE_FILE, profile=(4, 4, 4))
    with TensorRTBackend.open(engine_path, model_file, ENGINE_SPEC) as backend:
        backend.infer(*inputs(4, 9))
        arrays = inputs(2, 3)
        assert_right(backend.infer(*arrays), arrays)


def test_batch_sizes_in_between_share_a_graph(sim: Simulation, engine_path: Path) -> None:
    model_file = dataclasses.replace(ENGINE_FILE, max_batch=20, profile=(1, 1, 20))
    with TensorRTBackend.open(engine_path, model_file, ENGINE_SPEC) as backend:
        for batch in [20, *range(1, 21)]:
            arrays = inputs(batch, batch)
            assert_right(backend.infer(*arrays), arrays)
        assert list(backend.describe()["cuda_graphs"]) == [1, 20, 2, 4, 8, 16]
        assert sim.contexts == len(sim.graphs) == 6


def test_memory_follows_the_batch_that_is_run(sim: Simulation, engine_path: Path) -> None:
    """Not the largest one of the profile: 1,978 MiB of scratch for the full network, where batch 1 needs 61."""

    def held() -> int:
        return sum(map(len, [*sim.device_memory.values(), *sim.pinned.values()]))

    with TensorRTBackend.open(engine_path, dataclasses.replace(ENGINE_FILE, profile=(1, 1, 4)), ENGINE_SPEC) as backend:
        one = held()
        assert backend.describe()["scratch_bytes"] == SCRATCH_OF_A_VIDEO
        backend.infer(*inputs(3))
        four = held()
        assert 3 * one < four <= 4 * one  # the gaps that align arrays do not grow
        backend.infer(*inputs(1))
        assert held() == four
        assert backend.describe()["scratch_bytes"] == 4 * SCRATCH_OF_A_VIDEO
        with backend.fork() as fork:
            fork.infer(*inputs(1))
            assert held() == four + one


def test_a_batch_that_does_not_fit_leaves_the_smaller_ones(sim: Simulation, engine_path: Path) -> None:
    with TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC) as backend:
        sim.faults["cudaMalloc"] = 2
        with pytest.raises(EngineError, match="cudaMalloc failed"):
            backend.infer(*inputs(4))
        sim.faults.clear()
        arrays = inputs(2, 1)
        assert_right(backend.infer(*arrays), arrays)
        assert backend.describe()["scratch_bytes"] == 2 * SCRATCH_OF_A_VIDEO
    assert sim.held == {}


def test_outputs_that_the_library_infers_late(sim: Simulation, engine_path: Path) -> None:
    """8.6 and the first releases of 10 know the points of the outputs once a batch size is set."""
    points = ENGINE_SPEC.output_shapes(1)["logits"][1]
    engine_path.write_bytes(engine_path.read_bytes().replace(f"[-1, {points},".encode(), b"[-1, -1,"))
    sim.output_points = points
    with TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC) as backend:
        arrays = inputs(3)
        assert_right(backend.infer(*arrays), arrays)
    sim.output_points = points + 1
    with pytest.raises(EngineError, match=rf"at batch 2 output 'logits' is \(2, {points + 1}, 3\), expected"):
        TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC)
    assert sim.held == {}


def test_close_twice_and_use_after_close(sim: Simulation, engine_path: Path) -> None:
    backend = TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC)
    backend.infer(*inputs(2))
    backend.close()
    backend.close()
    assert sim.held == {}
    for use in (lambda: backend.infer(*inputs(1)), backend.fork):
        with pytest.raises(EngineError, match="closed"):
            use()


def test_engine_and_layer_times(sim: Simulation, engine_path: Path) -> None:
    with TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC) as backend:
        graphs, waits = len(sim.graphs), sim.waits
        times = backend.engine_milliseconds(2, repeats=50, warmup_seconds=0)
        assert times.shape == (50,)
        assert sim.waits - waits < 10  # all are queued before the first wait: no launch by the host is in a time
        launches = sim.launches
        backend.engine_milliseconds(2, repeats=1, warmup_seconds=0.01)
        assert sim.launches > launches + 2  # an idle GPU has low clocks
        np.testing.assert_allclose(times, 0.5)  # the simulated clock advances half a millisecond between two events
        assert len(sim.graphs) == graphs
        assert backend.layer_milliseconds(2, repeats=3) == {"slow": 2.0, "quick": 0.5}
        arrays = inputs(2, 5)
        assert_right(backend.infer(*arrays), arrays)
        with pytest.raises(EngineError, match="takes 1 to 4"):
            backend.engine_milliseconds(5)


def test_a_refused_run_is_an_error_with_the_library_text(sim: Simulation, engine_path: Path) -> None:
    with TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC, running=RunOptions(cuda_graph=False)) as backend:
        sim.refuse_runs = True
        with pytest.raises(EngineError, match=r"(?s)refused to run a batch of 2.*simulated refusal"):
            backend.infer(*inputs(2))
        sim.refuse_runs = False
        arrays = inputs(2, 1)
        assert_right(backend.infer(*arrays), arrays)


@pytest.mark.parametrize(
    ("knob", "text"),
    [
        ("refuse_runs", r"(?s)refused to run a batch of 2.*simulated refusal"),
        ("capture_nothing", "replayed CUDA graph gives another"),
        ("refuse_inputs", "refuses shape"),
    ],
)
def test_what_goes_wrong_at_load_frees_everything(sim: Simulation, engine_path: Path, knob: str, text: str) -> None:
    setattr(sim, knob, True)
    with pytest.raises(EngineError, match=text):
        TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC)
    assert sim.held == {}


@pytest.mark.parametrize("fault", ["cudaGraphInstantiate", "cudaStreamBeginCapture"])
def test_an_engine_that_cannot_be_captured_runs_plainly_and_says_so(
    sim: Simulation, engine_path: Path, fault: str
) -> None:
    sim.faults[fault] = 900
    with pytest.warns(UserWarning, match=f"without a CUDA graph.*{fault}"):
        backend = TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC)
    with backend:  # a second warning would be an error: it is said once per batch size, not per request
        arrays = inputs(2, 1)
        assert_right(backend.infer(*arrays), arrays)
        assert fault in backend.describe()["cuda_graphs"][2]
    assert sim.held == {}


@pytest.mark.parametrize("fault", ["cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags", "cudaStreamSynchronize"])
def test_a_failing_cuda_call_is_named(sim: Simulation, engine_path: Path, fault: str) -> None:
    sim.faults[fault] = 2
    with pytest.raises(EngineError, match=rf"{fault} failed: .*\(2\): simulated fault 2"):
        TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC)
    if fault != "cudaStreamSynchronize":  # without it nothing can be taken down in order
        assert sim.held == {}


def test_wrong_inputs_are_named(sim: Simulation, engine_path: Path) -> None:
    with TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC) as backend:
        visual, audio, lengths = inputs(2)
        with pytest.raises(FeatureError, match="takes 1 to 4"):
            backend.infer(*inputs(5))
        with pytest.raises(FeatureError, match="audio: got"):
            backend.infer(visual, audio[:, :2], lengths)
        with pytest.raises(FeatureError, match="lengths: got float32"):
            backend.infer(visual, audio, lengths.astype(np.float32))


def test_engine_of_another_network(sim: Simulation, engine_path: Path) -> None:
    with pytest.raises(BundleError, match="visual"):
        TensorRTBackend.open(engine_path, ENGINE_FILE, dataclasses.replace(ENGINE_SPEC, visual_dim=7))
    assert sim.held == {}


def test_an_output_type_that_numpy_lacks(sim: Simulation, tmp_path: Path) -> None:
    path = write_engine(tmp_path / "b" / "e.engine")
    path.write_bytes(path.read_bytes().replace(b'"FLOAT"]}}', b'"BF16"]}}'))
    with pytest.raises(EngineError, match="BF16"):
        TensorRTBackend.open(path, ENGINE_FILE, ENGINE_SPEC)


def test_missing_cut_short_and_foreign_files(sim: Simulation, engine_path: Path) -> None:
    content = engine_path.read_bytes()
    known = dataclasses.replace(ENGINE_FILE, build={"engine_bytes": len(content)})
    engine_path.write_bytes(content[:-5])
    with pytest.raises(BundleError, match=rf"{len(content) - 5} bytes, the engine had {len(content)}"):
        TensorRTBackend.open(engine_path, known, ENGINE_SPEC)
    with pytest.raises(EngineError, match="blobSize failed"):  # no size on record: the library finds it
        TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC)
    engine_path.write_bytes(b"vtrt" + content[4:])
    with pytest.raises(BundleError, match="is a TensorRT-RTX engine, the manifest says tensorrt"):
        TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC)
    engine_path.write_bytes(b"")
    with pytest.raises(BundleError, match="0 bytes"):
        TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC)
    engine_path.unlink()
    with pytest.raises(BundleError, match="missing"):
        TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"library_version": "10.8.0"}, r"built with tensorrt 10\.8\.0, here is 10\.9\..*'tensorrt==10\.8\.0'"),
        ({"gpu_name": "Other GPU"}, r"built for Other GPU .*here is Simulated GPU"),
        ({"compute_capabilities": ("8.9",)}, r"8\.9\), here is Simulated GPU \(compute capability 9\.0\)"),
        ({"library_version": "11.0.0", "options": {"version_compatible": True}}, "built with tensorrt 11"),
    ],
)  # fmt: skip
def test_an_engine_for_another_machine_is_refused_before_it_is_read(
    sim: Simulation, engine_path: Path, changes: dict[str, object], text: str
) -> None:
    with pytest.raises(EngineMismatch, match=text) as caught:
        TensorRTBackend.open(engine_path, dataclasses.replace(ENGINE_FILE, **changes), ENGINE_SPEC)  # type: ignore[arg-type]
    assert "ccnet rebuild BUNDLE" in str(caught.value)
    assert "on_mismatch='onnx'" in str(caught.value)
    assert sim.engines == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gpu_name": "Other GPU", "compute_capabilities": ("8.6",), "options": {"hardware_compatible": True}},
        {"library_version": "8.6.0", "options": {"version_compatible": True}},
        {"library_version": "10.2.0", "options": {"version_compatible": True}},
    ],
)
def test_engines_that_fit(sim: Simulation, changes: dict[str, object]) -> None:
    assert check_engine(dataclasses.replace(ENGINE_FILE, **changes)).name == "Simulated GPU"  # type: ignore[arg-type]


def test_hardware_compatible_needs_ampere(sim: Simulation) -> None:
    sim.capability = (7, 5)
    with pytest.raises(EngineMismatch, match="Ampere or newer"):
        check_engine(dataclasses.replace(ENGINE_FILE, options={"hardware_compatible": True}))


def test_a_library_that_can_not_start_cuda(sim: Simulation, engine_path: Path) -> None:
    """From 10 on it only logs, and the object that it returns ends the process when it is freed."""
    sim.start_error = "CUDA initialization failure with error: 35"
    with pytest.raises(BackendUnavailable, match=r"(?s)tensorrt 10\.9\.0 does not start here.*failure with error: 35"):
        TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC)
    gc.collect()
    assert sim.broken == 1


def test_a_library_that_returns_nothing(sim: Simulation, engine_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(logger: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(sys.modules["tensorrt"], "Runtime", nothing)
    with pytest.raises(BackendUnavailable, match=r"(?s)does not start here.*factory function returned nullptr"):
        TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC)


@pytest.mark.parametrize(
    ("installed", "fits"), [(("cu13",), False), (("cu12",), True), (("cu12", "cu13"), True), ((), True)]
)
def test_a_driver_that_is_too_old_for_the_library(
    sim: Simulation, monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], fits: bool
) -> None:
    def version(distribution: str) -> str:
        if distribution.removeprefix("tensorrt_") in installed:
            return "10.9.0"
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "version", version)
    sim.driver = 12020
    if fits:
        check_engine(ENGINE_FILE)
    else:
        with pytest.raises(
            BackendUnavailable, match=r"tensorrt 10\.9\.0 is built for CUDA 13, the driver serves CUDA 12\.2"
        ):
            check_engine(ENGINE_FILE)


@pytest.mark.parametrize(("status", "text"), [(35, "driver"), (100, "shows no GPU"), (3, "CUDA does not start")])
def test_no_driver_no_gpu(sim: Simulation, engine_path: Path, status: int, text: str) -> None:
    sim.device_status = status
    with pytest.raises(BackendUnavailable, match=text):
        TensorRTBackend.open(engine_path, ENGINE_FILE, ENGINE_SPEC)


def test_no_such_gpu(sim: Simulation) -> None:
    with pytest.raises(BackendUnavailable, match="no GPU 3: this machine shows 1"):
        check_engine(ENGINE_FILE, 3)


def test_an_onnx_model_file_is_no_engine() -> None:
    with pytest.raises(BundleError, match="ONNX graph"):
        check_engine(dataclasses.replace(ENGINE_FILE, format="onnx"))


def test_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ccnet\[gpu\]'"):
        check_engine(ENGINE_FILE)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ccnet\[rtx\]'"):
        check_engine(dataclasses.replace(ENGINE_FILE, format="tensorrt-rtx"))


def test_the_library_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libcublas.so.12: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(BackendUnavailable, match=r"does not load: libcublas\.so\.12"):
        check_engine(ENGINE_FILE)


def test_this_machine_is_probed_for_real() -> None:
    """With the real CUDA bindings: a device, or the reason why there is none; never a crash."""
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    try:
        found = cuda.probe().compute_capability
    except BackendUnavailable as error:
        found = str(error)
    assert re.search(r"^\d+\.\d$|driver|GPU|CUDA", found)


def test_a_real_rtx_engine_is_refused_without_a_gpu(tmp_path: Path) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    path = tmp_path / "e.engine"
    path.write_bytes(b"vtrt" + bytes(100))
    model_file = dataclasses.replace(ENGINE_FILE, format="tensorrt-rtx", library="tensorrt_rtx", gpu_name=None,
                                   library_version=str(rtx.__version__), compute_capabilities=())  # fmt: skip
    with pytest.raises((BackendUnavailable, EngineError, EngineMismatch)):
        TensorRTBackend.open(path, model_file, ENGINE_SPEC)
    with pytest.raises(EngineMismatch, match=r"built with tensorrt_rtx 1\.6\.0"):
        TensorRTBackend.open(path, dataclasses.replace(model_file, library_version="1.6.0"), ENGINE_SPEC)


class RtxCache:
    """IRuntimeCache: grows with every context that is made."""

    def __init__(self) -> None:
        self.content: bytes | None = None

    def deserialize(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> memoryview | None:
        return None if self.content is None else memoryview(self.content)


@pytest.fixture
def rtx(sim: Simulation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """TensorRT for RTX as far as it differs: validity of engines, configuration and cache of the runtime."""
    module: Any = tensorrt_module(sim)
    module.__name__, module.diagnostics, module.caches, module.configs = "tensorrt_rtx", 0, [], weakref.WeakSet()
    names = ("VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "INSUFFICIENT_GPU_MEMORY")
    bits = {name: 1 << bit for bit, name in enumerate((*names, "MALFORMED_ENGINE", "CUDA_ERROR"))}
    module.EngineInvalidityDiagnostics = SimpleNamespace(**bits)
    module.EngineValidity = SimpleNamespace(INVALID="invalid")
    module.ComputeCapability = SimpleNamespace(__members__={"SM86": 1, "SM89": 2, "SM120": 3})
    module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    module.CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")
    module.Runtime.engine_header_size = 4
    module.Runtime.get_engine_validity = lambda self, header: (
        "invalid" if module.diagnostics else "valid",
        module.diagnostics,
    )

    class Config:
        def set_execution_context_allocation_strategy(self, strategy: str) -> None:
            assert strategy == "user"

        def create_runtime_cache(self) -> Any:
            module.caches.append(RtxCache())
            return module.caches[-1]

        def set_runtime_cache(self, cache: RtxCache) -> None:
            self.cache = cache

    class RtxEngine(Engine):
        def create_runtime_config(self) -> Config:
            config = Config()
            module.configs.add(config)
            return config

        def create_execution_context(self, config: Any) -> Any:
            config.cache.content = (config.cache.content or b"") + b"kernels "
            return super().create_execution_context("user")

    monkeypatch.setattr("tensorrt_simulation.Engine", RtxEngine)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    return module


RTX_FILE = dataclasses.replace(ENGINE_FILE, format="tensorrt-rtx", library="tensorrt_rtx", compute_capabilities=())


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("VERSION_MISMATCH", EngineMismatch, "ccnet rebuild"),
        ("UNSUPPORTED_CC", EngineMismatch, "ccnet rebuild"),
        ("OLD_CUDA_DRIVER", BackendUnavailable, "the driver is too old"),
        ("OLD_CUDA_RUNTIME", BackendUnavailable, "the CUDA runtime is too old"),
        ("INSUFFICIENT_GPU_MEMORY", BackendUnavailable, "too little memory"),
        ("CUDA_ERROR", BackendUnavailable, "CUDA does not start"),
    ],
)
def test_what_rtx_says_of_an_engine(rtx: Any, tmp_path: Path, name: str, error: type[Exception], text: str) -> None:
    rtx.diagnostics = getattr(rtx.EngineInvalidityDiagnostics, name)
    path = write_engine(tmp_path / "bundle" / "e.engine", b"vtrt")
    with pytest.raises(error, match=f"can't run this engine on Simulated GPU.*{text}"):
        TensorRTBackend.open(path, RTX_FILE, ENGINE_SPEC)


@pytest.mark.parametrize("told", ["by the manifest", "by the header", "when it is loaded", "when it runs"])
def test_an_rtx_engine_on_a_gpu_that_rtx_does_not_know(rtx: Any, sim: Simulation, tmp_path: Path, told: str) -> None:
    """Hopper: `auto` takes the next engine, whenever it turns out."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    built_for = ("8.9",) if told == "by the manifest" else ()
    model_file = dataclasses.replace(
        RTX_FILE, compute_capabilities=built_for, library_version=rtx.__version__, files=("e.engine",)
    )
    rtx.diagnostics = rtx.EngineInvalidityDiagnostics.UNSUPPORTED_CC if told == "by the header" else 0
    if told == "when it is loaded":
        rtx.Runtime.deserialize_cuda_engine = lambda self, blob: None
    sim.refuse_runs = told == "when it runs"
    engines = [builders.engine("tensorrt-rtx", "fp16", model_file=model_file.name), builders.engine("onnxruntime")]
    files: Any = {"engine_files": [model_file], "engine_content": engine_bytes(b"vtrt")}
    bundle = builders.make_bundle(tmp_path / "bundle", engines, spec=ENGINE_SPEC, **files)
    with pytest.raises(EngineMismatch):
        open_engine(bundle, "tensorrt-rtx")
    with pytest.warns(RuntimeWarning, match="engine 'tensorrt-rtx-fp16' is skipped"):
        opened = open_engine(bundle)
    opened.backend.close()
    assert opened.backend.name == "onnxruntime"
    assert sim.held == {}
    sim.capability = (8, 9)  # a GPU that it knows: what goes wrong there is no mismatch
    if told in ("when it is loaded", "when it runs"):
        with pytest.raises(EngineError):
            open_engine(bundle, "tensorrt-rtx")


def test_rtx_kernels_are_saved_after_each_new_batch_size(rtx: Any, sim: Simulation, tmp_path: Path) -> None:
    path = write_engine(tmp_path / "bundle" / "e.engine", b"vtrt")
    with TensorRTBackend.open(path, RTX_FILE, ENGINE_SPEC) as backend:
        (saved,) = (tmp_path / "ccnet").iterdir()
        assert (tmp_path / "ccnet").stat().st_mode & 0o777 == 0o700
        first = saved.read_bytes()
        backend.infer(*inputs(4))
        assert len(saved.read_bytes()) > len(first)
        gc.collect()
        assert len(rtx.configs) == 1  # contexts may refer to it as long as they live
        rtx.caches[0].content = None  # a library that does not tell
    assert sim.held == {}
    with TensorRTBackend.open(path, RTX_FILE, ENGINE_SPEC):
        assert rtx.caches[1].content.startswith(first)
