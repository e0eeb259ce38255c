"""Annotation files of other data sets, brought into the UnAV-100 layout before they are checked.

- ActivityNet: JSON of the same shape without label ids, with the subsets `training` and `testing`. OpenTAD's and
  ActionFormer's files of THUMOS14 are of this style, too.
- THUMOS14: a folder of text files `<class>_<val|test|train>.txt` with lines `<video id> <start> <end>`, and a file
  `durations.csv` (video_id,duration), as the text files do not know how long a video is.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from runtime.files import is_sidecar
from runtime.records import BadRecord, as_number, as_segment, is_number, read_bytes, read_json
from runtime.schema import show

log = logging.getLogger(__name__)

_SUBSETS = {"training": "train", "val": "validation", "valid": "validation", "testing": "test"}
"""Other names of the subsets, in lower case."""
_AMBIGUOUS = "ambiguous"
"""The class of THUMOS14 whose events are neither right nor wrong."""


def subset_name(value: Any) -> Any:
    """Return the name of a subset that is written in another way (`Training`, `val`), and anything else as it is."""
    if not isinstance(value, str):
        return value
    name = value.strip().lower()
    return _SUBSETS.get(name, name)


def read_content(path: Path, labels: Sequence[str] | None) -> Any:
    """Return the JSON value of an annotation file of any style, in the UnAV-100 layout where its style is known.

    `labels`: the class list that ids are taken from where the file has none; without it, the names in alphabetical
    order. Raises BadRecord, OSError.
    """
    if path.is_dir():
        return {"database": _thumos(path, labels)}
    content = read_json(path, any_number=True)
    database = content.get("database") if isinstance(content, dict) else None
    if isinstance(database, dict) and _without_ids(database.values()):
        return {"database": _activitynet(path, database, labels)}
    return content


def _without_ids(records: Iterable[Any]) -> bool:
    """Return whether no event has a label id, and at least one a label."""
    events = [event for record in records for event in _events(record)]
    return bool(events) and all("label" in event and event.get("label_id") is None for event in events)


def _events(record: Any) -> list[dict[str, Any]]:
    events = record.get("annotations") if isinstance(record, dict) else None
    return [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []


def _activitynet(path: Path, database: dict[str, Any], labels: Sequence[str] | None) -> dict[str, Any]:
    names = {e["label"] for r in database.values() for e in _events(r) if isinstance(e["label"], str)}
    ids = _label_ids(names, labels)
    adapted: dict[str, Any] = {}
    cut = 0
    for video_id, record in database.items():
        if not isinstance(record, dict) or not isinstance(record.get("annotations", []), list):
            adapted[video_id] = record  # the check of the layout says what is wrong
            continue
        subset = subset_name(record.get("subset"))
        events = []
        for event in record.get("annotations", []):
            if isinstance(event, dict) and isinstance(event.get("label"), str):
                segment = as_segment(event.get("segment"))
                inside = _inside(segment, as_number(record.get("duration")))
                cut += inside != segment
                if inside is None:
                    continue
                event = {"segment": inside, "label": event["label"], "label_id": ids[event["label"]]}
            events.append(event)
        adapted[video_id] = {**record, "subset": subset, "annotations": events}
    if cut:
        log.warning("%s: %d events reach beyond their videos or have no length; they were cut or left out", path, cut)
    return adapted


def _inside(segment: Any, duration: Any) -> Any:
    """Cut a segment to its video, None where nothing is left: ActivityNet has both. What is no segment stays."""
    if not (isinstance(segment, list) and len(segment) == 2 and all(map(is_number, (*segment, duration)))):
        return segment
    start, end = max(segment[0], 0), min(segment[1], duration)
    return [start, end] if end > start else None


def _label_ids(names: set[str], labels: Sequence[str] | None) -> dict[str, int]:
    known = {name: i for i, name in enumerate(sorted(names) if labels is None else labels)}
    if unknown := sorted(names.difference(known)):
        raise BadRecord(f"label {show(unknown[0])}: expected one of {len(known)} classes")
    return known


def _thumos(folder: Path, labels: Sequence[str] | None) -> dict[str, Any]:
    durations = _durations(folder / "durations.csv")
    found: dict[str, dict[str, Any]] = {}
    names: set[str] = set()
    for path in sorted(folder / name for name in os.listdir(folder) if _is_list(name)):
        label, _, subset = path.stem.rpartition("_")
        subset = subset_name(subset)
        if not label or subset not in ("train", "validation", "test"):
            raise BadRecord(f"{path.name}: expected a name like Diving_val.txt or Diving_test.txt")
        if label.lower() == _AMBIGUOUS:
            continue
        names.add(label)
        for number, line in enumerate(read_bytes(path).decode(errors="replace").splitlines(), 1):
            if not line.strip():
                continue
            where = f"{path.name}, line {number}"
            video_id, segment = _line(line, where)
            if video_id not in durations:
                raise BadRecord(f"{where}: video {show(video_id)} is not in durations.csv")
            record = found.setdefault(
                video_id, {"duration": durations[video_id], "subset": subset, "annotations": [], "file": path.name}
            )
            if record["subset"] != subset:
                raise BadRecord(f"{where}: video {show(video_id)} is of subset {record['subset']} in {record['file']}")
            record["annotations"].append({"segment": segment, "label": label})
    if not found:
        raise BadRecord("a folder without events; expected text files like Diving_val.txt, or name an annotation file")
    ids = _label_ids(names, labels)
    for record in found.values():
        for event in record["annotations"]:
            event["label_id"] = ids[event["label"]]
    return found


def _is_list(name: str) -> bool:
    return name.endswith(".txt") and not is_sidecar(name)


def _line(line: str, where: str) -> tuple[str, list[float]]:
    cells = line.split()
    try:
        video_id, start, end = cells
        segment = [float(start), float(end)]
    except ValueError:
        raise BadRecord(f"{where}: got {show(line)}, expected video id, start and end in seconds") from None
    return video_id, segment


def _durations(path: Path) -> dict[str, float]:
    try:
        rows = list(csv.reader(io.StringIO(read_bytes(path).decode("utf-8-sig"), newline=""), strict=True))
    except FileNotFoundError:
        raise BadRecord(
            "got a folder without durations.csv, expected an annotation JSON file, or a folder with the text files of "
            "THUMOS14 and durations.csv (video_id,duration)"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadRecord(f"durations.csv: {error}") from None
    if not rows or rows[0] != ["video_id", "duration"]:
        raise BadRecord(f"durations.csv: got the header {show(rows[0] if rows else '')}, expected video_id,duration")
    durations = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) != 2 or re.fullmatch(r"[0-9]+(\.[0-9]+)?", row[1]) is None:
            raise BadRecord(f"durations.csv, line {number}: got {show(row)}, expected video_id,duration")
        durations[row[0]] = float(row[1])
    return durations
