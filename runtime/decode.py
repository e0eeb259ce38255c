"""Logits and offsets of one video -> candidate segments on the grid (the paper's section 3.4).

Shapes:  P points of all levels   C classes   N candidates
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import EngineError
from runtime.kernels.library import LOGITS_NOT_FINITE, OUT_OF_MEMORY, address, detection_settings, floats, kernels
from runtime.schema import require
from runtime.spec import LOGITS, OFFSETS, PointGrid, PostProcessing

Candidates = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]


def decode(
    logits: npt.NDArray[np.floating[Any]],
    offsets: npt.NDArray[np.floating[Any]],
    valid_steps: int,
    grid: PointGrid,
    post: PostProcessing,
    *,
    first_valid: int = 0,
    first_step: int = 0,
) -> Candidates:
    """Decode logits [P, C], offsets [P, C, 2] -> segments [N, 2] in grid steps, scores [N], labels [N].

    Per level: score = sigmoid(logit) at the points of the first `valid_steps` steps; of the scores above
    `post.pre_nms_score` the best `post.pre_nms_top_k`; segment = point -/+ offset * stride; segments not longer than
    `post.min_length` are dropped. Candidates come level by level, best first within a level. Points before step
    `first_valid` do not count either; `first_step` is added to the segments, where a video has more than these steps.

    Ties: of equal logits in a level the earlier point comes first, within a point the lower label; this also decides
    which ones are cut at `pre_nms_top_k`.

    Raises EngineError when a shape does not fit the grid, or when a logit at a valid point or the offset of a candidate
    is not finite.
    """
    check_outputs(logits, offsets, valid_steps, grid)
    settings = detection_settings(post, grid.lengths[0], len(grid.lengths), logits.shape[1])
    most = settings.most_candidates
    segments, scores, labels = np.empty((most, 2), np.float32), np.empty(most, np.float32), np.empty(most, np.int64)
    values, distances, point = floats(logits), floats(offsets), ctypes.c_int64()
    count = kernels().ccnet_decode(
        settings,
        address(values),
        address(distances),
        first_step,
        first_valid,
        valid_steps,
        address(segments),
        address(scores),
        address(labels),
        point,
    )
    if count == OUT_OF_MEMORY:
        raise MemoryError
    if count < 0:
        raise EngineError(
            f"{LOGITS if count == LOGITS_NOT_FINITE else OFFSETS}: not finite at point {point.value}; the engine "
            "overflowed or is damaged: verify the bundle, or use a higher precision"
        )
    return segments[:count], scores[:count], labels[:count]


def check_outputs(logits: Any, offsets: Any, valid_steps: int, grid: PointGrid) -> None:
    """Check the outputs of one video against the grid; see `decode`."""
    points, steps = grid.num_points, grid.lengths[0]
    if logits.ndim != 2 or logits.shape[0] != points:
        raise EngineError(
            f"{LOGITS}: got shape {list(logits.shape)}, expected [{points}, C] for a grid of {steps} steps"
        )
    if offsets.shape != (*logits.shape, 2):
        raise EngineError(f"{OFFSETS}: got shape {list(offsets.shape)}, expected {[*logits.shape, 2]}")
    require(0 <= valid_steps <= steps, "valid_steps", valid_steps, f"an integer from 0 to {steps}")
