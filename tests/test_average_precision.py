"""Average precision: the released evaluation's values, and a plain implementation of the same rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.average_precision import average_precision, match
from runtime.errors import AnnotationError, ConfigError, PredictionError

THRESHOLDS = np.arange(1, 10) / 10


def test_equals_the_released_evaluation() -> None:
    data = golden("average_precision")
    ap = average_precision(
        data["video"],
        np.stack([data["start"], data["end"]], axis=1),
        data["score"],
        data["label"],
        data["truth_video"],
        np.stack([data["truth_start"], data["truth_end"]], axis=1),
        data["truth_label"],
        100,
        data["tiou"],
    )
    np.testing.assert_allclose(ap[:, data["class_ids"]], data["ap"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.nanmean(ap, axis=1), data["mAP"], rtol=0, atol=1e-12)
    assert np.nanmean(ap) == pytest.approx(float(data["average_mAP"]), abs=1e-12)


def plain(pred: list[Any], gt: list[Any], num_classes: int, thresholds: Any) -> Any:
    """Compute AP one class and threshold at a time. pred: (video, start, end, score, label), gt: without the score."""
    real: list[Any] = []
    for event in gt:
        same = [e for e in real if e[0] == event[0] and e[3] == event[3]]
        if not any(abs(e[1] - event[1]) <= 1e-3 and abs(e[2] - event[2]) <= 1e-3 for e in same):
            real.append(event)
    result = np.full((len(thresholds), num_classes), np.nan)
    for label in range(num_classes):
        events = [e for e in real if e[3] == label]
        ranked = sorted((p for p in pred if p[4] == label), key=lambda p: -p[3])
        for k, threshold in enumerate(thresholds if events else []):
            taken: set[int] = set()
            hits = []
            for video, start, end, _, _ in ranked:
                options = []
                for index, event in enumerate(events):
                    if event[0] == video and index not in taken:
                        overlap = max(0, min(end, event[2]) - max(start, event[1]))
                        options.append((overlap / ((event[2] - event[1]) + (end - start) - overlap), index))
                tiou, index = max(options, default=(-1.0, -1))
                hits.append(tiou >= threshold)
                if tiou >= threshold:
                    taken.add(index)
            precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
            result[k, label] = sum(precision[i:].max() for i in np.flatnonzero(hits)) / len(events)
    return result


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    predictions=st.integers(0, 60),
    events=st.integers(0, 25),
    videos=st.integers(1, 5),
    classes=st.integers(1, 4),
    coarse=st.booleans(),
)
def test_equals_a_plain_implementation(
    seed: int, predictions: int, events: int, videos: int, classes: int, coarse: bool
) -> None:
    generator = np.random.default_rng(seed)

    def draw(count: int) -> tuple[Any, Any, Any]:
        start, length = generator.uniform(0, 20, count), generator.gamma(2, 2, count) + 0.5
        if coarse:  # many equal segments, tIoUs and scores
            start, length = start.round(-1), length.round() + 1
        segments = np.stack([start, start + length], axis=1)
        return generator.integers(0, videos, count) * 7 - 3, segments, generator.integers(0, classes, count)

    pred_video, pred_segments, pred_labels = draw(predictions)
    gt_video, gt_segments, gt_labels = draw(events)
    if predictions and events:  # some predictions close to an event, so that there are hits
        near = generator.integers(0, events, predictions // 2)
        pred_video[: len(near)], pred_labels[: len(near)] = gt_video[near], gt_labels[near]
        pred_segments[: len(near)] = gt_segments[near] + generator.uniform(0, 0.5, (len(near), 1))
    scores = generator.uniform(0, 1, predictions).round(1 if coarse else 9)
    got = average_precision(
        pred_video, pred_segments, scores, pred_labels, gt_video, gt_segments, gt_labels, classes, THRESHOLDS
    )
    expected = plain(
        [(v, *s, c, n) for v, s, c, n in zip(pred_video, pred_segments, scores, pred_labels, strict=True)],
        [(v, *s, n) for v, s, n in zip(gt_video, gt_segments, gt_labels, strict=True)],
        classes,
        THRESHOLDS,
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def ap(pred: list[tuple[Any, ...]], gt: list[tuple[Any, ...]], classes: int = 1, thresholds: Any = (0.5,)) -> Any:
    p, g = np.array(pred, float).reshape(-1, 5), np.array(gt, float).reshape(-1, 4)
    return average_precision(
        *(p[:, 0].astype(int), p[:, 1:3], p[:, 3], p[:, 4].astype(int)),
        *(g[:, 0].astype(int), g[:, 1:3], g[:, 3].astype(int)),
        classes,
        thresholds,
    )


def test_the_next_best_event_is_tried() -> None:
    gt = [(0, 0, 10, 0), (0, 2, 12, 0)]
    both = [(0, 1, 10, 0.9, 0), (0, 1, 10, 0.8, 0)]
    np.testing.assert_allclose(ap(both, gt), [[1.0]])
    np.testing.assert_allclose(ap(both, gt, thresholds=[0.8]), [[0.5]])


def test_duplicate_ground_truth_counts_once() -> None:
    gt = [(0, 0, 10, 0), (0, 0.0009, 10.0005, 0), (0, 0, 10, 1), (1, 0, 10, 0)]
    pred = [(0, 0, 10, 0.9, 0), (1, 0, 10, 0.8, 0)]
    np.testing.assert_allclose(ap(pred, gt, classes=2), [[1.0, 0.0]])
    np.testing.assert_allclose(ap(pred, [*gt, (0, 0.0011, 10, 0)], classes=2), [[2 / 3, 0.0]])


def test_false_alarms_anywhere_lower_precision() -> None:
    gt = [(3, 0, 10, 0)]
    for alarm in ((3, 20, 30, 0.9, 0), (99, 0, 10, 0.9, 0), (-5, 0, 10, 0.9, 0)):
        np.testing.assert_allclose(ap([alarm, (3, 0, 10, 0.5, 0)], gt), [[0.5]])
    # ... but not of another class, nor after the hit.
    np.testing.assert_allclose(ap([(3, 0, 10, 0.9, 1), (3, 0, 10, 0.5, 0), (3, 0, 9, 0.4, 0)], gt, 2), [[1.0, np.nan]])


def test_of_equal_scores_the_earlier_goes_first() -> None:
    hit, miss = (0, 0, 10, 0.5, 0), (0, 20, 30, 0.5, 0)
    np.testing.assert_allclose(ap([hit, miss], [(0, 0, 10, 0)]), [[1.0]])
    np.testing.assert_allclose(ap([miss, hit], [(0, 0, 10, 0)]), [[0.5]])


def test_matching_says_what_was_right_and_what_was_found() -> None:
    """In the order in which they are given, whatever the order of scores and classes."""
    pred = np.array([[0, 9], [30, 40], [0, 10], [21, 30], [0, 10]])
    truth = np.array([[20, 30], [0, 10], [0, 10.0005], [50, 60]])
    scores, labels = [0.5, 0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0, 0]
    matches = match(np.zeros(5, int), pred, scores, labels, np.zeros(4, int), truth, [0, 1, 1, 0], 2, [0.5, 0.95])
    assert matches.order.tolist() == [1, 3, 4, 2, 0]
    assert matches.hit.tolist() == [[False, True, False, True, False], [False, False, False, True, False]]
    assert matches.found.tolist() == [[True, True, False, False], [False, True, False, False]]
    assert matches.counted.tolist() == [True, True, False, True]


def test_threshold_is_inclusive() -> None:
    np.testing.assert_allclose(ap([(0, 0, 5, 1, 0)], [(0, 0, 10, 0)], thresholds=[0.5, 0.51]), [[1.0], [0.0]])


def test_nothing_predicted_and_nothing_there() -> None:
    np.testing.assert_array_equal(ap([], [(0, 0, 1, 1)], classes=3), [[np.nan, 0, np.nan]])
    np.testing.assert_array_equal(ap([(0, 0, 1, 1, 0)], [], classes=2), [[np.nan, np.nan]])


GOOD: dict[str, Any] = {
    "pred_video": [0, 1],
    "pred_segments": [[0, 1], [0, 2]],
    "pred_scores": [0.5, 0.6],
    "pred_labels": [0, 1],
    "gt_video": [0],
    "gt_segments": [[0, 1]],
    "gt_labels": [1],
    "num_classes": 2,
    "tiou_thresholds": [0.5],
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pred_segments": [[0, 1]]}, PredictionError, r"got shapes \[2\], \[1, 2\], \[2\], expected \[N\], \[N, 2\]"),
        ({"pred_scores": [0.5]}, PredictionError, r"pred_scores: got float64 \[1\], expected numbers \[2\]"),
        ({"pred_scores": [0.5, np.nan]}, PredictionError, "pred_scores: entry 1 is not finite"),
        ({"pred_video": [0, 0.5]}, PredictionError, "pred_video: got dtype float64, expected integers"),
        ({"pred_labels": [0, 2]}, PredictionError, "pred_labels: entry 1 is 2, expected 0 to 1"),
        ({"pred_segments": [[0, 1], [2, 1]]}, PredictionError, "pred_segments: entry 1 is .* start <= end"),
        ({"gt_labels": [-1]}, AnnotationError, "gt_labels: entry 0 is -1, expected 0 to 1"),
        ({"gt_segments": [[1, 1]]}, AnnotationError, "gt_segments: entry 0 is .* start < end"),
        ({"gt_segments": [[0, np.inf]]}, AnnotationError, "gt_segments: entry 0 is"),
        ({"gt_video": 0}, AnnotationError, "gt_video, gt_segments, gt_labels: got shapes"),
        ({"tiou_thresholds": [0.0]}, ConfigError, r"tiou_thresholds: got \[0.0\], expected one or more numbers in"),
        ({"tiou_thresholds": []}, ConfigError, "tiou_thresholds"),
        ({"tiou_thresholds": 0.5}, ConfigError, "tiou_thresholds"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    average_precision(**GOOD)
    with pytest.raises(error, match=message):
        average_precision(**GOOD | changes)
