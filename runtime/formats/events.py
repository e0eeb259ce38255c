"""Events as other tools' files hold them: a label by name, and duration, label id and score where the file has them.

Shapes:  N events of one video
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from runtime.detections import Detections, Record
from runtime.records import BadRecord, check_duration, check_video_id, is_number
from runtime.schema import show

SCORE_DIGITS = 4
"""Decimals of a score in a text, where a format has no place of its own for it."""

_SCORED = re.compile(r"(.*\S) \((0(?:\.\d+)?|1(?:\.0+)?)\)", re.DOTALL).fullmatch
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]").search


class Event(NamedTuple):
    """One event; what the file does not say is None."""

    start: float
    """Seconds."""
    end: float
    """Seconds, not before `start`."""
    label: str
    score: float | None = None
    """In [0, 1]."""
    label_id: int | None = None


@dataclass(frozen=True)
class Video:
    """One video and its events, in the order of the file."""

    video_id: str
    events: list[Event] = field(default_factory=list)
    duration: float | None = None
    """Seconds."""
    subset: str | None = None


def check_event(start: object, end: object, label: object, score: object = None, label_id: object = None) -> Event:
    """Return an event from a file's values. Raises BadRecord for what is none.

    Other models' segments may leave the video or have no length: the metric takes them as they are.
    """
    if not is_number(start) or not is_number(end):
        raise BadRecord(f"segment: got {show([start, end])}, expected start and end in seconds, finite")
    assert isinstance(start, int | float)
    assert isinstance(end, int | float)
    if end < start:
        raise BadRecord(f"segment: got {show([start, end])}, expected an end that is not before the start")
    if not isinstance(label, str) or not label:
        raise BadRecord(f"label: got {show(label)}, expected a class name")
    if score is not None and not (is_number(score) and isinstance(score, int | float) and 0 <= score <= 1):
        raise BadRecord(f"score: got {show(score)}, expected a number in [0, 1]")
    if label_id is not None and (type(label_id) is not int or not 0 <= label_id < 1 << 20):
        raise BadRecord(f"label_id: got {show(label_id)}, expected an integer from 0 to {(1 << 20) - 1}")
    confidence = None if score is None else float(score)  # type: ignore[arg-type]
    return Event(float(start), float(end), label, confidence, label_id)  # type: ignore[arg-type]


def parse_number(text: str, name: str) -> float:
    """Return a finite number from text. Raises BadRecord."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value) or "_" in text:
        raise BadRecord(f"{name}: got {show(text)}, expected a number")
    return value


def check_line(label: str) -> str:
    """Return a label that is one line of text. Raises BadRecord for others."""
    if _CONTROL(label) or label != label.strip():
        raise BadRecord(
            f"label {show(label)}: this format needs a label on one line, without space around it; "
            "use one with fields of its own (csv, activitynet, labelstudio)"
        )
    return label


def label_text(event: Event) -> str:
    """Return `label (0.8734)`, or the label alone of an event without a score, for formats that hold only a text.

    Raises BadRecord for a label that a line of text can't hold, or that would read back as a label with a score.
    """
    check_line(event.label)
    if event.score is None and _SCORED(event.label):
        raise BadRecord(f"label {show(event.label)}: ends like a score, which this format can't tell from one")
    return event.label if event.score is None else f"{event.label} ({event.score:.{SCORE_DIGITS}f})"


def parse_label_text(text: str) -> tuple[str, float | None]:
    """Return label and score of what `label_text` wrote, or of a text that a person typed: that has no score."""
    scored = _SCORED(text)
    return (scored[1], float(scored[2])) if scored else (text, None)


def check_videos(videos: Iterable[Video]) -> list[Video]:
    """Return the videos. Raises BadRecord for an id that can't be one, and one that is there twice."""
    seen: set[str] = set()
    checked = []
    for video in videos:
        check_video_id(video.video_id)
        if video.duration is not None:
            check_duration(video.duration)
        if video.video_id in seen:
            raise BadRecord(f"video {show(video.video_id)} occurs a second time")
        seen.add(video.video_id)
        checked.append(video)
    return checked


def class_names(videos: Iterable[Video], labels: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the class names, index = label id: those given, the files' ids, or the names in alphabetical order.

    Raises BadRecord for ids that contradict the names or each other.
    """
    if labels is not None:
        return tuple(labels)
    by_id: dict[int, str] = {}
    names: set[str] = set()
    for video in videos:
        for event in video.events:
            names.add(event.label)
            if event.label_id is not None and by_id.setdefault(event.label_id, event.label) != event.label:
                raise BadRecord(
                    f"label_id {event.label_id}: got labels {show(by_id[event.label_id])} and {show(event.label)}"
                )
    if not by_id:
        return tuple(sorted(names))
    if len(set(by_id.values())) < len(by_id):
        twice = next(name for name in by_id.values() if list(by_id.values()).count(name) > 1)
        raise BadRecord(f"label {show(twice)} has more than one label_id")
    if missing := sorted(names.difference(by_id.values())):
        raise BadRecord(f"label {show(missing[0])} has no label_id, but other events have one")
    return tuple(by_id.get(i, f"class {i}") for i in range(max(by_id) + 1))


def to_records(videos: Sequence[Video], labels: Sequence[str] | None = None) -> list[Record]:
    """Return (video id, duration, Detections) of videos whose events have scores, best first.

    `labels` (index = label id): every label must be one of them. An unknown duration is NaN. Raises BadRecord, naming
    video and event, for a label that is not among them and an event without a score.
    """
    names = class_names(videos, labels)
    ids = {name: i for i, name in enumerate(names)}
    return [
        (video.video_id, math.nan if video.duration is None else video.duration, _detections(video, names, ids))
        for video in videos
    ]


def _detections(video: Video, names: tuple[str, ...], ids: dict[str, int]) -> Detections:
    label_ids = []
    for number, event in enumerate(video.events):
        where = f"video {show(video.video_id)}, event {number}"
        if event.score is None:
            raise BadRecord(f"{where}: has no score; 'ccnet convert --score 1' gives every event one")
        label_id = ids.get(event.label)
        if label_id is None:
            raise BadRecord(f"{where}: label {show(event.label)}: expected one of {len(names)} classes")
        if event.label_id is not None and event.label_id != label_id:
            raise BadRecord(f"{where}: label {show(event.label)}: got label_id {event.label_id}, expected {label_id}")
        label_ids.append(label_id)
    scores = np.array([event.score for event in video.events], np.float32)
    order = np.argsort(-scores, kind="stable")
    segments = np.array([event[:2] for event in video.events], np.float64).reshape(-1, 2)
    return Detections(segments[order], scores[order], np.array(label_ids, np.int64)[order], names)


def from_records(records: Iterable[Record]) -> list[Video]:
    """Return (video id, duration, Detections) as videos of events."""
    videos = []
    for video_id, duration, found in records:
        rows = zip(found.segments.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
        events = [Event(start, end, found.label_names[i], score, i) for (start, end), i, score in rows]
        videos.append(Video(video_id, events, duration))
    return videos


def clipped(video: Video) -> tuple[Video, int, int]:
    """Return the video with its events cut to [0, duration], and how many were cut and how many left out.

    Left out is what has no length then. The duration must be known.
    """
    assert video.duration is not None
    kept = []
    cut = 0
    for event in video.events:
        start, end = max(event.start, 0.0), min(event.end, video.duration)
        if end > start:
            cut += (start, end) != event[:2]
            kept.append(event._replace(start=start, end=end))
    return replace(video, events=kept), cut, len(video.events) - len(kept)
