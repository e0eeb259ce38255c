"""An execution context on the GPU: a stream, buffers, and a captured CUDA graph for each batch size.

A request fills the pinned inputs, launches one graph (copy in, infer, copy out) and waits for the stream. Contexts of
one engine that different threads use let the copies of one batch overlap the inference of another.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.tensorrt import cuda, legacy
from runtime.backends.tensorrt.engine import Array, LoadedEngine
from runtime.errors import EngineError
from runtime.spec import ModelSpec

POISON = 0x7F
"""Fills the outputs before a replay is compared: as float32 the bytes read 3.4e38, which no engine computes."""

REPLAY_TOLERANCE = 0.01
"""Of the largest output. Kernels that sum in any order differ in the last bits; stale or missing output does not."""


class ExecutionContext:
    """Stream and buffers, as large as the largest batch that was run needs. One thread at a time.

    A larger batch frees them with the graphs that use them; those are captured again when their sizes come back.
    """

    def __init__(self, engine: LoadedEngine, spec: ModelSpec, *, cuda_graph: bool) -> None:
        self.engine = engine
        self.spec = spec
        self._cuda_graph = cuda_graph
        self._batches: dict[int, BatchContext] = {}
        self.graphs: dict[int, str] = {}
        """State of the graph of each batch size: `replayed`, `off`, or why there is none."""
        self.stream = cuda.Stream()
        self._rows = 0
        self._buffers = contextlib.ExitStack()
        self.scratch: cuda.DeviceBuffer | None = None
        self.inputs: dict[str, cuda.PinnedArray] = {}
        self.outputs: dict[str, cuda.PinnedArray] = {}
        self.device: dict[str, cuda.DeviceBuffer] = {}

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory that is allocated."""
        return self.scratch.nbytes if self.scratch else 0

    def infer(self, arrays: Mapping[str, Array], batch: int) -> dict[str, Array]:
        """Run one batch and return copies of its outputs, as many rows as `arrays` have.

        Rows beyond those, up to `batch`, are zeros. Raises EngineError when the GPU or the engine fails.
        """
        if batch not in self._batches:
            with cuda.ALONE:
                self._batches[batch] = self._prepare(batch, arrays)
                self.engine.save_cache()
        rows = self._fill(arrays, batch)
        self._batches[batch].launch()
        return self._read(rows)

    def engine_milliseconds(self, batch: int, repeats: int, warmup_seconds: float) -> npt.NDArray[np.float64]:
        """Return [repeats] device times of the engine alone, without copies, run back to back after a warm-up.

        The batch size must have been run, here and below: its inputs are what is timed.
        """
        prepared = self._batches[batch]
        with contextlib.ExitStack() as stack:
            run = prepared.enqueue
            if prepared.graph is not None:
                with cuda.ALONE:
                    graph = cuda.Graph(self.stream, prepared.enqueue)
                stack.callback(graph.close)
                run = graph.launch
            end = time.perf_counter() + warmup_seconds  # an idle GPU lowers its clocks
            while time.perf_counter() < end:
                run()
                self.stream.synchronize()
            return self.stream.milliseconds(run, repeats)

    def layer_milliseconds(self, batch: int, repeats: int) -> dict[str, float]:
        """Return the mean device time of each layer, slowest first, without CUDA graphs: they hide layers."""
        with cuda.ALONE:
            prepared = self._new_batch_context(batch)
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
        with cuda.ALONE, contextlib.ExitStack() as stack:  # runs backwards, and to the end also when a step fails
            stack.callback(self.stream.close)
            stack.callback(self._free)
            stack.callback(self.stream.synchronize)

    def _free(self) -> None:
        """Free graphs and TensorRT's contexts, then the buffers that they use."""
        with contextlib.ExitStack() as stack:
            stack.push(self._buffers.pop_all())
            for prepared in self._batches.values():
                stack.callback(prepared.close)
            self._batches.clear()
            self._rows, self.scratch = 0, None
            self.inputs, self.outputs, self.device = {}, {}, {}

    def _read(self, rows: int) -> dict[str, Array]:
        """Wait for the stream and copy the first `rows` of every output."""
        self.stream.synchronize()
        return {name: output.array[:rows].copy() for name, output in self.outputs.items()}

    def _fill(self, arrays: Mapping[str, Array], batch: int) -> int:
        """Write the inputs, zeros in the rows that `arrays` lack, and return how many they have."""
        rows = 0
        for name, array in arrays.items():
            host, rows = self.inputs[name].array, len(array)
            np.copyto(host[:rows], array, casting="same_kind")
            host[rows:batch] = 0
        return rows

    def _new_batch_context(self, batch: int) -> BatchContext:
        """Create TensorRT's context for a batch size, with buffers that are large enough."""
        prepared = BatchContext(self, batch)
        rows, scratch = max(batch, self._rows), max(prepared.scratch_bytes(), self.scratch_bytes)
        if rows > self._rows or scratch > self.scratch_bytes:
            self.stream.synchronize()
            self._free()
            self._allocate(rows, scratch)
        prepared.bind()
        return prepared

    def _allocate(self, rows: int, scratch_bytes: int) -> None:
        """Allocate scratch memory, and every input and output on the host and on the device."""
        engine, spec = self.engine, self.spec
        types = {name: binding.dtype for name, binding in (engine.inputs | engine.outputs).items()}
        with contextlib.ExitStack() as stack:
            scratch = _closing(stack, cuda.DeviceBuffer(scratch_bytes))
            inputs, outputs = (
                {name: _closing(stack, cuda.PinnedArray(shape, types[name])) for name, shape in shapes.items()}
                for shapes in (spec.input_shapes(rows), spec.output_shapes(rows))
            )
            hosts = inputs | outputs
            self.device = {name: _closing(stack, cuda.DeviceBuffer(h.array.nbytes)) for name, h in hosts.items()}
            self.scratch, self.inputs, self.outputs = scratch, inputs, outputs
            self._buffers, self._rows = stack.pop_all(), rows

    def _prepare(self, batch: int, arrays: Mapping[str, Array]) -> BatchContext:
        prepared = self._new_batch_context(batch)
        try:
            self._fill(arrays, batch)
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
        """Set the shapes; `bind` must follow."""
        self._context = context
        self._batch = batch
        self.graph: cuda.Graph | None = None
        engine = context.engine
        self.trt_context: Any = engine.create_execution_context()
        for name, shape in context.spec.input_shapes(batch).items():
            if not self.trt_context.set_input_shape(name, shape):
                raise EngineError(f"{engine.path}: input '{name}' refuses shape {shape}; rebuild with a wider profile")
        missing = self.trt_context.infer_shapes()
        if missing:
            raise EngineError(f"{engine.path}: the engine misses shapes of {', '.join(missing)}")
        for name, shape in context.spec.output_shapes(batch).items():
            if (found := tuple(self.trt_context.get_tensor_shape(name))) != shape:
                raise EngineError(f"{engine.path}: at batch {batch} output '{name}' is {found}, expected {shape}")

    def scratch_bytes(self) -> int:
        """Return the scratch memory that this batch size needs."""
        return legacy.scratch_bytes_of_shapes(self.trt_context, self._context.engine.scratch_bytes)

    def bind(self) -> None:
        """Use the buffers of the execution context."""
        context, engine = self._context, self._context.engine
        if context.scratch_bytes and context.scratch is not None:
            legacy.set_scratch(self.trt_context, context.scratch.pointer, context.scratch.nbytes)
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
