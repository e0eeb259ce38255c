"""Predictions and ground truth of one subset as flat tables, and what each predicted event lies closest to.

Shapes:  N predictions   M ground-truth events   V videos   C classes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.annotations import VideoAnnotation
from runtime.average_precision import match
from runtime.detections import Detections

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Truth:
    """The annotated events of all videos, video by video."""

    video: Integers
    """[M] index of the video."""
    segments: Floats
    """[M, 2] seconds."""
    labels: Integers
    """[M]"""
    durations: Floats
    """[V] seconds of each video."""
    num_classes: int


@dataclass(frozen=True)
class Predicted:
    """The predicted events of all videos, video by video, each video's in the order of its detections."""

    video: Integers
    """[N] index of the video."""
    segments: Floats
    """[N, 2] seconds."""
    labels: Integers
    """[N]"""
    scores: npt.NDArray[np.float32]
    """[N]"""

    def take(self, index: Integers | Flags) -> Predicted:
        """Return some of the events, by number or by flag."""
        return Predicted(self.video[index], self.segments[index], self.labels[index], self.scores[index])

    def changed(self, segments: Floats, labels: Integers) -> Predicted:
        """Return the events with other segments and labels."""
        return Predicted(self.video, segments, labels, self.scores)


@dataclass(frozen=True)
class Matching:
    """What the metric says of every prediction and event, at K thresholds."""

    ap: Floats
    """[K, C] average precision; NaN for a class without annotated events."""
    hit: Flags
    """[K, N] whether a prediction took an event."""
    found: Flags
    """[K, M] whether an event was taken."""
    counted: Flags
    """[M] false for an event that duplicates another one."""


@dataclass(frozen=True)
class Closest:
    """For each predicted event, the annotated event with the highest tIoU: of its class, and of all others.

    Where there is none, the tIoU is 0 and the event -1.
    """

    same_tiou: Floats
    """[N]"""
    same: Integers
    """[N] number of the annotated event."""
    other_tiou: Floats
    """[N]"""
    other: Integers
    """[N]"""


def truth_table(videos: Sequence[VideoAnnotation], num_classes: int) -> Truth:
    """Return the annotated events of these videos."""
    return Truth(
        np.repeat(np.arange(len(videos)), [len(video.labels) for video in videos]),
        np.concatenate([np.empty((0, 2)), *(video.segments for video in videos)]),
        np.concatenate([np.empty(0, np.int64), *(video.labels for video in videos)]),
        np.array([video.duration for video in videos]),
        num_classes,
    )


def prediction_table(videos: Sequence[VideoAnnotation], predictions: Mapping[str, Detections]) -> Predicted:
    """Return the predicted events of these videos; a video without predictions has none."""
    found = [(i, predictions[v.video_id]) for i, v in enumerate(videos) if v.video_id in predictions]
    return Predicted(
        np.repeat(np.array([i for i, _ in found], np.int64), [len(detections) for _, detections in found]),
        np.concatenate([np.empty((0, 2)), *(detections.segments for _, detections in found)]),
        np.concatenate([np.empty(0, np.int64), *(detections.labels for _, detections in found)]),
        np.concatenate([np.empty(0, np.float32), *(detections.scores for _, detections in found)]),
    )


def match_tables(predicted: Predicted, truth: Truth, thresholds: Sequence[float]) -> Matching:
    """Match predictions with ground truth at tIoU thresholds, by the metric's own matching."""
    matches = match(
        predicted.video,
        predicted.segments,
        predicted.scores,
        predicted.labels,
        truth.video,
        truth.segments,
        truth.labels,
        truth.num_classes,
        thresholds,
    )
    hit = np.empty_like(matches.hit)
    hit[:, matches.order] = matches.hit
    return Matching(matches.average_precision(), hit, matches.found, matches.counted)


def find_closest(predicted: Predicted, truth: Truth, counted: Flags) -> Closest:
    """Return what each predicted event lies closest to. Annotated events that are not `counted` are passed over."""
    count, videos = len(predicted.labels), len(truth.durations)
    same_tiou, other_tiou = np.zeros(count), np.zeros(count)
    same, other = np.full(count, -1), np.full(count, -1)
    events = np.flatnonzero(counted)
    begin = np.searchsorted(predicted.video, np.arange(videos + 1))
    first = np.searchsorted(truth.video[events], np.arange(videos + 1))
    for video in range(videos):
        here = slice(begin[video], begin[video + 1])
        there = events[first[video] : first[video + 1]]
        if here.start == here.stop or len(there) == 0:
            continue
        tiou = pairwise_tiou(predicted.segments[here], truth.segments[there])
        alike = predicted.labels[here, None] == truth.labels[None, there]
        for values, best_tiou, best in (
            (np.where(alike, tiou, 0), same_tiou, same),
            (np.where(alike, 0, tiou), other_tiou, other),
        ):
            closest = values.argmax(axis=1)
            best_tiou[here] = values.max(axis=1)
            best[here] = np.where(best_tiou[here] > 0, there[closest], -1)
    return Closest(same_tiou, same, other_tiou, other)


def pairwise_tiou(first: Floats, second: Floats) -> Floats:
    """Return the tIoU [N, M] of segments [N, 2] with segments [M, 2] that have a length."""
    left = np.maximum(first[:, None, 0], second[None, :, 0])
    right = np.minimum(first[:, None, 1], second[None, :, 1])
    overlap = np.maximum(right - left, 0)
    lengths = np.diff(second).T + np.diff(first)
    tiou: Floats = overlap / (lengths - overlap)
    return tiou
