"""Ground truth: the UnAV-100 annotation file, read strictly, and other data sets' files brought into its layout.

    {"version": ..., "database": {video_id: {"duration": s, "subset": "train|validation|test",
        "annotations": [{"segment": [start_s, end_s], "label": str, "label_id": int}]}}}

Keys beyond these are ignored, as files of this family carry extra facts (frame rate, URL).

Shapes:  M events of one video
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.annotation_styles import read_content, subset_name
from runtime.errors import AnnotationError
from runtime.records import (
    BadRecord,
    LabelTable,
    as_label_id,
    as_number,
    as_segment,
    check_duration,
    check_list,
    check_segment,
    check_video_id,
    get_values,
    read_bytes,
    read_json,
)
from runtime.schema import show

_NAMED_PROBLEMS, _LONGEST_LIST = 5, 400
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
    unnamed: tuple[int, ...] = ()
    """Label ids without events, whose classes are called `class <id>` because nothing says their names."""

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
    gathered from the events; an id up to the largest that never occurs is called `class <id>`, see `unnamed`.

    Where it is plain what is meant, it is taken: subsets called `Training` or `val`, ids as 3.0 or "3", no id where
    another event or `labels` has it, no `annotations` of a video without events, `duration_second` for `duration`,
    numbers as text, `null` for what is left out.

    Raises AnnotationError naming the file and all that is wrong in it, with video, event, what was found and what was
    expected: invalid JSON, wrong structure, a key (such as a video id) that occurs twice, an id with path separators,
    an unknown subset, numbers that are not finite, end <= start, segments outside the video, labels unknown or
    inconsistent with their ids.
    """
    annotations, problems = survey_annotations(path, labels)
    if len(problems) == 1:
        raise AnnotationError(f"{path}: {problems[0]}")
    if problems or annotations is None:
        raise AnnotationError(f"{path}: {len(problems)} problems:{_listed(problems)}")
    return annotations


def survey_annotations(path: str | Path, labels: Sequence[str] | None = None) -> tuple[Annotations | None, list[str]]:
    """Read an annotation file as `read_annotations`, passing over videos that are wrong.

    Returns the others, None where there are none with an event, and all that is wrong. Raises AnnotationError for a
    file that is not an annotation file at all.
    """
    path = Path(path)
    table = LabelTable(labels)
    problems: list[str] = []
    videos: dict[str, VideoAnnotation] = {}
    try:
        database = _database(path, labels)
        if labels is None:
            _gather_labels(database, table)
        for video_id, record in database.items():
            video = _read_video(video_id, record, table, problems)
            if video is not None:
                videos[video_id] = video
        count = max(table.names, default=-1) + 1
        if problems and (count == 0 or not videos):
            return None, problems
        if count == 0:
            raise BadRecord("there is no event in it; expected at least one")
        names = tuple(table.names.get(label_id, f"class {label_id}") for label_id in range(count))
        if len(set(names)) < count:
            raise BadRecord("a class is called like 'class 3', which is what an id without events is called; name them")
        return Annotations(path, names, videos, tuple(i for i in range(count) if i not in table.names)), problems
    except FileNotFoundError:
        raise AnnotationError(f"{path}: no such annotation file") from None
    except BadRecord as error:
        raise AnnotationError(f"{path}: {error}") from None


def _listed(problems: Sequence[str]) -> str:
    """Return the first problems, a line each, as many as make a message that can be read."""
    lines = ""
    for number, problem in enumerate(problems):
        if number and (number == _NAMED_PROBLEMS or len(lines) + len(problem) > _LONGEST_LIST):
            return f"{lines}\n  ... and {len(problems) - number} more"
        lines += f"\n  {problem}"
    return lines


def read_class_list(path: str | Path) -> tuple[str, ...]:
    """Read class names (index = label id) from a bundle, a checkpoint, an annotation file, or a file with one a line.

    Raises AnnotationError where it has no class list, or a name twice.
    """
    path = Path(path)
    try:
        if path.is_dir():
            for name, keys in (("bundle.json", ("spec", "labels")), ("checkpoint.json", ("labels",))):
                if (path / name).is_file():
                    found = read_json(path / name)
                    for key in keys:
                        (found,) = get_values(found, (key,))
                    return _checked_names(found)
            raise BadRecord("a folder that is neither a bundle nor a checkpoint")
        if path.suffix == ".json":
            content = read_json(path, any_number=True)
            return _checked_names(content) if isinstance(content, list) else read_annotations(path).labels
        return _checked_names([line for line in read_bytes(path).decode().splitlines() if line.strip()])
    except (BadRecord, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: {error}; expected class names: a bundle, a checkpoint or a file") from None


def _checked_names(names: Any) -> tuple[str, ...]:
    check_list(names, "class names")
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise BadRecord(f"class names: got {show(names)}, expected one or more distinct names")
    return tuple(names)


def _database(path: Path, labels: Sequence[str] | None) -> dict[str, Any]:
    content = read_content(path, labels)
    database = content.get("database") if isinstance(content, dict) else None
    if not isinstance(database, dict):
        raise BadRecord('expected an object {"version": ..., "database": {video id: ...}}')
    if not database:
        raise BadRecord("the database holds no video")
    return database


def _gather_labels(database: dict[str, Any], table: LabelTable) -> None:
    """Fill the table before events without an id ask it; what is wrong is said when the events are read."""
    events = [event for record in database.values() for event in _events(record)]
    if any(event.get("label_id") is None for event in events):
        for event in events:
            with contextlib.suppress(BadRecord):
                table.check(event.get("label"), as_label_id(event.get("label_id")))


def _events(record: Any) -> list[dict[str, Any]]:
    events = record.get("annotations") if isinstance(record, dict) else None
    return [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []


def _read_video(video_id: str, record: Any, table: LabelTable, problems: list[str]) -> VideoAnnotation | None:
    """Read one video; what is wrong with it goes to `problems`, and then the result is None."""
    found = len(problems)
    segments: list[tuple[float, float]] = []
    labels: list[int] = []
    try:
        check_video_id(video_id)
    except BadRecord as error:
        problems.append(str(error))
        return None
    where = f"video {show(video_id)}"
    duration, subset = 0.0, ""
    events: list[Any] = []
    try:
        duration, subset, events = _check_video(record)
    except BadRecord as error:
        problems.append(f"{where}: {error}")
    for number, event in enumerate(events):
        try:
            segment, label_id = _check_event(event, duration, table)
        except BadRecord as error:  # noqa: PERF203
            problems.append(f"{where}: event {number}: {error}")
        else:
            segments.append(segment)
            labels.append(label_id)
    if len(problems) > found:
        return None
    return VideoAnnotation(
        video_id, duration, subset, np.array(segments, np.float64).reshape(-1, 2), np.array(labels, np.int64)
    )


def _check_video(record: Any) -> tuple[float, str, list[Any]]:
    """Return duration, subset and events of a video's record."""
    if isinstance(record, dict):
        record = {key: value for key, value in record.items() if value is not None}
        record.setdefault("annotations", [])
        if "duration" not in record and "duration_second" in record:
            record["duration"] = record["duration_second"]
    duration, subset, events = get_values(record, ("duration", "subset", "annotations"))
    duration = check_duration(as_number(duration))
    subset = subset_name(subset)
    if subset not in SUBSETS:
        raise BadRecord(f"subset: got {show(subset)}, expected one of {', '.join(SUBSETS)}")
    check_list(events, "annotations")
    return duration, subset, events


def _check_event(event: Any, duration: float, table: LabelTable) -> tuple[tuple[float, float], int]:
    """Return segment and label id of an event."""
    segment, label = get_values(event, ("segment", "label"))
    bounds = _clip(check_segment(as_segment(segment), duration), duration)
    label_id = event.get("label_id")
    label_id = table.id_of(label) if label_id is None else table.check(label, as_label_id(label_id))
    return bounds, label_id


def _clip(segment: tuple[float, float], duration: float) -> tuple[float, float]:
    start, end = max(segment[0], 0.0), min(segment[1], duration)
    if end <= start:
        raise BadRecord(f"segment: nothing of it lies inside the video, [0, {duration}]")
    return start, end
