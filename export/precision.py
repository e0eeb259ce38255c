"""Precisions: the type each graph is written in, and how far its results may lie from the eager fp32 model.

This is the one place of the parity gate's tolerances. Nothing here imports torch until a torch type is asked for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from runtime.errors import ConfigError

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8"]
GraphPrecision = Literal["fp32", "fp16", "bf16"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_GRAPH: dict[str, GraphPrecision] = {"fp32": "fp32", "tf32": "fp32", "fp16": "fp16", "bf16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Limits of the gate for one precision, all inclusive. Tensors are compared at valid points only."""

    max_logits: float
    """Largest absolute difference of a logit."""
    mean_logits: float
    """Mean absolute difference of the logits."""
    max_offsets: float
    """Largest difference of an offset o (in strides), as |difference| / max(1, |o|)."""
    mean_offsets: float
    """Mean of the same."""
    matched: float
    """Least share of the reference's events above `EVENT_SCORE` found again (same class, tIoU > `EVENT_TIOU`)."""
    matched_stress: float
    """The same on the stress inputs."""
    score_drift: float
    """Largest score difference of a matched event."""
    average_map: float
    """Largest difference of mAP Avg, as a fraction (0.001 is 0.1 point)."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


EVENT_SCORE = 0.1
"""Events scoring above this are the ones that must be found again."""
EVENT_TIOU = 0.99
"""Two events of one class are the same when their temporal IoU is above this."""

TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(
        max_logits=1e-4,
        mean_logits=1e-5,
        max_offsets=1e-4,
        mean_offsets=1e-5,
        matched=1.0,
        matched_stress=1.0,
        score_drift=1e-4,
        average_map=1e-4,
    ),
}


def graph_precision(precision: str) -> GraphPrecision:
    """The type of the ONNX graph that a precision runs from: `tf32` is an engine's way to run the fp32 graph.

    Raises ConfigError for a precision that no graph is exported in.
    """
    if precision not in _GRAPH:
        raise ConfigError(f"precision: got {precision!r}, expected one of {', '.join(_GRAPH)}")
    return _GRAPH[precision]


def tolerance(precision: str) -> Tolerance:
    """Limits of the gate. Raises ConfigError for an unknown precision."""
    for known, limits in TOLERANCES.items():
        if known == precision:
            return limits
    raise ConfigError(f"precision: got {precision!r}, expected one of {', '.join(TOLERANCES)}")


def torch_dtype(precision: GraphPrecision) -> torch.dtype:
    """The torch type of the weights and products of a graph."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
