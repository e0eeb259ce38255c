"""Localizer: from features to seconds, on one engine or several, one video or many at once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import LABELS, SPEC, OracleBackend, features_with

from runtime import Localizer
from runtime.backends.base import Float32, Int32
from runtime.detections import Detections
from runtime.errors import ConfigError, EngineError, FeatureError
from runtime.features import VideoFeatures
from runtime.spec import TimeBase


def events(detections: Detections) -> list[tuple[float, float, int]]:
    return [(s, e, int(c)) for (s, e), c in zip(detections.segments.tolist(), detections.labels, strict=True)]


def test_one_video_from_features_to_seconds() -> None:
    features = features_with(20, [(3, 8, 1, 3.0), (10, 19, 2, 1.0)])
    found = Localizer([OracleBackend()], SPEC)(features.visual, features.audio, duration=20.0)
    assert events(found) == [(3.5, 8.5, 1), (10.5, 19.5, 2)]
    assert found.scores == pytest.approx([1 / (1 + np.exp(-3)), 1 / (1 + np.exp(-1))], rel=1e-5)
    assert found.label_names == LABELS


def test_without_a_duration_events_are_clamped_to_what_the_features_cover() -> None:
    spec = dataclasses.replace(SPEC, time_base=TimeBase(fps=25, stride_frames=8, window_frames=24))
    features = features_with(20, [(10, 25, 0, 3.0)])
    localizer = Localizer([OracleBackend(spec)], spec)
    covered = (19 * 8 + 24) / 25
    assert localizer(features.visual, features.audio).segments[0, 1] == pytest.approx(covered)
    assert localizer(features.visual, features.audio, duration=5.5).segments[0, 1] == 5.5
    # Float32 grid positions: 1e-5 s is far below a step of 0.32 s.
    assert localizer(features.visual, features.audio, 60.0).segments[0, 1] == pytest.approx(
        (25 * 8 + 12) / 25, abs=1e-5
    )


def test_a_batch_gives_each_video_what_it_gets_alone_and_respects_the_largest_batch() -> None:
    videos = [features_with(8 + 2 * i, [(1, 6, i % 4, 2.0 + 0.1 * i)]) for i in range(9)]
    backend = OracleBackend(max_batch=4)
    localizer = Localizer([backend], SPEC)
    together = localizer.batch(videos)
    assert backend.batches == [4, 4, 1]
    for video, found in zip(videos, together, strict=True):
        alone = localizer(video.visual, video.audio)
        np.testing.assert_array_equal(found.segments, alone.segments)
        np.testing.assert_array_equal(found.scores, alone.scores)
    assert localizer.batch([]) == []


def test_a_batch_takes_checked_features_and_arrays_with_or_without_duration() -> None:
    video = features_with(20, [(3, 30, 1, 3.0)])
    localizer = Localizer([OracleBackend()], SPEC)
    found = localizer.batch([video, (video.visual, video.audio), (video.visual, video.audio, 7.25)])
    assert [detections.segments[0, 1] for detections in found] == [20.0, 20.0, 7.25]


def test_long_videos_are_cropped_or_seen_through_windows() -> None:
    video = features_with(100, [(3, 8, 1, 3.0), (40, 60, 2, 2.0), (90, 99, 3, 1.0)])
    cropped = Localizer([OracleBackend()], SPEC)(video.visual, video.audio)
    assert events(cropped) == [(3.5, 8.5, 1)]
    windowed = Localizer([OracleBackend()], SPEC, long_videos="windows")
    expected = [(3.5, 8.5, 1), (40.5, 60.5, 2), (90.5, 99.5, 3)]
    assert events(windowed(video.visual, video.audio)) == expected
    short = features_with(20, [(3, 8, 1, 3.0)])
    assert [events(d) for d in windowed.batch([short, video, short])] == [[expected[0]], expected, [expected[0]]]


def test_settings_and_engines_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="long_videos: got 'squeeze'"):
        Localizer([OracleBackend()], SPEC, long_videos="squeeze")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="window_overlap"):
        Localizer([OracleBackend()], SPEC, window_overlap=1.0)
    with pytest.raises(ConfigError, match="at least one"):
        Localizer([], SPEC)
    with pytest.raises(ConfigError, match="another network"):
        Localizer([OracleBackend(dataclasses.replace(SPEC, visual_dim=7))], SPEC)


def test_bad_features_are_named() -> None:
    localizer = Localizer([OracleBackend()], SPEC)
    good = features_with(20)
    with pytest.raises(FeatureError, match=r"video 0: visual: got shape \(20, 5\)"):
        localizer(good.visual[:, :5], good.audio)
    with pytest.raises(FeatureError, match=r"video 1: features are \(5, 3\) wide"):
        localizer.batch([good, VideoFeatures(good.visual[:, :5], good.audio)])
    with pytest.raises(ConfigError, match="duration: got -1"):
        localizer(good.visual, good.audio, duration=-1.0)


class Overflowing(OracleBackend):
    def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        logits, offsets = super().infer(visual, audio, lengths)
        logits[0, 0] = np.nan
        return logits, offsets


def test_output_that_is_not_finite_is_an_error_and_not_an_empty_result() -> None:
    with pytest.raises(EngineError, match="not finite"):
        Localizer([Overflowing()], SPEC)(*features_with(20))


def test_close_closes_every_engine() -> None:
    engines = [OracleBackend(), OracleBackend()]
    with Localizer(engines, SPEC):
        pass
    assert [engine.closed for engine in engines] == [1, 1]


def test_an_empty_duration_of_the_arrays_leaves_the_given_one() -> None:
    features = features_with(20)
    localizer = Localizer([OracleBackend()], SPEC)
    items = [("v", (features.visual, features.audio, None), 3.5), ("w", (features.visual, features.audio, 4.5), 3.5)]
    assert [result.duration for result in localizer.stream(items)] == [3.5, 4.5]
