"""Label Studio tasks (JSON): regions of its tag `<Labels>` on a media timeline, one task a video.

    [{"data": {"video": url, "video_id": str, "duration": s},
      "annotations" or "predictions": [{"result": [{"type": "labels", "original_length": s, "score": p,
          "value": {"start": s, "end": s, "labels": [label]}}]}]}]

Events with scores are predictions, which annotators see as suggestions; events without are annotations. The regions of
`<TimelineLabels>` count frames; they are read where the task's data say "fps".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import orjson

from runtime.files import atomic_file
from runtime.formats.events import Event, Video, check_event, check_videos
from runtime.formats.text import at
from runtime.records import BadRecord, check_list, get_values, is_number, read_json
from runtime.schema import show

FROM_NAME, TO_NAME = "label", "audio"
"""Names of the tags in the labeling configuration that docs/formats.md gives."""
_MEDIA = ("video", "audio", "video_url", "audio_url", "url")
_UPLOADED = re.compile(r"[0-9a-f]{8}-").match


def read(path: Path) -> list[Video]:
    """Read exported tasks. Raises BadRecord naming task and region."""
    tasks = read_json(path, any_number=True)
    check_list(tasks, "tasks")
    videos = []
    for number, task in enumerate(tasks):
        with at(f"task {number}"):
            videos.append(_video(task))
    return check_videos(videos)


def _video(task: Any) -> Video:
    (data,) = get_values(task, ("data",))
    if not isinstance(data, dict):
        raise BadRecord(f"data: got {show(data)}, expected an object")
    durations: list[Any] = [data["duration"]] if data.get("duration") is not None else []
    events: list[Event] = []
    for number, region in enumerate(_regions(task)):
        with at(f"region {number}"):
            if not isinstance(region, dict):
                raise BadRecord(f"got {show(region)}, expected an object")
            events += _events(region, data)
            if region.get("original_length") is not None:
                durations.append(region["original_length"])
    if durations and not is_number(durations[0]):
        raise BadRecord(f"duration: got {show(durations[0])}, expected seconds")
    return Video(_video_id(data), events, float(durations[0]) if durations else None)


def _regions(task: dict[str, Any]) -> list[Any]:
    """Return the regions of the task's one annotation, or of its one prediction."""
    for kind in ("annotations", "predictions"):
        given = task.get(kind) or []
        check_list(given, kind)
        found = [entry for entry in given if isinstance(entry, dict) and not entry.get("was_cancelled")]
        if len(found) > 1:
            raise BadRecord(f"{kind}: got {len(found)}, expected one; export the one that counts")
        if found:
            result: Any = found[0].get("result")
            check_list(result, f"{kind}[0].result")
            return list(result)
    return []


def _events(region: dict[str, Any], data: dict[str, Any]) -> Iterator[Event]:
    kind, score = region.get("type"), region.get("score")
    value: Any = region.get("value")
    if kind not in ("labels", "timelinelabels"):
        return  # a choice, a rating, a text: of the whole video
    (labels,) = get_values(value, (kind,))
    check_list(labels, kind)
    spans = [value]
    scale, first = 1.0, 0
    if kind == "timelinelabels":
        if not is_number(data.get("fps")) or data["fps"] <= 0:
            raise BadRecord("counts frames, but the task's data have no 'fps'; add it, or label with <Labels>")
        spans, scale, first = value.get("ranges"), 1 / data["fps"], 1
        check_list(spans, "ranges")
    for span in spans:
        start, end = get_values(span, ("start", "end"))
        if not is_number(start) or not is_number(end):
            raise BadRecord(f"got start {show(start)}, end {show(end)}, expected numbers")
        for label in labels:
            yield check_event((start - first) * scale, end * scale, label, score)


def _video_id(data: dict[str, Any]) -> str:
    """Return the task's video id, or else the name of its media file without folder, upload mark and suffix."""
    if isinstance(data.get("video_id"), str):
        return str(data["video_id"])
    url = next((data[key] for key in _MEDIA if isinstance(data.get(key), str)), None)
    if url is None:
        raise BadRecord(f"data: got {show(sorted(data))}, expected 'video_id', or a media file as 'video' or 'audio'")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise BadRecord(f"data: {show(url)} is not the address of a file") from None
    local = parse_qs(parts.query).get("d") if parts.path.endswith("/local-files/") else None
    name = PurePosixPath(local[0] if local else unquote(parts.path)).name
    if "/upload/" in parts.path and _UPLOADED(name):
        name = name[9:]
    return PurePosixPath(name).stem


def write(path: Path, videos: Sequence[Video]) -> None:
    """Write tasks to import; the media of a video is called `<video id>.mp4`."""
    with atomic_file(path) as stream:
        tasks = [_task(number, video) for number, video in enumerate(videos, 1)]
        stream.write(orjson.dumps(tasks, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _task(number: int, video: Video) -> dict[str, Any]:
    data: dict[str, Any] = {"video": f"{video.video_id}.mp4", "video_id": video.video_id}
    if video.duration is not None:
        data["duration"] = video.duration
    regions = []
    for i, event in enumerate(video.events):
        region: dict[str, Any] = {"id": f"v{number}e{i}", "type": "labels", "from_name": FROM_NAME, "to_name": TO_NAME}
        region["value"] = {"start": event.start, "end": event.end, "channel": 0, "labels": [event.label]}
        if video.duration is not None:
            region["original_length"] = video.duration
        if event.score is not None:
            region["score"] = event.score
        regions.append(region)
    if not regions:
        return {"data": data}
    if any(event.score is not None for event in video.events):
        best = max(event.score or 0.0 for event in video.events)
        return {"data": data, "predictions": [{"model_version": "ccnet", "score": best, "result": regions}]}
    return {"data": data, "annotations": [{"result": regions}]}
