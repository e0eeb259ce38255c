"""Windows over a long video: they cover it, each point counts once, and events across a seam come out once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from builders import SPEC, features_with, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.batches import pack
from runtime.detections import Detections
from runtime.errors import ConfigError
from runtime.features import VideoFeatures
from runtime.windows import decode_window, merge_windows, plan_windows


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.sampled_from([8, 32, 224]), st.floats(0, 0.99))
def test_windows_cover_the_video_and_own_every_step_once(steps: int, length: int, overlap: float) -> None:
    windows = plan_windows(steps, length, overlap)
    assert windows[0].own_start == 0
    assert windows[-1].own_stop == windows[-1].stop == steps
    for window in windows:
        assert 0 <= window.start <= window.own_start < window.own_stop <= window.stop <= steps
        assert window.steps == min(length, steps)
    for left, right in itertools.pairwise(windows):
        assert left.own_stop == right.own_start
        assert left.start < right.start
        # At least the overlap that was asked for, but for rounding to whole steps.
        assert left.stop - right.start >= length * overlap - 1


def test_a_step_belongs_to_the_window_in_whose_middle_it_lies_more() -> None:
    first, second = plan_windows(48, 32, 0.5)
    assert (first.start, first.stop, second.start, second.stop) == (0, 32, 16, 48)
    assert first.own_stop == second.own_start == 24


def test_a_video_that_fits_has_one_window() -> None:
    (window,) = plan_windows(32, 32, 0.5)
    assert (window.start, window.stop) == (0, 32)
    assert len(plan_windows(33, 32, 0.5)) == 2


@pytest.mark.parametrize("overlap", [-0.1, 1.0, 2])
def test_an_overlap_out_of_range_is_refused(overlap: float) -> None:
    with pytest.raises(ConfigError, match="window_overlap"):
        plan_windows(100, 32, overlap)


def merged(features: VideoFeatures, overlap: float) -> Detections:
    windows = plan_windows(features.steps, SPEC.length, overlap)
    pieces = [VideoFeatures(features.visual[w.start : w.stop], features.audio[w.start : w.stop]) for w in windows]
    outputs = zip(windows, *oracle(*pack(pieces, SPEC)), strict=True)
    found = [decode_window(window, logits, offsets, SPEC, SPEC.post) for window, logits, offsets in outputs]
    return merge_windows(found, duration=float(features.steps), spec=SPEC, post=SPEC.post)


def through_windows(features: VideoFeatures, overlap: float) -> list[tuple[float, float, int]]:
    found = merged(features, overlap)
    return [(s - 0.5, e - 0.5, label) for (s, e), label in zip(found.segments.tolist(), found.labels, strict=True)]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_events_come_out_once_at_their_place_wherever_the_seams_are(overlap: float) -> None:
    events = [(3, 8, 0, 9.0), (20, 41, 1, 8.0), (40, 60, 2, 7.0), (61, 64, 3, 6.0), (90, 99, 0, 5.0)]
    # An event is synthetic on one step, which may be a point of the finest level only in windows that start on an
    # even step; each of these overlaps gives even starts.
    found = through_windows(features_with(100, events), overlap)
    assert found == [(start, end, label) for start, end, label, _ in events]


def test_an_event_in_the_overlap_of_two_windows_is_reported_once() -> None:
    found = through_windows(features_with(48, [(22, 29, 1, 5.0)]), 0.5)
    assert found == [(22, 29, 1)]


def test_events_of_two_windows_compete() -> None:
    """Two overlapping segments of one class whose points lie in different windows: suppression sees both."""
    features = features_with(48, [(20, 26, 1, 5.0), (20, 28, 1, 4.0)])
    (first, second) = through_windows(features, 0.5)
    assert first == (20, 26, 1)
    assert second == (20, 28, 1)
    assert plan_windows(48, SPEC.length, 0.5)[0].own_stop == 24  # the points are 23 and 25
    iou = 6 / 8
    decayed = 1 / (1 + np.exp(-4.0)) * np.exp(-(iou**2) / SPEC.post.sigma)
    assert merged(features, 0.5).scores[1] == pytest.approx(decayed, rel=1e-4)
