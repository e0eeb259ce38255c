"""Our own files as formats: events as JSON lines, and annotations in the UnAV-100 layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.annotations import SUBSETS, read_annotations
from runtime.detections import read_records, write_events
from runtime.files import write_json
from runtime.formats.events import Event, Video, class_names, from_records, to_records
from runtime.records import BadRecord
from runtime.schema import show


def read_jsonl(path: Path) -> list[Video]:
    """Read an events file. Raises PredictionError."""
    return from_records(read_records(path))


def write_jsonl(path: Path, videos: Sequence[Video]) -> None:
    """Write an events file. Every video needs a duration, every event a score and a length (BadRecord)."""
    _check_durations(videos)
    write_events(path, to_records(videos))


def read_annotation_file(path: Path) -> list[Video]:
    """Read annotations in any style that `read_annotations` knows. Raises AnnotationError."""
    annotations = read_annotations(path)
    videos = []
    for video in annotations.videos.values():
        rows = zip(video.segments.tolist(), video.labels.tolist(), strict=True)
        events = [Event(start, end, annotations.labels[i], None, i) for (start, end), i in rows]
        videos.append(Video(video.video_id, events, video.duration, video.subset))
    return videos


def write_annotation_file(path: Path, videos: Sequence[Video]) -> None:
    """Write annotations in the UnAV-100 layout; scores are left out.

    Every video needs a duration and a subset, every event a length (BadRecord).
    """
    _check_durations(videos)
    ids = {name: i for i, name in enumerate(class_names(videos))}
    database: dict[str, Any] = {}
    for video in videos:
        if video.subset not in SUBSETS:
            raise BadRecord(f"video {show(video.video_id)}: no subset is known; give --subset {'|'.join(SUBSETS)}")
        events = [{"segment": event[:2], "label": event.label, "label_id": ids[event.label]} for event in video.events]
        database[video.video_id] = {"duration": video.duration, "subset": video.subset, "annotations": events}
    write_json(path, {"version": "1.0", "database": database})


def _check_durations(videos: Sequence[Video]) -> None:
    """Check that durations are known; then the events were cut to them, and all have a length."""
    unknown = [video.video_id for video in videos if video.duration is None]
    if unknown:
        which = show(unknown[0]) + (f" ({len(unknown)} in all)" if len(unknown) > 1 else "")
        raise BadRecord(f"the duration of video {which} is not known; give --annotations or --durations")
