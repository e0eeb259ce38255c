"""One lane through the GPU: a stream, buffers allocated once, and a recorded CUDA graph per batch size.

A request is: fill the pinned inputs, launch one graph (copy in, infer, copy out), wait for the stream. Two lanes of one
engine let the copies of one batch overlap the inference of its neighbour.
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

MAX_RECORDED = 8
"""Batch sizes kept ready per lane; a graph and its context hold memory, so the longest unused one goes."""

POISON = 0x7F
"""Fills outputs before a replay is judged: as float32 the bytes read 3.4e38, which no engine computes."""

REPLAY_TOLERANCE = 0.01
"""Of the largest output. Kernels that sum in any order differ in the last bits; stale or missing output does not."""


class Lane:
    """Buffers and contexts of one stream. Used by one thread at a time."""

    def __init__(self, engine: LoadedEngine, max_batch: int, *, cuda_graph: bool) -> None:
        self.engine = engine
        self._cuda_graph = cuda_graph
        self._recorded: OrderedDict[int, Recorded] = OrderedDict()
        self.graphs: dict[int, str] = {}
        """What became of the graph of each batch size: `replayed`, `off`, or why not."""
        with contextlib.ExitStack() as stack:
            self.stream = _closing(stack, cuda.Stream())
            self.scratch = _closing(stack, cuda.DeviceBuffer(engine.scratch_bytes))
            self.inputs = {n: _closing(stack, b.pinned(max_batch)) for n, b in engine.inputs.items()}
            self.outputs = {n: _closing(stack, b.pinned(max_batch)) for n, b in engine.outputs.items()}
            hosts = self.inputs | self.outputs
            self.device = {n: _closing(stack, cuda.DeviceBuffer(h.array.nbytes)) for n, h in hosts.items()}
            self._resources = stack.pop_all()

    def launch(self, arrays: Mapping[str, Array], batch: int) -> None:
        """Put one batch on the stream. Rows of `arrays` beyond theirs, up to `batch`, are zeros."""
        for name, array in arrays.items():
            host = self.inputs[name].array
            np.copyto(host[: len(array)], array, casting="same_kind")
            host[len(array) : batch] = 0
        recorded = self._recorded.get(batch)
        if recorded is None:
            recorded = self._record(batch)
        self._recorded.move_to_end(batch)
        recorded.launch()

    def read(self, rows: int) -> dict[str, Array]:
        """Wait for the stream; copies of the first `rows` of every output."""
        self.stream.synchronize()
        return {name: output.array[:rows].copy() for name, output in self.outputs.items()}

    def engine_milliseconds(self, batch: int, repeats: int) -> npt.NDArray[np.float64]:
        """Device time of the engine alone, without copies: one event pair around each of `repeats` runs."""
        recorded = self._recorded.get(batch) or self._record(batch)
        with contextlib.ExitStack() as stack:
            run = recorded.enqueue
            if recorded.graph is not None:
                graph = cuda.Graph(self.stream, recorded.enqueue)
                stack.callback(graph.close)
                run = graph.launch
            return np.array([self.stream.milliseconds(run) for _ in range(repeats)])

    def layer_milliseconds(self, batch: int, repeats: int) -> dict[str, float]:
        """Mean device time of each layer, slowest first, from plain runs: graphs hide layers."""
        recorded = Recorded(self, batch)
        try:
            recorded.work()
            self.stream.synchronize()
            profiler = _profiler(self.engine.trt)
            recorded.context.profiler = profiler
            recorded.context.enqueue_emits_profile = False
            for _ in range(repeats):
                recorded.enqueue()
                self.stream.synchronize()
                recorded.context.report_to_profiler()
        finally:
            recorded.close()
        return {name: total / repeats for name, total in sorted(profiler.totals.items(), key=lambda item: -item[1])}

    def _record(self, batch: int) -> Recorded:
        while len(self._recorded) >= MAX_RECORDED:
            _, oldest = self._recorded.popitem(last=False)
            oldest.close()
        recorded = Recorded(self, batch)
        try:
            recorded.launch()  # TensorRT allocates and initializes on a shape's first run, which can't be recorded
            self.stream.synchronize()
            self.graphs[batch] = self._add_graph(recorded, batch) if self._cuda_graph else "off"
        except BaseException:
            recorded.close()
            raise
        self._recorded[batch] = recorded
        return recorded

    def _add_graph(self, recorded: Recorded, batch: int) -> str:
        try:
            recorded.graph = cuda.Graph(self.stream, recorded.work)
        except EngineError as error:
            return f"not recorded: {error}"
        self._check_replay(recorded, batch)
        return "replayed"

    def _check_replay(self, recorded: Recorded, batch: int) -> None:
        """Raises EngineError unless the replayed graph writes what the plain run wrote."""
        plain = self.read(batch)
        for name, output in self.outputs.items():
            self.stream.fill(self.device[name].pointer, output.array.nbytes, POISON)
            output.array.view(np.uint8).fill(POISON)
        recorded.launch()
        for name, replayed in self.read(batch).items():
            expected = plain[name]
            allowed = REPLAY_TOLERANCE * max(1.0, float(np.nanmax(np.abs(expected), initial=0.0)))
            if not np.allclose(replayed, expected, rtol=0, atol=allowed, equal_nan=True):
                worst = float(np.nanmax(np.abs(replayed - expected)))
                raise EngineError(
                    f"{self.engine.path}: at batch {batch} the replayed CUDA graph gives other '{name}' than the plain "
                    f"run (off by {worst:.3g}, allowed {allowed:.3g}); open the backend with cuda_graph=False"
                )

    def close(self) -> None:
        """Idle stream, then graphs and contexts, then the memory they used, the stream last."""
        with contextlib.ExitStack() as stack:  # runs backwards, and to the end also when a step fails
            stack.push(self._resources.pop_all())
            for recorded in self._recorded.values():
                stack.callback(recorded.close)
            self._recorded.clear()
            stack.callback(self.stream.synchronize)


class Recorded:
    """The context of one batch size, its addresses and shapes fixed, and its graph once there is one."""

    def __init__(self, lane: Lane, batch: int) -> None:
        self._lane = lane
        self._batch = batch
        self.graph: cuda.Graph | None = None
        self.context: Any = lane.engine.context(lane.scratch)
        engine = lane.engine
        for name, binding in engine.inputs.items():
            shape = (batch, *binding.shape[1:])
            if not self.context.set_input_shape(name, shape):
                raise EngineError(f"{engine.path}: input '{name}' refuses shape {shape}; rebuild with a wider profile")
        missing = self.context.infer_shapes()
        if missing:
            raise EngineError(f"{engine.path}: the engine misses shapes of {', '.join(missing)}")
        for name, buffer in lane.device.items():
            if not self.context.set_tensor_address(name, buffer.pointer):
                raise EngineError(f"{engine.path}: tensor '{name}' refuses its address")

    def work(self) -> None:
        """Copy in, infer, copy out."""
        lane = self._lane
        for name, host in lane.inputs.items():
            lane.stream.upload(lane.device[name].pointer, host.array[: self._batch])
        self.enqueue()
        for name, host in lane.outputs.items():
            lane.stream.download(host.array[: self._batch], lane.device[name].pointer)

    def enqueue(self) -> None:
        """Infer. A refused run is reported by the return value alone; unchecked, one would read stale output."""
        engine = self._lane.engine
        with engine.log.collect() as messages:
            accepted = self.context.execute_async_v3(int(self._lane.stream))
        if not accepted:
            raise EngineError(
                f"{engine.path}: the engine refused to run a batch of {self._batch}:\n{messages.errors()}"
            )

    def launch(self) -> None:
        if self.graph is not None:
            self.graph.launch()
        else:
            self.work()

    def close(self) -> None:
        try:
            self._lane.stream.synchronize()
            if self.graph is not None:
                self.graph.close()
        finally:
            self.graph = None
            self.context = None


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
