"""Compiled loop of `runtime.average_precision`. Imported on the first call, as this brings numba in.

Shapes:  N predictions   M ground-truth events   G (class, video) pairs with ground truth   C classes   K thresholds
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.kernels.compile import compiled


@compiled(
    "void(float64[:,::1], int64[::1], int64[::1], float64[:,::1], boolean[::1], int64[::1], int64[::1], float64[::1],"
    " boolean[:,::1], boolean[:,::1], float64[:,::1])"
)
def average_precision_kernel(
    pred_segments: Any,
    pred_group: Any,
    pred_begin: Any,
    gt_segments: Any,
    gt_real: Any,
    gt_begin: Any,
    positives: Any,
    thresholds: Any,
    taken: Any,
    hit: Any,
    result: Any,
) -> None:
    """Match all predictions and fill `result` [K, C] with the average precision.

    pred_segments [N, 2] by class, best first; pred_group [N] the group of its class and video, or -1;
    pred_begin [C + 1]; gt_segments [M, 2] by group; gt_real [M] false for duplicates; gt_begin [G + 1]; positives [C].
    Work space: taken [K, M], hit [K, N], all false.
    """
    for i in range(pred_segments.shape[0]):
        group = pred_group[i]
        if group < 0:
            continue
        start, stop = pred_segments[i, 0], pred_segments[i, 1]
        for k in range(thresholds.shape[0]):
            best, best_tiou = -1, thresholds[k]
            for j in range(gt_begin[group], gt_begin[group + 1]):
                if gt_real[j] and not taken[k, j]:
                    left = start if start > gt_segments[j, 0] else gt_segments[j, 0]
                    right = stop if stop < gt_segments[j, 1] else gt_segments[j, 1]
                    overlap = right - left if right > left else 0.0
                    tiou = overlap / ((gt_segments[j, 1] - gt_segments[j, 0]) + (stop - start) - overlap)
                    if tiou >= best_tiou:
                        best, best_tiou = j, tiou
            if best >= 0:
                taken[k, best] = True
                hit[k, i] = True

    for c in range(positives.shape[0]):
        for k in range(thresholds.shape[0]):
            if positives[c] == 0:
                result[k, c] = np.nan
                continue
            hits = 0
            for i in range(pred_begin[c], pred_begin[c + 1]):
                if hit[k, i]:
                    hits += 1
            # From the last prediction to the first: precision there, and the best precision from there on.
            area, best_precision = 0.0, 0.0
            for step in range(pred_begin[c + 1] - pred_begin[c]):
                i = pred_begin[c + 1] - 1 - step
                if hit[k, i]:
                    precision = hits / (i - pred_begin[c] + 1)
                    if precision > best_precision:
                        best_precision = precision
                    area += best_precision
                    hits -= 1
            result[k, c] = area / positives[c]


@compiled("void(float64[:,::1], int64[::1], float64, boolean[::1])")
def mark_duplicates_kernel(segments: Any, begin: Any, tolerance: float, real: Any) -> None:
    """real[j] = no earlier real event of the same group has both ends within `tolerance` seconds of segments[j]."""
    for group in range(begin.shape[0] - 1):
        for j in range(begin[group], begin[group + 1]):
            real[j] = True
            for other in range(begin[group], j):
                if real[other] and real[j]:
                    start_gap = segments[j, 0] - segments[other, 0]
                    stop_gap = segments[j, 1] - segments[other, 1]
                    near = -tolerance <= start_gap <= tolerance and -tolerance <= stop_gap <= tolerance
                    real[j] = not near
