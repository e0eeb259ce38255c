"""Synthetic features: events are exactly where both modalities agree, and only there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccnet.synthetic.annotations import demo_annotations
from ccnet.synthetic.features import FeatureSynthesizer, SynthesisSettings
from runtime.annotations import VideoAnnotation, read_annotations
from runtime.errors import ConfigError
from runtime.spec import TimeBase

CLASSES = 6


def synthesizer(
    settings: Any = None, visual_dim: Any = 48, audio_dim: Any = 16, time_base: Any = None
) -> FeatureSynthesizer:
    return FeatureSynthesizer(
        num_classes=CLASSES,
        visual_dim=visual_dim,
        audio_dim=audio_dim,
        time_base=time_base or TimeBase(),
        settings=settings or SynthesisSettings(),
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("annotations") / "annotations.json"
    path.write_text(json.dumps(demo_annotations({"train": 150, "test": 50}, CLASSES)))
    return list(read_annotations(path).videos.values())


def event_frames(video: VideoAnnotation) -> Any:
    event = np.zeros((CLASSES, int(np.ceil(video.duration * 25))), bool)
    for (start, end), label in zip(video.segments, video.labels, strict=True):
        first = min(event.shape[1] - 1, round(start * 25))
        event[label, first : max(first + 1, round(end * 25))] = True
    return event


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
def test_a_class_is_seen_and_heard_at_once_exactly_during_its_events(
    videos: list[VideoAnnotation], difficulty: float
) -> None:
    maker = synthesizer(SynthesisSettings.of_difficulty(difficulty))
    for video in videos[:60]:
        presence = maker.presence(video)
        assert np.array_equal((presence.seen > 0) & (presence.heard > 0), event_frames(video))


def test_one_modality_alone_shows_about_as_much_that_is_no_event(videos: list[VideoAnnotation]) -> None:
    """By default every event has a seen-only and a heard-only companion, and half of the boundaries are extended."""
    seen = heard = event = 0
    for video in videos:
        presence = synthesizer().presence(video)
        seen += int((presence.seen > 0).sum())
        heard += int((presence.heard > 0).sum())
        event += int(event_frames(video).sum())
    # Long events leave less room for distractors, so the share is above one half.
    assert 0.4 < event / seen < 0.65
    assert 0.4 < event / heard < 0.65


def test_at_difficulty_zero_nothing_but_events_is_shown(videos: list[VideoAnnotation]) -> None:
    maker = synthesizer(SynthesisSettings.of_difficulty(0.0))
    for video in videos[:40]:
        presence = maker.presence(video)
        assert np.array_equal(presence.seen > 0, event_frames(video))
        assert np.array_equal(presence.heard > 0, event_frames(video))


def test_the_classes_of_a_video_do_not_give_its_distractors_away(videos: list[VideoAnnotation]) -> None:
    """A good part of the distractors are of classes that do have events in the same video."""
    own = other = 0
    for video in videos:
        presence = synthesizer(SynthesisSettings(tails=0.0)).presence(video)
        alone = ((presence.seen > 0) & (presence.heard == 0)).any(axis=1)
        mine = np.isin(np.arange(CLASSES), video.labels)
        own += int((alone & mine).sum())
        other += int((alone & ~mine).sum())
    assert own > 0.15 * (own + other)
    assert other > 0.15 * (own + other)


def test_features_look_like_real_ones(videos: list[VideoAnnotation]) -> None:
    maker = synthesizer(visual_dim=2048, audio_dim=128)
    visual, audio = (np.concatenate(parts) for parts in zip(*map(maker.features, videos[:20]), strict=True))
    for features in (visual, audio):
        assert features.dtype == np.float32
        assert features.min() == 0
        assert 0.1 < features.mean() < 0.2
        assert features.max() < 4
    assert (visual == 0).mean() < 0.2 < (audio == 0).mean() < 0.6


def test_steps_follow_from_the_duration_through_the_time_base(videos: list[VideoAnnotation]) -> None:
    one = dataclasses.replace(videos[0], duration=10.0, segments=np.zeros((0, 2)), labels=np.zeros(0, np.int64))
    for time_base in (TimeBase(), TimeBase(fps=16.0, stride_frames=4.0, window_frames=16.0)):
        maker = synthesizer(time_base=time_base)
        visual, audio = maker.features(one)
        assert len(visual) == len(audio) == maker.steps(10.0)
        assert time_base.covered_seconds(len(visual)) <= 10.0 < time_base.covered_seconds(len(visual) + 1)
    assert synthesizer().steps(0.1) == 1


@pytest.mark.parametrize("dims", [(48, 16), (1024, 128)])
def test_an_event_stands_out_by_the_signal_whatever_the_width(dims: Any) -> None:
    """Projected on its signature, an event stands about `signal` noise deviations above the same video without it."""
    maker = synthesizer(SynthesisSettings(signal=8.0, distractors=0.0, tails=0.0), *dims)
    segments, labels = np.array([[10.0, 20.0]]), np.array([2])
    heights = []
    for i in range(20):
        video = VideoAnnotation(f"v{i}", 30.0, "train", segments, labels)
        visual, _ = maker.features(video)
        signature = maker.visual.signatures[2]
        projected = visual @ signature / np.linalg.norm(signature) / maker.visual.noise
        heights.append(projected[35:58].mean() - np.concatenate((projected[:25], projected[70:])).mean())
    # The rectifier takes away some of the noise's lower half, so the step is a little smaller than `signal`.
    assert 6.0 < np.mean(heights) < 8.5


def test_what_a_video_gets_depends_on_itself_and_the_seed_alone(videos: list[VideoAnnotation]) -> None:
    first, again = synthesizer(), synthesizer()
    again.features(videos[1])  # nothing is carried from one video to the next
    for a, b in zip(first.features(videos[0]), again.features(videos[0]), strict=True):
        assert np.array_equal(a, b)
    others = (
        synthesizer(SynthesisSettings(seed=1)).features(videos[0]),
        synthesizer().features(dataclasses.replace(videos[0], video_id="another")),
    )
    for visual, audio in others:
        assert not np.array_equal(visual, first.features(videos[0])[0])
        assert not np.array_equal(audio, first.features(videos[0])[1])


def test_difficulty_has_a_range() -> None:
    assert SynthesisSettings.of_difficulty(0.5) == SynthesisSettings()
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="difficulty"):
            SynthesisSettings.of_difficulty(bad)
    with pytest.raises(ConfigError, match=r"synthesis\.signal"):
        SynthesisSettings(signal=0.0)


def test_synthetic_annotations_resemble_the_published_ones(tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(demo_annotations({"train": 3000}, 100)))
    videos = read_annotations(path).subset("train")  # checks every event
    durations = np.array([video.duration for video in videos])
    assert durations.mean() == pytest.approx(42.1, abs=1.5)
    counts = np.array([len(video.labels) for video in videos])
    assert counts.min() >= 1
    assert counts.mean() == pytest.approx(2.79, abs=0.3)
    lengths = np.concatenate([np.diff(video.segments)[:, 0] for video in videos])
    # Published quartiles of the event length: 2.19, 6.44, 21.1 s.
    assert np.percentile(lengths, [25, 50, 75]) == pytest.approx([2.19, 6.44, 21.1], rel=0.35)
    overlapping = 0
    for video in videos:
        for i, (start, end) in enumerate(video.segments):
            for j in range(i):
                begin, finish = video.segments[j]
                if start < finish and begin < end:
                    assert video.labels[i] != video.labels[j]
                    overlapping += 1
    pairs = (counts * (counts - 1) // 2).sum()
    assert overlapping / pairs == pytest.approx(8354 / 59606, abs=0.08)


def test_synthetic_annotations_are_seeded() -> None:
    sets = [demo_annotations({"train": 5, "test": 2}, 4, seed=seed) for seed in (0, 0, 1)]
    assert sets[0] == sets[1] != sets[2]
    assert [v["subset"] for v in sets[0]["database"].values()] == ["train"] * 5 + ["test"] * 2
