"""Small stand-ins for `tensorrt` and `cuda.bindings.runtime`, backed by numpy, for machines without a GPU.

They keep the rules that the backend must respect: work on a stream happens when the stream is synchronized, a graph
runs nothing while it is captured, the first run of a context can't be captured, a refused run is only a False, memory
is checked and counted. `Simulation` holds all state and the faults to inject.
"""

from __future__ import annotations

import ctypes
import enum
import json
import mmap
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.bundle import ModelFile
from runtime.spec import GraphTensors, ModelSpec

Operation = Callable[[], None]


@dataclass
class Simulation:
    gpu_name: str = "Simulated GPU"
    capability: tuple[int, int] = (9, 0)
    driver: int = 13000
    """Newest CUDA version that the driver serves, as CUDA gives it."""
    device_status: int = 0
    """Status of cudaGetDeviceCount: 35 without a driver, 100 without a GPU."""
    faults: dict[str, int] = field(default_factory=dict)
    """CUDA call -> status that it returns instead of working."""
    refuse_runs: bool = False
    """execute_async_v3 returns False."""
    capture_nothing: bool = False
    """While capturing, execute_async_v3 returns True and puts nothing into the graph: a replay leaves stale output."""
    refuse_inputs: bool = False
    start_error: str = ""
    """What the library logs when a Runtime is made that can't start CUDA; freeing it ends the process."""
    output_points: int | None = None
    """Points of the outputs that a context infers, where they are others than the engine's."""

    device_memory: dict[int, np.ndarray] = field(default_factory=dict)
    pinned: dict[int, np.ndarray] = field(default_factory=dict)
    registered: dict[int, int] = field(default_factory=dict)
    """Page-locked memory of the host that CUDA did not allocate: address -> bytes."""
    copies: list[tuple[str, int]] = field(default_factory=list)
    """Direction (`in` or `out`) and bytes of each copy that was made."""
    streams: dict[int, list[Operation]] = field(default_factory=dict)
    graphs: dict[int, list[Operation]] = field(default_factory=dict)
    events: dict[int, float] = field(default_factory=dict)
    captures: dict[int, tuple[int, list[Operation]]] = field(default_factory=dict)
    """Stream -> the thread that captures it, and the graph so far."""
    priorities: list[int] = field(default_factory=list)
    """Of the streams that were made with one."""
    contexts: int = 0
    broken: int = 0
    """Runtimes that could not start and are still there."""
    engines: int = 0
    launches: int = 0
    plain_runs: int = 0
    waits: int = 0
    """Times that the host waited for a stream."""
    clock: float = 0.0
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held during each CUDA call: threads share the device."""
    _last: int = 0

    def handle(self) -> int:
        """Return a new number, far enough from the others to be an address in device memory."""
        self._last += 1
        return self._last << 40

    def put(self, stream: int, operation: Operation) -> None:
        (self.captures[stream][1] if stream in self.captures else self.streams[stream]).append(operation)

    def bytes_at(self, pointer: int, nbytes: int) -> np.ndarray:
        """Return memory of the device or page-locked memory of the host, bounds checked."""
        for base, memory in self.device_memory.items():
            if base <= pointer < base + len(memory):
                assert pointer + nbytes <= base + len(memory), "copy beyond the end of a buffer"
                return memory[pointer - base : pointer - base + nbytes]
        locked = self.registered | {base: len(memory) for base, memory in self.pinned.items()}
        inside = [base <= pointer and pointer + nbytes <= base + size for base, size in locked.items()]
        assert any(inside), "an asynchronous copy of memory that is not page-locked"
        return np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(pointer))

    @property
    def held(self) -> dict[str, int]:
        """Return what is still allocated, without what there is none of."""
        names = ("device_memory", "pinned", "registered", "streams", "graphs", "events")
        counts = {name: len(getattr(self, name)) for name in names}
        counts |= {"contexts": self.contexts, "engines": self.engines}
        return {name: count for name, count in counts.items() if count}


class Cuda:
    """The CUDA runtime calls; `bindings` wraps each so that it returns (status, *results)."""

    cudaStreamNonBlocking = 1
    cudaHostRegisterPortable = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread-local")

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self.cudaFree, self.cudaFreeHost = sim.device_memory.pop, sim.pinned.pop
        self.cudaHostUnregister = sim.registered.pop
        self.cudaGraphDestroy = self.cudaGraphExecDestroy = sim.graphs.pop
        self.cudaEventDestroy = sim.events.pop

    def _hold(self, kind: str, thing: Any) -> int:
        handle = self._sim.handle()
        getattr(self._sim, kind)[handle] = thing
        return handle

    def cudaGetDeviceProperties(self, index: int) -> Any:
        major, minor = self._sim.capability
        return SimpleNamespace(name=self._sim.gpu_name.encode(), major=major, minor=minor, totalGlobalMem=1 << 34)

    def cudaSetDevice(self, index: int) -> None:
        assert index == 0

    def cudaDriverGetVersion(self) -> int:
        return self._sim.driver

    def cudaMemGetInfo(self) -> tuple[int, int]:
        return (1 << 34) - sum(map(len, self._sim.device_memory.values())), 1 << 34

    def cudaMalloc(self, nbytes: int) -> int:
        assert not self._sim.captures, "allocation while a stream is captured, by any thread"
        return self._hold("device_memory", np.full(nbytes, 0xAA, np.uint8))

    def cudaHostAlloc(self, nbytes: int, flags: int) -> int:
        memory = np.full(nbytes, 0xAA, np.uint8)
        self._sim.pinned[memory.ctypes.data] = memory
        return int(memory.ctypes.data)

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> None:
        assert not self._sim.captures, "memory is registered while a stream is captured, by any thread"
        assert pointer % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == 0
        assert pointer not in self._sim.registered
        self._sim.registered[pointer] = nbytes

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Any, stream: int) -> None:
        sim = self._sim

        def copy() -> None:
            sim.copies.append(("in" if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else "out", nbytes))
            np.copyto(sim.bytes_at(target, nbytes), sim.bytes_at(source, nbytes))

        sim.put(stream, copy)

    def cudaMemsetAsync(self, pointer: int, byte: int, nbytes: int, stream: int) -> None:
        self._sim.put(stream, lambda: self._sim.bytes_at(pointer, nbytes).fill(byte))

    def cudaMemset2DAsync(self, pointer: int, pitch: int, byte: int, width: int, height: int, stream: int) -> None:
        def fill() -> None:
            self._sim.bytes_at(pointer, pitch * height).reshape(height, pitch)[:, :width] = byte

        self._sim.put(stream, fill)

    def cudaStreamCreateWithFlags(self, flags: int) -> int:
        return self._hold("streams", [])

    def cudaDeviceGetStreamPriorityRange(self) -> tuple[int, int]:
        return 0, -5

    def cudaStreamCreateWithPriority(self, flags: int, priority: int) -> int:
        self._sim.priorities.append(priority)
        return self._hold("streams", [])

    def cudaStreamSynchronize(self, stream: int) -> None:
        assert stream not in self._sim.captures, "synchronization while capturing"
        self._sim.waits += 1
        queue, self._sim.streams[stream] = self._sim.streams[stream], []
        for operation in queue:
            operation()

    def cudaStreamDestroy(self, stream: int) -> None:
        assert not self._sim.streams.pop(stream) or self._sim.faults, "stream destroyed with work on it"

    def cudaStreamBeginCapture(self, stream: int, mode: str) -> None:
        assert mode == "thread-local"
        self._sim.captures[stream] = (threading.get_ident(), [])

    def cudaStreamEndCapture(self, stream: int) -> int:
        return self._hold("graphs", self._sim.captures.pop(stream)[1])

    def cudaGraphInstantiate(self, graph: int, flags: int) -> int:
        return self._hold("graphs", list(self._sim.graphs[graph]))

    def cudaGraphUpload(self, executable: int, stream: int) -> None:
        assert executable in self._sim.graphs

    def cudaGraphLaunch(self, executable: int, stream: int) -> None:
        self._sim.launches += 1
        for operation in self._sim.graphs[executable]:
            self._sim.put(stream, operation)

    def cudaEventCreateWithFlags(self, flags: int) -> int:
        return self._hold("events", 0.0)

    def cudaEventRecord(self, event: int, stream: int) -> None:
        def stamp() -> None:  # the clock advances half a millisecond from one event to the next
            self._sim.clock += 0.5
            self._sim.events[event] = self._sim.clock

        self._sim.put(stream, stamp)

    def cudaEventSynchronize(self, event: int) -> None:
        for stream in list(self._sim.streams):
            self.cudaStreamSynchronize(stream)

    def cudaEventElapsedTime(self, begin: int, end: int) -> float:
        return self._sim.events[end] - self._sim.events[begin]


def bindings(sim: Simulation) -> types.ModuleType:
    """Return what stands for `cuda.bindings.runtime`."""
    cuda, module = Cuda(sim), types.ModuleType("cuda.bindings.runtime")

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            if status := sim.faults.get(name, 0):
                return (status, 0)
            with sim.lock:
                result = function(*arguments)
            return (0, *result) if isinstance(result, tuple) else (0,) if result is None else (0, result)

        return call

    for name in dir(cuda):
        if name.startswith("cuda"):
            value = getattr(cuda, name)
            setattr(module, name, wrapped(name, value) if callable(value) else value)
    values: dict[str, Any] = {
        "cudaGetDeviceCount": lambda: (sim.device_status, 0 if sim.device_status else 1),
        "cudaGetErrorString": lambda status: (0, f"simulated fault {int(status)}".encode()),
    }
    module.__dict__.update(values)
    return module


DataType = enum.Enum("DataType", ["FLOAT", "HALF", "INT32", "BF16"])
TensorIOMode = enum.Enum("TensorIOMode", ["INPUT", "OUTPUT"])
Severity = enum.Enum("Severity", ["ERROR", "WARNING"])


class ILogger:
    def log(self, severity: Severity, msg: str) -> None: ...


class IProfiler:
    pass


def expected_outputs(inputs: dict[str, np.ndarray], outputs: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return what the simulated network computes: one number per video, spread over the points and classes."""
    number = sum(weight * array.reshape(len(array), -1).mean(1) for weight, array in enumerate(inputs.values(), 1))
    found = {}
    for index, (name, shape) in enumerate(outputs.items()):
        ramp = np.arange(np.prod(shape[1:]), dtype=np.float32).reshape(shape[1:]) * 0.01
        found[name] = (np.reshape(number, (-1, *[1] * (len(shape) - 1))) + ramp + index).astype(np.float32)
    return found


SCRATCH_OF_A_VIDEO = 1024


class Context:
    """IExecutionContext."""

    profiler: Any = None
    enqueue_emits_profile = True

    def __init__(self, sim: Simulation, plan: dict[str, Any], log: ILogger) -> None:
        self._sim, self._plan, self._log = sim, plan, log
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._ran = False
        self._scratch = 0
        sim.contexts += 1

    def __del__(self) -> None:
        self._sim.contexts -= 1

    def update_device_memory_size_for_shapes(self) -> int:
        return SCRATCH_OF_A_VIDEO * next(iter(self._shapes.values()))[0]

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes()
        assert size == len(self._sim.device_memory[pointer])
        self._scratch = pointer

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        _, points, *rest = self._plan["outputs"][name][0]
        batch = next(iter(self._shapes.values()))[0]
        return (batch, self._sim.output_points or points, *rest)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return not self._sim.refuse_inputs

    def infer_shapes(self) -> list[str]:
        return [name for name in self._plan["inputs"] if name not in self._shapes]

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self._addresses[name] = pointer
        inside = any(base <= pointer < base + len(memory) for base, memory in self._sim.device_memory.items())
        return inside and pointer % 256 == 0

    def report_to_profiler(self) -> bool:
        self.profiler.report_layer_time("slow", 2.0)
        self.profiler.report_layer_time("quick", 0.5)
        return True

    def execute_async_v3(self, stream: int) -> bool:
        sim, capturing = self._sim, stream in self._sim.captures
        assert self._scratch in sim.device_memory
        if sim.refuse_runs or (capturing and not self._ran):
            self._log.log(Severity.ERROR, "simulated refusal")
            return False
        self._ran = True
        sim.plain_runs += not capturing
        if capturing:
            time.sleep(1e-3)  # lets other threads in
        if not (capturing and sim.capture_nothing):
            sim.put(stream, self._compute)
        return True

    def _compute(self) -> None:
        inputs = {}
        for name, (_, kind) in self._plan["inputs"].items():
            dtype, shape = np.dtype(np.int32 if kind == "INT32" else np.float32), self._shapes[name]
            memory = self._sim.bytes_at(self._addresses[name], int(np.prod(shape)) * dtype.itemsize)
            inputs[name] = memory.view(dtype).reshape(shape)
        if "lengths" in inputs:
            assert inputs["lengths"].min() >= 1, "a row without a valid step"
        assert np.isfinite(next(iter(inputs.values()))).all(), "memory that nobody wrote"
        shapes = {name: self.get_tensor_shape(name) for name in self._plan["outputs"]}
        for name, values in expected_outputs(inputs, shapes).items():
            self._sim.bytes_at(self._addresses[name], values.nbytes)[:] = values.reshape(-1).view(np.uint8)


class Engine:
    """ICudaEngine."""

    device_memory_size_v2 = 4 * SCRATCH_OF_A_VIDEO

    def __init__(self, sim: Simulation, plan: dict[str, Any], log: ILogger) -> None:
        self._sim, self._plan, self._log = sim, plan, log
        self._all = plan["inputs"] | plan["outputs"]
        self.num_io_tensors = len(self._all)
        sim.engines += 1

    def __del__(self) -> None:
        self._sim.engines -= 1

    def get_tensor_name(self, index: int) -> str:
        return str(list(self._all)[index])

    def get_tensor_mode(self, name: str) -> enum.Enum:
        return TensorIOMode["INPUT" if name in self._plan["inputs"] else "OUTPUT"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._all[name][0])

    def get_tensor_dtype(self, name: str) -> enum.Enum:
        return DataType[self._all[name][1]]

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "user"
        return Context(self._sim, self._plan, self._log)


def tensorrt_module(sim: Simulation) -> Any:
    """Return what stands for `tensorrt`, as far as the runtime uses it."""

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            assert sim.device_status == 0, "a Runtime without a driver ends the process"
            self._logger = logger
            if sim.start_error:
                sim.broken += 1
                logger.log(Severity.ERROR, sim.start_error)

        def __del__(self) -> None:
            sim.broken -= bool(sim.start_error)

        def deserialize_cuda_engine(self, blob: Any) -> Engine | None:
            try:
                return Engine(sim, json.loads(bytes(memoryview(blob))[4:]), self._logger)
            except ValueError:
                self._logger.log(Severity.ERROR, "plan.header.size == blobSize failed")
                return None

    module: Any = types.ModuleType("tensorrt")
    module.__version__ = "10.9.0"
    module.ILogger, module.IProfiler, module.TensorIOMode, module.Runtime = ILogger, IProfiler, TensorIOMode, Runtime
    module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    return module


def install(monkeypatch: pytest.MonkeyPatch, sim: Simulation) -> None:
    """Put the stand-ins where `import tensorrt` and `from cuda.bindings import runtime` find them."""
    from runtime.backends.tensorrt import cuda

    module = bindings(sim)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_module(sim))
    monkeypatch.setattr(cuda, "bindings", lambda: module)


ENGINE_SPEC = ModelSpec(length=16, levels=3, visual_dim=6, audio_dim=4, labels=("a", "b", "c"))
ENGINE_FILE = ModelFile(
    name="tensorrt-fp16", format="tensorrt", files=("e.engine",), precision="fp16", max_batch=4,
    library="tensorrt", library_version="10.9.0", gpu_name="Simulated GPU", compute_capabilities=("9.0",),
    profile=(1, 2, 4), onnx_sha256="0" * 64,
)  # fmt: skip
"""Of an engine that `write_engine` writes."""


def engine_bytes(magic: bytes = b"ftrt", tensors: GraphTensors | None = None) -> bytes:
    """Return an engine of the simulation: its tensors with their shapes (-1 where they are free) and types."""
    shapes: dict[str, Any] = {"inputs": ENGINE_SPEC.input_shapes(1), "outputs": ENGINE_SPEC.output_shapes(1)}
    if tensors is not None:
        shapes = {"inputs": tensors.inputs, "outputs": tensors.outputs}
    plan = {
        kind: {
            n: ([-1, *(e if isinstance(e, int) else -1 for e in s[1:])], "INT32" if n == "lengths" else "FLOAT")
            for n, s in of_kind.items()
        }
        for kind, of_kind in shapes.items()
    }
    return magic + json.dumps(plan).encode()


def write_engine(path: Path, magic: bytes = b"ftrt", tensors: GraphTensors | None = None) -> Path:
    """Write an engine file of the simulation."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(engine_bytes(magic, tensors))
    return path


def inputs(batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw inputs of the simulated network, values behind the valid steps too."""
    draw = np.random.default_rng(seed)
    shapes = ENGINE_SPEC.input_shapes(batch)
    visual, audio = (draw.standard_normal(shapes[name], dtype=np.float32) for name in ("visual", "audio"))
    return visual, audio, draw.integers(1, ENGINE_SPEC.length + 1, shapes["lengths"], dtype=np.int32)


def assert_right(outputs: tuple[np.ndarray, np.ndarray], arrays: tuple[np.ndarray, ...]) -> None:
    """Assert that outputs are what the simulated network computes of these inputs."""
    named = dict(zip(("visual", "audio", "lengths"), arrays, strict=True))
    expected = expected_outputs(named, ENGINE_SPEC.output_shapes(len(arrays[0])))
    for got, name in zip(outputs, ("logits", "offsets"), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected[name])
