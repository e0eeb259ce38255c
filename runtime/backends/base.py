"""The interface that every engine is used through, and the base class that the backends share.

Shapes: see `runtime.spec.ModelSpec` (B batch, T steps, P points, C classes).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from runtime.errors import BundleError, EngineError, FeatureError
from runtime.spec import INPUT_TYPES, ModelSpec

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Outputs = tuple[Float32, Float32]
Self = TypeVar("Self", bound="BaseBackend")


class Backend(Protocol):
    """A loaded engine: what a `Localizer` needs of it. One `infer` at a time.

    Two more methods are used where they exist: `fork` (see `BaseBackend.fork`), and `allocate(shape, dtype)`, which
    returns memory that the engine reads without a further copy, such as page-locked memory; batches are filled there.
    """

    name: str
    """As in `runtime.backends.registry.REGISTRY`; `torch` for eager PyTorch."""
    precision: str
    """`fp32`, `tf32`, `fp16`, `bf16`, `int8` or `fp8`."""
    spec: ModelSpec
    max_batch: int

    def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> Outputs:
        """Run one batch: visual [B, T, Cv], audio [B, T, Ca], lengths [B] -> logits [B, P, C], offsets [B, P, C, 2].

        The returned arrays belong to the caller. Raises EngineError when the engine fails, FeatureError when the
        shapes are not those of `spec`, a length is not within 1 to T, or B is above `max_batch`.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return library, version, device and precision as delivered, for reports."""
        ...

    def close(self) -> None:
        """Release the engine and its buffers. Safe to call twice."""
        ...


class BaseBackend(abc.ABC):
    """A `Backend` that checks its inputs, knows when it is closed, and can be used as a context manager."""

    def __init__(self, name: str, precision: str, spec: ModelSpec, max_batch: int) -> None:
        self.name = name
        self.precision = precision
        self.spec = spec
        self.max_batch = max_batch
        self.closed = False

    def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> Outputs:
        """See `Backend.infer`."""
        if self.closed:
            raise EngineError(f"{self.name}: the backend is closed")
        return self._infer(*check_inputs(visual, audio, lengths, self.spec, self.max_batch))

    def describe(self) -> dict[str, Any]:
        """See `Backend.describe`."""
        shape = {"length": self.spec.length, "max_batch": self.max_batch}
        return {"backend": self.name, "precision": self.precision, **shape, **self._facts()}

    def fork(self) -> BaseBackend | None:
        """Return a backend for another thread on the same loaded engine, or None where one context fills the device."""
        return None

    def close(self) -> None:
        """See `Backend.close`."""
        if not self.closed:
            self.closed = True
            self._close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abc.abstractmethod
    def _infer(self, visual: Float32, audio: Float32, lengths: Int32) -> Outputs:
        """Run one checked, C-contiguous batch."""

    @abc.abstractmethod
    def _facts(self) -> dict[str, Any]:
        """Return what `describe` says besides name, precision and shapes."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Release the engine; called once."""


def check_inputs(
    visual: Float32, audio: Float32, lengths: Int32, spec: ModelSpec, max_batch: int
) -> tuple[Float32, Float32, Int32]:
    """Check the inputs against `spec` and return them as C-contiguous arrays.

    Raises FeatureError, naming the tensor, for a shape or dtype other than `spec` states, a length that is not within
    1 to T, an empty batch, or one above `max_batch`.
    """
    batch = visual.shape[0] if np.ndim(visual) else 0
    if not 1 <= batch <= max_batch:
        raise FeatureError(f"batch: got {batch} video(s), this engine takes 1 to {max_batch}; split the batch")
    checked = []
    for (name, expected), array in zip(spec.input_shapes(batch).items(), (visual, audio, lengths), strict=True):
        wanted = np.dtype(INPUT_TYPES[name])
        if array.shape != expected or array.dtype != wanted:
            raise FeatureError(f"{name}: got {array.dtype} {array.shape}, expected {wanted} {expected}")
        checked.append(np.ascontiguousarray(array))
    if lengths.min() < 1 or lengths.max() > spec.length:
        raise FeatureError(f"lengths: got {lengths.tolist()}, expected 1 to {spec.length} valid steps of each video")
    return checked[0], checked[1], checked[2]


def check_graph(
    inputs: Mapping[str, Sequence[Any]], outputs: Mapping[str, Sequence[Any]], spec: ModelSpec, where: str
) -> int | None:
    """Compare the tensors of a loaded graph or engine with `spec`; `inputs` and `outputs` map names to dimensions.

    The first dimension is the batch: an int where it is fixed, else anything (a symbol's name, None or -1). Another
    one of -1 is not known before a batch size is set, and not compared.
    Returns the fixed batch size, or None for a dynamic one. Raises BundleError saying what was found.
    """
    batch = 0
    fixed: set[int] = set()
    for found, expected, kind in (
        (inputs, spec.input_shapes(batch), "input"),
        (outputs, spec.output_shapes(batch), "output"),
    ):
        if set(found) != set(expected):
            raise BundleError(f"{where}: {kind}s are {sorted(found)}, the manifest says {sorted(expected)}")
        for name, shape in expected.items():
            dims = tuple(found[name])
            if len(dims) != len(shape) or any(d not in (-1, s) for d, s in zip(dims[1:], shape[1:], strict=True)):
                raise BundleError(
                    f"{where}: {kind} '{name}' is {list(dims)}, the manifest says {['batch', *shape[1:]]}"
                )
            if isinstance(dims[0], int) and dims[0] >= 0:
                fixed.add(dims[0])
    if len(fixed) > 1:
        raise BundleError(f"{where}: its inputs and outputs have different fixed batch sizes: {sorted(fixed)}")
    return fixed.pop() if fixed else None
