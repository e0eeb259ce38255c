"""Average precision over temporal IoU thresholds as UnAV-100's evaluation computes it.

Shapes:  N predictions   M ground-truth events   C classes   K thresholds
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.errors import AnnotationError, CCNetError, ConfigError, PredictionError
from runtime.kernels.library import address, kernels

DUPLICATE_SECONDS = 1e-3
"""Ground truth of one video and class with both ends this close counts once."""


def average_precision(
    pred_video: npt.ArrayLike,
    pred_segments: npt.ArrayLike,
    pred_scores: npt.ArrayLike,
    pred_labels: npt.ArrayLike,
    gt_video: npt.ArrayLike,
    gt_segments: npt.ArrayLike,
    gt_labels: npt.ArrayLike,
    num_classes: int,
    tiou_thresholds: npt.ArrayLike,
) -> npt.NDArray[np.float64]:
    """Predictions (video [N], segments [N, 2] s, scores [N], labels [N]) against ground truth (video [M], segments
    [M, 2] s, labels [M]) -> AP [K, num_classes].

    Videos are integer ids; predictions for a video without ground truth count as wrong. Per class, predictions of all
    videos go best first; each takes the not yet taken event of its video and class with the highest tIoU, if that is
    at least the threshold. AP is the area under the interpolated precision-recall curve, all points.

    A class without ground truth has no average precision: its column is NaN, and the mean over classes leaves it out
    (`numpy.nanmean`), as the released evaluation does.

    Ties: of equal scores the earlier prediction goes first; of equal tIoU the later event is taken.

    Raises PredictionError or AnnotationError for arrays whose shapes, types or values do not fit (not finite, a
    segment that ends before it starts, a label outside 0..C-1), ConfigError for thresholds outside (0, 1].
    """
    predictions = (pred_video, pred_segments, pred_scores, pred_labels)
    return match(*predictions, gt_video, gt_segments, gt_labels, num_classes, tiou_thresholds).average_precision()


@dataclass(frozen=True)
class Matches:
    """Which predictions find an event: what average precision follows from, however often a video counts.

    Predictions stand by class, best first. Events that duplicate another one are left out.
    """

    hit: npt.NDArray[np.bool_]
    """[K, N] whether a prediction takes an event at a threshold."""
    video: npt.NDArray[np.int64]
    """[N]"""
    scores: npt.NDArray[np.float64]
    """[N]"""
    labels: npt.NDArray[np.int64]
    """[N], ascending."""
    truth_video: npt.NDArray[np.int64]
    """[M]"""
    truth_labels: npt.NDArray[np.int64]
    """[M]"""
    num_classes: int
    order: npt.NDArray[np.int64]
    """[N] the number of each prediction as it was given."""
    found: npt.NDArray[np.bool_]
    """[K, all events as they were given] whether an event is taken at a threshold."""
    counted: npt.NDArray[np.bool_]
    """[all events as they were given] false for those that duplicate another one."""

    def average_precision(self, counts: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float64]:
        """Return AP [K, C]; see `average_precision`. `counts` [V]: how often each video counts, 0 or more; None: once.

        Video ids then are 0..V-1. A video that counts twice is as good as two videos with the same content.
        """
        if counts is None:
            return self.weighted(np.ones(len(self.video), np.int64), np.ones(len(self.truth_video), np.int64))
        return self.weighted(counts[self.video], counts[self.truth_video])

    def weighted(self, weights: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return AP [K, C] where predictions count `weights` [N] and events `truth` [M] times."""
        positives = np.zeros(self.num_classes, np.int64)
        np.add.at(positives, self.truth_labels, truth)
        begin = np.searchsorted(self.labels, np.arange(self.num_classes + 1)).astype(np.int64)
        result = np.empty((len(self.hit), self.num_classes), np.float64)
        weights = np.ascontiguousarray(weights, np.int64)
        kernels().ccnet_average_precision(
            self.num_classes,
            len(self.hit),
            len(self.video),
            *(address(array) for array in (self.hit, weights, begin, positives, result)),
        )
        return result


def match(
    pred_video: npt.ArrayLike,
    pred_segments: npt.ArrayLike,
    pred_scores: npt.ArrayLike,
    pred_labels: npt.ArrayLike,
    gt_video: npt.ArrayLike,
    gt_segments: npt.ArrayLike,
    gt_labels: npt.ArrayLike,
    num_classes: int,
    tiou_thresholds: npt.ArrayLike,
) -> Matches:
    """Match predictions with events as `average_precision` does, which says what it takes and raises."""
    thresholds = _check_thresholds(tiou_thresholds)
    video, segments, labels = _check("pred", pred_video, pred_segments, pred_labels, num_classes, PredictionError)
    scores = np.asarray(pred_scores)
    if scores.shape != video.shape or scores.dtype.kind not in "fiu":
        raise PredictionError(f"pred_scores: got {scores.dtype} {list(scores.shape)}, expected numbers [{len(video)}]")
    if not np.isfinite(scores).all():
        raise PredictionError(f"pred_scores: entry {int(np.argmin(np.isfinite(scores)))} is not finite")
    gt = _check("gt", gt_video, gt_segments, gt_labels, num_classes, AnnotationError)

    order = np.lexsort((-scores.astype(np.float64), labels))
    truth = _GroundTruth(*gt)
    predictions, groups = segments[order], truth.groups_of(video[order], labels[order])
    taken = np.zeros((len(thresholds), len(truth.segments)), np.bool_)
    hit = np.zeros((len(thresholds), len(order)), np.bool_)
    arrays = (predictions, groups, truth.segments, truth.real, truth.begin, thresholds, taken, hit)
    kernels().ccnet_match(len(thresholds), len(order), len(truth.segments), *map(address, arrays))
    found, counted = np.empty_like(taken), np.empty_like(truth.real)
    found[:, truth.order], counted[truth.order] = taken, truth.real
    return Matches(
        hit=hit,
        video=video[order],
        scores=scores[order].astype(np.float64),
        labels=labels[order],
        truth_video=truth.video[truth.real],
        truth_labels=truth.labels[truth.real],
        num_classes=num_classes,
        order=order,
        found=found,
        counted=counted,
    )


class _GroundTruth:
    """Ground truth grouped by (class, video), in its original order within a group."""

    def __init__(
        self,
        video: npt.NDArray[np.int64],
        segments: npt.NDArray[np.float64],
        labels: npt.NDArray[np.int64],
    ) -> None:
        self.videos, index = np.unique(video, return_inverse=True)
        keys = labels * len(self.videos) + index
        self.order = order = np.argsort(keys, kind="stable")
        self.segments, self.video, self.labels = segments[order], video[order], labels[order]
        self.keys, first = np.unique(keys[order], return_index=True)
        self.begin = np.append(first, len(keys)).astype(np.int64)
        self.real = np.empty(len(keys), np.bool_)
        kernels().ccnet_mark_duplicates(
            len(self.keys), address(self.segments), address(self.begin), DUPLICATE_SECONDS, address(self.real)
        )

    def groups_of(self, video: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the group of each (video, label), -1 where there is no such ground truth."""
        if len(self.keys) == 0:
            return np.full(len(video), -1, np.int64)
        index = np.searchsorted(self.videos, video).clip(max=len(self.videos) - 1)
        keys = np.where(self.videos[index] == video, labels * len(self.videos) + index, -1)
        group = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[group] == keys, group, -1)


def _check_thresholds(tiou_thresholds: npt.ArrayLike) -> npt.NDArray[np.float64]:
    thresholds = np.asarray(tiou_thresholds)
    good = thresholds.ndim == 1 and thresholds.size > 0 and thresholds.dtype.kind in "fiu"
    if not good or not ((thresholds > 0) & (thresholds <= 1)).all():
        raise ConfigError(f"tiou_thresholds: got {tiou_thresholds!r}, expected one or more numbers in (0, 1]")
    return np.ascontiguousarray(thresholds, np.float64)


def _check(
    kind: str,
    video: npt.ArrayLike,
    segments: npt.ArrayLike,
    labels: npt.ArrayLike,
    num_classes: int,
    error: type[CCNetError],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    ids, boundaries, classes = np.asarray(video), np.asarray(segments), np.asarray(labels)
    count = ids.shape[0] if ids.ndim == 1 else -1
    if count < 0 or boundaries.shape != (count, 2) or classes.shape != (count,):
        shapes = f"{list(ids.shape)}, {list(boundaries.shape)}, {list(classes.shape)}"
        raise error(f"{kind}_video, {kind}_segments, {kind}_labels: got shapes {shapes}, expected [N], [N, 2], [N]")
    for name, array, kinds in (("video", ids, "iu"), ("segments", boundaries, "fiu"), ("labels", classes, "iu")):
        if count and array.dtype.kind not in kinds:
            expected = "integers" if kinds == "iu" else "numbers"
            raise error(f"{kind}_{name}: got dtype {array.dtype}, expected {expected}")
    ends = boundaries[:, 1] > boundaries[:, 0] if kind == "gt" else boundaries[:, 1] >= boundaries[:, 0]
    good = np.isfinite(boundaries).all(axis=1) & ends
    if not good.all():
        index = int(np.argmin(good))
        relation = "start < end" if kind == "gt" else "start <= end"
        raise error(f"{kind}_segments: entry {index} is {boundaries[index].tolist()}, expected finite, {relation}")
    if count and not 0 <= classes.min() <= classes.max() < num_classes:
        index = int(np.argmax((classes < 0) | (classes >= num_classes)))
        raise error(f"{kind}_labels: entry {index} is {int(classes[index])}, expected 0 to {num_classes - 1}")
    return (
        np.ascontiguousarray(ids, np.int64),
        np.ascontiguousarray(boundaries, np.float64),
        np.ascontiguousarray(classes, np.int64),
    )
