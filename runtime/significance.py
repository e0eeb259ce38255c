"""How sure is a score, and a difference of scores? Bootstrap intervals over videos, and a paired randomization test.

Videos are the units: they are drawn with replacement, each with all its events and predictions. Matching predictions
with events does not depend on the other videos, so it is done once, and a draw only changes how often a video counts.

Shapes:  V videos of a subset   S draws   N predictions   K tIoU thresholds   C classes   U duration buckets
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.average_precision import Matches
from runtime.schema import require

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

COVERAGE = 0.95
"""Share of the draws that lie inside an interval."""


@dataclass(frozen=True)
class VideoScores:
    """What a method found in each video of a subset: all that a draw of videos needs."""

    matches: Matches
    """Video ids are 0..V-1."""
    events: Ints
    """[V, U] ground-truth events of a video in each duration bucket."""
    found: Ints
    """[V, U] those among them that are found."""

    @property
    def videos(self) -> int:
        """V"""
        return len(self.events)

    def map_at(self, counts: Ints | None = None) -> Floats:
        """Return mAP [K] where each video counts `counts` [V] times; None: once."""
        return mean_over_classes(self.matches.average_precision(counts))

    def recall(self, counts: Ints | None = None) -> Floats:
        """Return the share of events found [U]; NaN for a bucket without events."""
        weights = np.ones(self.videos, np.int64) if counts is None else counts
        events = weights @ self.events
        return np.where(events > 0, weights @ self.found / np.maximum(events, 1), np.nan)


@dataclass(frozen=True)
class Draws:
    """Scores of several methods on the same draws of videos."""

    map_at: Floats
    """[methods, S, K]"""
    recall: Floats
    """[methods, S, U]"""

    @property
    def average_map(self) -> Floats:
        """[methods, S]"""
        average: Floats = self.map_at.mean(axis=2)
        return average


def bootstrap(methods: Sequence[VideoScores], *, samples: int, seed: int) -> Draws:
    """Score methods on `samples` draws of V videos with replacement, all methods on the same draws."""
    require(samples >= 1, "samples", samples, "an integer >= 1")
    videos = methods[0].videos
    rng = np.random.default_rng(seed)
    draws = [np.bincount(rng.integers(0, videos, videos), minlength=videos) for _ in range(samples)]
    return Draws(
        map_at=np.array([[method.map_at(counts) for counts in draws] for method in methods]),
        recall=np.array([[method.recall(counts) for counts in draws] for method in methods]),
    )


def interval(score: float, draws: Floats) -> tuple[float, float]:
    """Return the interval of `COVERAGE` around a score, as wide as its draws [S] scatter; NaN among them is left out.

    Draws of videos that are there twice score higher on average, the more so the fewer events a class has, so that
    their percentiles often lie above the score. They are moved by that difference: the result holds the expected score
    on test sets of this size as often as it says (tests/test_significance.py).
    """
    kept = draws[np.isfinite(draws)]
    if len(kept) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]) + (score - kept.mean())
    return float(low), float(high)


def randomization_test(first: VideoScores, second: VideoScores, *, samples: int, seed: int) -> float:
    """Return the p-value of the difference in average mAP, two-sided, of a paired randomization test.

    If the methods were equally good, it would not matter which one's predictions of a video are called whose: for each
    of `samples` random exchanges, video by video, the difference is taken. p is the share of them, the true one
    included, in which it is at least as large.
    """
    require(samples >= 1, "samples", samples, "an integer >= 1")
    both = _joined(first.matches, second.matches, first.videos)
    of_second = both.video >= first.videos
    video = both.video % first.videos
    ones = np.ones(len(both.truth_video), np.int64)

    def difference(exchanged: npt.NDArray[np.bool_]) -> float:
        taken = exchanged[video] == of_second  # by the method called the first
        return _average(both, taken, ones) - _average(both, ~taken, ones)

    observed = abs(difference(np.zeros(first.videos, np.bool_)))
    extreme = sum(
        abs(difference(exchanged)) >= observed - 1e-12 for exchanged in _exchanges(first.videos, samples, seed)
    )
    return (1 + extreme) / (1 + samples)


def mean_over_classes(ap: Floats) -> Floats:
    """Return the mean [K] of AP [K, C] over the classes that have ground truth; NaN where none has."""
    known = np.isfinite(ap)
    count = known.sum(axis=1)
    return np.where(count > 0, np.where(known, ap, 0.0).sum(axis=1) / np.maximum(count, 1), np.nan)


def _exchanges(videos: int, samples: int, seed: int) -> Iterator[npt.NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    for _ in range(samples):
        yield rng.integers(0, 2, videos).astype(np.bool_)


def _joined(first: Matches, second: Matches, videos: int) -> Matches:
    """Return the predictions of both as one list, those of `second` with video ids from V on."""
    labels = np.concatenate([first.labels, second.labels])
    scores = np.concatenate([first.scores, second.scores])
    order = np.lexsort((-scores, labels))
    return dataclasses.replace(
        first,
        hit=np.ascontiguousarray(np.concatenate([first.hit, second.hit], axis=1)[:, order]),
        video=np.concatenate([first.video, second.video + videos])[order],
        scores=scores[order],
        labels=labels[order],
    )


def _average(matches: Matches, taken: npt.NDArray[np.bool_], truth: Ints) -> float:
    return float(mean_over_classes(matches.weighted(taken.astype(np.int64), truth)).mean())
