"""Suppression: of many overlapping candidates, the best events (reference section 7).

Shapes:  N candidates   K segments kept, at most `max_segments`
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from runtime.errors import ConfigError, PredictionError
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
    weighted by their original scores.

    Ties: the lower label first, within a label the earlier one in memory. That is the input order for `hard` and
    `none`; for `soft` the input order as changed by the swaps of the released program (a taken segment trades places
    with the first remaining one, a dropped one is replaced by the last).

    The first call in a process loads or compiles the loops (numba). Raises ConfigError for a setting out of range,
    PredictionError for shapes that do not fit, values that are not finite, or segments that end before they start.
    """
    _check_settings(method, sigma, iou_threshold, min_score, max_segments, voting_threshold)
    boundaries, confidence, classes = _check_arrays(segments, scores, labels)
    if len(confidence) == 0:
        return boundaries, confidence, classes
    if method == "none":
        return _best(boundaries, confidence, classes, min_score, max_segments)

    from runtime.kernels.suppression import suppress_kernel

    groups, first_label, group_count = _grouping(classes) if multiclass else (classes, 0, 1)
    total = len(confidence)
    kept = np.empty(min(max_segments, total), np.int64)
    kept_scores = np.empty(len(kept), np.float32)
    count = suppress_kernel(
        boundaries,
        confidence,
        groups,
        first_label,
        method == "soft",
        np.float32(sigma),
        np.float32(iou_threshold),
        np.float32(min_score),
        np.empty((total, 4), np.float32),
        np.empty(total, np.int64),
        np.zeros((group_count, 3), np.int64),
        np.empty(group_count, np.float32),
        kept,
        kept_scores,
    )
    if count < 0:
        raise _bad_candidate(-1 - count, boundaries, confidence)
    kept, kept_scores = kept[:count], kept_scores[:count]
    if multiclass or voting_threshold == 0:
        return boundaries[kept], kept_scores, classes[kept]
    return _vote(boundaries, confidence, kept, voting_threshold), kept_scores, classes[kept]


def _grouping(labels: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int, int]:
    """Labels -> (group labels, the first one, number of groups), in label order and without large gaps."""
    lowest, highest = int(labels.min()), int(labels.max())
    if highest - lowest < 4096:
        return labels, lowest, highest - lowest + 1
    names, dense = np.unique(labels, return_inverse=True)
    return dense.astype(np.int64), 0, len(names)


def _vote(
    segments: npt.NDArray[np.float32], scores: npt.NDArray[np.float32], kept: npt.NDArray[np.int64], threshold: float
) -> npt.NDArray[np.float32]:
    from runtime.kernels.voting import vote_kernel

    voted = np.empty((len(kept), 2), np.float32)
    vote_kernel(segments, scores, kept, np.float32(threshold), voted)
    return voted


def _best(
    segments: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    min_score: float,
    max_segments: int,
) -> Suppressed:
    good = np.isfinite(scores) & np.isfinite(segments).all(axis=1) & (segments[:, 0] <= segments[:, 1])
    if not good.all():
        raise _bad_candidate(int(np.argmin(good)), segments, scores)
    order = np.lexsort((labels, -scores))
    order = order[scores[order] >= np.float32(min_score)][:max_segments]
    return segments[order], scores[order], labels[order]


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
    return (
        # Writable too: the compiled kernels know one type of array.
        np.require(boundaries, np.float32, ["C", "W"]),
        np.require(confidence, np.float32, ["C", "W"]),
        np.require(classes, np.int64, ["C", "W"]),
    )


def _bad_candidate(index: int, segments: npt.NDArray[np.float32], scores: npt.NDArray[np.float32]) -> PredictionError:
    start, end = segments[index].tolist()
    return PredictionError(
        f"candidate {index}: got segment [{start}, {end}] with score {float(scores[index])},"
        " expected finite numbers and start <= end"
    )
