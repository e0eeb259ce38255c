"""The one interface every engine is used through: eager PyTorch, ONNX Runtime, OpenVINO, TensorRT.

Shapes: see `runtime.spec.ModelSpec` (B batch, T steps, P points, C classes).
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.errors import FeatureError
from runtime.spec import AUDIO, MASK, VISUAL, ModelSpec

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


def check_batch(spec: ModelSpec, max_batch: int, visual: Float32, audio: Float32, mask: Bool) -> int:
    """Number of videos B of one `infer` call. Raises FeatureError for a wrong shape, dtype or too large a batch."""
    batch = int(visual.shape[0]) if visual.ndim == 3 else 0
    if not 1 <= batch <= max_batch:
        raise FeatureError(f"{VISUAL}: got shape {tuple(visual.shape)}, expected 1 to {max_batch} videos in a batch")
    expected = spec.input_shapes(batch)
    for name, array, dtype in ((VISUAL, visual, np.float32), (AUDIO, audio, np.float32), (MASK, mask, np.bool_)):
        if tuple(array.shape) != expected[name] or array.dtype != dtype:
            wanted = f"{expected[name]} {np.dtype(dtype).name}"
            raise FeatureError(f"{name}: got shape {tuple(array.shape)} {array.dtype}, expected {wanted}")
    return batch
