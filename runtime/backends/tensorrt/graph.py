"""TensorRT engines of any float tensors as `GraphRunner`s: what the networks of an extractor run through.

Inputs of any shape within the engine's profile: each batch size and size of picture gets an execution context, with
memory and a CUDA graph of its own.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.base import Float32
from runtime.backends.graphs import GraphRunner, check_names
from runtime.backends.tensorrt import cuda, legacy
from runtime.backends.tensorrt.context import POISON, REPLAY_TOLERANCE
from runtime.backends.tensorrt.engine import LoadedEngine
from runtime.blocks import BlockLayout
from runtime.bundle import ModelFile
from runtime.errors import EngineError
from runtime.files import user_cache_folder
from runtime.spec import GraphTensors

Shapes = dict[str, tuple[int, ...]]

MOST_SHAPES = 8
"""Sets of input shapes that stay prepared; a further one takes the place of the one that was not used for longest."""


def open_graph(path: Path, model_file: ModelFile, tensors: GraphTensors, *, device: int = 0) -> GraphRunner:
    """Load an engine; contexts are made when their shapes come.

    Raises as `TensorRTBackend.open`: what `engine.check_engine` raises, BundleError, EngineError.
    """
    engine = LoadedEngine(path, model_file, device, user_cache_folder())
    try:
        check_names(path, list(engine.inputs), list(engine.outputs), tensors)
        graph = EngineGraph(engine, model_file)
    except BaseException:
        engine.release()
        raise
    facts = {
        "library": engine.trt.__name__,
        "version": str(engine.trt.__version__),
        "device": engine.device.name,
        "compute_capability": engine.device.compute_capability,
        "driver_cuda": engine.device.driver,
        "cuda_graphs": graph.states,
    }
    return GraphRunner(model_file.format, model_file.precision, tensors, graph.run, facts, graph.close)


class EngineGraph:
    """A loaded engine and its contexts. One `run` at a time."""

    def __init__(self, engine: LoadedEngine, model_file: ModelFile) -> None:
        """Take over one use of `engine`."""
        self._engine = engine
        self._max_batch = model_file.max_batch
        self._range = {"batch": model_file.profile, **model_file.options.get("extents", {})}
        self._thread: int | None = None
        self._stream: cuda.Stream | None = None
        self._contexts: dict[tuple[tuple[int, ...], ...], ShapeContext] = {}
        self.states: dict[str, str] = {}
        """Of the CUDA graph of each set of shapes: `replayed`, or why there is none."""

    def run(self, arrays: Mapping[str, Float32]) -> dict[str, Float32]:
        """Run rows of any number, in batches of the largest at most. Raises EngineError."""
        rows, most = len(next(iter(arrays.values()))), self._max_batch
        if rows > most:
            starts = range(0, rows, most)
            parts = [self.run({n: array[s : s + most] for n, array in arrays.items()}) for s in starts]
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if self._thread != threading.get_ident():
            cuda.call("cudaSetDevice", self._engine.device.index)  # CUDA keeps that choice per thread
            self._thread = threading.get_ident()
        self._stream = self._stream or cuda.Stream()
        batch = min(1 << (rows - 1).bit_length(), most)  # sizes in between share a context
        shapes = {name: (batch, *array.shape[1:]) for name, array in arrays.items()}
        key = tuple(shapes.values())
        if key in self._contexts:
            context = self._contexts[key] = self._contexts.pop(key)  # the newest is the last
            return context.infer(arrays)
        if len(self._contexts) >= MOST_SHAPES:
            self._contexts.pop(next(iter(self._contexts))).close()
        with cuda.ALONE:
            context = ShapeContext(self._engine, self._stream, shapes, self._range)
            try:
                outputs = context.first(arrays)
            except BaseException:
                context.close()
                raise
            self._engine.save_cache()
        self._contexts[key] = context
        self.states[" ".join("x".join(map(str, shape)) for shape in dict.fromkeys(key))] = context.state
        return outputs

    def close(self) -> None:
        """Free everything."""
        with cuda.ALONE, contextlib.ExitStack() as stack:  # runs backwards, and to the end also when a step fails
            stack.callback(self._engine.release)
            if self._stream is not None:
                stack.callback(self._stream.close)
            for context in self._contexts.values():
                stack.callback(context.close)
            self._contexts, self._stream = {}, None


class ShapeContext:
    """An execution context for one set of input shapes, its memory, and its CUDA graph once captured."""

    def __init__(self, engine: LoadedEngine, stream: cuda.Stream, shapes: Shapes, allowed: Mapping[str, Any]) -> None:
        self._engine, self._stream = engine, stream
        self.state = ""
        self._graph: cuda.Graph | None = None
        self._memory = contextlib.ExitStack()
        self._context: Any = engine.create_execution_context()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise EngineError(
                    f"{engine.path}: input '{name}' refuses the shape {list(shape)}; the engine was built for "
                    f"{', '.join(f'{n} {r[0]} to {r[2]}' for n, r in allowed.items() if r)} (pictures: eighths of "
                    "their sides); choose another engine for this video, for example --backend onnxruntime-cuda"
                )
        if missing := self._context.infer_shapes():
            raise EngineError(f"{engine.path}: the engine misses shapes of {', '.join(missing)}")
        outputs = {name: tuple(self._context.get_tensor_shape(name)) for name in engine.outputs}
        types = {name: binding.dtype for name, binding in (engine.inputs | engine.outputs).items()}
        self._in, self._out = BlockLayout.of(shapes, types), BlockLayout.of(outputs, types)
        with contextlib.ExitStack() as stack:
            sizes = (self._in.nbytes, self._out.nbytes, self._scratch_bytes())
            self._buffers = [self._closing(stack, cuda.DeviceBuffer(nbytes)) for nbytes in sizes]
            self._host = [self._closing(stack, cuda.PinnedArray((nbytes,), np.uint8)) for nbytes in sizes[:2]]
            self._memory = stack.pop_all()
        layouts = zip((self._in, self._out), self._host, strict=True)
        self._arrays = [layout.arrays(host.array) for layout, host in layouts]

    def first(self, arrays: Mapping[str, Float32]) -> dict[str, Float32]:
        """Run without a CUDA graph, capture one, and check that it gives the same. Comes before `infer`."""
        self._bind()
        self._stream.fill(self._buffers[0].pointer, self._in.nbytes, 0)
        expected = self.infer(arrays)  # a shape's first run allocates and initializes: it can't be captured
        try:
            self._graph = cuda.Graph(self._stream, self._enqueue)
        except EngineError as error:
            self.state = f"not captured: {error}"
            warnings.warn(f"{self._engine.path}: runs without a CUDA graph, slower: {error}", stacklevel=4)
            return expected
        self._stream.fill(self._buffers[1].pointer, self._out.nbytes, POISON)
        for name, replayed in self.infer(arrays).items():
            allowed = REPLAY_TOLERANCE * max(1.0, float(np.nanmax(np.abs(expected[name]), initial=0.0)))
            if not np.allclose(replayed, expected[name], rtol=0, atol=allowed, equal_nan=True):
                raise EngineError(
                    f"{self._engine.path}: the replayed CUDA graph gives another '{name}' than the run without it"
                )
        self.state = "replayed"
        return expected

    def infer(self, arrays: Mapping[str, Float32]) -> dict[str, Float32]:
        """Copy the rows in, run, and return copies of as many rows of the outputs."""
        rows = len(next(iter(arrays.values())))
        for name, array in arrays.items():
            np.copyto(self._arrays[0][name][:rows], array, casting="same_kind")
        try:
            self._stream.upload(self._buffers[0].pointer, self._host[0].pointer, self._in.nbytes)
            if self._graph is not None:
                self._graph.launch()
            else:
                self._enqueue()
            self._stream.download(self._host[1].pointer, self._buffers[1].pointer, self._out.nbytes)
        finally:
            self._stream.synchronize()
        return {name: array[:rows].copy() for name, array in self._arrays[1].items()}

    def close(self) -> None:
        """Wait for the stream, then free graph, context and memory."""
        with contextlib.ExitStack() as stack:
            stack.push(self._memory.pop_all())
            stack.callback(setattr, self, "_context", None)
            if self._graph is not None:
                stack.callback(self._graph.close)
            self._arrays, self._graph = [], None
            self._stream.synchronize()

    def _scratch_bytes(self) -> int:
        return legacy.scratch_bytes_of_shapes(self._context, self._engine.scratch_bytes)

    def _bind(self) -> None:
        scratch = self._buffers[2]
        if scratch.nbytes:
            legacy.set_scratch(self._context, scratch.pointer, scratch.nbytes)
        for layout, buffer in zip((self._in, self._out), self._buffers, strict=False):
            for name, offset in layout.offsets.items():
                if not self._context.set_tensor_address(name, buffer.pointer + offset):
                    raise EngineError(f"{self._engine.path}: tensor '{name}' refuses its address")

    def _enqueue(self) -> None:
        """Put the inference on the stream; a refused run is told by the return value alone."""
        with self._engine.log.collect() as messages:
            accepted = self._context.execute_async_v3(int(self._stream))
        if not accepted:
            raise EngineError(f"{self._engine.path}: the engine refused to run:\n{messages.errors()}")

    @staticmethod
    def _closing(stack: contextlib.ExitStack, resource: Any) -> Any:
        stack.callback(resource.close)
        return resource
