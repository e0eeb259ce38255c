"""An execution context on the GPU: a stream, buffers allocated once, and a captured CUDA graph for each batch size.

A request fills the pinned inputs, launches one graph (copy in, infer, copy out) and waits for the stream. Contexts of
one engine that different threads use let the copies of one batch overlap the inference of another.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.tensorrt import cuda
from runtime.backends.tensorrt.engine import Array, LoadedEngine
from runtime.errors import EngineError

MAX_BATCH_SIZES = 8
"""Batch sizes kept ready. Each holds memory, so the one unused for longest is freed for the next."""

POISON = 0x7F
"""Fills the outputs before a replay is compared: as float32 the bytes read 3.4e38, which no engine computes."""

REPLAY_TOLERANCE = 0.01
"""Of the largest output. Kernels that sum in any order differ in the last bits; stale or missing output does not."""


class ExecutionContext:
    """Stream and buffers for batches of 1 to `max_batch` videos. One thread at a time."""

    def __init__(self, engine: LoadedEngine, max_batch: int, *, cuda_graph: bool) -> None:
        self.engine = engine
        self._cuda_graph = cuda_graph
        self._batches: OrderedDict[int, BatchContext] = OrderedDict()
        self.graphs: dict[int, str] = {}
        """State of the graph of each batch size: `replayed`, `off`, or why there is none."""
        with contextlib.ExitStack() as stack:
            self.stream = _closing(stack, cuda.Stream())
            self.scratch = _closing(stack, cuda.DeviceBuffer(engine.scratch_bytes))
            self.inputs = {n: _closing(stack, b.pinned(max_batch)) for n, b in engine.inputs.items()}
            self.outputs = {n: _closing(stack, b.pinned(max_batch)) for n, b in engine.outputs.items()}
            hosts = self.inputs | self.outputs
            self.device = {n: _closing(stack, cuda.DeviceBuffer(h.array.nbytes)) for n, h in hosts.items()}
            self._resources = stack.pop_all()

    def infer(self, arrays: Mapping[str, Array], batch: int) -> dict[str, Array]:
        """Run one batch and return copies of its outputs, as many rows as `arrays` have.

        Rows beyond those, up to `batch`, are zeros. Raises EngineError when the GPU or the engine fails.
        """
        rows = 0
        for name, array in arrays.items():
            host, rows = self.inputs[name].array, len(array)
            np.copyto(host[:rows], array, casting="same_kind")
            host[rows:batch] = 0
        self._batch_context(batch).launch()
        return self._read(rows)

    def engine_milliseconds(self, batch: int, repeats: int) -> npt.NDArray[np.float64]:
        """Return [repeats] device times of the engine alone, without copies, each between two events."""
        prepared = self._batch_context(batch)
        with contextlib.ExitStack() as stack:
            run = prepared.enqueue
            if prepared.graph is not None:
                graph = cuda.Graph(self.stream, prepared.enqueue)
                stack.callback(graph.close)
                run = graph.launch
            return np.array([self.stream.milliseconds(run) for _ in range(repeats)])

    def layer_milliseconds(self, batch: int, repeats: int) -> dict[str, float]:
        """Return the mean device time of each layer, slowest first, without CUDA graphs: they hide layers."""
        prepared = BatchContext(self, batch)
        try:
            prepared.work()
            self.stream.synchronize()
            profiler = _profiler(self.engine.trt)
            prepared.trt_context.profiler = profiler
            prepared.trt_context.enqueue_emits_profile = False
            for _ in range(repeats):
                prepared.enqueue()
                self.stream.synchronize()
                prepared.trt_context.report_to_profiler()
        finally:
            prepared.close()
        return {name: total / repeats for name, total in sorted(profiler.totals.items(), key=lambda item: -item[1])}

    def close(self) -> None:
        """Free everything: idle stream, then graphs and TensorRT's contexts, then their memory, the stream last."""
        with contextlib.ExitStack() as stack:  # runs backwards, and to the end also when a step fails
            stack.push(self._resources.pop_all())
            for prepared in self._batches.values():
                stack.callback(prepared.close)
            self._batches.clear()
            stack.callback(self.stream.synchronize)

    def _read(self, rows: int) -> dict[str, Array]:
        """Wait for the stream and copy the first `rows` of every output."""
        self.stream.synchronize()
        return {name: output.array[:rows].copy() for name, output in self.outputs.items()}

    def _batch_context(self, batch: int) -> BatchContext:
        prepared = self._batches.get(batch)
        if prepared is None:
            prepared = self._batches[batch] = self._prepare(batch)
        self._batches.move_to_end(batch)
        return prepared

    def _prepare(self, batch: int) -> BatchContext:
        while len(self._batches) >= MAX_BATCH_SIZES:
            _, oldest = self._batches.popitem(last=False)
            oldest.close()
        prepared = BatchContext(self, batch)
        try:
            prepared.work()  # TensorRT allocates and initializes on a shape's first run, which can't be captured
            self.stream.synchronize()
            self.graphs[batch] = self._capture(prepared, batch) if self._cuda_graph else "off"
        except BaseException:
            prepared.close()
            raise
        return prepared

    def _capture(self, prepared: BatchContext, batch: int) -> str:
        try:
            prepared.graph = cuda.Graph(self.stream, prepared.work)
        except EngineError as error:
            return f"not captured: {error}"
        self._check_replay(prepared, batch)
        return "replayed"

    def _check_replay(self, prepared: BatchContext, batch: int) -> None:
        """Raise EngineError unless the replayed graph writes what the run without it wrote."""
        expected = self._read(batch)
        for name, output in self.outputs.items():
            self.stream.fill(self.device[name].pointer, output.array.nbytes, POISON)
            output.array.view(np.uint8).fill(POISON)
        prepared.launch()
        for name, replayed in self._read(batch).items():
            allowed = REPLAY_TOLERANCE * max(1.0, float(np.nanmax(np.abs(expected[name]), initial=0.0)))
            if not np.allclose(replayed, expected[name], rtol=0, atol=allowed, equal_nan=True):
                worst = float(np.nanmax(np.abs(replayed - expected[name])))
                raise EngineError(
                    f"{self.engine.path}: at batch {batch} the replayed CUDA graph gives another '{name}' than the run "
                    f"without it (off by {worst:.3g}, allowed {allowed:.3g}); open the backend with cuda_graph=False"
                )


class BatchContext:
    """TensorRT's execution context for one batch size, shapes and addresses set, and its CUDA graph once captured."""

    def __init__(self, context: ExecutionContext, batch: int) -> None:
        self._context = context
        self._batch = batch
        self.graph: cuda.Graph | None = None
        engine = context.engine
        self.trt_context: Any = engine.create_execution_context(context.scratch)
        for name, binding in engine.inputs.items():
            shape = (batch, *binding.shape[1:])
            if not self.trt_context.set_input_shape(name, shape):
                raise EngineError(f"{engine.path}: input '{name}' refuses shape {shape}; rebuild with a wider profile")
        missing = self.trt_context.infer_shapes()
        if missing:
            raise EngineError(f"{engine.path}: the engine misses shapes of {', '.join(missing)}")
        for name, buffer in context.device.items():
            if not self.trt_context.set_tensor_address(name, buffer.pointer):
                raise EngineError(f"{engine.path}: tensor '{name}' refuses its address")

    def work(self) -> None:
        """Put copies in, inference and copies out on the stream."""
        context = self._context
        for name, host in context.inputs.items():
            context.stream.upload(context.device[name].pointer, host.array[: self._batch])
        self.enqueue()
        for name, host in context.outputs.items():
            context.stream.download(host.array[: self._batch], context.device[name].pointer)

    def enqueue(self) -> None:
        """Put the inference on the stream.

        TensorRT reports a refused run by the return value alone; unchecked, one would read stale output.
        """
        engine = self._context.engine
        with engine.log.collect() as messages:
            accepted = self.trt_context.execute_async_v3(int(self._context.stream))
        if not accepted:
            raise EngineError(
                f"{engine.path}: the engine refused to run a batch of {self._batch}:\n{messages.errors()}"
            )

    def launch(self) -> None:
        """Put the whole request on the stream: the graph where there is one."""
        if self.graph is not None:
            self.graph.launch()
        else:
            self.work()

    def close(self) -> None:
        """Wait for the stream, then free the graph and TensorRT's context."""
        try:
            self._context.stream.synchronize()
            if self.graph is not None:
                self.graph.close()
        finally:
            self.graph = None
            self.trt_context = None


def _profiler(trt: Any) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.totals: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.totals[layer_name] = self.totals.get(layer_name, 0.0) + ms

    return Profiler()


def _closing(stack: contextlib.ExitStack, resource: Any) -> Any:
    stack.callback(resource.close)
    return resource
