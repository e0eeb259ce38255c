"""A TensorRT engine on this machine: whether it fits, loading it once, and the execution contexts made from it.

Everything that can be known without the library is compared first: an engine of another version or GPU is refused
with what to do, instead of with whatever the library would say, or do.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.tensorrt import cuda, legacy
from runtime.backends.tensorrt.library import (
    TensorRTFormat,
    check_driver,
    library_logger,
    load_library,
    numpy_type,
    start,
)
from runtime.backends.tensorrt.pinned import PinnedPool
from runtime.backends.tensorrt.rtx import REFUSALS, RTX_MAGIC, RuntimeCache, runtime_config
from runtime.bundle import ModelFile
from runtime.errors import BackendUnavailable, BundleError, EngineError, EngineMismatch

HINT = "build it again here ('ccnet rebuild BUNDLE') or run the ONNX graph instead (on_mismatch='onnx')"


def check_engine(model_file: ModelFile, device: int = 0) -> cuda.Device:
    """Compare an engine's manifest entry with this machine, before the library sees a byte of the engine.

    Raises BundleError for a model file that is not an engine; BackendUnavailable when the library, the driver or a GPU
    is missing, or the driver too old for the library; EngineMismatch, saying what to do, when the library's version or
    the GPU is another one.
    """
    if model_file.format == "onnx":
        raise BundleError(f"model file '{model_file.name}' is an ONNX graph, not a TensorRT engine")
    trt = load_library(model_file.format)
    built = (model_file.library_version or "unknown", str(trt.__version__))
    if not _version_fits(model_file, *built):
        package = str(trt.__name__).replace("_", "-")
        raise EngineMismatch(
            f"engine '{model_file.name}' was built with {trt.__name__} {built[0]}, here is {built[1]}: "
            f"{HINT}, or pip install '{package}=={built[0]}'"
        )
    found = cuda.probe(device)
    check_driver(trt, found.driver)
    wanted = f"built for {_target(model_file)}, here is {found.name} (compute capability {found.compute_capability})"
    if not _gpu_fits(model_file, found):
        raise EngineMismatch(f"engine '{model_file.name}' was {wanted}: {HINT}")
    return found


def known_gpu(model_file: ModelFile, device: int) -> bool:
    """Return whether the library knows this GPU at all; what it says of an engine on another one may be anything."""
    if model_file.format != "tensorrt-rtx":
        return True
    name = f"SM{cuda.probe(device).compute_capability.replace('.', '')}"
    return name in load_library(model_file.format).ComputeCapability.__members__


def _version_fits(model_file: ModelFile, built: str, here: str) -> bool:
    if model_file.format == "tensorrt" and model_file.options.get("version_compatible"):
        # same major version or the next one, never an older release than the builder's
        old, new = (tuple(int(p) for p in v.split(".") if p.isdigit()) for v in (built, here))
        allowed = {8: (8, 10), 10: (10, 11)}.get(old[0], (old[0],)) if old else ()
        return bool(new) and new[0] in allowed and new >= old
    return built == here


def _gpu_fits(model_file: ModelFile, found: cuda.Device) -> bool:
    if model_file.format == "tensorrt-rtx":
        # an empty list is a portable engine: the library itself knows whether it runs here
        return not model_file.compute_capabilities or found.compute_capability in model_file.compute_capabilities
    if model_file.options.get("hardware_compatible"):
        return int(found.compute_capability.split(".")[0]) >= 8
    same_capability = found.compute_capability in model_file.compute_capabilities
    return same_capability and model_file.gpu_name in (None, found.name)


def _target(model_file: ModelFile) -> str:
    capabilities = "compute capability " + ", ".join(model_file.compute_capabilities or ("unknown",))
    if model_file.options.get("hardware_compatible"):
        return "Ampere or newer GPUs"
    return f"{model_file.gpu_name} ({capabilities})" if model_file.gpu_name else capabilities


def check_file(path: Path, model_file: ModelFile) -> None:
    """Raise BundleError for an engine file that is missing, cut short, or of the other format."""
    if not path.is_file():
        raise BundleError(f"{path}: missing; copy the bundle again")
    size, expected = path.stat().st_size, model_file.build.get("engine_bytes")
    if size == 0 or (expected is not None and size != expected):
        raise BundleError(f"{path}: {size} bytes, the engine had {expected} when it was built; copy the bundle again")
    with path.open("rb") as stream:
        magic = stream.read(len(RTX_MAGIC))
    if (magic == RTX_MAGIC) != (model_file.format == "tensorrt-rtx"):
        kind = (
            "a TensorRT-RTX engine" if magic == RTX_MAGIC else f"not a TensorRT-RTX engine (it starts with {magic!r})"
        )
        raise BundleError(f"{path}: is {kind}, the manifest says {model_file.format}; export the bundle again")


class LoadedEngine:
    """An engine in GPU memory, shared by the backends of all threads and freed when the last one releases it.

    Contexts are made one at a time here; each is then used by one thread only.
    """

    def __init__(self, path: Path, model_file: ModelFile, device: int, cache_folder: Path | None) -> None:
        check_file(path, model_file)
        self.device = check_engine(model_file, device)
        self.format: TensorRTFormat = "tensorrt-rtx" if model_file.format == "tensorrt-rtx" else "tensorrt"
        self.trt = load_library(self.format)
        self.path = path
        cuda.call("cudaSetDevice", device)
        _, self.log = library_logger(self.trt)
        self._users = 1
        with cuda.ALONE:
            self._runtime: Any = start(self.trt, "Runtime")
            if model_file.options.get("version_compatible"):
                # such an engine carries library code; its hash is in the manifest, and only our own builds are loaded
                self._runtime.engine_host_code_allowed = True
            self._engine: Any = self._deserialize(model_file)
        self.inputs, self.outputs = self._bindings()
        self.pinned = PinnedPool(device)
        """Memory for the batches of its users."""
        self.scratch_bytes = legacy.scratch_bytes(self._engine)
        """What the largest batch of the profile works in."""
        self._config: Any = None
        self._cache: RuntimeCache | None = None
        if self.format == "tensorrt-rtx":
            names = path.stem, (model_file.onnx_sha256 or "")[:16], self.device.name, str(self.trt.__version__)
            self._cache = RuntimeCache(cache_folder, names)

    def _deserialize(self, model_file: ModelFile) -> Any:
        with (
            self.path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
            self.log.collect() as messages,
        ):
            if self.format == "tensorrt-rtx":
                validity, diagnostics = self._runtime.get_engine_validity(content[: self._runtime.engine_header_size])
                if validity == self.trt.EngineValidity.INVALID:
                    self._refuse(int(diagnostics))
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise EngineError(f"{self.path}: the library can't load this engine:\n{messages.errors()}\n"
                              f"The file is damaged or of another release or GPU: {HINT}")  # fmt: skip
        return engine

    def _refuse(self, diagnostics: int) -> None:
        """Raise what the library says of an engine that is sound but can't run here; a damaged one is read on."""
        bits = self.trt.EngineInvalidityDiagnostics
        found = {name for name in REFUSALS if diagnostics & int(getattr(bits, name))}
        where = f"{self.device.name} (compute capability {self.device.compute_capability})"
        text = f"{self.path}: TensorRT-RTX {self.trt.__version__} can't run this engine on {where}"
        if found & {"VERSION_MISMATCH", "UNSUPPORTED_CC"}:
            raise EngineMismatch(f"{text}: {HINT}")
        if found:
            raise BackendUnavailable(f"{text}: {', '.join(sorted(REFUSALS[name] for name in found))}")

    def _bindings(self) -> tuple[dict[str, Binding], dict[str, Binding]]:
        inputs: dict[str, Binding] = {}
        outputs: dict[str, Binding] = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            is_input = self._engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT
            shape = tuple(int(extent) for extent in self._engine.get_tensor_shape(name))
            (inputs if is_input else outputs)[name] = Binding(shape, numpy_type(self._engine.get_tensor_dtype(name)))
        return inputs, outputs

    def create_execution_context(self) -> Any:
        """Create an execution context of TensorRT, without scratch memory: its caller gives it some."""
        with cuda.ALONE, self.log.collect() as messages:
            if self._engine is None:
                raise EngineError(f"{self.path}: the engine was closed")
            context = self._create_context()
        if context is None:
            raise EngineError(f"{self.path}: no execution context:\n{messages.errors()}")
        return context

    def save_cache(self) -> None:
        """Write the kernels that RTX has compiled so far to their file."""
        if self._cache is not None:
            self._cache.save()

    def _create_context(self) -> Any:
        trt = self.trt
        if legacy.is_legacy(trt):
            return legacy.create_execution_context(self._engine)
        if self._cache is None:
            return self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._config is None:
            self._config = runtime_config(trt, self._engine, self._cache)
        return self._engine.create_execution_context(self._config)

    def retain(self) -> LoadedEngine:
        """Count one more user of the engine, and return it."""
        with cuda.ALONE:
            if self._engine is None:
                raise EngineError(f"{self.path}: the engine was closed")
            self._users += 1
        return self

    def release(self) -> None:
        """Count one user less; the last one frees the engine."""
        with cuda.ALONE:
            self._users -= 1
            if self._users > 0 or self._engine is None:
                return
            try:
                self.pinned.close()
            finally:
                self.save_cache()
                # all before what made them, or what they refer to
                self._config = None
                self._engine = None
                self._runtime = None
                self._cache = None


@dataclass(frozen=True)
class Binding:
    """Shape (-1 for a dynamic batch, and for what the library infers from it) and type of one input or output."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


Array = npt.NDArray[Any]
