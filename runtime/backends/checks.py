"""Checks that every backend shares: what it is given, and what the loaded graph says it takes.

Shapes: see `runtime.spec.ModelSpec` (B batch, T steps, P points, C classes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import BundleError, FeatureError
from runtime.spec import AUDIO, MASK, VISUAL, ModelSpec

Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

_DTYPES: dict[str, type] = {VISUAL: np.float32, AUDIO: np.float32, MASK: np.bool_}


def check_inputs(
    visual: Float32, audio: Float32, mask: Bool, spec: ModelSpec, max_batch: int
) -> tuple[Float32, Float32, Bool]:
    """The inputs as C-contiguous arrays, after checking them against `spec`.

    Raises FeatureError, naming the tensor, for a shape or dtype other than `spec` states, an empty batch, or one
    above `max_batch`.
    """
    batch = visual.shape[0] if np.ndim(visual) else 0
    if not 1 <= batch <= max_batch:
        raise FeatureError(f"batch: got {batch} video(s), this engine takes 1 to {max_batch}; split the batch")
    checked = []
    for (name, expected), array in zip(spec.input_shapes(batch).items(), (visual, audio, mask), strict=True):
        if array.shape != expected or array.dtype != _DTYPES[name]:
            raise FeatureError(
                f"{name}: got {array.dtype} {array.shape}, expected {np.dtype(_DTYPES[name])} {expected}"
            )
        checked.append(np.ascontiguousarray(array))
    return checked[0], checked[1], checked[2]


def check_graph(
    inputs: Mapping[str, Sequence[Any]], outputs: Mapping[str, Sequence[Any]], spec: ModelSpec, where: str
) -> int | None:
    """Compare the tensors of a loaded graph or engine with `spec`; `inputs` and `outputs` map names to dimensions.

    The first dimension is the batch: an int where it is fixed, else anything (a symbol's name, None or -1).
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
            if dims[1:] != shape[1:]:
                raise BundleError(
                    f"{where}: {kind} '{name}' is {list(dims)}, the manifest says {['batch', *shape[1:]]}"
                )
            if isinstance(dims[0], int) and dims[0] >= 0:
                fixed.add(dims[0])
    if len(fixed) > 1:
        raise BundleError(f"{where}: its inputs and outputs have different fixed batch sizes: {sorted(fixed)}")
    return fixed.pop() if fixed else None
