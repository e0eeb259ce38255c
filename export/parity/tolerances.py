"""Precisions: the type each graph is written in, and how far its results may lie from the eager fp32 model.

This is the one place of the parity check's tolerances. Nothing here imports torch until a torch type is asked for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from runtime.backends.registry import PRECISIONS, Precision
from runtime.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Limits of the parity check for one precision, all inclusive. Tensors are compared at valid points only."""

    max_logits: float
    """Largest absolute difference of a logit."""
    mean_logits: float
    """Mean absolute difference of the logits."""
    max_offsets: float
    """Largest difference of an offset o (in strides), as |difference| / max(1, |o|)."""
    mean_offsets: float
    """Mean of the same."""
    tiou: float
    """Two events of one class are the same when their temporal IoU is above this."""
    matched: float
    """Least share of the reference's events above `EVENT_SCORE` that are found again after post-processing."""
    matched_stress: float
    """The same on the stress inputs."""
    score_drift: float
    """Largest mean score difference of the matched events."""
    undecided: float = 0.0
    """What the reference itself does not find again when its logits move by this is a tie, and not judged."""
    average_map: float
    """Largest difference of mAP Avg, as a fraction (0.001 is 0.1 point)."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


EVENT_SCORE = 0.1
"""Events scoring above this are the ones that must be found again."""

_HALF = Tolerance(
    max_logits=0.03,
    mean_logits=3e-3,
    max_offsets=0.03,
    mean_offsets=3e-3,
    tiou=0.95,
    matched=0.99,
    matched_stress=0.9,
    score_drift=3e-3,
    average_map=1e-3,
)

# Eight times as coarse.
_SEVEN_BITS = replace(_HALF, max_logits=0.25, mean_logits=0.03, max_offsets=0.2, mean_offsets=0.02, score_drift=0.02)

# Measured with the fused network on eager PyTorch: a briefly trained demo network on 48 videos (about 1,000 events
# above 0.1) and the stress inputs; the released program's random network. Limits are about four times the worst.
#
#                      fp32        fp16            bf16
#   max_logits         5e-6        0.007 - 0.010   0.04 - 0.09
#   mean_logits        2e-7        4e-4            4e-3 (rms of the random network 0.015)
#   max_offsets        6e-6        0.008           0.04
#   mean_offsets       2e-7        3e-4            2e-3
#   matched            1           0.995 - 0.996   0.984 - 0.989 of that network: it may well fail
#   average_map        0           0 - 4e-4        7e-4 - 12e-4
#
# And with engines: OpenVINO in bfloat16 found 0.998 of the demo network's events (80 videos, mAP 1e-4 off), 0.984 of
# those of a full-size network whose heads alone were fitted (40 videos, mAP 7e-4 off; 0.991 of another one's, 24
# videos, since norms have three axes). Of the former ONNX Runtime in float16 found all on 6 videos, and 0.999 on the
# stress inputs.
#
# What half precision loses are events that Soft-NMS decides by a hair: two overlapping candidates of nearly the same
# score change places, and the other one is kept. A tIoU of 0.95 asks for the same candidate; the rounding of its ends
# alone moves an event of a few steps by up to 0.02. The shares and the mAP difference are what an engine must keep to
# be of use and were not widened to what was measured. The stress inputs are noise with few events: one of 20 may flip.
TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(
        max_logits=1e-4,
        mean_logits=1e-5,
        max_offsets=1e-4,
        mean_offsets=1e-5,
        tiou=0.99,
        matched=1.0,
        matched_stress=1.0,
        # A GPU adds up in any order: where Soft-NMS has two candidates of the same score, either is right.
        undecided=1e-5,
        score_drift=1e-5,
        average_map=1e-4,
    ),
    "fp16": _HALF,
    # 10 bits behind the point, as in fp16, in matmuls alone.
    "tf32": _HALF,
    "bf16": _SEVEN_BITS,
    # Int8 weights, rows quantized each by itself. Seen on a trained network (513 events): logits 0.035, mean 0.003,
    # offsets 0.028, mean 0.002, mAP 2e-4 (measured before the stretching and channel layers were int8 too).
    "int8": _SEVEN_BITS,
    # Large matmuls and feed-forward layers in fp8. Seen on a trained network (36 matmuls, 290 events): logits 0.055,
    # mean 0.0025, offsets 0.040, mean 0.0016, mAP 3e-4; one event lost. A full-size network of random weights with
    # fitted heads (31 matmuls, 111 events) fails: logits 0.55, mean 0.015, 22 events lost, mAP 0.016 off.
    "fp8": _SEVEN_BITS,
}


def graph_precision(precision: str) -> Precision:
    """Return the type of the ONNX graph that an engine is built from: `tf32` is a way to run the fp32 graph.

    Raises ConfigError for an unknown precision.
    """
    for known in PRECISIONS:
        if known == precision:
            return "fp32" if known == "tf32" else known
    raise ConfigError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")


def tolerance(precision: str) -> Tolerance:
    """Return the limits of the parity check. Raises ConfigError for an unknown precision."""
    for known, limits in TOLERANCES.items():
        if known == precision:
            return limits
    raise ConfigError(f"precision: got {precision!r}, expected one of {', '.join(TOLERANCES)}")


def torch_dtype(precision: Precision) -> torch.dtype:
    """Return the torch type that a graph is traced in; int8 and fp8 are put into the finished graph."""
    import torch

    return {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "int8": torch.float32,
        "fp8": torch.float16,
    }[precision]


@dataclass(frozen=True, kw_only=True)
class ExtractorTolerance:
    """How far a graph of an extractor may be from its network: in shares of an output's largest value, or in levels."""

    largest: float
    mean: float


# Measured with seeded weights: fp32 with networks of the real sizes, half precision with the calibrated small networks
# of the tests and the demo, the more sensitive ones. The worst seen, and limits of two to four times that; the flow in
# levels, of which 6.4 are a pixel. In fp32 the worse of ONNX Runtime and OpenVINO, fp16 by ONNX Runtime, bf16 by
# OpenVINO. At real sizes fp16 came to 0.0009 and bf16 to 0.017 of the largest feature; the flow by OpenVINO in bf16,
# which computes coordinates in it too, was NaN.
#
#                       fp32      fp16      bf16
#   features, largest   4e-5      0.013     0.11
#   features, mean      4e-6      0.003     0.022
#   flow, mean          2e-5      0.032     0.11
#
# A rounded level flips by one where the flow lies at a half; networks whose flow strays do it by more.
_HALF_EXTRACTOR = ExtractorTolerance(largest=0.03, mean=6e-3), ExtractorTolerance(largest=2.0, mean=0.1)
_EXTRACTOR: dict[str, tuple[ExtractorTolerance, ExtractorTolerance]] = {
    "fp32": (ExtractorTolerance(largest=1e-4, mean=1e-5), ExtractorTolerance(largest=1.0, mean=1e-3)),
    "tf32": _HALF_EXTRACTOR,
    "fp16": _HALF_EXTRACTOR,
    "bf16": (ExtractorTolerance(largest=0.25, mean=0.05), ExtractorTolerance(largest=4.0, mean=0.3)),
}
"""Of outputs, and of the rounded flow."""
EXTRACTOR_PRECISIONS = tuple(_EXTRACTOR)
"""Nothing of an extractor was tried in int8 or fp8."""


def extractor_tolerance(graph: str, precision: str) -> ExtractorTolerance:
    """Return the limits of an extractor's graph. Raises ConfigError for a precision that extractors do not have."""
    if precision not in _EXTRACTOR:
        raise ConfigError(f"precision: got {precision!r}, extractors have {', '.join(_EXTRACTOR)}")
    return _EXTRACTOR[precision][graph == "flow"]
