"""Events of a video as the runtime reports them, and the files they are written to.

`events.jsonl` holds one line a video, its events best first:

    {"video_id": str, "duration": s,
     "events": [{"segment": [start_s, end_s], "label": str, "label_id": int, "score": p}]}

Numbers are written so that they read back bit by bit. A Parquet file holds one row an event instead.

Shapes:  N events of one video
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.annotations import OVERRUN_SECONDS, check_video_id, is_number
from runtime.errors import MissingDependency, PredictionError
from runtime.files import atomic_file

_Arrays = tuple[npt.NDArray[np.float64], npt.NDArray[np.float32], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Detections:
    """Events of one video, best first."""

    segments: npt.NDArray[np.float64]
    """[N, 2] start and end in seconds."""
    scores: npt.NDArray[np.float32]
    """[N] in [0, 1], descending."""
    labels: npt.NDArray[np.int64]
    """[N] label ids."""
    label_names: tuple[str, ...]
    """Class names; the index is the label id."""

    def __len__(self) -> int:
        return len(self.scores)

    def to_json(self) -> list[dict[str, Any]]:
        """One object an event, best first: segment (seconds), label, label_id, score."""
        names = self.label_names
        rows = zip(self.segments.tolist(), self.labels.tolist(), self.scores.tolist(), strict=True)
        return [{"segment": s, "label": names[i], "label_id": i, "score": score} for s, i, score in rows]


def write_events(path: str | Path, records: Iterable[tuple[str, float, Detections]]) -> int:
    """Write `(video id, duration in seconds, detections)` records as they come. Returns the number of videos.

    The file appears under its name only when the last record has been written; memory holds one video at a time.
    """
    count = 0
    with atomic_file(path, "w") as stream:
        for video_id, duration, detections in records:
            line = {"video_id": video_id, "duration": float(duration), "events": detections.to_json()}
            stream.write(json.dumps(line, allow_nan=False) + "\n")
            count += 1
    return count


def write_parquet(path: str | Path, records: Iterable[tuple[str, float, Detections]]) -> int:
    """Like `write_events`, as a Parquet file of one row an event; a video without events has no row.

    Columns: video_id, duration, start, end (seconds), label, label_id, score. Needs the extra `parquet`
    (MissingDependency otherwise).
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise MissingDependency("pyarrow", "parquet", "writing Parquet") from None
    kinds = (pa.string(), pa.float64(), pa.float64(), pa.float64(), pa.string(), pa.int64(), pa.float32())
    names = ("video_id", "duration", "start", "end", "label", "label_id", "score")
    schema = pa.schema(list(zip(names, kinds, strict=True)))
    count = 0
    rows: list[list[Any]] = [[] for _ in names]
    with atomic_file(path, "wb") as stream, pq.ParquetWriter(stream, schema) as writer:

        def flush() -> None:
            columns = [pa.array(values, kind) for values, kind in zip(rows, kinds, strict=True)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            for values in rows:
                values.clear()

        for video_id, duration, detections in records:
            labels = detections.labels.tolist()
            rows[0] += [video_id] * len(labels)
            rows[1] += [float(duration)] * len(labels)
            rows[2] += detections.segments[:, 0].tolist()
            rows[3] += detections.segments[:, 1].tolist()
            rows[4] += [detections.label_names[i] for i in labels]
            rows[5] += labels
            rows[6] += detections.scores.tolist()
            count += 1
            if len(rows[0]) >= 100_000:
                flush()
        flush()
    return count


def read_events(path: str | Path, label_names: Sequence[str] | None = None) -> dict[str, Detections]:
    """Read an events file -> detections by video id, in file order.

    With `label_names` (index = label id) every event must fit them; without, the names are gathered from the file, and
    ids that never occur are called `class <id>`. Events out of order are sorted, best first.

    Raises PredictionError naming file, line and event: not JSON, a missing key, a video twice, a segment that is not
    0 <= start < end <= duration (within 10 ms), a score outside [0, 1], an unknown label or one that does not
    fit its id.
    """
    path = Path(path)
    reader = _Reader(label_names)
    videos: dict[str, _Arrays] = {}
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    video_id, arrays = reader.video(line)
                    if video_id in videos:
                        raise PredictionError(f"video {video_id!r} occurs a second time")
                except PredictionError as error:
                    raise PredictionError(f"{path}, line {number}: {error}") from None
                videos[video_id] = arrays
    except FileNotFoundError:
        raise PredictionError(f"{path}: no such events file; 'ccnet predict ... --out {path}' writes one") from None
    except IsADirectoryError:
        raise PredictionError(f"{path}: got a folder, expected an events file (.jsonl)") from None
    names = reader.class_names()
    return {video_id: Detections(*arrays, names) for video_id, arrays in videos.items()}


class _Reader:
    """Checks one line after the other and gathers the class names on the way."""

    def __init__(self, label_names: Sequence[str] | None) -> None:
        self.given = label_names is not None
        self.name_of: dict[int, str] = dict(enumerate(label_names or ()))

    def video(self, line: bytes) -> tuple[str, _Arrays]:
        """One line -> video id and segments [N, 2], scores [N], labels [N]."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PredictionError(f"not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise PredictionError(f"got {_show(record)}, expected an object with video_id, duration, events")
        video_id, duration, events = (_get(record, key) for key in ("video_id", "duration", "events"))
        if not isinstance(video_id, str) or check_video_id(video_id):
            raise PredictionError(f"video_id: got {_show(video_id)}, expected a name without path separators")
        if not is_number(duration) or duration <= 0:
            raise PredictionError(f"duration: got {_show(duration)}, expected seconds above 0")
        if not isinstance(events, list):
            raise PredictionError(f"events: got {_show(events)}, expected a list")
        segments, scores, labels = [], [], []
        try:
            for event in events:
                segments.append(_segment(event, duration))
                scores.append(_score(event))
                labels.append(self.label(event))
        except PredictionError as error:
            raise PredictionError(f"event {len(labels)}: {error}") from None
        confidence = np.array(scores, np.float32)
        order = np.argsort(-confidence, kind="stable")
        boundaries = np.array(segments, np.float64).reshape(-1, 2)
        return video_id, (boundaries[order], confidence[order], np.array(labels, np.int64)[order])

    def label(self, event: dict[str, Any]) -> int:
        label_id, name = _get(event, "label_id"), _get(event, "label")
        if type(label_id) is not int or not 0 <= label_id < 1 << 20 or not isinstance(name, str) or not name:
            raise PredictionError(f"label {_show(name)} with id {_show(label_id)}: expected a name and an integer >= 0")
        known = self.name_of.get(label_id)
        if known is None and not self.given:
            self.name_of[label_id] = name
        elif known is None:
            raise PredictionError(
                f"unknown label {name!r} with id {label_id}; expected an id below {len(self.name_of)}"
            )
        elif known != name:
            raise PredictionError(f"label_id {label_id}: got label {name!r}, expected {known!r}")
        return label_id

    def class_names(self) -> tuple[str, ...]:
        return tuple(self.name_of.get(i, f"class {i}") for i in range(max(self.name_of, default=-1) + 1))


def _segment(event: Any, duration: float) -> tuple[float, float]:
    if not isinstance(event, dict):
        raise PredictionError(f"got {_show(event)}, expected an object")
    segment = _get(event, "segment")
    if not isinstance(segment, list) or len(segment) != 2 or not is_number(segment[0]) or not is_number(segment[1]):
        raise PredictionError(f"segment: got {_show(segment)}, expected [start, end] in seconds, finite")
    start, end = segment
    if not -OVERRUN_SECONDS <= start < end <= duration + OVERRUN_SECONDS:
        raise PredictionError(f"segment: got {_show(segment)}, expected 0 <= start < end <= duration ({duration})")
    return float(start), float(end)


def _score(event: dict[str, Any]) -> float:
    score = _get(event, "score")
    if not is_number(score) or not 0 <= score <= 1:
        raise PredictionError(f"score: got {_show(score)}, expected a number in [0, 1]")
    return float(score)


def _get(record: dict[str, Any], key: str) -> Any:
    if key not in record:
        raise PredictionError(f"'{key}' is missing")
    return record[key]


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
