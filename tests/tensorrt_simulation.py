"""Small stand-ins for `tensorrt` and `cuda.bindings.runtime`, backed by numpy, for machines without a GPU.

They keep the rules that the backend must respect: work on a stream happens when the stream is synchronized, a recorded
graph runs nothing while it is recorded, the first run of a context can't be recorded, a refused run is only a False,
memory is checked and counted. `Simulation` holds all state and the faults to inject.
"""

from __future__ import annotations

import ctypes
import enum
import json
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle import ModelFile
from runtime.spec import ModelSpec

Operation = Callable[[], None]


@dataclass
class Simulation:
    gpu_name: str = "Simulated GPU"
    capability: tuple[int, int] = (9, 0)
    device_status: int = 0
    """Status of cudaGetDeviceCount: 35 without a driver, 100 without a GPU."""
    faults: dict[str, int] = field(default_factory=dict)
    """CUDA call -> status that it returns instead of working."""
    refuse_runs: bool = False
    """execute_async_v3 returns False."""
    record_nothing: bool = False
    """While recording, execute_async_v3 returns True and records nothing: the replay leaves stale output."""
    refuse_inputs: bool = False
    version: str = "10.9.0"

    device_memory: dict[int, np.ndarray] = field(default_factory=dict)
    pinned: dict[int, np.ndarray] = field(default_factory=dict)
    streams: dict[int, list[Operation]] = field(default_factory=dict)
    recording: dict[int, list[Operation]] = field(default_factory=dict)
    recording_threads: set[int] = field(default_factory=set)
    graphs: dict[int, list[Operation]] = field(default_factory=dict)
    events: dict[int, float] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held during each CUDA call: threads share the simulated device."""
    contexts: int = 0
    engines: int = 0
    launches: int = 0
    plain_runs: int = 0
    clock: float = 0.0
    _next: int = 0x10000

    def handle(self) -> int:
        self._next += 0x10000
        return self._next

    def put(self, stream: int, operation: Operation) -> None:
        (self.recording[stream] if stream in self.recording else self.streams[stream]).append(operation)

    def run(self, stream: int) -> None:
        queue, self.streams[stream] = self.streams[stream], []
        for operation in queue:
            operation()

    def bytes_at(self, pointer: int, nbytes: int) -> np.ndarray:
        """Memory of the device (bounds checked) or of the host."""
        for base, memory in self.device_memory.items():
            if base <= pointer < base + len(memory):
                assert pointer + nbytes <= base + len(memory), "copy beyond the end of a buffer"
                return memory[pointer - base : pointer - base + nbytes]
        return np.frombuffer((ctypes.c_ubyte * nbytes).from_address(pointer), np.uint8)

    @property
    def held(self) -> dict[str, int]:
        """What is still allocated."""
        names = ("device_memory", "pinned", "streams", "graphs", "events")
        return {name: len(getattr(self, name)) for name in names} | {"contexts": self.contexts, "engines": self.engines}


class Stream(int):
    pass


def cuda_module(sim: Simulation) -> types.ModuleType:
    """`cuda.bindings.runtime`: every function returns (status, *results)."""
    module = types.ModuleType("cuda.bindings.runtime")

    def offer(function: Callable[..., Any]) -> None:
        def call(*arguments: Any) -> tuple[Any, ...]:
            status = sim.faults.get(function.__name__, 0)
            if status:
                return (status, *([0] if function.__name__ != "cudaMemGetInfo" else [0, 0]))
            with sim.lock:
                result = function(*arguments)
            return (0, *result) if isinstance(result, tuple) else (0,) if result is None else (0, result)

        setattr(module, function.__name__, call)

    def cudaHostAlloc(nbytes: int, flags: int) -> int:
        memory = np.full(nbytes, 0xAA, np.uint8)
        sim.pinned[memory.ctypes.data] = memory
        return int(memory.ctypes.data)

    def cudaMalloc(nbytes: int) -> int:
        assert threading.get_ident() not in sim.recording_threads, "allocation while recording"
        pointer = sim.handle() << 20
        sim.device_memory[pointer] = np.full(nbytes, 0xAA, np.uint8)
        return pointer

    def cudaMemcpyAsync(target: int, source: int, nbytes: int, kind: Any, stream: Stream) -> None:
        def copy() -> None:
            sim.bytes_at(target, nbytes)[:] = sim.bytes_at(source, nbytes)

        sim.put(stream, copy)

    def cudaMemsetAsync(pointer: int, byte: int, nbytes: int, stream: Stream) -> None:
        sim.put(stream, lambda: sim.bytes_at(pointer, nbytes).fill(byte))

    def cudaStreamCreateWithFlags(flags: int) -> Stream:
        stream = Stream(sim.handle())
        sim.streams[stream] = []
        return stream

    def cudaStreamSynchronize(stream: Stream) -> None:
        assert stream not in sim.recording, "synchronization while recording"
        sim.run(stream)

    def cudaStreamBeginCapture(stream: Stream, mode: str) -> None:
        assert mode == "thread-local"
        sim.recording[stream] = []
        sim.recording_threads.add(threading.get_ident())

    def cudaStreamEndCapture(stream: Stream) -> int:
        graph = sim.handle()
        sim.graphs[graph] = sim.recording.pop(stream)
        sim.recording_threads.discard(threading.get_ident())
        return graph

    def cudaGraphInstantiate(graph: int, flags: int) -> int:
        executable = sim.handle()
        sim.graphs[executable] = list(sim.graphs[graph])
        return executable

    def cudaGraphLaunch(executable: int, stream: Stream) -> None:
        sim.launches += 1
        for operation in sim.graphs[executable]:
            sim.put(stream, operation)

    def cudaEventCreateWithFlags(flags: int) -> int:
        event = sim.handle()
        sim.events[event] = 0.0
        return event

    def cudaEventRecord(event: int, stream: Stream) -> None:
        def stamp() -> None:
            sim.clock += 0.5
            sim.events[event] = sim.clock

        sim.put(stream, stamp)

    def cudaEventSynchronize(event: int) -> None:
        for stream in list(sim.streams):
            sim.run(stream)

    def cudaEventElapsedTime(begin: int, end: int) -> float:
        return sim.events[end] - sim.events[begin]

    def cudaGetDeviceProperties(index: int) -> Any:
        major, minor = sim.capability
        return types.SimpleNamespace(name=sim.gpu_name.encode(), major=major, minor=minor, totalGlobalMem=1 << 34)

    def cudaGraphDestroy(graph: int) -> None:
        del sim.graphs[graph]

    def cudaGraphExecDestroy(executable: int) -> None:
        del sim.graphs[executable]

    def cudaFree(pointer: int) -> None:
        del sim.device_memory[pointer]

    def cudaFreeHost(pointer: int) -> None:
        del sim.pinned[pointer]

    def cudaStreamDestroy(stream: Stream) -> None:
        assert not sim.streams.pop(stream) or sim.faults, "stream destroyed with work on it"

    def cudaEventDestroy(event: int) -> None:
        del sim.events[event]

    def cudaGraphUpload(executable: int, stream: Stream) -> None:
        assert executable in sim.graphs

    def cudaSetDevice(index: int) -> None:
        assert index == 0

    def cudaDriverGetVersion() -> int:
        return 13000

    def cudaMemGetInfo() -> tuple[int, int]:
        return (1 << 34) - sum(map(len, sim.device_memory.values())), 1 << 34

    for function in list(locals().values()):
        if isinstance(function, types.FunctionType) and function.__name__.startswith("cuda"):
            offer(function)
    module.cudaGetDeviceCount = lambda: (sim.device_status, 0 if sim.device_status else 1)  # type: ignore[attr-defined]
    module.cudaGetErrorString = lambda status: (0, f"simulated fault {int(status)}".encode())  # type: ignore[attr-defined]
    module.cudaStreamNonBlocking = 1  # type: ignore[attr-defined]
    kinds = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    module.cudaMemcpyKind = kinds  # type: ignore[attr-defined]
    module.cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread-local")  # type: ignore[attr-defined]
    return module


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    BOOL = 4
    BF16 = 7


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class Severity(enum.Enum):
    ERROR = 1
    WARNING = 2


class ILogger:
    pass


class IProfiler:
    pass


def expected_outputs(inputs: dict[str, np.ndarray], outputs: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """What the simulated network computes: one number per video, spread over the points and classes."""
    visual, audio, mask = (inputs[name] for name in ("visual", "audio", "mask"))
    number = visual.mean((1, 2)) + 2 * audio.mean((1, 2)) + mask.mean((1, 2))
    found = {}
    for index, (name, shape) in enumerate(outputs.items()):
        ramp = np.arange(np.prod(shape[1:]), dtype=np.float32).reshape(shape[1:]) * 0.01
        found[name] = (number.reshape(-1, *[1] * (len(shape) - 1)) + ramp + index).astype(np.float32)
    return found


def plan_bytes(inputs: dict[str, Any], outputs: dict[str, Any], magic: bytes = b"ftrt") -> bytes:
    """A simulated engine file. `inputs` and `outputs` map names to (shape with -1, type name)."""
    return magic + json.dumps({"inputs": inputs, "outputs": outputs}).encode()


class Context:
    def __init__(self, sim: Simulation, plan: dict[str, Any], log: ILogger) -> None:
        self._sim, self._plan, self._log = sim, plan, log
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._ran = False
        self._scratch = 0
        self.profiler: Any = None
        self.enqueue_emits_profile = True
        sim.contexts += 1

    def __del__(self) -> None:
        self._sim.contexts -= 1

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert pointer in self._sim.device_memory
        self._scratch = pointer

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return not self._sim.refuse_inputs

    def infer_shapes(self) -> list[str]:
        return [name for name in self._plan["inputs"] if name not in self._shapes]

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self._addresses[name] = pointer
        return pointer in self._sim.device_memory and pointer % 256 == 0

    def report_to_profiler(self) -> bool:
        self.profiler.report_layer_time("slow", 2.0)
        self.profiler.report_layer_time("quick", 0.5)
        return True

    def execute_async_v3(self, stream: int) -> bool:
        sim, recording = self._sim, stream in self._sim.recording
        assert self._scratch in sim.device_memory
        if sim.refuse_runs or (recording and not self._ran):
            self._log.log(Severity.ERROR, "simulated refusal")  # type: ignore[attr-defined]
            return False
        self._ran = True
        sim.plain_runs += not recording
        if not (recording and sim.record_nothing):
            sim.put(stream, self._compute)
        return True

    def _compute(self) -> None:
        batch = self._shapes["visual"][0]
        inputs = {}
        for name, (_, kind) in self._plan["inputs"].items():
            dtype, shape = np.dtype(np.bool_ if kind == "BOOL" else np.float32), self._shapes[name]
            memory = self._sim.bytes_at(self._addresses[name], int(np.prod(shape)) * dtype.itemsize)
            inputs[name] = memory.view(dtype).reshape(shape)
        shapes = {name: (batch, *shape[1:]) for name, (shape, _) in self._plan["outputs"].items()}
        for name, values in expected_outputs(inputs, shapes).items():
            self._sim.bytes_at(self._addresses[name], values.nbytes)[:] = values.reshape(-1).view(np.uint8)


class Engine:
    def __init__(self, sim: Simulation, plan: dict[str, Any], log: ILogger) -> None:
        self._sim, self._plan, self._log = sim, plan, log
        self._all = plan["inputs"] | plan["outputs"]
        self.num_io_tensors = len(self._all)
        self.device_memory_size_v2 = 4096
        sim.engines += 1

    def __del__(self) -> None:
        self._sim.engines -= 1

    def get_tensor_name(self, index: int) -> str:
        return list(self._all)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._plan["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._all[name][0])

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._all[name][1]]

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "user"
        return Context(self._sim, self._plan, self._log)


def tensorrt_module(sim: Simulation) -> types.ModuleType:
    module: Any = types.ModuleType("tensorrt")
    module.__version__ = sim.version
    module.ILogger, module.IProfiler, module.TensorIOMode = ILogger, IProfiler, TensorIOMode
    module.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user")

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            assert sim.device_status == 0, "a Runtime without a driver ends the process"
            self._logger = logger

        def deserialize_cuda_engine(self, blob: Any) -> Engine | None:
            content = bytes(memoryview(blob))
            try:
                return Engine(sim, json.loads(content[4:]), self._logger)
            except ValueError:
                self._logger.log(Severity.ERROR, "plan.header.size == blobSize failed")  # type: ignore[attr-defined]
                return None

    module.Runtime = Runtime
    return module  # type: ignore[no-any-return]


def install(monkeypatch: pytest.MonkeyPatch, sim: Simulation) -> None:
    """Put the stand-ins where `import tensorrt` and `from cuda.bindings import runtime` find them."""
    from runtime.backends.tensorrt import cuda

    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = cuda_module(sim)  # type: ignore[attr-defined]
    package = types.ModuleType("cuda")
    package.bindings = bindings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", bindings.runtime)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_module(sim))
    monkeypatch.setattr(cuda, "bindings", lambda: bindings.runtime)


ENGINE_SPEC = ModelSpec(length=16, levels=3, visual_dim=6, audio_dim=4, labels=("a", "b", "c"))
ENGINE_FILE = ModelFile(
    name="tensorrt-fp16", format="tensorrt", files=("e.engine",), precision="fp16", max_batch=4,
    library="tensorrt", library_version="10.9.0", gpu_name="Simulated GPU", compute_capabilities=("9.0",),
    profile=(1, 2, 4), onnx_sha256="0" * 64,
)  # fmt: skip
"""Of an engine that `write_engine` writes."""


def write_engine(path: Path, spec: ModelSpec = ENGINE_SPEC, magic: bytes = b"ftrt") -> Path:
    types = {"visual": "FLOAT", "audio": "FLOAT", "mask": "BOOL"}
    inputs = {n: ([-1, *s[1:]], types[n]) for n, s in spec.input_shapes(1).items()}
    outputs = {n: ([-1, *s[1:]], "FLOAT") for n, s in spec.output_shapes(1).items()}
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(plan_bytes(inputs, outputs, magic))
    return path
