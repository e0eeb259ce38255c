"""An execution context on the GPU: a stream, buffers, and a captured CUDA graph for each batch size.

A request copies its rows in, launches the engine's graph, copies the outputs back and waits for the stream, the only
wait there is. Contexts of one engine that different threads use let the copies of one batch overlap the inference of
another.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from runtime.backends.tensorrt import cuda, legacy
from runtime.backends.tensorrt.copies import Arrays, Inputs, Outputs, Source
from runtime.backends.tensorrt.engine import Array, LoadedEngine
from runtime.backends.tensorrt.pinned import Block
from runtime.errors import EngineError
from runtime.spec import ModelSpec

Copies = Literal["stream", "graph", "steps"]
"""How a batch gets to the GPU and its outputs back: by copies of whole rows before and after the graph (`stream`);
within a graph of its own for each place that full batches come from (`graph`); or before the graph, the valid steps of
each row alone (`steps`). Which one is fastest depends on the machine: `benchmarks.gpu.report` measures all three."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How an engine is run; what is not about the engine itself."""

    cuda_graph: bool = True
    """Capture each batch size and replay it."""
    copies: Copies = "stream"
    high_priority: bool = False
    """Let what this engine has waiting on the GPU go before the work of other engines of the process."""


POISON = 0x7F
"""Fills the outputs before a replay is compared: as float32 the bytes read 3.4e38, which no engine computes."""

REPLAY_TOLERANCE = 0.01
"""Of the largest output. Kernels that sum in any order differ in the last bits; stale or missing output does not."""

MOST_PLACES = 16
"""Places on the host for which a batch size keeps a graph with copies; batches from further ones are copied outside."""


class ExecutionContext:
    """Stream and buffers, as large as the largest batch that was run needs. One thread at a time.

    A larger batch frees them with the graphs that use them; those are captured again when their sizes come back.
    """

    def __init__(self, engine: LoadedEngine, spec: ModelSpec, running: RunOptions) -> None:
        self.engine = engine
        self.spec = spec
        self._cuda_graph = running.cuda_graph
        self._copies = running.copies
        self._batches: dict[int, BatchContext] = {}
        self.graphs: dict[int, str] = {}
        """State of the graph of each batch size: `replayed`, `off`, or why there is none."""
        self.stream = cuda.Stream(high_priority=running.high_priority)
        self._rows = 0
        self._buffers = contextlib.ExitStack()
        self.scratch: cuda.DeviceBuffer | None = None
        self.inputs: Inputs | None = None
        self.outputs: Outputs | None = None

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory that is allocated."""
        return self.scratch.nbytes if self.scratch else 0

    def infer(self, arrays: Arrays, batch: int) -> dict[str, Array]:
        """Run one batch and return copies of its outputs, as many rows as `arrays` have.

        The engine runs `batch` rows; see `Inputs` for those beyond. Raises EngineError when the GPU or the engine
        fails. Whatever happens, nothing reads `arrays` any more when this returns.
        """
        try:
            if batch not in self._batches:
                with cuda.ALONE:
                    self._batches[batch] = self._prepare(batch, arrays)
                    self.engine.save_cache()
            inputs, outputs = self._io()
            source = inputs.source(arrays)
            prepared = self._batches[batch]
            if self._copies == "graph" and self._cuda_graph and source.rows == batch:
                self._launch_with_copies(prepared, source)
            else:
                self._launch(prepared, source)
            self.stream.synchronize()
            return outputs.copies(source.rows)
        except BaseException:
            with contextlib.suppress(EngineError):
                self.stream.synchronize()
            raise

    def engine_milliseconds(self, batch: int, repeats: int, warmup_seconds: float) -> npt.NDArray[np.float64]:
        """Return [repeats] device times of the engine alone, without copies, run back to back after a warm-up.

        The batch size must have been run, here and below: its inputs are what is timed.
        """
        prepared = self._batches[batch]
        end = time.perf_counter() + warmup_seconds  # an idle GPU lowers its clocks
        while time.perf_counter() < end:
            prepared.launch()
            self.stream.synchronize()
        return self.stream.milliseconds(prepared.launch, repeats)

    def layer_milliseconds(self, batch: int, repeats: int) -> dict[str, float]:
        """Return the mean device time of each layer, slowest first, without CUDA graphs: they hide layers."""
        with cuda.ALONE:
            prepared = self._new_batch_context(batch)
        try:
            prepared.enqueue()
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
            self._rows, self.scratch, self.inputs, self.outputs = 0, None, None, None

    def _io(self) -> tuple[Inputs, Outputs]:
        if self.inputs is None or self.outputs is None:
            raise EngineError(f"{self.engine.path}: the execution context has no buffers")
        return self.inputs, self.outputs

    def _launch(self, prepared: BatchContext, source: Source) -> None:
        """Put a request on the stream, its copies around the engine."""
        inputs, outputs = self._io()
        if self._copies == "steps":
            inputs.upload_steps(source)
        else:
            inputs.upload(source)
        prepared.launch()
        outputs.download(source.rows)

    def _launch_with_copies(self, prepared: BatchContext, source: Source) -> None:
        """Put a full batch on the stream as one graph, captured when a place on the host is first seen."""
        inputs, outputs = self._io()

        def work() -> None:
            inputs.upload(source)
            prepared.enqueue()
            outputs.download(source.rows)

        place = (source.block, *source.pointers.values())
        if place not in prepared.places and prepared.has_room():
            with cuda.ALONE, contextlib.ExitStack() as stack:
                self._launch(prepared, source)
                self.stream.synchronize()
                expected = outputs.copies(source.rows)
                try:
                    graph = cuda.Graph(self.stream, work)
                except EngineError as error:
                    prepared.places_wanted = False
                    what = f"{self.engine.path}: batch {source.rows} is copied outside its CUDA graph"
                    warnings.warn(f"{what}, slower: {error}", stacklevel=5)
                else:
                    stack.callback(graph.close)
                    self._check_replay(graph.launch, expected)
                    stack.pop_all()
                    prepared.places[place] = graph
        if place in prepared.places:
            prepared.places[place].launch()
        else:
            self._launch(prepared, source)

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
        """Allocate scratch memory, and one block for each direction on the host and on the device."""
        types = {name: binding.dtype for name, binding in (self.engine.inputs | self.engine.outputs).items()}
        with contextlib.ExitStack() as stack:
            scratch = _closing(stack, cuda.DeviceBuffer(scratch_bytes))
            inputs = _closing(stack, Inputs(self.spec, types, rows, self.stream))
            stack.callback(self.stream.synchronize)
            inputs.clear()
            outputs = _closing(stack, Outputs(self.spec, types, rows, self.stream))
            self.scratch, self.inputs, self.outputs = scratch, inputs, outputs
            self._buffers, self._rows = stack.pop_all(), rows

    def _prepare(self, batch: int, arrays: Arrays) -> BatchContext:
        prepared = self._new_batch_context(batch)
        try:
            source = self._io()[0].source(arrays)
            self._launch(prepared, source)  # a shape's first run allocates and initializes: it can't be captured
            self.stream.synchronize()
            self.graphs[batch] = self._capture(prepared, source) if self._cuda_graph else "off"
        except BaseException:
            prepared.close()
            raise
        return prepared

    def _capture(self, prepared: BatchContext, source: Source) -> str:
        expected = self._io()[1].copies(source.rows)
        try:
            prepared.graph = cuda.Graph(self.stream, prepared.enqueue)
        except EngineError as error:
            return f"not captured: {error}"
        self._check_replay(lambda: self._launch(prepared, source), expected)
        return "replayed"

    def _check_replay(self, launch: Callable[[], None], expected: Mapping[str, Array]) -> None:
        """Raise EngineError unless the replayed graph writes what the run without it wrote."""
        outputs = self._io()[1]
        outputs.poison(POISON)
        launch()
        self.stream.synchronize()
        rows = len(next(iter(expected.values())))
        for name, replayed in outputs.copies(rows).items():
            allowed = REPLAY_TOLERANCE * max(1.0, float(np.nanmax(np.abs(expected[name]), initial=0.0)))
            if not np.allclose(replayed, expected[name], rtol=0, atol=allowed, equal_nan=True):
                worst = float(np.nanmax(np.abs(replayed - expected[name])))
                raise EngineError(
                    f"{self.engine.path}: with {rows} videos the replayed CUDA graph gives another '{name}' than the "
                    f"run without it (off by {worst:.3g}, allowed {allowed:.3g}); open the backend with "
                    "cuda_graph=False"
                )


class BatchContext:
    """TensorRT's execution context for one batch size, shapes and addresses set, and its CUDA graph once captured."""

    def __init__(self, context: ExecutionContext, batch: int) -> None:
        """Set the shapes; `bind` must follow."""
        self._context = context
        self._batch = batch
        self.graph: cuda.Graph | None = None
        """Of the engine alone."""
        self.places: dict[tuple[Block | int | None, ...], cuda.Graph] = {}
        """Graphs of the engine with the copies around it, by where these copy from."""
        self.places_wanted = True
        """False once such a graph could not be captured."""
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
        for io in (context.inputs, context.outputs):
            for name, pointer in (io.addresses if io else {}).items():
                if not self.trt_context.set_tensor_address(name, pointer):
                    raise EngineError(f"{engine.path}: tensor '{name}' refuses its address")

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
        """Put the inference on the stream, as a graph where there is one."""
        if self.graph is not None:
            self.graph.launch()
        else:
            self.enqueue()

    def has_room(self) -> bool:
        """Return whether one more place is to get a graph; those whose memory is gone make room."""
        if len(self.places) >= MOST_PLACES:
            for place in [p for p in self.places if isinstance(p[0], Block) and not p[0].registered]:
                self.places.pop(place).close()
        return self.places_wanted and len(self.places) < MOST_PLACES

    def close(self) -> None:
        """Wait for the stream, then free the graphs and TensorRT's context."""
        with contextlib.ExitStack() as stack:  # runs backwards, and to the end also when a step fails
            stack.callback(setattr, self, "trt_context", None)
            for graph in (self.graph, *self.places.values()):
                if graph is not None:
                    stack.callback(graph.close)
            self.graph, self.places = None, {}
            self._context.stream.synchronize()


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
