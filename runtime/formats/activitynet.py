"""ActivityNet result JSON, which OpenTAD, ActionFormer's descendants and evaluation servers take.

{"version": str, "results": {video_id: [{"segment": [start_s, end_s], "label": str, "score": p}]}, "external_data": {}}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from runtime.files import atomic_file
from runtime.formats.events import Event, Video, check_event, check_videos
from runtime.formats.text import at
from runtime.records import BadRecord, check_list, get_values, read_json
from runtime.schema import show

VERSION = "VERSION 1.3"
"""What ActivityNet's own evaluation expects."""


def read(path: Path) -> list[Video]:
    """Read a result file. Raises BadRecord naming video and event."""
    content = read_json(path, any_number=True)
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict):
        raise BadRecord('expected an object {"version": ..., "results": {video id: [...]}, "external_data": {...}}')
    return check_videos(Video(video_id, _events(video_id, found)) for video_id, found in results.items())


def _events(video_id: str, found: Any) -> list[Event]:
    events: list[Event] = []
    check_list(found, f"video {show(video_id)}")
    for number, event in enumerate(found):
        with at(f"video {show(video_id)}, event {number}"):
            segment, label, score = get_values(event, ("segment", "label", "score"))
            if not isinstance(segment, list) or len(segment) != 2:
                raise BadRecord(f"segment: got {show(segment)}, expected [start, end] in seconds")
            if score is None:
                raise BadRecord("score: got None, expected a number in [0, 1]")
            start, end = segment
            events.append(check_event(start, end, label, score))
    return events


def write(path: Path, videos: Sequence[Video]) -> None:
    """Write a result file. Every event must have a score (BadRecord)."""
    results = {
        video.video_id: [{"segment": e[:2], "label": e.label, "score": e.score} for e in video.events]
        for video in videos
    }
    content = {"version": VERSION, "results": results, "external_data": {"used": False, "details": ""}}
    with atomic_file(path) as stream:
        stream.write(orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE))
