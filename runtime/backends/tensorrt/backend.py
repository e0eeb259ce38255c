"""TensorRT and TensorRT for RTX behind the Backend protocol: numpy, the library and cuda-python, nothing else.

Shapes: see `runtime.spec.ModelSpec` (B batch, T steps, P points, C classes).
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from runtime.backends.base import BaseBackend, Float32, Int32, Outputs, check_graph
from runtime.backends.graphs import GraphRunner
from runtime.backends.tensorrt import cuda, graph
from runtime.backends.tensorrt import engine as loaded
from runtime.backends.tensorrt.context import Copies, ExecutionContext, RunOptions
from runtime.backends.tensorrt.engine import LoadedEngine
from runtime.backends.tensorrt.library import load_library
from runtime.bundle import ModelFile
from runtime.errors import BackendUnavailable, BundleError, EngineError, EngineMismatch
from runtime.files import user_cache_folder
from runtime.spec import AUDIO, LENGTHS, LOGITS, OFFSETS, VISUAL, GraphTensors, ModelSpec


def check_engine(name: str, model_file: ModelFile, precision: str) -> None:
    """Raise unless library and GPU are those the engine was built for; see `engine.check_engine`."""
    loaded.check_engine(model_file)


def open_engine(
    name: str, path: Path, model_file: ModelFile, spec: ModelSpec, precision: str, threads: int | None
) -> TensorRTBackend:
    """Load an engine of a bundle; see `TensorRTBackend.open`."""
    return TensorRTBackend.open(path, model_file, spec)


def open_graph(
    name: str, path: Path, model_file: ModelFile, tensors: GraphTensors, precision: str, threads: int | None
) -> GraphRunner:
    """Load an engine of other tensors; see `graph.open_graph`."""
    return graph.open_graph(path, model_file, tensors)


def probe(name: str) -> str:
    """Return library and GPU. Raises MissingDependency or BackendUnavailable."""
    library = load_library(cast(Any, name))
    try:
        device = cuda.probe()
    except BackendUnavailable as error:
        raise BackendUnavailable(f"{library.__name__} {library.__version__} is installed, but {error}") from error
    return f"{library.__name__} {library.__version__}, {device.name} ({device.compute_capability})"


class TensorRTBackend(BaseBackend):
    """A TensorRT engine. One thread at a time; `fork` gives each further thread a backend on the same engine."""

    def __init__(self, engine: LoadedEngine, model_file: ModelFile, spec: ModelSpec, running: RunOptions) -> None:
        """Use `open`. Takes over one use of `engine`."""
        super().__init__(model_file.format, model_file.precision, spec, model_file.max_batch)
        self._min_batch = model_file.profile[0] if model_file.profile else 1
        self._model_file = model_file
        self._engine = engine
        self._running = running
        self._context: ExecutionContext | None = None
        self._thread: int | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        model_file: ModelFile,
        spec: ModelSpec,
        *,
        device: int = 0,
        running: RunOptions | None = None,
        cache_folder: str | Path | None = None,
    ) -> TensorRTBackend:
        """Load an engine, and run it in the batch sizes up to the one it is tuned for: no request is slow as the first.

        `model_file`: the engine's entry in the manifest; it is compared with this machine before the file is read.
        `spec`: shapes of this engine. `running`: None takes what the manifest says. `cache_folder`: where RTX keeps
        compiled kernels; None: see `runtime.files.user_cache_folder`.

        Raises what `engine.check_engine` raises; BundleError for a file that is missing, cut short, of the other
        format, or whose tensors are not those of `spec`; EngineError when the library can't load or run it, which is an
        EngineMismatch on a GPU that TensorRT for RTX does not know.
        """
        path = Path(path)
        running = running or _recorded(path, model_file)
        folder = Path(cache_folder) if cache_folder else user_cache_folder()
        try:
            return cls._open(LoadedEngine(path, model_file, device, folder), model_file, spec, running)
        except EngineError as error:
            if loaded.known_gpu(model_file, device):
                raise
            raise EngineMismatch(f"the library does not know this GPU: {error}") from error

    @classmethod
    def _open(
        cls, engine: LoadedEngine, model_file: ModelFile, spec: ModelSpec, running: RunOptions
    ) -> TensorRTBackend:
        backend = cls(engine, model_file, spec, running)
        try:
            fixed = check_graph(_shapes(engine.inputs), _shapes(engine.outputs), spec, str(engine.path))
            if fixed not in (None, backend.max_batch):
                raise BundleError(
                    f"{engine.path}: its batch is fixed at {fixed}, the manifest says {backend.max_batch}"
                )
        except BaseException:
            backend.close()
            raise
        return backend._warm()

    def fork(self) -> TensorRTBackend:
        """Return a backend for another thread: its own execution context, stream and buffers on the same engine.

        It has run the batch sizes that `open` runs.
        """
        if self.closed:
            raise EngineError(f"{self.name}: the backend is closed")
        return TensorRTBackend(self._engine.retain(), self._model_file, self.spec, self._running)._warm()

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array of any content that batches are copied to the GPU from without one more copy.

        It may be used by all forks, from any thread, and is an array like others once the engine is closed. Raises
        EngineError when it is closed already.
        """
        if self.closed:
            raise EngineError(f"{self.name}: the backend is closed")
        return self._engine.pinned.allocate(shape, dtype)

    def _infer(self, visual: Float32, audio: Float32, lengths: Int32) -> Outputs:
        context = self._ready_context()
        known = len(context.graphs)
        batch = self._batch_size(len(visual))
        outputs = context.infer({VISUAL: visual, AUDIO: audio, LENGTHS: lengths}, batch)
        if self._running.cuda_graph and len(context.graphs) > known:
            self._warn_without_graph(batch, context.graphs[batch])
        logits, offsets = (outputs[name].astype(np.float32, copy=False) for name in (LOGITS, OFFSETS))
        return logits, offsets

    def engine_milliseconds(
        self, batch: int, repeats: int = 1000, *, warmup_seconds: float = 0.3
    ) -> npt.NDArray[np.float64]:
        """Return [repeats] device times of the engine alone at a batch size, back to back: no copies, no host work."""
        if not self._min_batch <= batch <= self.max_batch:
            raise EngineError(f"batch {batch}: this engine takes {self._min_batch} to {self.max_batch}")
        self._warm_up(self._batch_size(batch))
        return self._ready_context().engine_milliseconds(self._batch_size(batch), repeats, warmup_seconds)

    def layer_milliseconds(self, batch: int, repeats: int = 20) -> dict[str, float]:
        """Return the mean device time of each layer, slowest first, run without CUDA graphs, which would hide layers.

        A region that the library compiled as a whole shows as one entry.
        """
        self._warm_up(self._batch_size(batch))
        return self._ready_context().layer_milliseconds(self._batch_size(batch), repeats)

    def _facts(self) -> dict[str, Any]:
        engine = self._engine
        return {
            "library": engine.trt.__name__,
            "version": str(engine.trt.__version__),
            "device": engine.device.name,
            "compute_capability": engine.device.compute_capability,
            "driver_cuda": engine.device.driver,
            "profile": self._model_file.profile,
            "scratch_bytes": self._context.scratch_bytes if self._context else 0,
            "largest_scratch_bytes": engine.scratch_bytes,
            "pinned_bytes": engine.pinned.nbytes,
            "pinned_refusal": engine.pinned.refusal or None,
            "copies": self._running.copies,
            "high_priority": self._running.high_priority,
            "cuda_graphs": dict(self._context.graphs) if self._context else {},
        }

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:  # frees the rest also when one of them fails
            stack.callback(self._engine.release)
            if self._context is not None:
                stack.callback(self._context.close)
            self._select_device()
            self._context = None

    def _batch_size(self, rows: int) -> int:
        """Return the batch size that so many videos run in: a power of two within the profile, or its largest.

        Each size that is run costs a context, a plain run and a capture, so the sizes in between share one.
        """
        return max(self._min_batch, min(1 << (rows - 1).bit_length(), self.max_batch))

    def _sizes_up_to(self, rows: int) -> list[int]:
        """Return the batch sizes that up to so many videos run in, the largest first: it settles the buffers."""
        return sorted({self._batch_size(1 << bits) for bits in range((rows - 1).bit_length() + 1)}, reverse=True)

    def _ready_context(self) -> ExecutionContext:
        """Return the execution context, made on first use, with the GPU selected for the calling thread."""
        if self.closed:
            raise EngineError(f"{self.name}: the backend is closed")
        self._select_device()
        if self._context is None:
            self._context = ExecutionContext(self._engine, self.spec, self._running)
        return self._context

    def _select_device(self) -> None:
        """Select the engine's GPU; CUDA keeps that choice per thread."""
        if self._thread != threading.get_ident():
            cuda.call("cudaSetDevice", self._engine.device.index)
            self._thread = threading.get_ident()

    def _warm(self) -> TensorRTBackend:
        """Run the batch sizes up to the one that the engine is tuned for, and return the backend; else close it."""
        try:
            for batch in self._sizes_up_to(self._model_file.profile[1] if self._model_file.profile else 1):
                self._warm_up(batch)
        except BaseException:
            self.close()
            raise
        return self

    def _warm_up(self, batch: int) -> None:
        """Run one request with every step valid: a new batch size is captured and its replay compared."""
        draw = np.random.default_rng(0)
        shapes = self.spec.input_shapes(batch)
        visual, audio = (draw.standard_normal(shapes[name], dtype=np.float32) for name in (VISUAL, AUDIO))
        self.infer(visual, audio, np.full(shapes[LENGTHS], self.spec.length, np.int32))

    def _warn_without_graph(self, batch: int, state: str) -> None:
        if state != "replayed":
            warnings.warn(f"{self.name}: batch {batch} runs without a CUDA graph, slower: {state}", stacklevel=3)


def _recorded(path: Path, model_file: ModelFile) -> RunOptions:
    """Return how the manifest wants an engine to be run."""
    copies = model_file.options.get("copies", "stream")
    if copies not in get_args(Copies):
        raise BundleError(f"{path}: copies: got {copies!r}, expected one of {', '.join(get_args(Copies))}")
    return RunOptions(copies=copies, high_priority=model_file.options.get("high_priority") is True)


def _shapes(bindings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: binding.shape for name, binding in bindings.items()}
