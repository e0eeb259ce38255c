"""The one interface every engine is used through: eager PyTorch, ONNX Runtime, OpenVINO, TensorRT.

Shapes: see `runtime.spec.ModelSpec` (B batch, T steps, P points, C classes).
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.spec import ModelSpec

Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


class Backend(Protocol):
    """A loaded engine. Not thread-safe unless it says so: use one backend per worker thread."""

    name: str
    """`torch`, `onnxruntime`, `onnxruntime-cuda`, `openvino`, `tensorrt` or `tensorrt-rtx`."""
    precision: str
    """`fp32`, `tf32`, `fp16`, `bf16` or `int8`."""
    spec: ModelSpec
    """Shapes this engine takes; `spec.length` may be shorter than the bundle's default."""
    max_batch: int

    def infer(self, visual: Float32, audio: Float32, mask: Bool) -> tuple[Float32, Float32]:
        """visual [B, Cv, T], audio [B, Ca, T], mask [B, 1, T] -> logits [B, P, C], offsets [B, P, C, 2].

        The returned arrays belong to the caller. Raises EngineError when the engine fails, FeatureError when
        the shapes are not those of `spec` or B is above `max_batch`.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Library, version, device and precision as delivered, for reports."""
        ...

    def close(self) -> None:
        """Release the engine and its buffers. Safe to call twice."""
        ...

    def __enter__(self) -> Backend: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
