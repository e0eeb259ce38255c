"""Bootstrap over videos and the paired test: against plain resampling, and against what is known beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.average_precision import Matches, average_precision, match
from runtime.errors import ConfigError
from runtime.significance import VideoScores, bootstrap, interval, mean_over_classes, randomization_test

TIOU = (0.3, 0.5)
CLASSES = 3


def events(rng: np.random.Generator, videos: int) -> tuple[Any, Any, Any]:
    """Return video [M], segments [M, 2], labels [M]: three events a video."""
    start = rng.uniform(0, 50, 3 * videos)
    segments = np.stack([start, start + rng.uniform(1, 9, 3 * videos)], axis=1)
    return np.repeat(np.arange(videos), 3), segments, rng.integers(0, CLASSES, 3 * videos)


def predictions(rng: np.random.Generator, truth: tuple[Any, Any, Any], noise: float) -> tuple[Any, Any, Any, Any]:
    """Return video, segments, scores, labels: every event with shifted ends, and as many false ones."""
    video, segments, labels = truth
    shifted = np.sort(segments + rng.normal(0, noise, segments.shape), axis=1)
    other = np.sort(rng.uniform(0, 60, segments.shape), axis=1)
    return (
        np.concatenate([video, video]),
        np.concatenate([shifted, other]),
        rng.uniform(0, 1, 2 * len(video)),  # all different
        np.concatenate([labels, labels]),
    )


def scored(truth: tuple[Any, Any, Any], predicted: tuple[Any, Any, Any, Any], videos: int) -> VideoScores:
    counts = np.bincount(truth[0], minlength=videos)[:, None]
    return VideoScores(match(*predicted, *truth, CLASSES, TIOU), counts, counts // 2)


def copied(arrays: tuple[Any, ...], counts: Any) -> Any:
    """Return events or predictions as if every video were there `counts` times under other names."""
    video, *rest = arrays
    rows = [(v, copy, i) for i, v in enumerate(video) for copy in range(counts[v])]
    index = np.array([i for _, _, i in rows], np.int64)
    return [np.array([1000 * copy + v for v, copy, _ in rows], np.int64), *(array[index] for array in rest)]


def test_a_video_that_counts_twice_is_two_videos() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        truth = events(rng, 20)
        predicted = predictions(rng, truth, 1.0)
        counts = rng.integers(0, 4, 20)
        arguments: Any = [*copied(predicted, counts), *copied(truth, counts), CLASSES, TIOU]
        expected = average_precision(*arguments)
        got = match(*predicted, *truth, CLASSES, TIOU).average_precision(counts)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_every_video_once_is_the_score_itself() -> None:
    rng = np.random.default_rng(1)
    truth = events(rng, 30)
    predicted = predictions(rng, truth, 1.0)
    found = match(*predicted, *truth, CLASSES, TIOU)
    np.testing.assert_array_equal(found.average_precision(np.ones(30, np.int64)), found.average_precision())
    np.testing.assert_array_equal(found.average_precision(), average_precision(*predicted, *truth, CLASSES, TIOU))


def test_intervals_hold_the_score_and_shrink_with_more_videos() -> None:
    rng = np.random.default_rng(2)
    widths = []
    for videos in (25, 400):
        truth = events(rng, videos)
        method = scored(truth, predictions(rng, truth, 1.0), videos)
        draws = bootstrap([method], samples=200, seed=0)
        low, high = interval(method.map_at().mean(), draws.average_map[0])
        assert low < method.map_at().mean() < high
        widths.append(high - low)
    # 16 times as many videos: a quarter of the width in the limit.
    assert 0.15 < widths[1] / widths[0] < 0.5  # measured: 0.37


def test_intervals_hold_the_expected_score_as_often_as_they_say() -> None:
    """Also with few events in a class, where plain percentiles of the draws lie too high."""
    scores, draws = [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        truth = events(rng, 10)
        method = scored(truth, predictions(rng, truth, 1.0), 10)
        scores.append(method.map_at().mean())
        draws.append(bootstrap([method], samples=100, seed=seed).average_map[0])
    expected = np.mean(scores)
    intervals = [interval(score, values) for score, values in zip(scores, draws, strict=True)]
    inside = np.mean([low <= expected <= high for low, high in intervals])
    plain = np.mean([np.quantile(v, 0.025) <= expected <= np.quantile(v, 0.975) for v in draws])
    assert inside > plain + 0.05  # measured: 0.91 and 0.80
    assert inside > 0.85


def test_the_test_tells_a_worse_method_and_not_the_same_one() -> None:
    rng = np.random.default_rng(3)
    truth = events(rng, 60)
    first, worse = (scored(truth, predictions(rng, truth, noise), 60) for noise in (1.0, 3.0))
    assert randomization_test(first, worse, samples=199, seed=0) == pytest.approx(1 / 200)
    assert randomization_test(first, first, samples=99, seed=0) == 1.0


def test_p_values_are_uniform_where_nothing_differs() -> None:
    values = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = events(rng, 12)
        pair = (scored(truth, predictions(rng, truth, 2.0), 12) for _ in range(2))
        values.append(randomization_test(*pair, samples=49, seed=seed))
    assert 0.35 < float(np.mean(values)) < 0.65  # measured: 0.56
    assert np.mean(np.array(values) < 0.2) < 0.3  # measured: 0.13


def test_recall_by_bucket() -> None:
    nothing = Matches(
        hit=np.zeros((1, 0), np.bool_),
        video=np.zeros(0, np.int64),
        scores=np.zeros(0),
        labels=np.zeros(0, np.int64),
        truth_video=np.array([0, 1]),
        truth_labels=np.array([0, 0]),
        num_classes=2,
        order=np.zeros(0, np.int64),
        found=np.zeros((1, 2), np.bool_),
        counted=np.ones(2, np.bool_),
    )
    method = VideoScores(nothing, np.array([[2, 0], [1, 0]]), np.array([[1, 0], [1, 0]]))
    np.testing.assert_array_equal(method.recall(), [2 / 3, np.nan])
    np.testing.assert_array_equal(method.recall(np.array([0, 2])), [1.0, np.nan])
    assert method.map_at().tolist() == [0.0]  # the class without events is left out
    assert np.isnan(mean_over_classes(np.array([[np.nan, np.nan]]))).all()
    with pytest.raises(ConfigError, match="samples: got 0"):
        bootstrap([method], samples=0, seed=0)
