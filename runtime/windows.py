"""Videos longer than the network: overlapping windows, whose events are merged in the time of the whole video.

Each point of the video counts in one window only, the one in whose middle it lies more: near the edge of a window
the network has seen only half of what surrounds a point. Events found from both sides of a seam are then merged by
suppression over all windows together.

Shapes:  P points of all levels   C classes   T steps of the network
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.backends.base import Float32
from runtime.decode import Candidates, decode
from runtime.detections import Detections
from runtime.postprocess import to_events
from runtime.schema import require
from runtime.spec import ModelSpec, PostProcessing


@dataclass(frozen=True)
class Window:
    """A stretch of a video that the network sees at once, in grid steps of the whole video."""

    start: int
    stop: int
    own_start: int
    """Points at and after this step count in this window ..."""
    own_stop: int
    """... up to, not including, this one."""

    @property
    def steps(self) -> int:
        return self.stop - self.start


def plan_windows(steps: int, length: int, overlap: float) -> list[Window]:
    """Plan windows of `length` steps over a video of `steps` steps; the last one ends where the video ends.

    `overlap`: share of a window that the next one covers too, at least, 0 <= overlap < 1. A video that fits gets one
    window. Raises ConfigError for an overlap out of range.
    """
    require(0 <= overlap < 1, "window_overlap", overlap, "a number in [0, 1)")
    if steps <= length:
        return [Window(0, steps, 0, steps)]
    hop = max(1, round(length * (1 - overlap)))
    starts = [*range(0, steps - length, hop), steps - length]
    seams = [0, *((left + length + right) // 2 for left, right in itertools.pairwise(starts)), steps]
    return [Window(start, start + length, seams[i], seams[i + 1]) for i, start in enumerate(starts)]


def decode_window(
    window: Window, logits: Float32, offsets: Float32, spec: ModelSpec, post: PostProcessing
) -> Candidates:
    """Decode one window, logits [P, C], offsets [P, C, 2], into candidates at its own points, in steps of the video.

    Raises EngineError as `runtime.decode.decode`.
    """
    return decode(
        logits,
        offsets,
        min(window.steps, window.own_stop - window.start),
        spec.grid,
        post,
        first_valid=max(0, window.own_start - window.start),
        first_step=window.start,
    )


def merge_windows(found: Sequence[Candidates], *, duration: float, spec: ModelSpec, post: PostProcessing) -> Detections:
    """Merge the candidates of all windows of a video into its events; `duration` is the video's, in seconds.

    Raises as `runtime.postprocess.detect`.
    """
    segments, scores, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return to_events(segments, scores, labels, duration=duration, spec=spec, post=post)
