"""Plain NumPy versions of suppression and metric to compare with: the rules written down, nothing clever.

Shapes:  N candidates or predictions   M ground-truth events   K tIoU thresholds
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def plain_soft_nms(
    segments: Array, scores: Array, labels: Array, *, sigma: float, min_score: float, max_segments: int
) -> tuple[Array, Array, Array]:
    """Run Gaussian Soft-NMS of every class to its end and keep the best. segments [N, 2], scores [N], labels [N]."""
    kept_segments, kept_scores, kept_labels = [], [], []
    for label in np.unique(labels):
        member = labels == label
        segment, score = segments[member], scores[member].copy()
        while len(score):
            top = int(np.argmax(score))
            kept_segments.append(segment[top])
            kept_scores.append(score[top])
            kept_labels.append(label)
            best = segment[top]
            segment, score = np.delete(segment, top, axis=0), np.delete(score, top)
            overlap = np.minimum(best[1], segment[:, 1]) - np.maximum(best[0], segment[:, 0])
            overlap = np.clip(overlap, 0, None)
            length = segment[:, 1] - segment[:, 0] + 1e-6
            iou = overlap / (best[1] - best[0] + 1e-6 + length - overlap)
            score = score * np.exp(-(iou**2) / sigma)
            segment, score = segment[score >= min_score], score[score >= min_score]
    order = np.argsort(-np.array(kept_scores), kind="stable")[:max_segments]
    return np.array(kept_segments)[order], np.array(kept_scores)[order], np.array(kept_labels)[order]


def plain_average_precision(
    pred_video: Array,
    pred_segments: Array,
    pred_scores: Array,
    pred_labels: Array,
    gt_video: Array,
    gt_segments: Array,
    gt_labels: Array,
    num_classes: int,
    tiou_thresholds: Array,
) -> Array:
    """Return AP [K, num_classes], one prediction at a time; ground truth without near-duplicates is expected."""
    result = np.full((len(tiou_thresholds), num_classes), np.nan)
    for label in range(num_classes):
        of_class = np.flatnonzero(gt_labels == label)
        if len(of_class) == 0:
            continue
        events_of: dict[int, list[int]] = {}
        for index in of_class.tolist():
            events_of.setdefault(int(gt_video[index]), []).append(index)
        ranked = np.flatnonzero(pred_labels == label)
        ranked = ranked[np.argsort(-pred_scores[ranked], kind="stable")]
        hits = np.zeros((len(tiou_thresholds), len(ranked)), bool)
        taken = np.zeros((len(tiou_thresholds), len(gt_labels)), bool)
        for rank, index in enumerate(ranked.tolist()):
            events = events_of.get(int(pred_video[index]))
            if events is None:
                continue
            start, stop = pred_segments[index]
            truth = gt_segments[events]
            overlap = np.clip(np.minimum(stop, truth[:, 1]) - np.maximum(start, truth[:, 0]), 0, None)
            tiou = overlap / ((truth[:, 1] - truth[:, 0]) + (stop - start) - overlap)
            for k, threshold in enumerate(tiou_thresholds):
                for j in np.argsort(-tiou).tolist():
                    if tiou[j] < threshold:
                        break
                    if not taken[k, events[j]]:
                        taken[k, events[j]] = hits[k, rank] = True
                        break
        count = np.cumsum(hits, axis=1)
        precision = count / np.arange(1, len(ranked) + 1)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        result[:, label] = (envelope * hits).sum(axis=1) / len(of_class)
    return result
