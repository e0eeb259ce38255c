"""Raw outputs -> events in seconds.

Shapes:  B videos   P points of all levels   C classes   N candidates   K events, at most `post.max_segments`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.decode import check_outputs, decode
from runtime.detections import Detections
from runtime.errors import CCNetError, EngineError
from runtime.kernels.library import OUT_OF_MEMORY, address, detection_settings, floats, kernels
from runtime.schema import require
from runtime.spec import LOGITS, OFFSETS, ModelSpec, PostProcessing
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
    """Post-process one video: logits [P, C], offsets [P, C, 2] -> Detections, at most `post.max_segments`, best first.

    `valid_steps` of the T steps hold content; `first_step` is where they start in the video, in steps (a crop);
    `duration` of the video in seconds. Decodes, then `to_events`. `post` replaces `spec.post`.

    Raises EngineError when the arrays do not fit `spec` or are not finite, ConfigError for a `duration` or
    `valid_steps` out of range.
    """
    check_outputs(logits, offsets, valid_steps, spec.grid)
    steps = np.array([valid_steps], np.int32)
    (found,) = PostProcessor(spec, post, 1)(logits[None], offsets[None], steps, [duration], first_step=first_step)
    if isinstance(found, CCNetError):
        raise found
    return found


class PostProcessor:
    """Post-processing of batches of up to `size` videos, with room for their events. One thread at a time."""

    def __init__(self, spec: ModelSpec, post: PostProcessing | None, size: int) -> None:
        """`post` replaces `spec.post`."""
        self._spec, self._post = spec, post or spec.post
        self._settings = detection_settings(self._post, spec.length, spec.levels, spec.num_classes, spec.time_base)
        self._shape = (spec.grid.num_points, spec.num_classes)
        most = min(self._post.max_segments, self._settings.most_candidates)
        self._segments, self._scores = np.empty((size, most, 2)), np.empty((size, most), np.float32)
        self._labels, self._counts = np.empty((size, most), np.int64), np.empty(size, np.int64)
        room = (self._segments, self._scores, self._labels, self._counts)
        self._room = (*(address(array) for array in room), most)

    def __call__(
        self,
        logits: npt.NDArray[np.floating[Any]],
        offsets: npt.NDArray[np.floating[Any]],
        lengths: npt.NDArray[np.int32],
        durations: Sequence[float],
        *,
        first_step: int = 0,
    ) -> list[Detections | CCNetError]:
        """Post-process a batch: logits [B, P, C], offsets [B, P, C, 2], seconds [B] -> one result a video.

        `lengths` [B]: valid steps, 0 to T, C-contiguous, which is not checked again. All of it is one compiled call
        without the interpreter lock. A video whose outputs are not finite, or whose duration is out of range, gets the
        error that `detect` raises; the others are not touched by it. Raises EngineError for arrays whose shapes are not
        those of `spec`.
        """
        batch = len(durations)
        for name, array, expected in ((LOGITS, logits, self._shape), (OFFSETS, offsets, (*self._shape, 2))):
            if array.shape != (batch, *expected):
                raise EngineError(f"{name}: got shape {list(array.shape)}, expected {[batch, *expected]}")
        values, distances = floats(logits), floats(offsets)
        seconds = np.array(durations, np.float64)
        kernels().ccnet_detect(
            self._settings,
            batch,
            address(values),
            address(distances),
            address(lengths),
            address(seconds),
            first_step,
            *self._room,
        )
        results: list[Detections | CCNetError] = []
        for b, count in enumerate(self._counts[:batch].tolist()):
            if count == OUT_OF_MEMORY:
                raise MemoryError
            if count < 0 or not 0 < durations[b] < float("inf"):
                results.append(self._error_of(values[b], distances[b], int(lengths[b]), durations[b]))
            else:
                segments, scores = self._segments[b, :count].copy(), self._scores[b, :count].copy()
                results.append(Detections(segments, scores, self._labels[b, :count].copy(), self._spec.labels))
        return results

    def _error_of(self, logits: Any, offsets: Any, valid_steps: int, duration: float) -> CCNetError:
        """Take the failed post-processing of one video step by step, for an error that says where it is."""
        spec, post = self._spec, self._post
        try:
            to_events(*decode(logits, offsets, valid_steps, spec.grid, post), duration=duration, spec=spec, post=post)
        except CCNetError as error:
            return error
        raise AssertionError("the compiled post-processing failed on a video that has no error")


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
    """Suppress candidates of one video: segments [N, 2] in grid steps, scores [N], labels [N]; see `detect`."""
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
