"""TensorRT and TensorRT for RTX behind the Backend protocol: numpy, the library and cuda-python, nothing else.

Shapes: see `runtime.spec.ModelSpec` (B batch, T steps, P points, C classes).
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.base import Bool, Float32
from runtime.backends.checks import check_graph, check_inputs
from runtime.backends.tensorrt import cuda
from runtime.backends.tensorrt.context import Lane
from runtime.backends.tensorrt.engine import LoadedEngine, check_engine
from runtime.bundle import ModelFile
from runtime.errors import BundleError, EngineError
from runtime.spec import AUDIO, LOGITS, MASK, OFFSETS, VISUAL, ModelSpec

__all__ = ["TensorRTBackend", "Ticket", "check_engine"]

MAX_IN_FLIGHT = 2


@dataclass(eq=False)
class Ticket:
    """A batch on its way through the GPU; hand it to `collect` once."""

    lane: Lane
    rows: int
    done: bool = False


class TensorRTBackend:
    """A TensorRT engine. One thread at a time; `fork` gives each further thread a backend on the same engine."""

    def __init__(self, engine: LoadedEngine, model_file: ModelFile, spec: ModelSpec, *, cuda_graph: bool) -> None:
        """Use `open`. Takes over one use of `engine`."""
        self.name: str = model_file.format
        self.precision = model_file.precision
        self.spec = spec
        self.max_batch = model_file.max_batch
        self._min_batch = model_file.profile[0] if model_file.profile else 1
        self._model_file = model_file
        self._engine = engine
        self._cuda_graph = cuda_graph
        self._lanes: list[Lane] = []
        self._free: list[Lane] = []
        self._closed = False
        self._thread: int | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        model_file: ModelFile,
        spec: ModelSpec,
        *,
        device: int = 0,
        cuda_graph: bool = True,
        cache_folder: str | Path | None = None,
    ) -> TensorRTBackend:
        """Load an engine and run it once, so that the first request is as quick as the others.

        `model_file`: the engine's entry in the manifest; it is compared with this machine before the file is read.
        `spec`: shapes of this engine. `cuda_graph`: record each batch size and replay it. `cache_folder`: where RTX
        keeps compiled kernels; None puts them in a folder beside the bundle.

        Raises what `check_engine` raises; BundleError for a file that is missing, cut short, of the other format, or
        whose tensors are not those of `spec`; EngineError when the library can't load or run it.
        """
        path = Path(path)
        folder = Path(cache_folder) if cache_folder else path.parent.with_name(path.parent.name + ".cache")
        engine = LoadedEngine(path, model_file, device, folder)
        backend = cls(engine, model_file, spec, cuda_graph=cuda_graph)
        try:
            fixed = check_graph(_shapes(engine.inputs), _shapes(engine.outputs), spec, str(path))
            if fixed not in (None, backend.max_batch):
                raise BundleError(f"{path}: its batch is fixed at {fixed}, the manifest says {backend.max_batch}")
            backend._warm_up(model_file.profile[1] if model_file.profile else 1)
        except BaseException:
            backend.close()
            raise
        return backend

    def fork(self) -> TensorRTBackend:
        """A backend for another thread: its own stream, buffers and contexts on the same loaded engine."""
        if self._closed:
            raise EngineError(f"{self.name}: the backend is closed")
        return TensorRTBackend(self._engine.retain(), self._model_file, self.spec, cuda_graph=self._cuda_graph)

    def infer(self, visual: Float32, audio: Float32, mask: Bool) -> tuple[Float32, Float32]:
        """See `Backend.infer`."""
        return self.collect(self.submit(visual, audio, mask))

    def submit(self, visual: Float32, audio: Float32, mask: Bool) -> Ticket:
        """Start a batch and return at once; `infer` is `collect(submit(...))`.

        Up to `MAX_IN_FLIGHT` batches overlap: one is copied while its neighbour is inferred. The inputs may be reused
        as soon as this returns. Raises as `infer`, and EngineError when too many batches are in flight.
        """
        visual, audio, mask = check_inputs(visual, audio, mask, self.spec, self.max_batch)
        lane = self._take_lane()
        try:
            rows = len(visual)
            known = len(lane.graphs)
            lane.launch({VISUAL: visual, AUDIO: audio, MASK: mask}, max(rows, self._min_batch))
        except BaseException:
            self._free.append(lane)
            raise
        if self._cuda_graph and len(lane.graphs) > known:
            self._report(lane)
        return Ticket(lane, rows)

    def collect(self, ticket: Ticket) -> tuple[Float32, Float32]:
        """Wait for a batch: logits [B, P, C], offsets [B, P, C, 2]. Raises EngineError when the GPU failed."""
        if self._closed or ticket.done or ticket.lane not in self._lanes:
            raise EngineError(f"{self.name}: this batch was collected before, or its backend is closed")
        ticket.done = True
        self._on_this_thread()
        try:
            outputs = ticket.lane.read(ticket.rows)
        finally:
            self._free.append(ticket.lane)
        logits, offsets = (outputs[name].astype(np.float32, copy=False) for name in (LOGITS, OFFSETS))
        return logits, offsets

    def engine_milliseconds(self, batch: int, repeats: int = 100) -> npt.NDArray[np.float64]:
        """[repeats] device time of the engine alone at a batch size, by events; no copies, no host work."""
        if not self._min_batch <= batch <= self.max_batch:
            raise EngineError(f"batch {batch}: this engine takes {self._min_batch} to {self.max_batch}")
        lane = self._take_lane()
        try:
            return lane.engine_milliseconds(batch, repeats)
        finally:
            self._free.append(lane)

    def layer_milliseconds(self, batch: int, repeats: int = 20) -> dict[str, float]:
        """Mean device time of each layer, slowest first; measured on plain runs, which graphs would hide.

        A region that the library compiled as a whole shows as one entry.
        """
        lane = self._take_lane()
        try:
            return lane.layer_milliseconds(batch, repeats)
        finally:
            self._free.append(lane)

    def describe(self) -> dict[str, Any]:
        """See `Backend.describe`."""
        engine, model_file = self._engine, self._model_file
        return {
            "backend": self.name,
            "precision": self.precision,
            "length": self.spec.length,
            "max_batch": self.max_batch,
            "library": engine.trt.__name__,
            "version": str(engine.trt.__version__),
            "device": engine.device.name,
            "compute_capability": engine.device.compute_capability,
            "driver_cuda": engine.device.driver,
            "profile": model_file.profile,
            "scratch_bytes": engine.scratch_bytes,
            "cuda_graphs": {batch: state for lane in self._lanes for batch, state in lane.graphs.items()},
        }

    def close(self) -> None:
        """See `Backend.close`."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as stack:  # frees the rest also when one of them fails
            stack.callback(self._engine.release)
            for lane in self._lanes:
                stack.callback(lane.close)
            self._on_this_thread()
        self._lanes, self._free = [], []

    def __enter__(self) -> TensorRTBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_lane(self) -> Lane:
        if self._closed:
            raise EngineError(f"{self.name}: the backend is closed")
        self._on_this_thread()
        if not self._free:
            if len(self._lanes) >= MAX_IN_FLIGHT:
                raise EngineError(f"{self.name}: {MAX_IN_FLIGHT} batches are in flight; collect one before the next")
            lane = Lane(self._engine, max(self.max_batch, self._min_batch), cuda_graph=self._cuda_graph)
            self._lanes.append(lane)
            return lane
        # the lane used last is ready for its batch sizes; a further one is only made when batches overlap
        return self._free.pop()

    def _on_this_thread(self) -> None:
        if self._thread != threading.get_ident():
            cuda.call("cudaSetDevice", self._engine.device.index)
            self._thread = threading.get_ident()

    def _warm_up(self, batch: int) -> None:
        """One request with every step valid: records the first graph and compares it with the plain run."""
        draw = np.random.default_rng(0)
        shapes = self.spec.input_shapes(batch)
        visual, audio = (draw.standard_normal(shapes[name], dtype=np.float32) for name in (VISUAL, AUDIO))
        self.infer(visual, audio, np.ones(shapes[MASK], np.bool_))

    def _report(self, lane: Lane) -> None:
        batch, state = list(lane.graphs.items())[-1]
        if state != "replayed":
            warnings.warn(f"{self.name}: batch {batch} runs without a CUDA graph, slower: {state}", stacklevel=3)


def _shapes(bindings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: binding.shape for name, binding in bindings.items()}
