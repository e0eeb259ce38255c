"""CSV and Parquet: one row an event.

Columns: video_id, duration, start, end (seconds), label, label_id, score. Read are also the names that ActionFormer's
tables have (video-id, t-start, t-end); duration, label_id and score may be absent, and other columns may be there.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.detections import write_parquet as write_parquet_records
from runtime.files import atomic_file
from runtime.formats.events import Event, Video, check_event, check_videos, parse_number, to_records
from runtime.formats.text import read_text
from runtime.packages import missing
from runtime.records import BadRecord
from runtime.schema import show

COLUMNS = ("video_id", "duration", "start", "end", "label", "label_id", "score")
_REQUIRED = ("video_id", "start", "end", "label")
_ALIASES = {"video-id": "video_id", "t-start": "start", "t-end": "end", "label-id": "label_id"}
_LARGEST_TABLE = 50_000_000
"""Rows of a Parquet file, which may say more than it holds."""


def read_csv(path: Path) -> list[Video]:
    """Read a CSV file with a header. Raises BadRecord naming the line."""
    lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    gathered = _Gathered()
    try:
        header = next(lines, [])
        columns = _columns(header)
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(header):
                raise BadRecord(f"got {len(cells)} cells, expected {len(header)} as in the header")
            gathered.add({name: cells[i] or None for name, i in columns.items()}, from_text=True)
    except (BadRecord, csv.Error) as error:
        raise BadRecord(f"line {max(lines.line_num, 1)}: {error}") from None
    return check_videos(gathered.videos())


def write_csv(path: Path, videos: Sequence[Video]) -> None:
    """Write a CSV file; what an event does not have stays empty. A video without events has no row."""
    with atomic_file(path, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for video in videos:
            for event in video.events:
                row = (video.video_id, video.duration, event.start, event.end, event.label, event.label_id, event.score)
                writer.writerow(row)


def read_parquet(path: Path) -> list[Video]:
    """Read a Parquet file. Raises BadRecord naming the row, MissingDependency without pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise missing("pyarrow", "reading Parquet") from None
    gathered = _Gathered()
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows > _LARGEST_TABLE:
                raise BadRecord(f"{file.metadata.num_rows} rows, expected at most {_LARGEST_TABLE}")
            header = file.schema_arrow.names
            columns = _columns(header)
            for batch in file.iter_batches(columns=[header[i] for i in columns.values()]):
                found = batch.to_pydict()
                values = [found[header[i]] for i in columns.values()]
                for cells in zip(*values, strict=True):
                    row += 1
                    gathered.add(dict(zip(columns, cells, strict=True)), from_text=False)
    except BadRecord as error:
        raise BadRecord(f"row {row}: {error}" if row else str(error)) from None
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of the content
            raise
        raise BadRecord(f"not a Parquet file that can be read ({show(str(error))})") from None
    return check_videos(gathered.videos())


def write_parquet(path: Path, videos: Sequence[Video]) -> None:
    """Write a Parquet file as `ccnet predict` does; every event must have a score (BadRecord)."""
    write_parquet_records(path, to_records(videos))


def _columns(header: Sequence[str]) -> dict[str, int]:
    """Return where the columns that are read stand."""
    found: dict[str, int] = {}
    for index, name in enumerate(header):
        known = _ALIASES.get(name.strip(), name.strip())
        if known not in COLUMNS:
            continue
        if known in found:
            raise BadRecord(f"column {show(name)} occurs twice")
        found[known] = index
    if absent := [name for name in _REQUIRED if name not in found]:
        raise BadRecord(f"columns {', '.join(absent)} are missing; got {show(','.join(header))}")
    return found


class _Gathered:
    """Rows, by video in order of first appearance."""

    def __init__(self) -> None:
        self._events: dict[str, list[Event]] = {}
        self._durations: dict[str, float | None] = {}

    def add(self, row: Mapping[str, Any], *, from_text: bool) -> None:
        """Add one row; absent values are None."""
        video_id, duration = row["video_id"], row.get("duration")
        if not isinstance(video_id, str):
            raise BadRecord(f"video_id: got {show(video_id)}, expected text")
        numbers = {name: row.get(name) for name in ("start", "end", "score", "label_id")}
        if from_text:
            numbers = {name: None if v is None else parse_number(v, name) for name, v in numbers.items()}
            duration = None if duration is None else parse_number(duration, "duration")
            label_id = numbers["label_id"]
            if label_id is not None and label_id.is_integer():
                numbers["label_id"] = int(label_id)
        if isinstance(duration, float) and math.isnan(duration):  # how a table of floats says unknown
            duration = None
        if self._durations.setdefault(video_id, duration) != duration:
            raise BadRecord(
                f"video {show(video_id)}: got duration {show(duration)}, in another row {self._durations[video_id]}"
            )
        event = check_event(numbers["start"], numbers["end"], row["label"], numbers["score"], numbers["label_id"])
        self._events.setdefault(video_id, []).append(event)

    def videos(self) -> Iterator[Video]:
        for video_id, events in self._events.items():
            yield Video(video_id, events, self._durations[video_id])
