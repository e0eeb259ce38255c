"""The compiled loop of `runtime.suppression`. Imported on the first call, as this brings numba in.

The released program suppresses every class to its end, then keeps the best of all. Here the classes advance
together: the class whose best remaining segment has the highest score gives up that segment and suppresses its
others. As suppression never raises a score, segments come out in their final order, and the first `max_segments` are
the result; most classes are never touched beyond the search for their best segment. Within a class the arithmetic
(float32, decays multiplied in one by one) and the order in memory, which decides ties, are the released program's.

The loop is written with scalars and given arrays only: every NumPy call in it would cost compile time.

Shapes:  N candidates   G classes   K segments kept
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from runtime.kernels.compile import compiled

START, STOP, LENGTH, SCORE = 0, 1, 2, 3
"""Columns of the working table."""

NONE = np.float32(-np.inf)
"""Score of the best segment of a class that has none left."""


@compiled(
    "int64(float32[:,::1], float32[::1], int64[::1], int64, boolean, float32, float32, float32,"
    " float32[:,::1], int64[::1], int64[:,::1], float32[::1], int64[::1], float32[::1])"
)
def suppress_kernel(
    segments: Any,
    scores: Any,
    labels: Any,
    first_label: int,
    soft: bool,
    sigma: Any,
    iou_threshold: Any,
    min_score: Any,
    table: Any,
    index: Any,
    groups: Any,
    best_score: Any,
    kept: Any,
    kept_scores: Any,
) -> int:
    """Fill `kept` [K] with candidate indices and `kept_scores` [K] with their final scores; returns how many.

    segments [N, 2], scores [N], labels [N] in [first_label, first_label + G); all candidates are one class where G
    is 1. Returns -1 - i when candidate i is not finite or ends before it starts.
    Work space: table [N, 4], index [N], groups [G, 3] zeros, best_score [G].
    """
    total, classes = scores.shape[0], best_score.shape[0]
    zero, epsilon = np.float32(0), np.float32(1e-6)

    # Candidates go into the table grouped by class, in their original order: class g owns rows groups[g, 0:2],
    # its best one is row groups[g, 2].
    for i in range(total):
        length = segments[i, 1] - segments[i, 0]
        if not (length >= zero and length < math.inf and scores[i] - scores[i] == zero):
            return -1 - i
        if soft or scores[i] > min_score:
            groups[labels[i] - first_label if classes > 1 else 0, 1] += 1
    row = 0
    for group in range(classes):
        groups[group, 0] = row
        row += groups[group, 1]
        groups[group, 1] = groups[group, 0]
        best_score[group] = NONE
    for i in range(total):
        if soft or scores[i] > min_score:
            group = labels[i] - first_label if classes > 1 else 0
            row = groups[group, 1]
            groups[group, 1] = row + 1
            index[row] = i
            table[row, START] = segments[i, 0]
            table[row, STOP] = segments[i, 1]
            table[row, LENGTH] = segments[i, 1] - segments[i, 0] + epsilon
            table[row, SCORE] = scores[i]
            if scores[i] > best_score[group]:
                best_score[group] = scores[i]
                groups[group, 2] = row

    count = 0
    while count < kept.shape[0]:
        group = 0
        for other in range(1, classes):
            if best_score[other] > best_score[group]:
                group = other
        if best_score[group] == NONE:
            break
        chosen = groups[group, 2]
        kept[count] = index[chosen]
        kept_scores[count] = best_score[group]
        count += 1
        start, stop, length = table[chosen, START], table[chosen, STOP], table[chosen, LENGTH]
        best_score[group] = NONE
        row, last = groups[group, 0], groups[group, 1]
        free = row
        if soft:  # the chosen segment leaves by trading places with the first one
            index[chosen] = index[row]
            for column in range(4):
                table[chosen, column] = table[row, column]
            row += 1
            groups[group, 0] = row
        while row < last:
            left = start if start > table[row, START] else table[row, START]
            right = stop if stop < table[row, STOP] else table[row, STOP]
            overlap = right - left if right > left else zero
            iou = overlap / (length + table[row, LENGTH] - overlap)
            if soft:
                if overlap > zero:
                    table[row, SCORE] *= math.exp(-(iou * iou) / sigma)
                if table[row, SCORE] < min_score:  # the last one takes the place of a dropped one, and is next
                    last -= 1
                    index[row] = index[last]
                    for column in range(4):
                        table[row, column] = table[last, column]
                    continue
                free = row
            else:
                if row == chosen or iou >= iou_threshold:
                    row += 1
                    continue
                index[free] = index[row]
                for column in range(4):
                    table[free, column] = table[row, column]
            if table[free, SCORE] > best_score[group]:
                best_score[group] = table[free, SCORE]
                groups[group, 2] = free
            row += 1
            free += 1
        groups[group, 1] = last if soft else free
    return count
