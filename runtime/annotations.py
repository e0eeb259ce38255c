"""Ground truth: the UnAV-100 annotation file, read strictly.

    {"version": ..., "database": {video_id: {"duration": s, "subset": "train|validation|test",
        "annotations": [{"segment": [start_s, end_s], "label": str, "label_id": int}]}}}

Keys beyond these are ignored, as files of this family carry extra facts (frame rate, URL).

Shapes:  M events of one video
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import AnnotationError

SUBSETS = ("train", "validation", "test")

OVERRUN_SECONDS = 0.01
"""A segment may leave [0, duration] by this much and is clipped: durations are published rounded to 10 ms, segment
times are not. Anything beyond it is an error. (The published UnAV-100 file needs no clipping at all.)"""


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
        """The videos of one subset, in file order. Raises AnnotationError when there are none."""
        chosen = [video for video in self.videos.values() if video.subset == name]
        if not chosen:
            known = ", ".join(sorted({video.subset for video in self.videos.values()}))
            raise AnnotationError(f"{self.path}: no video of subset {name!r}; the file has: {known}")
        return chosen


def read_annotations(path: str | Path, labels: Sequence[str] | None = None) -> Annotations:
    """Read and check an annotation file.

    `labels` is the class list of a model or another file: every event must then fit it. Without it the list is
    gathered from the events, whose ids must be 0..C-1 without a gap.

    Raises AnnotationError naming file, video, event, what was found and what was expected: invalid JSON, wrong
    structure, a key (such as a video id) that occurs twice, an id with path separators, an unknown subset, numbers
    that are not finite, end <= start, segments outside the video, labels unknown or inconsistent with their ids.
    """
    path = Path(path)
    database = _parse(path)
    reader = _Reader(path, labels)
    videos = {video_id: reader.video(video_id, record) for video_id, record in database.items()}
    return Annotations(path, reader.class_names(), videos)


def check_video_id(video_id: str) -> str | None:
    """What is wrong with a video id as part of a file name, or None when nothing is."""
    if not video_id or video_id in (".", ".."):
        return "expected a name"
    if any(c in "/\\" or ord(c) < 32 for c in video_id):
        return "expected a name without path separators or control characters"
    return None


class _Reader:
    """Checks one record after the other and gathers the class names on the way."""

    def __init__(self, path: Path, labels: Sequence[str] | None) -> None:
        self.path = path
        self.given = labels is not None
        self.name_of: dict[int, str] = dict(enumerate(labels or ()))
        self.id_of: dict[str, int] = {name: label_id for label_id, name in self.name_of.items()}

    def video(self, video_id: str, record: Any) -> VideoAnnotation:
        where = f"{self.path}: video {video_id!r}"
        problem = check_video_id(video_id)
        if problem:
            raise AnnotationError(f"{where}: bad video id; {problem}")
        if not isinstance(record, dict):
            raise AnnotationError(f"{where}: got {_kind(record)}, expected an object")
        _require_keys(where, record, ("duration", "subset", "annotations"))
        duration, subset, events = record["duration"], record["subset"], record["annotations"]
        if not is_number(duration) or duration <= 0:
            raise AnnotationError(f"{where}: duration: got {_show(duration)}, expected seconds above 0")
        if subset not in SUBSETS:
            raise AnnotationError(f"{where}: subset: got {_show(subset)}, expected one of {', '.join(SUBSETS)}")
        if not isinstance(events, list):
            raise AnnotationError(f"{where}: annotations: got {_kind(events)}, expected a list")
        segments: list[tuple[float, float]] = []
        labels: list[int] = []
        try:
            for event in events:
                segment, label = self.event(event, float(duration))
                segments.append(segment)
                labels.append(label)
        except AnnotationError as error:
            raise AnnotationError(f"{where}: event {len(labels)}: {error}") from None
        array = np.array(segments, np.float64).reshape(-1, 2)
        return VideoAnnotation(video_id, float(duration), subset, array, np.array(labels, np.int64))

    def event(self, event: Any, duration: float) -> tuple[tuple[float, float], int]:
        if not isinstance(event, dict):
            raise AnnotationError(f"got {_kind(event)}, expected an object")
        _require_keys("", event, ("segment", "label", "label_id"))
        segment = event["segment"]
        if not isinstance(segment, list) or len(segment) != 2 or not is_number(segment[0]) or not is_number(segment[1]):
            raise AnnotationError(f"segment: got {_show(segment)}, expected [start, end] in seconds, finite")
        start, end = float(segment[0]), float(segment[1])
        if end <= start:
            raise AnnotationError(f"segment: got [{start}, {end}], expected an end after the start")
        if start < -OVERRUN_SECONDS or end > duration + OVERRUN_SECONDS:
            raise AnnotationError(f"segment: got [{start}, {end}], expected it inside the video, [0, {duration}]")
        start, end = max(start, 0.0), min(end, duration)
        if end <= start:
            raise AnnotationError(f"segment: nothing of it lies inside the video, [0, {duration}]")
        return (start, end), self.label(event["label"], event["label_id"])

    def label(self, name: Any, label_id: Any) -> int:
        if not isinstance(name, str) or not name:
            raise AnnotationError(f"label: got {_show(name)}, expected a class name")
        if type(label_id) is not int or not 0 <= label_id < 2**31:
            raise AnnotationError(f"label_id: got {_show(label_id)}, expected an integer >= 0")
        known_name, known_id = self.name_of.get(label_id), self.id_of.get(name)
        if known_name == name and known_id == label_id:
            return label_id
        if known_id is not None:
            raise AnnotationError(f"label {name!r}: got label_id {label_id}, elsewhere this label has {known_id}")
        if known_name is not None:
            raise AnnotationError(f"label_id {label_id}: got label {name!r}, elsewhere this id is {known_name!r}")
        if self.given:
            raise AnnotationError(f"unknown label {name!r} (id {label_id}); expected one of {len(self.id_of)} classes")
        self.name_of[label_id], self.id_of[name] = name, label_id
        return label_id

    def class_names(self) -> tuple[str, ...]:
        count = max(self.name_of, default=-1) + 1
        if count == 0:
            raise AnnotationError(f"{self.path}: there is no event in it; expected at least one")
        if count > len(self.name_of):
            gaps = _first_missing(self.name_of, count)
            raise AnnotationError(
                f"{self.path}: label ids go up to {count - 1} but {gaps} never occur(s); expected 0..C-1 without a gap"
            )
        return tuple(self.name_of[label_id] for label_id in range(count))


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise AnnotationError(f"{path}: no such annotation file") from None
    except IsADirectoryError:
        raise AnnotationError(f"{path}: got a folder, expected an annotation JSON file") from None
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of a number with thousands of digits
        raise AnnotationError(f"{path}: not valid JSON ({error})") from None
    except _DuplicateKey as error:
        raise AnnotationError(
            f"{path}: key {error.args[0]!r} occurs twice in one object; expected every video id once"
        ) from None
    database = content.get("database") if isinstance(content, dict) else None
    if not isinstance(database, dict):
        raise AnnotationError(f'{path}: expected an object {{"version": ..., "database": {{video id: ...}}}}')
    if not database:
        raise AnnotationError(f"{path}: the database holds no video")
    return database


class _DuplicateKey(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(key)
            seen.add(key)
    return unique


def _require_keys(where: str, record: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        if key not in record:
            prefix = f"{where}: " if where else ""
            raise AnnotationError(f"{prefix}'{key}' is missing; expected {', '.join(keys)}")


def _first_missing(ids: Iterable[int], count: int) -> str:
    present = set(ids)
    missing: list[str] = []
    for label_id in range(count):
        if label_id not in present:
            missing.append(str(label_id))
            if len(missing) == 5:
                return ", ".join(missing) + ", ..."
    return ", ".join(missing)


def is_number(value: Any) -> bool:
    """True for a finite JSON number that fits a float (not for true and false)."""
    kind = type(value)
    return (kind is float and math.isfinite(value)) or (kind is int and abs(value) < 1e300)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
