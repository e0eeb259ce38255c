"""Strict reading of JSON: the one parser of every file, and what records of annotations and events have in common.

Every function raises `BadRecord` with what was received and what was expected; the reader of the file says where.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from runtime.files import open_input
from runtime.schema import show

OVERRUN_SECONDS = 0.01
"""A segment may leave [0, duration] by this much: durations are published rounded to 10 ms, segment times are not.
(The published UnAV-100 file needs none of it.)"""

LARGEST_FILE = 1 << 28
"""Bytes of a JSON file. The published UnAV-100 annotation file has 4 million."""

_DEEPEST = 64
_DIGITS = 40
_LABEL_IDS = 100_000

_NOT_UTF_8 = ((b"\x1f\x8b", "compressed by gzip"), (b"\xff\xfe", "in UTF-16"), (b"\xfe\xff", "in UTF-16"))
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE).fullmatch

_PLAIN_NAME = re.compile(r"[^/\\\x00-\x1f\ud800-\udfff]+").fullmatch
"""A surrogate alone stands for a byte of a file name that is not UTF-8; no file can carry it on."""


class BadRecord(Exception):
    """A record is not what it should be."""


def read_bytes(path: str | Path, limit: int = LARGEST_FILE) -> bytes:
    """Return a file's content. Raises BadRecord for one of more than `limit` bytes, OSError."""
    with open_input(path) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise BadRecord(f"more than {limit} bytes, expected a file of at most that size")
    return content


def read_json(path: str | Path, *, limit: int = LARGEST_FILE, any_number: bool = False) -> Any:
    """Parse a JSON file of at most `limit` bytes. Raises BadRecord, and OSError when it can't be read."""
    return parse_json(read_bytes(path, limit), any_number=any_number)


def parse_json(text: str | bytes, *, any_number: bool = False) -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark, strictly.

    Refused beyond bad JSON: a key twice in one object, objects and lists nested deeper than 64, text that is not
    Unicode (half of a surrogate pair), and, unless `any_number`, numbers that are not finite or have more than 40
    digits. Records that may hold more than is read take any number, and check those they read.
    """
    numbers: dict[str, Any] = {"parse_float": _finite, "parse_int": _integer, "parse_constant": _refuse_constant}
    try:
        text = text if isinstance(text, str) else _decode(text)
        value = json.loads(text, object_pairs_hook=_unique_keys, **({} if any_number else numbers))
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"text is not Unicode: half of a surrogate pair, {show(error.object[error.start])}") from None
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8
        if isinstance(text, str) and text.startswith("version https://git-lfs"):
            raise BadRecord("a Git LFS pointer, not the file; 'git lfs pull' fetches it") from None
        raise BadRecord(f"not valid JSON ({error})") from None
    _check_depth(value)
    return value


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = next((name for begin, name in _NOT_UTF_8 if content.startswith(begin)), None)
        what = f"it is {found}" if found else f"byte {error.start} is not UTF-8"
        raise BadRecord(f"not valid JSON ({what}); expected text in UTF-8") from None


def get_values(record: Any, keys: tuple[str, ...]) -> list[Any]:
    """Return the values of `keys` in a record, which may have further ones."""
    if not isinstance(record, dict):
        raise BadRecord(f"got {show(record)}, expected an object with {', '.join(keys)}")
    try:
        return [record[key] for key in keys]
    except KeyError as error:
        raise BadRecord(f"'{error.args[0]}' is missing; expected {', '.join(keys)}") from None


def check_list(value: Any, name: str) -> None:
    """Check that a value is a list."""
    if not isinstance(value, list):
        raise BadRecord(f"{name}: got {show(value)}, expected a list")


def check_video_id(video_id: Any) -> str:
    """Return a video id, which is a part of file names."""
    if not isinstance(video_id, str) or video_id in (".", "..") or not _PLAIN_NAME(video_id):
        raise BadRecord(
            f"video id: got {show(video_id)}, expected a name without path separators and control characters"
        )
    return video_id


def check_duration(value: Any) -> float:
    """Return a duration in seconds."""
    if not is_number(value) or value <= 0:
        raise BadRecord(f"duration: got {show(value)}, expected seconds above 0")
    return float(value)


def check_segment(value: Any, duration: float) -> tuple[float, float]:
    """Return start and end in seconds, inside a video of `duration` but for `OVERRUN_SECONDS`."""
    if not isinstance(value, list) or len(value) != 2 or not is_number(value[0]) or not is_number(value[1]):
        raise BadRecord(f"segment: got {show(value)}, expected [start, end] in seconds, finite")
    start, end = value
    if end <= start:
        raise BadRecord(f"segment: got {show(value)}, expected an end after the start")
    if start < -OVERRUN_SECONDS or end > duration + OVERRUN_SECONDS:
        raise BadRecord(f"segment: got {show(value)}, expected it inside the video, [0, {duration}]")
    return float(start), float(end)


def as_label_id(value: Any) -> Any:
    """Return an id that is written as a whole float or as digits as the integer, anything else as it is."""
    if type(value) is float and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _DIGITS:
        return int(value)
    return value


def as_number(value: Any) -> Any:
    """Return a number that is written as text as the number, anything else as it is."""
    return float(value) if isinstance(value, str) and len(value) <= _DIGITS and _NUMBER(value) else value


def as_segment(value: Any) -> Any:
    """Return a list with the numbers in it that are written as text as numbers, anything else as it is."""
    return [as_number(item) for item in value] if isinstance(value, list) else value


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite JSON number that fits a float (true and false are not numbers)."""
    kind = type(value)
    return (kind is float and math.isfinite(value)) or (kind is int and abs(value) < 1e300)


class LabelTable:
    """Class names and their ids: those given, or else those that the records have, each pair consistent."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self._given = names is not None
        self.names: dict[int, str] = dict(enumerate(names or ()))
        """Class name of each id."""
        self._ids = {name: label_id for label_id, name in self.names.items()}

    def id_of(self, name: Any) -> int:
        """Return the id of a class whose record has none."""
        if isinstance(name, str) and name in self._ids:
            return self._ids[name]
        raise BadRecord(f"'label_id' is missing, and nothing else says the id of label {show(name)}")

    def check(self, name: Any, label_id: Any) -> int:
        """Return the id of a label; without given names, a new pair is added."""
        if not isinstance(name, str) or not name:
            raise BadRecord(f"label: got {show(name)}, expected a class name")
        if type(label_id) is not int or not 0 <= label_id < _LABEL_IDS:
            raise BadRecord(f"label_id: got {show(label_id)}, expected an integer from 0 to {_LABEL_IDS - 1}")
        if self.names.get(label_id) == name:
            return label_id
        known = "expected" if self._given else "elsewhere it is"
        if name in self._ids:
            raise BadRecord(f"label {show(name)}: got label_id {label_id}, {known} {self._ids[name]}")
        if label_id in self.names:
            raise BadRecord(f"label_id {label_id}: got label {show(name)}, {known} {show(self.names[label_id])}")
        if self._given:
            raise BadRecord(f"label {show(name)} (id {label_id}): expected one of {len(self.names)} classes")
        self.names[label_id], self._ids[name] = name, label_id
        return label_id


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadRecord(f"number {show(text)} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise BadRecord(f"got an integer of {len(text)} digits, expected at most {_DIGITS}")
    return int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise BadRecord(f"{text} is not valid JSON; expected finite numbers")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise BadRecord(f"nested deeper than {_DEEPEST} objects and lists")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BadRecord(f"key {show(key)} occurs twice in one object")
            seen.add(key)
    return unique
