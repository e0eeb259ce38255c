"""Synthetic features: what a feature extractor could return for the videos of an annotation file.

Every class has a visual and an audio signature. During an event both are present. The video also holds *unimodal
distractors* (a class that is seen but not heard, or heard but not seen), and events extend beyond their boundaries in
one modality. Which stretches are events, and where they start and end, can only be told from both modalities together.
The values resemble those of I3D and VGGish: not negative, mean 0.1 to 0.2, smooth in time because neighbouring steps
share frames.

Shapes:  n steps of one video   F frames of one video   C classes   D channels of one modality
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ccnet.synthetic.annotations import draw_event_length
from runtime.annotations import VideoAnnotation
from runtime.schema import require
from runtime.spec import TimeBase

Floats = npt.NDArray[np.float32]
_SCENES = 12
"""Directions in which whole videos differ without any event being there (lighting, room, camera)."""
_LONGEST_TAIL = 6.0
"""Seconds by which an event may extend beyond a boundary in one modality."""
_PLACEMENT_TRIALS = 8


@dataclass(frozen=True, kw_only=True)
class SynthesisSettings:
    """How clear the signatures are, and what else the features hold that is not an event."""

    seed: int = 0
    signal: float = 7.5
    """Length of a signature's vector in standard deviations of the noise; the same for every feature width."""
    distractors: float = 1.0
    """Seen-only, and as many heard-only, stretches per event. At 1, half of what one modality shows is no event."""
    distractor_strength: float = 1.0
    """Strength of a distractor's signature relative to an event's."""
    tails: float = 0.5
    """Share of event boundaries beyond which one modality continues for up to 6 s."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 1 << 63, "synthesis.seed", self.seed, "an integer from 0 to 2^63 - 1")
        require(self.signal > 0, "synthesis.signal", self.signal, "a number above 0")
        require(self.distractors >= 0, "synthesis.distractors", self.distractors, "a number >= 0")
        require(0 <= self.tails <= 1, "synthesis.tails", self.tails, "a number in [0, 1]")
        good = 0 <= self.distractor_strength <= 2
        require(good, "synthesis.distractor_strength", self.distractor_strength, "a number in [0, 2]")

    @classmethod
    def of_difficulty(cls, difficulty: float, seed: int = 0) -> SynthesisSettings:
        """Return the settings of a difficulty from 0 (clean, no distractors) to 1; 0.5 gives the defaults above.

        | difficulty          | 0   | 0.25 | 0.5 | 0.75 | 1   |
        |---------------------|-----|------|-----|------|-----|
        | signal              | 12  | 9.75 | 7.5 | 5.25 | 3   |
        | distractors         | 0   | 0.5  | 1   | 1.5  | 2   |
        | distractor_strength | 0.5 | 0.75 | 1   | 1    | 1   |
        | tails               | 0   | 0.25 | 0.5 | 0.75 | 1   |
        """
        require(0 <= difficulty <= 1, "difficulty", difficulty, "a number from 0 to 1")
        return cls(
            seed=seed,
            signal=12 - 9 * difficulty,
            distractors=2 * difficulty,
            distractor_strength=min(1.0, 0.5 + difficulty),
            tails=difficulty,
        )


class Presence(NamedTuple):
    """How strongly each class is seen and heard in each frame, 0 where it is not.

    Frames where a class is both seen and heard are exactly those of its events.
    """

    seen: Floats
    """[C, F]"""
    heard: Floats
    """[C, F]"""


class FeatureSynthesizer:
    """Makes the features of a video, which depend on the settings and on its own annotation alone."""

    def __init__(
        self, *, num_classes: int, visual_dim: int, audio_dim: int, time_base: TimeBase, settings: SynthesisSettings
    ) -> None:
        self.num_classes = num_classes
        self.time_base = time_base
        self.settings = settings
        # Measured on real features: I3D has mean 0.14, is hardly ever zero and changes by 0.09 from step to step;
        # VGGish has mean 0.12, is zero half of the time and changes by 0.10.
        self.visual = _Modality(visual_dim, num_classes, settings, level=0.15, noise=0.08, seed=1)
        self.audio = _Modality(audio_dim, num_classes, settings, level=0.0, noise=0.2, seed=2)

    def steps(self, duration: float) -> int:
        """Return the number of feature steps that fit into a video of `duration` seconds, at least 1."""
        frames = duration * self.time_base.fps
        return max(1, 1 + math.floor((frames - self.time_base.window_frames) / self.time_base.stride_frames + 1e-6))

    def features(self, video: VideoAnnotation) -> tuple[Floats, Floats]:
        """Return the visual [n, Cv] and audio [n, Ca] features of a video, float32, >= 0."""
        rng = self._generator(video)
        presence = self._presence(video, rng)
        taps = max(1, round(self.time_base.window_frames / self.time_base.stride_frames))
        steps = self.steps(video.duration)
        return (
            self.visual.features(self._per_step(presence.seen, steps), taps, rng),
            self.audio.features(self._per_step(presence.heard, steps), taps, rng),
        )

    def presence(self, video: VideoAnnotation) -> Presence:
        """Return what is seen and heard in each frame; `features(video)` is made from it."""
        return self._presence(video, self._generator(video))

    def _generator(self, video: VideoAnnotation) -> np.random.Generator:
        identity = hashlib.sha256(video.video_id.encode()).digest()[:8]
        return np.random.default_rng((self.settings.seed, int.from_bytes(identity, "little")))

    def _presence(self, video: VideoAnnotation, rng: np.random.Generator) -> Presence:
        fps, duration, events = self.time_base.fps, video.duration, len(video.labels)
        frames = max(1, math.ceil(duration * fps))
        seen, heard = np.zeros((2, self.num_classes, frames), np.float32)

        spans = []
        for (start, end), label in zip(video.segments, video.labels, strict=True):
            first = min(frames - 1, round(start * fps))
            span = slice(first, max(first + 1, round(end * fps)))
            spans.append((int(label), span))
            seen[label, span], heard[label, span] = rng.uniform(0.75, 1.25, 2)

        for label, span in spans:
            for side in ("before", "after"):
                tail, draw = round(rng.uniform(0.5, _LONGEST_TAIL) * fps), rng.random(2)
                if draw[0] >= self.settings.tails:
                    continue
                extended, other = (seen, heard) if draw[1] < 0.5 else (heard, seen)
                strength = extended[label, span.start]
                beyond = (
                    slice(max(0, span.start - tail), span.start)
                    if side == "before"
                    else slice(span.stop, span.stop + tail)
                )
                free = (other[label, beyond] == 0) & (extended[label, beyond] == 0)
                extended[label, beyond][free] = strength

        for shown in (seen, heard):
            wanted = self.settings.distractors * events
            for _ in range(int(wanted + rng.random())):
                self._place_distractor(shown, seen, heard, video, rng)
        return Presence(seen, heard)

    def _place_distractor(
        self, shown: Floats, seen: Floats, heard: Floats, video: VideoAnnotation, rng: np.random.Generator
    ) -> None:
        """Add a stretch of one class to `shown`, the array of one modality, where that class is neither seen nor heard.

        Half of the time the class also has events in this video, so that a distractor can't be recognized by its class.
        """
        frames = seen.shape[1]
        strength = self.settings.distractor_strength * rng.uniform(0.75, 1.25)
        for _ in range(_PLACEMENT_TRIALS):
            label = int(rng.choice(video.labels) if rng.random() < 0.5 else rng.integers(self.num_classes))
            length = draw_event_length(rng, video.duration, len(video.labels))
            start = rng.uniform(0, video.duration - length)
            span = slice(round(start * self.time_base.fps), max(1, round((start + length) * self.time_base.fps)))
            if span.start < frames and not (seen[label, span].any() or heard[label, span].any()):
                shown[label, span] = strength
                return

    def _per_step(self, presence: Floats, steps: int) -> Floats:
        """Average over the frames that each step sees: [C, F] -> [n, C]."""
        sums = np.pad(np.cumsum(presence, axis=1, dtype=np.float64), ((0, 0), (1, 0)))
        first = np.round(np.arange(steps) * self.time_base.stride_frames).astype(int)
        last = first + max(1, round(self.time_base.window_frames))
        first, last = (np.minimum(edge, presence.shape[1]) for edge in (first, last))
        means: Floats = ((sums[:, last] - sums[:, first]) / np.maximum(1, last - first)).T.astype(np.float32)
        return means


class _Modality:
    """Signatures and background of one modality, and the features made from them."""

    def __init__(
        self, dim: int, num_classes: int, settings: SynthesisSettings, *, level: float, noise: float, seed: int
    ) -> None:
        rng = np.random.default_rng((settings.seed, seed))
        self.noise = noise
        self.level = (level + noise * (rng.gamma(2.0, 0.5, dim) - 1)).astype(np.float32)
        self.scenes = (noise * rng.standard_normal((_SCENES, dim))).astype(np.float32) / math.sqrt(_SCENES)
        channels = min(dim, max(4, dim // 10))
        self.signatures = np.zeros((num_classes, dim), np.float32)
        for signature in self.signatures:
            chosen = rng.choice(dim, channels, replace=False)
            weights = rng.uniform(0.5, 1.5, channels)
            signature[chosen] = settings.signal * noise * weights / np.linalg.norm(weights)

    def features(self, presence: Floats, taps: int, rng: np.random.Generator) -> Floats:
        """Return the features of a video, [n, C] -> [n, D].

        Neighbouring steps share frames, so their noise is a moving sum of independent blocks.
        """
        steps, dim = len(presence), len(self.level)
        blocks = rng.standard_normal((steps + taps - 1, dim), dtype=np.float32)
        features = blocks[:steps].copy()
        for tap in range(1, taps):
            features += blocks[tap : tap + steps]
        features *= self.noise / math.sqrt(taps)
        features += self.level
        features += rng.standard_normal(_SCENES, dtype=np.float32) @ self.scenes
        shown = presence.any(axis=0)
        features += presence[:, shown] @ self.signatures[shown]
        return np.maximum(features, 0, out=features)
