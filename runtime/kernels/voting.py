"""Compiled boundary voting of `runtime.suppression`. Imported when class-agnostic suppression first votes.

A vote is a weighted mean, so its float32 result depends on the order of the additions. The order here is that of the
released program's tensor library (its row sum and its matmul), so that results agree to the last bit.

Shapes:  N candidates   K segments kept
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.kernels.compile import compiled

BLOCK = 384
"""Terms the matmul adds up before it starts a new partial sum; up to twice as many are halved."""


@compiled("float32(float32[::1])")
def row_sum(values: Any) -> Any:
    """Sum of values [N]: 4 x 8 interleaved partial sums, each cascaded after every 16 and every 256 terms."""
    rounds, vectors = values.shape[0] // 32, values.shape[0] // 8
    levels = np.zeros((4, 32), np.float32)
    for turn in range(rounds):
        for lane in range(32):
            levels[0, lane] += values[turn * 32 + lane]
        for level in range(3):
            if (turn + 1) % 16 ** (level + 1) != 0:
                break
            for lane in range(32):
                levels[level + 1, lane] += levels[level, lane]
                levels[level, lane] = 0
    partial = levels[0]
    for level in range(1, 4):
        for lane in range(32):
            partial[lane] += levels[level, lane]
    for i in range(rounds * 32, vectors * 8):
        partial[i % 8] += values[i]
    total = np.float32(0)
    for i in range(vectors * 8, values.shape[0]):
        total += values[i]
    for lane in range(8):
        total += partial[lane] + partial[8 + lane] + partial[16 + lane] + partial[24 + lane]
    return total


@compiled("void(float32[:,::1], float32[::1], int64[::1], float32, float32[:,::1])")
def vote_kernel(segments: Any, scores: Any, kept: Any, threshold: Any, voted: Any) -> None:
    """`voted[j]` = mean of all segments [N, 2] with IoU >= threshold to segment `kept[j]`, weighted by scores [N].

    A segment nobody votes for (of no length or of score 0) stays as it is.
    """
    count = segments.shape[0]
    weights = np.empty(count, np.float32)
    for j in range(kept.shape[0]):
        left, right = segments[kept[j], 0], segments[kept[j], 1]
        for i in range(count):
            overlap = min(right, segments[i, 1]) - max(left, segments[i, 0])
            union = (right - left) + (segments[i, 1] - segments[i, 0]) - overlap
            votes = overlap > np.float32(0) and overlap / union >= threshold
            weights[i] = scores[i] if votes else np.float32(0)
        total = row_sum(weights)
        if total <= np.float32(0):
            voted[j, 0], voted[j, 1] = left, right
            continue
        voted[j, 0] = voted[j, 1] = np.float32(0)
        done = 0
        while done < count:
            rest = count - done
            size = BLOCK if rest >= 2 * BLOCK else (rest + 1) // 2 if rest > BLOCK else rest
            start, end = np.float32(0), np.float32(0)
            for i in range(done, done + size):
                share = np.float64(weights[i] / total)
                # Multiply and add with one rounding, as the fused instruction does.
                start = np.float32(start + share * segments[i, 0])
                end = np.float32(end + share * segments[i, 1])
            voted[j, 0] += start
            voted[j, 1] += end
            done += size
