"""Evaluation of predicted events: the paper's mAP table, AP per class, and recall by event duration (Fig. 3).

Shapes:  K tIoU thresholds   C classes   N predictions   M ground-truth events
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtime.annotations import Annotations, VideoAnnotation
from runtime.average_precision import match
from runtime.coverage import Gaps
from runtime.detections import Detections
from runtime.errors import AnnotationError, CCNetError, FeatureError, Interrupted, PredictionError
from runtime.features import FeatureFiles
from runtime.progress import Progress
from runtime.schema import show
from runtime.signals import StopRequest
from runtime.significance import VideoScores

if TYPE_CHECKING:
    from runtime.localizer import Localizer

TIOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Thresholds that the average is taken over."""
REPORTED = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Thresholds that the paper's table shows beside it."""
BUCKETS = ((0.0, 5.0), (5.0, 20.0), (20.0, 60.0))
"""Ground-truth durations (above, up to) of the paper's Fig. 3, in seconds."""
BUCKET_TIOU = 0.5
"""An event of a bucket is found by a prediction of its class with a tIoU above this."""


@dataclass(frozen=True)
class Bucket:
    """Recall of the ground-truth events of one range of durations."""

    above: float
    """Seconds."""
    up_to: float
    """Seconds; infinity for what is longer than the paper's last range, where there is such an event."""
    events: int
    found: int

    @property
    def recall(self) -> float | None:
        """Share of the events that are found; None where there is none."""
        return self.found / self.events if self.events else None


@dataclass(frozen=True)
class Evaluation:
    """The result for one subset."""

    subset: str
    labels: tuple[str, ...]
    ap: npt.NDArray[np.float64]
    """[K, C] average precision at `TIOU`; NaN for classes without ground truth in the subset."""
    class_events: tuple[int, ...]
    """Ground-truth events of each class."""
    buckets: tuple[Bucket, ...]
    videos: int
    """Videos of the subset."""
    missing: int
    """Videos of the subset without an entry in the predictions: they count as videos without detections."""
    outside: int
    """Predicted videos of other subsets, which were left out."""
    predictions: int
    """Predicted events that took part."""
    failed: Mapping[str, CCNetError] = field(default_factory=dict)
    """What is wrong with each video that a Localizer could not process; these are among `missing`."""
    gaps: Mapping[str, Gaps] = field(default_factory=dict)
    """What a Localizer did not see of a video, where that is something."""

    @property
    def map_at(self) -> dict[float, float]:
        """Mean over the classes that have ground truth, by tIoU threshold."""
        return dict(zip(TIOU, np.nanmean(self.ap, axis=1).tolist(), strict=True))

    @property
    def average_map(self) -> float:
        """The mean of `map_at` over all thresholds, 0.1:0.1:0.9."""
        return float(np.mean(list(self.map_at.values())))

    @property
    def per_class(self) -> dict[str, list[float] | None]:
        """AP of each class at `TIOU`; None for a class without ground truth in the subset."""
        columns = self.ap.T.tolist()
        return {name: None if math.isnan(c[0]) else c for name, c in zip(self.labels, columns, strict=True)}

    def table(self) -> str:
        """Format the paper's columns in percent, the duration buckets, and what was counted."""
        header = "".join(f"{t:>7}" for t in REPORTED)
        values = "".join(f"{100 * self.map_at[t]:7.1f}" for t in REPORTED)
        lines = [f"tIoU     {header}   Avg.", f"mAP (%)  {values}{100 * self.average_map:7.1f}", ""]
        for b in self.buckets:
            share = "-" if b.recall is None else f"{100 * b.recall:.1f} %"
            name = f"({b.above:g}, {b.up_to:g}] s" if math.isfinite(b.up_to) else f"above {b.above:g} s"
            lines.append(f"events of {name:<11} {b.events:6}   found (tIoU > {BUCKET_TIOU}): {share}")
        counted = f"{self.subset}: {self.videos} videos, {self.predictions} predicted events"
        if self.missing:
            counted += f"; {self.missing} without predictions"
        if self.outside:
            counted += f"; {self.outside} of other subsets left out"
        if self.gaps:
            counted += f"; {len(self.gaps)} not covered as annotated"
        return "\n".join([*lines, counted])

    def per_class_table(self) -> str:
        """Format a line per class: events, AP in percent at the paper's thresholds, and the average."""
        width = max(len(name) for name in self.labels)
        lines = [f"{'class':<{width}}  events" + "".join(f"{t:>7}" for t in REPORTED) + "   Avg."]
        for (name, values), events in zip(self.per_class.items(), self.class_events, strict=True):
            if values is None:
                lines.append(f"{name:<{width}}  {events:6}      - (no ground truth in this subset)")
                continue
            shown = [values[TIOU.index(t)] for t in REPORTED] + [sum(values) / len(values)]
            lines.append(f"{name:<{width}}  {events:6}" + "".join(f"{100 * v:7.1f}" for v in shown))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON values."""
        return {
            "subset": self.subset,
            "average_map": self.average_map,
            "map_at": {str(t): value for t, value in self.map_at.items()},
            "per_class": self.per_class,
            "buckets": [
                {**vars(b), "up_to": b.up_to if math.isfinite(b.up_to) else None, "recall": b.recall}
                for b in self.buckets
            ],
            "videos": self.videos,
            "missing": self.missing,
            "outside": self.outside,
            "predictions": self.predictions,
            "failed": {video_id: str(error) for video_id, error in self.failed.items()},
            "notes": {video_id: str(gaps) for video_id, gaps in self.gaps.items()},
        }


def evaluate_localizer(
    localizer: Localizer,
    features: str | Path,
    annotations: Annotations,
    subset: str,
    *,
    strict: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    quiet: bool = True,
    stop: StopRequest | None = None,
) -> Evaluation:
    """Run a Localizer on every video of a subset and score what it finds. Takes and raises as `find_events`."""
    found = find_events(
        localizer,
        features,
        annotations.subset(subset),
        strict=strict,
        batch_size=batch_size,
        workers=workers,
        quiet=quiet,
        stop=stop,
    )
    evaluation = evaluate(found.predictions, annotations, subset)
    return dataclasses.replace(evaluation, failed=found.failed, gaps=found.gaps)


@dataclass(frozen=True)
class FoundEvents:
    """What a Localizer found in some videos, by video id."""

    predictions: Mapping[str, Detections]
    failed: Mapping[str, CCNetError]
    """What is wrong with each video that could not be processed."""
    gaps: Mapping[str, Gaps]
    """What was not seen of a video, where that is something."""


def find_events(
    localizer: Localizer,
    features: str | Path,
    videos: Sequence[VideoAnnotation],
    *,
    strict: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    quiet: bool = True,
    stop: StopRequest | None = None,
) -> FoundEvents:
    """Run a Localizer on annotated videos, one or more.

    Args:
        features: folder of the videos' feature files.
        strict: raise the error of a bad video. Otherwise it counts as a video in which nothing was found.
        batch_size, workers: see `Localizer.stream`.
        quiet: show no progress.
        stop: asked before every video whether to raise Interrupted.

    Raises FeatureError when no video could be processed, and what `evaluate` and the engine raise.
    """
    sources = ((video.video_id, FeatureFiles(features, video.video_id), video.duration) for video in videos)
    predictions: dict[str, Detections] = {}
    failed: dict[str, CCNetError] = {}
    gaps: dict[str, Gaps] = {}
    with (
        contextlib.closing(localizer.stream(sources, batch_size=batch_size, workers=workers)) as stream,
        Progress(videos[0].subset, total=len(videos), quiet=quiet) as progress,
    ):
        for result in stream:
            if stop is not None and stop.requested:
                raise Interrupted("interrupted", stop.signal_number)
            if result.gaps is not None:
                gaps[result.video_id] = result.gaps
            if result.detections is not None:
                predictions[result.video_id] = result.detections
            elif result.error is not None:
                failed[result.video_id] = result.error
                if strict:
                    raise result.error
            progress.advance()
    if not predictions:
        video_id, error = next(iter(failed.items()))
        raise FeatureError(f"none of the {len(videos)} videos could be used; the first, {video_id}: {error}")
    return FoundEvents(predictions, failed, gaps)


def evaluate(predictions: Mapping[str, Detections], annotations: Annotations, subset: str) -> Evaluation:
    """Score predictions, by video id, on one subset of an annotation file.

    A video of the subset without predictions counts as one in which nothing was found; predictions for videos of other
    subsets are left out; both are counted in the result. Raises PredictionError for a video that the annotation file
    does not have, or a class that is not one of its classes; AnnotationError for an unknown subset or one without
    events.
    """
    videos = annotations.subset(subset)
    scores = score_videos(predictions, annotations, subset)
    present = sum(video.video_id in predictions for video in videos)
    labels = np.concatenate([video.labels for video in videos])
    counts = [*zip(BUCKETS, scores.events.sum(axis=0).tolist(), scores.found.sum(axis=0).tolist(), strict=True)]
    longer = (BUCKETS[-1][1], math.inf)
    beyond = [_count_events(video, predictions.get(video.video_id), *longer) for video in videos]
    if events := sum(count for count, _ in beyond):
        counts.append((longer, events, sum(hits for _, hits in beyond)))
    return Evaluation(
        subset=subset,
        labels=annotations.labels,
        ap=scores.matches.average_precision(),
        class_events=tuple(np.bincount(labels, minlength=len(annotations.labels)).tolist()),
        buckets=tuple(Bucket(*edges, events, found) for edges, events, found in counts),
        videos=len(videos),
        missing=len(videos) - present,
        outside=len(predictions) - present,
        predictions=len(scores.matches.video),
    )


def score_videos(predictions: Mapping[str, Detections], annotations: Annotations, subset: str) -> VideoScores:
    """Match predictions with the events of every video of a subset, at `TIOU` and in `BUCKETS`. Raises as `evaluate`.

    Video i of the result is the i-th of `Annotations.subset`.
    """
    videos = annotations.subset(subset)
    _check_videos(predictions, annotations)
    truth = _flatten([video.segments for video in videos], [video.labels for video in videos])
    if len(truth.labels) == 0:
        raise AnnotationError(f"{annotations.path}: subset {subset!r} has {len(videos)} videos but no event")
    present = [(i, predictions[video.video_id]) for i, video in enumerate(videos) if video.video_id in predictions]
    for index, detections in present:
        _check_labels(detections, annotations, videos[index].video_id)
    pred = _flatten([d.segments for _, d in present], [d.labels for _, d in present])
    scores = np.concatenate([np.empty(0, np.float32), *(d.scores for _, d in present)])
    number_of = np.array([index for index, _ in present], np.int64)
    matches = match(
        number_of[pred.video],
        pred.segments,
        scores,
        pred.labels,
        truth.video,
        truth.segments,
        truth.labels,
        len(annotations.labels),
        TIOU,
    )
    counts = [_count_buckets(video, predictions.get(video.video_id)) for video in videos]
    return VideoScores(matches, *np.array(counts, np.int64).transpose(1, 0, 2))


@dataclass(frozen=True)
class _Flat:
    """Events of several videos in one table."""

    video: npt.NDArray[np.int64]
    segments: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]


def _flatten(segments: Sequence[npt.NDArray[np.float64]], labels: Sequence[npt.NDArray[np.int64]]) -> _Flat:
    video = np.repeat(np.arange(len(labels)), [len(values) for values in labels])
    return _Flat(video, np.concatenate([np.empty((0, 2)), *segments]), np.concatenate([np.empty(0, np.int64), *labels]))


def _check_videos(predictions: Mapping[str, Detections], annotations: Annotations) -> None:
    unknown = [video_id for video_id in predictions if video_id not in annotations.videos]
    if unknown:
        shown = ", ".join(map(show, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise PredictionError(
            f"{annotations.path} does not have the predicted videos {shown} ({len(unknown)} in all); "
            "expected predictions of its videos"
        )


def _check_labels(detections: Detections, annotations: Annotations, video_id: str) -> None:
    if detections.label_names == annotations.labels:
        return
    for label_id in np.unique(detections.labels).tolist():
        name = detections.label_names[label_id]
        expected = annotations.labels[label_id] if label_id < len(annotations.labels) else None
        if name != expected:
            raise PredictionError(
                f"video {show(video_id)}: predicted class {show(name)} has id {label_id}, which in {annotations.path} "
                f"is {'not used' if expected is None else show(expected)}; expected predictions of the same classes"
            )


def _count_buckets(video: VideoAnnotation, predicted: Detections | None) -> tuple[list[int], list[int]]:
    """Return the events of a video in each bucket, and those that are found."""
    counts = [_count_events(video, predicted, above, up_to) for above, up_to in BUCKETS]
    return [events for events, _ in counts], [found for _, found in counts]


def _count_events(video: VideoAnnotation, predicted: Detections | None, above: float, up_to: float) -> tuple[int, int]:
    """Return the events of a range of durations in seconds, and how many of them are found."""
    length = video.segments[:, 1] - video.segments[:, 0]
    inside = (length > above) & (length <= up_to)
    return int(inside.sum()), int(_found(video, predicted)[inside].sum()) if inside.any() else 0


def _found(video: VideoAnnotation, predicted: Detections | None) -> npt.NDArray[np.bool_]:
    """Return [M] bool: whether a prediction of the event's class has a tIoU above `BUCKET_TIOU` with it."""
    if predicted is None or len(predicted) == 0:
        return np.zeros(len(video.labels), np.bool_)
    start = np.maximum(video.segments[:, None, 0], predicted.segments[None, :, 0])
    stop = np.minimum(video.segments[:, None, 1], predicted.segments[None, :, 1])
    overlap = np.maximum(stop - start, 0)
    union = np.ptp(video.segments, axis=1)[:, None] + np.ptp(predicted.segments, axis=1)[None] - overlap
    same = video.labels[:, None] == predicted.labels[None]
    hits: npt.NDArray[np.bool_] = (same & (overlap > BUCKET_TIOU * union)).any(axis=1)
    return hits
