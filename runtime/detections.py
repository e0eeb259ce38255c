"""Events of a video as the runtime reports them, and the files they are written to.

`events.jsonl` holds one line a video, its events best first:

    {"video_id": str, "duration": s,
     "events": [{"segment": [start_s, end_s], "label": str, "label_id": int, "score": p}]}

Numbers are written so that they read back bit by bit. A Parquet file holds one row an event instead.

Shapes:  N events of one video
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson

from runtime.errors import PredictionError
from runtime.files import atomic_file, open_input
from runtime.packages import missing
from runtime.records import (
    LARGEST_FILE,
    BadRecord,
    LabelTable,
    check_duration,
    check_list,
    check_segment,
    check_video_id,
    get_values,
    is_number,
    parse_json,
)
from runtime.schema import show

_ROW_GROUP = 100_000
"""Events that go into one row group of a Parquet file."""

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
        """Return an object per event, best first: segment (seconds), label, label_id, score."""
        names = self.label_names
        rows = zip(self.segments.tolist(), self.labels.tolist(), self.scores.tolist(), strict=True)
        return [{"segment": s, "label": names[i], "label_id": i, "score": score} for s, i, score in rows]


Record: TypeAlias = tuple[str, float, Detections]
"""(video id, duration in seconds, events)."""


def write_events(path: str | Path, records: Iterable[Record]) -> int:
    """Write `(video id, duration in seconds, detections)` records as they come. Returns the number of videos.

    The file appears under its name only when the last record has been written; memory holds one video at a time. Raises
    PredictionError for a number that is not finite, and for text that is not Unicode.
    """
    count = 0
    with atomic_file(path, "wb") as stream:
        for video_id, duration, detections in records:
            stream.write(event_line(video_id, duration, detections))
            count += 1
    return count


def event_line(video_id: str, duration: float, detections: Detections) -> bytes:
    """Return the line of a video in an events file, with the line break. Raises as `write_events`."""
    line = {"video_id": video_id, "duration": float(duration), "events": detections.to_json()}
    try:
        text = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:  # a lone surrogate, as in the name of a file that is not UTF-8
        raise PredictionError(f"video {video_id!r}: can't be written as JSON ({error})") from None
    if b"null" in text:  # what is not finite, or a part of a name
        numbers = (duration, *detections.segments.flat, *detections.scores)
        if not all(math.isfinite(number) for number in numbers):
            raise PredictionError(f"video {video_id!r}: its events hold a number that is not finite")
    return text


def write_parquet(path: str | Path, records: Iterable[Record]) -> int:
    """Write records like `write_events`, as a Parquet file of one row an event; a video without events has no row.

    Columns: video_id, duration, start, end (seconds), label, label_id, score. Needs the extra `parquet`
    (MissingDependency otherwise).
    """
    check_parquet()
    with atomic_file(path, "wb") as stream:
        return write_parquet_to(stream, records)


def check_parquet() -> None:
    """Raise MissingDependency where Parquet can't be written."""
    if importlib.util.find_spec("pyarrow") is None:
        raise missing("pyarrow", "writing Parquet")


def write_parquet_to(stream: IO[bytes], records: Iterable[Record]) -> int:
    """Write what `write_parquet` writes, to an open file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = (pa.string(), pa.float64(), pa.float64(), pa.float64(), pa.string(), pa.int64(), pa.float32())
    names = ("video_id", "duration", "start", "end", "label", "label_id", "score")
    schema = pa.schema(list(zip(names, kinds, strict=True)))

    def table(group: Sequence[Record]) -> Any:
        ids, durations, found = zip(*group, strict=True)
        video = np.repeat(np.arange(len(group)), [len(detections) for detections in found])
        segments = np.concatenate([detections.segments for detections in found])
        labels = np.concatenate([detections.labels for detections in found])
        columns = (
            pa.array(ids, pa.string()).take(pa.array(video)),
            np.array(durations, np.float64)[video],
            segments[:, 0],
            segments[:, 1],
            pa.array(found[0].label_names, pa.string()).take(pa.array(labels)),
            labels,
            np.concatenate([detections.scores for detections in found]),
        )
        arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        return pa.Table.from_arrays(arrays, schema=schema)

    count = 0
    with pq.ParquetWriter(stream, schema) as writer:
        for group in _row_groups(records):
            writer.write_table(table(group))
            count += len(group)
    return count


def join_parquet(stream: IO[bytes], parts: Iterable[bytes]) -> None:
    """Write the rows of Parquet files that `write_parquet_to` made as one file, in row groups of about the usual size.

    There must be at least one part.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = (pq.read_table(pa.BufferReader(part)) for part in parts)
    group = [next(tables)]
    with pq.ParquetWriter(stream, group[0].schema) as writer:
        for table in tables:
            if sum(part.num_rows for part in group) >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(group))
                group = []
            group.append(table)
        writer.write_table(pa.concat_tables(group))


def _row_groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Return records in groups of about `_ROW_GROUP` events, each with one list of class names."""
    group: list[Record] = []
    events = 0
    for record in records:
        if group and (events >= _ROW_GROUP or record[2].label_names != group[0][2].label_names):
            yield group
            group, events = [], 0
        group.append(record)
        events += len(record[2])
    if group:
        yield group


def read_events(path: str | Path, label_names: Sequence[str] | None = None) -> dict[str, Detections]:
    """Read an events file. Returns the detections by video id, in file order; raises as `read_records`."""
    return {video_id: detections for video_id, _, detections in read_records(path, label_names)}


def read_records(path: str | Path, label_names: Sequence[str] | None = None) -> list[Record]:
    """Read an events file. Returns (video id, duration in seconds, detections) in file order.

    With `label_names` (index = label id) every event must fit them; without, the names are gathered from the file, and
    ids that never occur are called `class <id>`. Events out of order are sorted, best first.

    Raises PredictionError naming file, line and event: not JSON, a missing key, a video twice, a segment that is not
    0 <= start < end <= duration (within 10 ms), a score outside [0, 1], an unknown label or one that does not
    fit its id.
    """
    path = Path(path)
    table = LabelTable(label_names)
    videos: dict[str, tuple[float, _Arrays]] = {}
    try:
        with open_input(path) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LARGEST_FILE), b""), 1):
                if not line.strip():
                    continue
                try:
                    video_id, duration, arrays = _read_video(line, table)
                    if video_id in videos:
                        raise BadRecord(f"video {show(video_id)} occurs a second time")
                except BadRecord as error:
                    raise PredictionError(f"{path}, line {number}: {error}") from None
                videos[video_id] = duration, arrays
    except FileNotFoundError:
        raise PredictionError(f"{path}: no such events file; 'ccnet predict ... --out {path}' writes one") from None
    except IsADirectoryError:
        raise PredictionError(f"{path}: got a folder, expected an events file (.jsonl)") from None
    names = tuple(table.names.get(i, f"class {i}") for i in range(max(table.names, default=-1) + 1))
    return [(video_id, duration, Detections(*arrays, names)) for video_id, (duration, arrays) in videos.items()]


def _read_video(line: bytes, table: LabelTable) -> tuple[str, float, _Arrays]:
    """Return video id, duration, and segments [N, 2], scores [N], labels [N] of one line."""
    video_id, duration, events = get_values(parse_json(line, any_number=True), ("video_id", "duration", "events"))
    video_id, duration = check_video_id(video_id), check_duration(duration)
    segments, scores, labels = [], [], []
    check_list(events, "events")
    try:
        for event in events:
            segment, label, label_id, score = get_values(event, ("segment", "label", "label_id", "score"))
            segments.append(check_segment(segment, duration))
            if not is_number(score) or not 0 <= score <= 1:
                raise BadRecord(f"score: got {show(score)}, expected a number in [0, 1]")
            scores.append(float(score))
            labels.append(table.check(label, label_id))
    except BadRecord as error:
        raise BadRecord(f"event {len(labels)}: {error}") from None
    confidence = np.array(scores, np.float32)
    order = np.argsort(-confidence, kind="stable")
    boundaries = np.array(segments, np.float64).reshape(-1, 2)
    return video_id, duration, (boundaries[order], confidence[order], np.array(labels, np.int64)[order])
