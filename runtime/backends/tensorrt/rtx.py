"""What TensorRT for RTX alone has: the configuration of execution contexts, and a cache of compiled kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.files import atomic_file

RTX_MAGIC = b"vtrt"
REFUSALS = {
    "VERSION_MISMATCH": "built by another release",
    "UNSUPPORTED_CC": "not built for this GPU",
    "OLD_CUDA_DRIVER": "the driver is too old",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory",
    "CUDA_ERROR": "CUDA does not start",
}
"""What the library may say of an engine that is not damaged."""


class RuntimeCache:
    """Kernels compiled for this GPU, kept in a file of this user so that the next start is quick.

    A hint, never needed: a file that can't be read or written costs time and nothing else.
    """

    def __init__(self, folder: Path | None, names: Sequence[str]) -> None:
        """Use the file in `folder` that `names` tell apart from others; None: no file."""
        name = "-".join(names).replace(" ", "_").replace("/", "_")
        self._path = folder / f"{name}.cache" if folder else None
        self._saved: bytes = b""
        self._cache: Any = None

    def attach(self, config: Any) -> None:
        """Let the contexts of this configuration use the cache; the first one fills it from the file."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._path is not None and self._path.is_file():
                with contextlib.suppress(OSError):
                    self._saved = self._path.read_bytes()
                    self._cache.deserialize(self._saved)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file, where kernels were added."""
        serialized = None if self._cache is None or self._path is None else self._cache.serialize()
        if serialized is None or self._path is None:
            return
        content = bytes(memoryview(serialized).cast("B"))
        if content != self._saved:
            with contextlib.suppress(OSError), atomic_file(self._path) as stream:
                stream.write(content)
            self._saved = content


def runtime_config(trt: Any, engine: Any, cache: RuntimeCache) -> Any:
    """Configure the execution contexts of an engine, which may refer to the configuration as long as they live."""
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    # kernels of a new shape are compiled before its first run, and graphs are captured by the backend itself
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
    cache.attach(config)
    return config
