"""Logits and offsets of one video -> candidate segments on the grid (reference section 7).

Shapes:  P points of all levels   C classes   N candidates
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import EngineError
from runtime.schema import require
from runtime.spec import LOGITS, OFFSETS, PointGrid, PostProcessing

Candidates = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]


def decode(
    logits: npt.NDArray[np.floating[Any]],
    offsets: npt.NDArray[np.floating[Any]],
    valid_steps: int,
    grid: PointGrid,
    post: PostProcessing,
) -> Candidates:
    """logits [P, C], offsets [P, C, 2] -> segments [N, 2] in grid steps, scores [N], labels [N].

    Per level: score = sigmoid(logit) at the points of the first `valid_steps` steps; of the scores above
    `post.pre_nms_score` the best `post.pre_nms_top_k`; segment = point -/+ offset * stride; segments not longer than
    `post.min_length` are dropped. Candidates come level by level, best first within a level.

    Ties: of equal logits in a level the earlier point comes first, within a point the lower label; this also decides
    which ones are cut at `pre_nms_top_k`.

    Raises EngineError when a shape does not fit the grid, or when a logit at a valid point or the offset of a candidate
    is not finite.
    """
    _check_shapes(logits, offsets, valid_steps, grid)
    classes = logits.shape[1]
    values = np.ascontiguousarray(logits, np.float32).ravel()
    chosen = []
    for level, stride in zip(grid.level_slices, grid.strides, strict=True):
        start, stop = level.start * classes, (level.start - (-valid_steps // stride)) * classes
        level_values = values[start:stop]
        if not np.isfinite(level_values).all():
            raise _not_finite(LOGITS, (start + int(np.argmin(np.isfinite(level_values)))) // classes)
        index = np.flatnonzero(level_values > _logit_below(post.pre_nms_score)) + start
        chosen.append(_best_first(values, index, post.pre_nms_top_k))
    entry = np.concatenate(chosen)
    point = entry // classes
    label: npt.NDArray[np.int64] = entry - point * classes
    one = np.float32(1)
    score: npt.NDArray[np.float32] = one / (one + np.exp(-np.maximum(values[entry], np.float32(-80))))  # no overflow
    distance = offsets.reshape(-1, 2).take(entry, axis=0).astype(np.float32, copy=False)
    if not np.isfinite(distance).all():
        raise _not_finite(OFFSETS, int(point[np.argmin(np.isfinite(distance).all(axis=1))]))
    centre, stride_of = grid.positions[point], grid.point_strides[point]
    segments = np.empty((len(point), 2), np.float32)
    np.subtract(centre, distance[:, 0] * stride_of, out=segments[:, 0])
    np.add(centre, distance[:, 1] * stride_of, out=segments[:, 1])
    keep = (score > np.float32(post.pre_nms_score)) & (segments[:, 1] - segments[:, 0] > np.float32(post.min_length))
    if keep.all():
        return segments, score, label
    return segments[keep], score[keep], label[keep]


def _logit_below(score: float) -> np.float32:
    """A logit slightly below that of `score`: cheap to compare with; the sigmoid decides for what passes."""
    return np.float32(math.log(score / (1 - score)) - 1e-3 if score > 0 else -math.inf)


def _best_first(values: npt.NDArray[np.float32], index: npt.NDArray[np.int64], top_k: int) -> npt.NDArray[np.int64]:
    """The entries `index` of `values`, highest value first, equal values in index order; at most `top_k` of them.

    Value and index are packed into one 64-bit key (the bits of a float, with the sign folded in, sort like the
    float), so that sorting is stable at the speed of sorting plain integers.
    """
    bits = (values[index] + np.float32(0)).view(np.uint32)  # + 0: minus zero equals zero
    descending = np.where(bits >> 31 == 1, bits, ~bits & np.uint32(0x7FFFFFFF))
    keys = descending.astype(np.uint64) << np.uint64(32) | index.astype(np.uint64)
    if len(keys) > top_k:
        keys = np.partition(keys, top_k - 1)[:top_k]
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _check_shapes(logits: Any, offsets: Any, valid_steps: int, grid: PointGrid) -> None:
    points, steps = grid.num_points, grid.lengths[0]
    if logits.ndim != 2 or logits.shape[0] != points:
        raise EngineError(
            f"{LOGITS}: got shape {list(logits.shape)}, expected [{points}, C] for a grid of {steps} steps"
        )
    if offsets.shape != (*logits.shape, 2):
        raise EngineError(f"{OFFSETS}: got shape {list(offsets.shape)}, expected {[*logits.shape, 2]}")
    require(0 <= valid_steps <= steps, "valid_steps", valid_steps, f"an integer from 0 to {steps}")


def _not_finite(name: str, point: int) -> EngineError:
    return EngineError(
        f"{name}: not finite at point {point}; the engine overflowed or is damaged: verify the bundle, or use a higher"
        " precision"
    )
