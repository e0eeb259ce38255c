"""Post-processing in plain NumPy, float32 as the kernels do it: what they are compared with, bit by bit.

Shapes:  P points of all levels   C classes   N candidates
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.spec import ModelSpec, PointGrid, PostProcessing

Arrays = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


class Bad(Exception):
    """An output that is refused; the text is how the error of the runtime begins."""


def decode_oracle(logits: Any, offsets: Any, valid_steps: int, grid: PointGrid, post: PostProcessing) -> Arrays:
    """Do what `runtime.decode.decode` does."""
    classes = logits.shape[1]
    values = logits.ravel()
    chosen = []
    for level, stride in zip(grid.level_slices, grid.strides, strict=True):
        start, stop = level.start * classes, (level.start - (-valid_steps // stride)) * classes
        finite = np.isfinite(values[start:stop])
        if not finite.all():
            raise Bad(f"logits: not finite at point {(start + int(np.argmin(finite))) // classes};")
        score = post.pre_nms_score
        below = np.float32(math.log(score / (1 - score)) - 1e-3 if score > 0 else -math.inf)
        index = np.flatnonzero(values[start:stop] > below) + start
        chosen.append(index[np.argsort(-values[index], kind="stable")][: post.pre_nms_top_k])
    entry = np.concatenate(chosen)
    point, label = entry // classes, entry % classes
    one = np.float32(1)
    score = one / (one + np.exp(-np.maximum(values[entry], np.float32(-80))))
    distance = offsets.reshape(-1, 2)[entry]
    finite = np.isfinite(distance).all(axis=1)
    if not finite.all():
        raise Bad(f"offsets: not finite at point {point[np.argmin(finite)]};")
    centre, stride_of = grid.positions[point], grid.point_strides[point]
    with np.errstate(over="ignore"):
        segments = np.stack([centre - distance[:, 0] * stride_of, centre + distance[:, 1] * stride_of], axis=1)
        length = segments[:, 1] - segments[:, 0]
    keep = (score > np.float32(post.pre_nms_score)) & (length > np.float32(post.min_length))
    return segments[keep], score[keep], label[keep]


def suppress_oracle(segments: Any, scores: Any, labels: Any, post: PostProcessing) -> Arrays:
    """Do what `runtime.suppression.suppress` does, without voting: every class to its end, then the best of all."""
    with np.errstate(over="ignore"):
        good = np.isfinite(segments[:, 1] - segments[:, 0])
    if not good.all():
        i = int(np.argmin(good))
        start, end = segments[i].tolist()
        raise Bad(f"candidate {i}: got segment [{start}, {end}] with score {float(scores[i])},")
    if post.method == "none":
        kept = np.lexsort((labels, -scores))
        kept = kept[scores[kept] >= np.float32(post.min_score)][: post.max_segments]
        return segments[kept], scores[kept], labels[kept]
    found = []
    for group in np.unique(labels) if post.multiclass else [None]:
        rows = np.flatnonzero(np.ones(len(labels), bool) if group is None else labels == group)
        run = _soft if post.method == "soft" else _hard
        found += [(index, score) for index, score in run(rows, segments, scores[rows].copy(), post)]
    order = np.argsort([-float(score) for _, score in found], kind="stable")[: post.max_segments]
    kept = np.array([found[i][0] for i in order], np.int64)
    return segments[kept], np.array([found[i][1] for i in order], np.float32), labels[kept]


def detect_oracle(
    logits: Any, offsets: Any, valid_steps: int, duration: float, spec: ModelSpec, post: PostProcessing
) -> Arrays:
    """Do what `runtime.postprocess.detect` does."""
    candidates = decode_oracle(logits, offsets, valid_steps, spec.grid, post)
    segments, scores, labels = suppress_oracle(*candidates, post)
    seconds = np.clip(spec.time_base.to_seconds(segments.astype(np.float64)), 0.0, duration)
    inside = seconds[:, 1] > seconds[:, 0]
    return seconds[inside], scores[inside], labels[inside]


def _soft(rows: Any, segments: Any, scores: Any, post: PostProcessing) -> Any:
    """Run the released program's loop: the best trades places with the first, the last replaces a dropped one."""
    while len(rows):
        best = int(scores.argmax())
        yield rows[best], scores[best]
        chosen = segments[rows[best]]
        rows[best], scores[best] = rows[0], scores[0]
        rows, scores = rows[1:], scores[1:]
        overlap, iou = _iou(chosen, segments[rows])
        decay = _exp(-(iou * iou) / np.float32(post.sigma))
        scores = np.where(overlap > 0, scores * decay, scores)
        row, last = 0, len(rows)
        while row < last:
            if scores[row] < np.float32(post.min_score):
                last -= 1
                rows[row], scores[row] = rows[last], scores[last]
            else:
                row += 1
        rows, scores = rows[:last], scores[:last]


def _hard(rows: Any, segments: Any, scores: Any, post: PostProcessing) -> Any:
    stays = scores > np.float32(post.min_score)
    while stays.any():
        rows, scores = rows[stays], scores[stays]
        best = int(scores.argmax())
        yield rows[best], scores[best]
        stays = _iou(segments[rows[best]], segments[rows])[1] < np.float32(post.iou_threshold)
        stays[best] = False


def _iou(one: Any, others: Any) -> Any:
    """Return overlap and IoU in float32; a length counts as end - start + 1e-6."""
    length, lengths = (s[..., 1] - s[..., 0] + np.float32(1e-6) for s in (one, others))
    overlap = np.maximum(np.minimum(one[1], others[:, 1]) - np.maximum(one[0], others[:, 0]), np.float32(0))
    with np.errstate(over="ignore"):
        return overlap, overlap / (length + lengths - overlap)


_POWERS = 2.0 ** (np.arange(32) / 32)


def _exp(x: Any) -> Any:
    """Return exp of float32 in double precision, 2^(k/32) times a polynomial: glibc's steps, rounded once."""
    scaled = x.astype(np.float64) * float.fromhex("0x1.71547652b82fep+5")
    k = np.rint(scaled)
    rest = scaled - k
    upper = float.fromhex("0x1.c6af84b912394p-20") * rest + float.fromhex("0x1.ebfce50fac4f3p-13")
    series = upper * (rest * rest) + (float.fromhex("0x1.62e42ff0c52d6p-6") * rest + 1.0)
    whole, part = np.divmod(k.astype(np.int64), 32)
    return (series * np.ldexp(_POWERS[part], whole)).astype(np.float32)
