"""Files of other tools: read whole and bounded, UTF-8 with or without a byte order mark, any line ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from runtime.records import BadRecord, read_bytes


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Say where in a file a BadRecord of the block was met."""
    try:
        yield
    except BadRecord as error:
        raise BadRecord(f"{place}: {error}") from None


def read_text(path: Path) -> str:
    """Return a file's text with `\\n` as line end. Raises BadRecord where it is not UTF-8."""
    content = read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadRecord(f"line {line}: not UTF-8; save the file as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
