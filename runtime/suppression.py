"""Suppression: of many overlapping candidates, the best events (Soft-NMS, Bodla et al. 2017, as it was released).

Shapes:  N candidates   K segments kept, at most `max_segments`
"""

from __future__ import annotations

import ctypes
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from runtime.errors import ConfigError, PredictionError
from runtime.kernels.library import BAD_CANDIDATE, OUT_OF_MEMORY, Settings, address, floats, kernels
from runtime.schema import require
from runtime.spec import Method, PostProcessing

Suppressed = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]

_DEFAULT = PostProcessing()


def suppress(
    segments: npt.ArrayLike,
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    method: Method = _DEFAULT.method,
    sigma: float = _DEFAULT.sigma,
    iou_threshold: float = _DEFAULT.iou_threshold,
    min_score: float = _DEFAULT.min_score,
    max_segments: int = _DEFAULT.max_segments,
    multiclass: bool = _DEFAULT.multiclass,
    voting_threshold: float = _DEFAULT.voting_threshold,
) -> Suppressed:
    """segments [N, 2], scores [N], integer labels [N] -> the same of the K best, best first (float32, float32, int64).

    `soft`: take the best remaining segment, multiply the score of every other one by exp(-iou^2 / sigma), drop
    those below `min_score`, repeat. `hard`: only scores above `min_score` take part, and a taken segment removes those
    with IoU >= `iou_threshold`. `none`: the best scores of at least `min_score`. A length counts as end - start + 1e-6.
    As in the released program, `min_score` is applied by `soft` to decayed scores only: the best segment of a class
    stays whatever its score is (decoding has dropped low scores before).

    `multiclass` suppresses every class on its own; otherwise all compete as one class, and where `voting_threshold` is
    above 0 each surviving segment becomes the mean of all candidates with at least that IoU (no 1e-6 here),
    weighted by their original scores (within 1e-6 of the released program, which adds in another order).

    Ties: the lower label first, within a label the earlier one in memory. That is the input order for `hard` and
    `none`; for `soft` the input order as changed by the swaps of the released program (a taken segment trades places
    with the first remaining one, a dropped one is replaced by the last).

    Raises ConfigError for a setting out of range, PredictionError for shapes that do not fit, values that are not
    finite, or segments that end before they start.
    """
    _check_settings(method, sigma, iou_threshold, min_score, max_segments, voting_threshold)
    boundaries, confidence, classes = _check_arrays(segments, scores, labels)
    total = len(confidence)
    if total == 0:
        return boundaries, confidence, classes
    settings = Settings(
        max_segments=min(max_segments, total),
        method=get_args(Method).index(method),
        multiclass=multiclass,
        sigma=sigma,
        iou_threshold=iou_threshold,
        min_score=min_score,
        voting_threshold=voting_threshold,
    )
    groups, first_label, group_count = _grouping(classes) if multiclass or method == "none" else (classes, 0, 1)
    events = np.empty((settings.max_segments, 2), np.float32)
    kept_scores, kept = np.empty(len(events), np.float32), np.empty(len(events), np.int64)
    candidate = ctypes.c_int64()
    count = kernels().ccnet_suppress(
        settings,
        total,
        address(boundaries),
        address(confidence),
        address(groups),
        first_label,
        group_count,
        address(events),
        address(kept_scores),
        address(kept),
        candidate,
    )
    if count == OUT_OF_MEMORY:
        raise MemoryError
    if count == BAD_CANDIDATE:
        index = candidate.value
        start, end = boundaries[index].tolist()
        raise PredictionError(
            f"candidate {index}: got segment [{start}, {end}] with score {float(confidence[index])},"
            " expected finite numbers and start <= end"
        )
    return events[:count], kept_scores[:count], classes[kept[:count]]


def _grouping(labels: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int, int]:
    """Return labels as (group labels, the first one, number of groups), in label order and without large gaps."""
    lowest, highest = int(labels.min()), int(labels.max())
    if highest - lowest < 4096:
        return labels, lowest, highest - lowest + 1
    names, dense = np.unique(labels, return_inverse=True)
    return dense.astype(np.int64), 0, len(names)


def _check_settings(
    method: str, sigma: float, iou_threshold: float, min_score: float, max_segments: int, voting_threshold: float
) -> None:
    require(method in get_args(Method), "method", method, f"one of {get_args(Method)}")
    require(0 < sigma < float("inf"), "sigma", sigma, "a finite number above 0")
    require(0 <= iou_threshold <= 1, "iou_threshold", iou_threshold, "a number in [0, 1]")
    require(0 <= min_score < 1, "min_score", min_score, "a number in [0, 1)")
    require(0 <= voting_threshold <= 1, "voting_threshold", voting_threshold, "a number in [0, 1]")
    if not isinstance(max_segments, int | np.integer) or max_segments < 1:
        raise ConfigError(f"max_segments: got {max_segments!r}, expected an integer >= 1")


def _check_arrays(segments: npt.ArrayLike, scores: npt.ArrayLike, labels: npt.ArrayLike) -> Suppressed:
    arrays: list[npt.NDArray[Any]] = [np.asarray(a) for a in (segments, scores, labels)]
    boundaries, confidence, classes = arrays
    for name, array in (("segments", boundaries), ("scores", confidence)):
        if array.dtype.kind not in "fiu":
            raise PredictionError(f"{name}: got dtype {array.dtype}, expected numbers")
    count = confidence.shape[0] if confidence.ndim == 1 else -1
    if count < 0 or boundaries.shape != (count, 2) or classes.shape != (count,):
        shapes = ", ".join(str(list(a.shape)) for a in arrays)
        raise PredictionError(f"segments, scores, labels: got shapes {shapes}, expected [N, 2], [N], [N]")
    if classes.dtype.kind not in "iu" and count:
        raise PredictionError(f"labels: got dtype {classes.dtype}, expected integers")
    return floats(boundaries), floats(confidence), np.ascontiguousarray(classes, np.int64)
