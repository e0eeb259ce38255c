"""Ground truth: the UnAV-100 annotation file, read strictly, and other data sets' files brought into its layout.

    {"version": ..., "database": {video_id: {"duration": s, "subset": "train|validation|test",
        "annotations": [{"segment": [start_s, end_s], "label": str, "label_id": int}]}}}

Keys beyond these are ignored, as files of this family carry extra facts (frame rate, URL).

Shapes:  M events of one video
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.annotation_styles import read_content
from runtime.errors import AnnotationError
from runtime.records import (
    BadRecord,
    LabelTable,
    check_duration,
    check_list,
    check_segment,
    check_video_id,
    get_values,
)
from runtime.schema import show

SUBSETS = ("train", "validation", "test")


@dataclass(frozen=True)
class VideoAnnotation:
    """One video and its events, in the order of the file."""

    video_id: str
    duration: float
    """Seconds."""
    subset: str
    segments: npt.NDArray[np.float64]
    """[M, 2] start and end in seconds, 0 <= start < end <= duration."""
    labels: npt.NDArray[np.int64]
    """[M] label ids."""


@dataclass(frozen=True)
class Annotations:
    """A whole annotation file."""

    path: Path
    labels: tuple[str, ...]
    """Class names; the index is the label id."""
    videos: dict[str, VideoAnnotation]
    """By video id, in the order of the file."""

    def subset(self, name: str) -> list[VideoAnnotation]:
        """Return the videos of one subset, in file order. Raises AnnotationError when there are none."""
        chosen = [video for video in self.videos.values() if video.subset == name]
        if not chosen:
            known = ", ".join(sorted({video.subset for video in self.videos.values()}))
            raise AnnotationError(f"{self.path}: no video of subset {show(name)}; the file has: {known}")
        return chosen


def read_annotations(path: str | Path, labels: Sequence[str] | None = None) -> Annotations:
    """Read and check an annotation file, or a folder of THUMOS14 (see `runtime.annotation_styles`).

    `labels` is the class list of a model or another file: every event must then fit it. Without it the list is
    gathered from the events, whose ids must be 0..C-1 without a gap.

    Raises AnnotationError naming file, video, event, what was found and what was expected: invalid JSON, wrong
    structure, a key (such as a video id) that occurs twice, an id with path separators, an unknown subset, numbers
    that are not finite, end <= start, segments outside the video, labels unknown or inconsistent with their ids.
    """
    path = Path(path)
    table = LabelTable(labels)
    try:
        videos = {
            video_id: _read_video(video_id, record, table) for video_id, record in _database(path, labels).items()
        }
        return Annotations(path, _class_names(table), videos)
    except FileNotFoundError:
        raise AnnotationError(f"{path}: no such annotation file") from None
    except BadRecord as error:
        raise AnnotationError(f"{path}: {error}") from None


def _database(path: Path, labels: Sequence[str] | None) -> dict[str, Any]:
    content = read_content(path, labels)
    database = content.get("database") if isinstance(content, dict) else None
    if not isinstance(database, dict):
        raise BadRecord('expected an object {"version": ..., "database": {video id: ...}}')
    if not database:
        raise BadRecord("the database holds no video")
    return database


def _read_video(video_id: str, record: Any, table: LabelTable) -> VideoAnnotation:
    check_video_id(video_id)
    try:
        duration, subset, events = get_values(record, ("duration", "subset", "annotations"))
        duration = check_duration(duration)
        if subset not in SUBSETS:
            raise BadRecord(f"subset: got {show(subset)}, expected one of {', '.join(SUBSETS)}")
        segments: list[tuple[float, float]] = []
        labels: list[int] = []
        check_list(events, "annotations")
        try:
            for event in events:
                segment, label, label_id = get_values(event, ("segment", "label", "label_id"))
                segments.append(_clip(check_segment(segment, duration), duration))
                labels.append(table.check(label, label_id))
        except BadRecord as error:
            raise BadRecord(f"event {len(labels)}: {error}") from None
    except BadRecord as error:
        raise BadRecord(f"video {show(video_id)}: {error}") from None
    return VideoAnnotation(
        video_id, duration, subset, np.array(segments, np.float64).reshape(-1, 2), np.array(labels, np.int64)
    )


def _clip(segment: tuple[float, float], duration: float) -> tuple[float, float]:
    start, end = max(segment[0], 0.0), min(segment[1], duration)
    if end <= start:
        raise BadRecord(f"segment: nothing of it lies inside the video, [0, {duration}]")
    return start, end


def _class_names(table: LabelTable) -> tuple[str, ...]:
    count = max(table.names, default=-1) + 1
    if count == 0:
        raise BadRecord("there is no event in it; expected at least one")
    if count > len(table.names):
        missing = _first_missing(table.names, count)
        raise BadRecord(f"label ids go up to {count - 1} but {missing} never occur; expected 0..C-1 without a gap")
    return tuple(table.names[label_id] for label_id in range(count))


def _first_missing(ids: Iterable[int], count: int) -> str:
    missing = sorted(set(range(count)).difference(ids))
    return ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
