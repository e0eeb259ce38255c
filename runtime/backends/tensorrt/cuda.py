"""The few CUDA runtime calls the engines need, every return value checked: memory, streams, events, graphs.

Thin over `cuda.bindings.runtime` (the same in cuda-bindings 12.9 and 13); no torch, no cupy. Nothing here is freed by
a finalizer: whoever allocates closes, in order, because CUDA may be gone by the time Python exits.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import BackendUnavailable, EngineError
from runtime.packages import missing

NO_DEVICE, INSUFFICIENT_DRIVER = 100, 35

ALONE = threading.RLock()
"""Held while an engine is loaded or freed, and from the first run of a batch size until its graph is captured.

Loading, allocating and freeing may synchronize the whole device, which is not allowed while any stream is captured,
whichever thread does it. Launches of what is ready need no lock.
"""


@functools.lru_cache(maxsize=1)
def bindings() -> Any:
    """Return `cuda.bindings.runtime`. Raises MissingDependency when cuda-python is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise missing("cuda-python", "A TensorRT engine") from error
    return runtime


def call(name: str, *arguments: Any) -> Any:
    """Call `cuda.bindings.runtime.<name>` and return its one result, a tuple of several, or None.

    Raises EngineError naming the call and CUDA's own text when the status is not cudaSuccess.
    """
    rt = bindings()
    status, *results = getattr(rt, name)(*arguments)
    if int(status) != 0:
        raise EngineError(f"{name} failed: {_status_text(rt, status)}")
    return results[0] if len(results) == 1 else tuple(results) or None


def _status_text(rt: Any, status: Any) -> str:
    text = rt.cudaGetErrorString(status)[1]
    text = text.decode() if isinstance(text, bytes) else str(text)
    return f"{getattr(status, 'name', 'cudaError')} ({int(status)}): {text}"


@dataclass(frozen=True)
class Device:
    """One GPU and the driver in front of it."""

    index: int
    name: str
    compute_capability: str
    """For example `9.0`."""
    total_memory: int
    """Bytes."""
    driver: str
    """Newest CUDA version that the driver serves, for example `13.0`."""


def probe(index: int = 0) -> Device:
    """Return the GPU that engines run on.

    Ask this before anything of TensorRT: without a driver `trt.Runtime` of 8.6 ends the process instead of raising.
    Raises BackendUnavailable saying which is missing: the driver, a GPU, or that GPU.
    """
    rt = bindings()
    status, count = rt.cudaGetDeviceCount()
    if int(status) == INSUFFICIENT_DRIVER:
        found = _cuda_version(rt.cudaDriverGetVersion()[1])
        have = f"the NVIDIA driver serves CUDA {found} only" if found else "no NVIDIA driver is loaded"
        raise BackendUnavailable(f"no CUDA here: {have}; install or update the driver, or use the ONNX backend")
    if int(status) == NO_DEVICE or (int(status) == 0 and count == 0):
        raise BackendUnavailable("the NVIDIA driver is there but shows no GPU (CUDA_VISIBLE_DEVICES may hide it)")
    if int(status) != 0:
        raise BackendUnavailable(f"CUDA does not start: {_status_text(rt, status)}")
    if not 0 <= index < count:
        raise BackendUnavailable(f"no GPU {index}: this machine shows {count}, numbered from 0")
    properties = call("cudaGetDeviceProperties", index)
    name = properties.name
    return Device(
        index=index,
        name=(name.decode() if isinstance(name, bytes) else str(name)).strip("\0 "),
        compute_capability=f"{properties.major}.{properties.minor}",
        total_memory=int(properties.totalGlobalMem),
        driver=_cuda_version(call("cudaDriverGetVersion")),
    )


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def memory_info() -> tuple[int, int]:
    """Return free and total bytes of the current device."""
    free, total = call("cudaMemGetInfo")
    return int(free), int(total)


class DeviceBuffer:
    """Bytes on the device; `cudaMalloc` aligns to 256, as TensorRT asks."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.pointer = int(call("cudaMalloc", max(nbytes, 1)))

    def close(self) -> None:
        if self.pointer:
            pointer, self.pointer = self.pointer, 0
            call("cudaFree", pointer)


class PinnedArray:
    """A numpy array in page-locked memory, so that copies are asynchronous and can be captured in a graph.

    `array` must not be used after `close`.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        dtype = np.dtype(dtype)
        size = max(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, 1)
        self.pointer = int(call("cudaHostAlloc", size, 0))
        memory = (ctypes.c_ubyte * size).from_address(self.pointer)
        count = int(np.prod(shape, dtype=np.int64))
        self.array: npt.NDArray[Any] = np.frombuffer(memoryview(memory), dtype, count=count).reshape(shape)

    def close(self) -> None:
        if self.pointer:
            pointer, self.pointer = self.pointer, 0
            self.array = np.empty(0, self.array.dtype)
            call("cudaFreeHost", pointer)


class Stream:
    """A stream that does not wait for the default stream; TensorRT synchronizes the whole device on the default one."""

    def __init__(self, *, high_priority: bool = False) -> None:
        """Create it; waiting work of `high_priority` goes before that of other streams on the GPU."""
        flags = bindings().cudaStreamNonBlocking
        if high_priority:
            _, greatest = call("cudaDeviceGetStreamPriorityRange")
            self.handle = call("cudaStreamCreateWithPriority", flags, greatest)
        else:
            self.handle = call("cudaStreamCreateWithFlags", flags)

    def __int__(self) -> int:
        return int(self.handle)

    def upload(self, pointer: int, host: int, nbytes: int) -> None:
        """Copy page-locked memory of the host to the device, asynchronously."""
        kind = bindings().cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", pointer, host, nbytes, kind, self.handle)

    def download(self, host: int, pointer: int, nbytes: int) -> None:
        """Copy device memory to page-locked memory of the host, asynchronously."""
        kind = bindings().cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("cudaMemcpyAsync", host, pointer, nbytes, kind, self.handle)

    def fill(self, pointer: int, nbytes: int, byte: int) -> None:
        """Set device memory to one byte's value, asynchronously."""
        call("cudaMemsetAsync", pointer, byte, nbytes, self.handle)

    def fill_ones(self, pointer: int, count: int, itemsize: int) -> None:
        """Make integers one, whose bytes must be zero, asynchronously: the lowest byte of each comes first."""
        call("cudaMemset2DAsync", pointer, itemsize, 1, 1, count, self.handle)

    def synchronize(self) -> None:
        """Wait for all work on the stream."""
        call("cudaStreamSynchronize", self.handle)

    def milliseconds(self, work: Callable[[], None], repeats: int) -> npt.NDArray[np.float64]:
        """Return [repeats] device times of what `work` puts on this stream, from each event to the next.

        All is queued before the first wait, so that the host's launches are not measured with short work.
        """
        with contextlib.ExitStack() as stack:
            events = [stack.enter_context(_event()) for _ in range(repeats + 1)]
            call("cudaEventRecord", events[0], self.handle)
            for event in events[1:]:
                work()
                call("cudaEventRecord", event, self.handle)
            call("cudaEventSynchronize", events[-1])
            pairs = itertools.pairwise(events)
            return np.array([float(call("cudaEventElapsedTime", begin, end)) for begin, end in pairs])

    def close(self) -> None:
        if self.handle is not None:
            handle, self.handle = self.handle, None
            call("cudaStreamDestroy", handle)


@contextlib.contextmanager
def _event() -> Iterator[Any]:
    event = call("cudaEventCreateWithFlags", 0)
    try:
        yield event
    finally:
        call("cudaEventDestroy", event)


class Graph:
    """What `work` puts on a stream, captured once and launched as one operation.

    `work` must have run once outside a capture. It must not synchronize, allocate or touch pageable memory.
    Raises EngineError when the work can't be captured; nothing of it has run then.
    """

    def __init__(self, stream: Stream, work: Callable[[], None]) -> None:
        self._stream = stream
        self._executable: Any = None
        stream.synchronize()
        # thread-local: CUDA calls of other threads must not invalidate this capture
        mode = bindings().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", stream.handle, mode)
        try:
            work()
        except BaseException:
            # the capture must be ended, whatever it holds, or the stream stays unusable
            status, graph = bindings().cudaStreamEndCapture(stream.handle)
            if int(status) == 0:
                call("cudaGraphDestroy", graph)
            raise
        graph = call("cudaStreamEndCapture", stream.handle)
        try:
            self._executable = call("cudaGraphInstantiate", graph, 0)
        finally:
            call("cudaGraphDestroy", graph)
        call("cudaGraphUpload", self._executable, stream.handle)

    def launch(self) -> None:
        """Put the graph on the stream."""
        call("cudaGraphLaunch", self._executable, self._stream.handle)

    def close(self) -> None:
        if self._executable is not None:
            executable, self._executable = self._executable, None
            call("cudaGraphExecDestroy", executable)
