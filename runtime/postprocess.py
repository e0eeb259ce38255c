"""From what an engine puts out for one video to its events in seconds.

Shapes:  P points of all levels   C classes   N candidates
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.decode import decode
from runtime.detections import Detections
from runtime.schema import require
from runtime.spec import ModelSpec, PostProcessing
from runtime.suppression import suppress


def detect(
    logits: npt.NDArray[np.floating[Any]],
    offsets: npt.NDArray[np.floating[Any]],
    *,
    valid_steps: int,
    duration: float,
    spec: ModelSpec,
    post: PostProcessing | None = None,
    first_step: int = 0,
) -> Detections:
    """logits [P, C], offsets [P, C, 2] of one video -> Detections, at most `post.max_segments`, best first.

    `valid_steps` of the T steps hold content; `first_step` is where they start in the video, in steps (a crop or a
    window); `duration` of the video in seconds. Decodes, then `to_events`. `post` replaces `spec.post`.

    Raises EngineError when the arrays do not fit `spec` or are not finite, ConfigError for a `duration` or
    `valid_steps` out of range.
    """
    post = post or spec.post
    segments, scores, labels = decode(logits, offsets, valid_steps, spec.grid, post)
    return to_events(segments, scores, labels, duration=duration, spec=spec, post=post, first_step=first_step)


def to_events(
    segments: npt.NDArray[np.floating[Any]],
    scores: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    *,
    duration: float,
    spec: ModelSpec,
    post: PostProcessing,
    first_step: int = 0,
) -> Detections:
    """Candidates of one video, segments [N, 2] in grid steps, scores [N], labels [N] -> Detections; see `detect`."""
    require(0 < duration < float("inf"), "duration", duration, "seconds above 0")
    segments, scores, labels = suppress(
        segments,
        scores,
        labels,
        method=post.method,
        sigma=post.sigma,
        iou_threshold=post.iou_threshold,
        min_score=post.min_score,
        max_segments=post.max_segments,
        multiclass=post.multiclass,
        voting_threshold=post.voting_threshold,
    )
    seconds = np.clip(spec.time_base.to_seconds(segments.astype(np.float64) + first_step), 0.0, float(duration))
    inside = seconds[:, 1] > seconds[:, 0]
    return Detections(seconds[inside], scores[inside], labels[inside], spec.labels)
