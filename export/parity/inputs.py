"""What the parity check feeds to both sides: stress inputs that look for mistakes, and videos that hold events.

Stress inputs sit where engines go wrong: lengths around every pyramid stride, silence, black frames, constants, large
values. Videos with events are synthetic, or real ones from a feature folder. Needs numpy alone.

Shapes:  n steps of one video   Cv, Ca visual / audio feature width   M events of one video
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ccnet.synthetic.annotations import draw_duration, draw_events
from ccnet.synthetic.features import FeatureSynthesizer, SynthesisSettings
from runtime.annotations import Annotations, VideoAnnotation, read_annotations
from runtime.coverage import Gaps, find_gaps, report_gaps
from runtime.errors import ConfigError
from runtime.features import VideoFeatures, find_videos, read_video
from runtime.spec import ModelSpec

NUM_VIDEOS = 24
"""Synthetic or real videos of one check: about 70 events, half a minute of the full-size network on two cores."""
LARGE = 100.0
"""Factor of the large-magnitude stress inputs. Real features seldom exceed 10."""


@dataclass(frozen=True)
class ParityVideo:
    """One input of the parity check."""

    name: str
    """For example `stress length 17`, `synthetic 3` or the id of a real video."""
    features: VideoFeatures
    """At most T steps."""
    duration: float
    """Seconds."""
    stress: bool
    segments: npt.NDArray[np.float64]
    """[M, 2] annotated events in seconds; none where the video is not annotated."""
    labels: npt.NDArray[np.int64]
    """[M]"""
    annotated: bool = False
    """The events are a person's, from an annotation file."""


def parity_inputs(
    spec: ModelSpec,
    *,
    features: str | Path | None = None,
    annotations: str | Path | None = None,
    count: int = NUM_VIDEOS,
) -> list[ParityVideo]:
    """Return the stress inputs and `count` videos: real ones from the folder `features`, else synthetic ones.

    `annotations`: file with the events of the real videos. Raises FeatureError, AnnotationError, and ConfigError for
    annotations without features.
    """
    if features is None:
        if annotations is not None:
            raise ConfigError(
                f"annotations: got {annotations} without a feature folder; synthetic videos have their own"
            )
        return stress_inputs(spec) + synthetic_inputs(spec, count=count)
    known = None if annotations is None else read_annotations(annotations, spec.labels)
    return stress_inputs(spec) + folder_inputs(features, spec, annotations=known, count=count)


def stress_inputs(spec: ModelSpec, seed: int = 0) -> list[ParityVideo]:
    """Make videos of every length at which padding or a stride could go wrong, and of unusual content."""
    rng = np.random.default_rng((seed, 1))
    full, odd = spec.length, max(1, spec.length // 2 - 1)

    def noise(steps: int, width: int) -> npt.NDArray[np.float32]:
        return np.maximum(rng.standard_normal((steps, width), np.float32), 0)

    def video(
        what: str, steps: int, see: Callable[..., npt.NDArray[np.float32]], hear: Callable[..., npt.NDArray[np.float32]]
    ) -> ParityVideo:
        features = VideoFeatures(see(steps, spec.visual_dim), hear(steps, spec.audio_dim))
        return _without_events(f"stress {what}", features, spec, stress=True)

    def constant(value: float) -> Callable[..., npt.NDArray[np.float32]]:
        return lambda steps, width: np.full((steps, width), value, np.float32)

    def large(steps: int, width: int) -> npt.NDArray[np.float32]:
        return noise(steps, width) * np.float32(LARGE)

    videos = [video(f"length {steps}", steps, noise, noise) for steps in stress_lengths(spec)]
    for steps in (full, odd):
        videos += [
            video(f"silent audio, length {steps}", steps, noise, constant(0)),
            video(f"black video, length {steps}", steps, constant(0), noise),
            video(f"constant, length {steps}", steps, constant(1), constant(1)),
            video(f"large values, length {steps}", steps, large, large),
        ]
    return videos


def stress_lengths(spec: ModelSpec) -> list[int]:
    """Return 1, 2, 3; one less, exact and one more of every stride; odd ones; T - 1 and T."""
    half = spec.length // 2
    lengths = {1, 2, 3, half - 1, half + 1, 3 * spec.length // 4 + 1, spec.length - 1, spec.length}
    for stride in spec.grid.strides:
        lengths |= {stride - 1, stride, stride + 1}
    return sorted(steps for steps in lengths if 1 <= steps <= spec.length)


def synthetic_inputs(
    spec: ModelSpec, *, count: int = NUM_VIDEOS, seed: int = 0, settings: SynthesisSettings | None = None
) -> list[ParityVideo]:
    """Make videos with synthetic events and distractors (see `ccnet.synthetic.features`), at most T steps long."""
    settings = settings or SynthesisSettings(seed=seed)
    synthesizer = FeatureSynthesizer(
        num_classes=spec.num_classes,
        visual_dim=spec.visual_dim,
        audio_dim=spec.audio_dim,
        time_base=spec.time_base,
        settings=settings,
    )
    rng = np.random.default_rng((seed, 2))
    longest = spec.time_base.covered_seconds(spec.length)
    videos = []
    for number in range(count):
        duration = min(draw_duration(rng), longest)
        events = draw_events(rng, duration, spec.num_classes)
        segments = np.array([event[:2] for event in events], np.float64)
        labels = np.array([event[2] for event in events], np.int64)
        annotation = VideoAnnotation(f"synthetic {number}", duration, "test", segments, labels)
        visual, audio = synthesizer.features(annotation)
        videos.append(
            ParityVideo(
                annotation.video_id, _cut(VideoFeatures(visual, audio), spec), duration, False, segments, labels
            )
        )
    return videos


def folder_inputs(
    folder: str | Path, spec: ModelSpec, *, annotations: Annotations | None = None, count: int = NUM_VIDEOS
) -> list[ParityVideo]:
    """Read real videos from a feature folder: up to `count`, spread evenly over the ids.

    With `annotations`, of the annotated ones, with their events. Raises FeatureError for a folder without videos that
    fit, or for a video that can't be read.
    """
    ids = find_videos(folder, spec.layout)
    if annotations is not None:
        ids = [video_id for video_id in ids if video_id in annotations.videos] or ids
    chosen = [ids[i] for i in np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int))]
    videos = []
    gaps: dict[str, Gaps] = {}
    for video_id in chosen:
        features = read_video(folder, video_id, spec.layout, spec.visual_dim, spec.audio_dim)
        known = None if annotations is None else annotations.videos.get(video_id)
        found = find_gaps(
            features.steps,
            features.note,
            time_base=spec.time_base,
            duration=None if known is None else known.duration,
            longest=spec.length,
            hint="the parity check compares those",
        )
        if found is not None:
            gaps[video_id] = found
        if known is None:
            videos.append(_without_events(video_id, _cut(features, spec), spec, stress=False))
        else:
            cut = _cut(features, spec)
            videos.append(ParityVideo(video_id, cut, known.duration, False, known.segments, known.labels, True))
    report_gaps(gaps, len(chosen), spec.time_base)
    return videos


def _without_events(name: str, features: VideoFeatures, spec: ModelSpec, *, stress: bool) -> ParityVideo:
    duration = spec.time_base.covered_seconds(features.steps)
    return ParityVideo(name, features, duration, stress, np.zeros((0, 2)), np.zeros(0, np.int64))


def _cut(features: VideoFeatures, spec: ModelSpec) -> VideoFeatures:
    return VideoFeatures(features.visual[: spec.length], features.audio[: spec.length])
