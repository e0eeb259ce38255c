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
    (found,) = detect_batch(
        logits[None], offsets[None], [valid_steps], [duration], spec=spec, post=post, first_step=first_step
    )
    if isinstance(found, CCNetError):
        raise found
    return found


def detect_batch(
    logits: npt.NDArray[np.floating[Any]],
    offsets: npt.NDArray[np.floating[Any]],
    lengths: Sequence[int] | npt.NDArray[np.int32],
    durations: Sequence[float],
    *,
    spec: ModelSpec,
    post: PostProcessing | None = None,
    first_step: int = 0,
) -> list[Detections | CCNetError]:
    """Post-process a batch: logits [B, P, C], offsets [B, P, C, 2], valid steps [B], seconds [B] -> one result a video.

    All of it is one compiled call without the interpreter lock. A video whose outputs are not finite, or whose
    duration is out of range, gets the error that `detect` raises; the others are not touched by it. Raises EngineError
    for arrays whose shapes are not those of `spec`, ConfigError for lengths outside 0..T.
    """
    post = post or spec.post
    for name, array in ((LOGITS, logits), (OFFSETS, offsets)):
        expected = spec.output_shapes(len(durations))[name]
        if array.shape != expected:
            raise EngineError(f"{name}: got shape {list(array.shape)}, expected {list(expected)}")
    settings = detection_settings(post, spec.length, spec.levels, spec.num_classes, spec.time_base)
    batch, most = len(logits), min(post.max_segments, settings.most_candidates)
    segments, scores = np.empty((batch, most, 2)), np.empty((batch, most), np.float32)
    labels, counts = np.empty((batch, most), np.int64), np.empty(batch, np.int64)
    values, distances = floats(logits), floats(offsets)
    steps, seconds = np.ascontiguousarray(lengths, np.int32), np.ascontiguousarray(durations, np.float64)
    good = steps.shape == (batch,) and bool(((steps >= 0) & (steps <= spec.length)).all())
    require(good, "lengths", steps.tolist(), f"{batch} integers from 0 to {spec.length}")
    kernels().ccnet_detect(
        settings,
        batch,
        address(values),
        address(distances),
        address(steps),
        address(seconds),
        first_step,
        address(segments),
        address(scores),
        address(labels),
        address(counts),
        most,
    )
    results: list[Detections | CCNetError] = []
    for b, count in enumerate(counts.tolist()):
        if count == OUT_OF_MEMORY:
            raise MemoryError
        if count < 0 or not 0 < durations[b] < float("inf"):
            results.append(_error_of(values[b], distances[b], int(steps[b]), durations[b], spec, post))
        else:  # copies, so that a video kept does not keep its batch
            arrays = (segments[b, :count].copy(), scores[b, :count].copy(), labels[b, :count].copy())
            results.append(Detections(*arrays, spec.labels))
    return results


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


def _error_of(
    logits: npt.NDArray[np.float32],
    offsets: npt.NDArray[np.float32],
    valid_steps: int,
    duration: float,
    spec: ModelSpec,
    post: PostProcessing,
) -> CCNetError:
    """Take the failed post-processing of one video step by step, for an error that says where it is."""
    try:
        to_events(*decode(logits, offsets, valid_steps, spec.grid, post), duration=duration, spec=spec, post=post)
    except CCNetError as error:
        return error
    raise AssertionError("the compiled post-processing failed on a video that has no error")
