"""Mutations of files, and what a reader is held to while it reads them.

Whatever a file holds, its reader ends with a result or a `CCNetError` of bounded, plain text, within a second of
processor time, and takes no more memory than twice the file and a fixed amount.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import io
import json
import logging
import os
import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.errors import CCNetError
from runtime.records import BadRecord

COUNT = int(os.environ.get("CCNET_FUZZ", "300"))
FIRST = int(os.environ.get("CCNET_FUZZ_SEED", "0"))
LONGEST_MESSAGE = 600
"""Characters, without the path: a quotation of at most 400, and what is said about it."""
HANGS_AFTER = 60.0
"""Seconds by the clock, for a reader that waits and takes no processor time."""


@dataclass(frozen=True)
class Limits:
    """What reading one file may take."""

    seconds: float = 1.0
    """Of processor time of this process, which other processes of the machine do not lengthen."""
    base_bytes: int = 32 << 20
    """Beside twice the file: arenas of the allocator, thread stacks, tables of a library."""


LIMITS = Limits()
_MMAP_THRESHOLD, _MMAPPED_FROM = -3, 1 << 20
"""glibc's name of the size from which on an allocation is given back to the system when it is freed, and that size."""
WARM_UP = 3
"""Mutations that are read once before anything is measured: modules are imported and caches filled."""

Mutate = Callable[[np.random.Generator], bytes]


class Attack(Protocol):
    """The fixture `attack`: read mutations of a file, and fail where one is not read as it should be."""

    def __call__(
        self,
        read: Callable[[Path], object],
        path: Path,
        mutate: Mutate,
        *,
        share: float = 1.0,
        name: str = "",
        limits: Limits = LIMITS,
    ) -> None:
        """Read `share` of the usual number. `name`: of the reader, where a test has several."""


# Text that stands for a value, put into the JSON as it is.
RAW = (
    "[" * 100_000,
    '{"a":' * 5_000,
    "[" * 200 + "]" * 200,
    "9" * 5_000,
    "9" * 400,
    "-" + "9" * 30,
    "1e999",
    "-1e999",
    "1e308",
    "NaN",
    "-Infinity",
    '"\\ud800"',
    '"\\u0000"',
    '"\\u001b[2J"',
    '"' + "x" * 30_000 + '"',
    '{"a": 1, "a": 2}',
    "{",
    "",
    "nul",
    "1.",
    "\ufeff1",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2,
    10**6,
    10**12,
    2**63,
    -0.5,
    0.0,
    1e-320,
    1e300,
    "",
    "x",
    "../x",
    "\0",
    [],
    [[]],
    {},
    [1],
    {"": 0},
)


def mutated_json(content: Any, rng: np.random.Generator) -> bytes:
    """Replace, remove, rename or double one to three nodes of a JSON tree; sometimes damage the bytes."""
    content = json.loads(json.dumps(content))
    raw: dict[str, str] = {}
    for _ in range(rng.integers(1, 4)):
        places = [place for place in _places(content) if place[0] is not None]
        if not places:
            break
        parent, key = places[rng.integers(len(places))]
        action = rng.integers(7)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, dict):
            parent[str(VALUES[rng.integers(len(VALUES))])] = parent.pop(key)
        elif action == 2 and isinstance(parent, list):
            parent.extend(parent[:3])
        elif action == 3:
            other, name = places[rng.integers(len(places))]
            parent[key] = json.loads(json.dumps(other[name]))
        elif action <= 5:
            parent[key] = json.loads(json.dumps(VALUES[rng.integers(len(VALUES))]))
        else:
            mark = f"@{len(raw)}@"
            raw[json.dumps(mark)] = RAW[rng.integers(len(RAW))]
            parent[key] = mark
    text = json.dumps(content)
    for mark, replacement in raw.items():
        text = text.replace(mark, replacement)
    data = text.encode()
    return mutated_bytes(data, rng) if rng.random() < 0.2 else data


def _places(node: Any, parent: Any = None, key: Any = None) -> list[tuple[Any, Any]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [(parent, key), *(place for name, child in children for place in _places(child, node, name))]


def mutated_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut a file, or change, take out, put in or move bytes of it."""
    damaged = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(damaged) + 1))
        size = int(rng.integers(1, 1 + min(64, max(1, len(damaged)))))
        action = rng.integers(5)
        if action == 0:
            del damaged[at:]
        elif action == 1:
            del damaged[at : at + size]
        elif action == 2:
            damaged[at:at] = rng.integers(0, 256, size, np.uint8).tobytes()
        elif action == 3:
            damaged[at : at + 1] = bytes([rng.integers(256)])
        else:
            damaged[at:at] = damaged[:size]
    return bytes(damaged)


def mutated_npy(content: bytes, rng: np.random.Generator) -> bytes:
    """Give an array file another header, or damage its bytes."""
    headers = (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 6)}",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (12, 6)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 6)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (12, 6)}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (12, 6)}",
        "{'descr': '<f16', 'fortran_order': False, 'shape': (12, 6)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (12, 6)",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 6), 'x': 1}",
        "{'descr': '\x1b[2J', 'fortran_order': False, 'shape': (12, 6)}",
        "(" * 5_000,
        "{" + "'a':{" * 300,
        "9" * 5_000,
        "x" * 9_000,
        "",
    )
    if rng.random() < 0.5:
        return mutated_bytes(content, rng)
    text = headers[rng.integers(len(headers))].encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content[128:]


_TOKEN = re.compile(rb"[0-9.]+|[A-Za-z_]+|[^\sA-Za-z0-9]")
_HOSTILE = (
    *(text.encode() for text in RAW),
    *(b"-1", b"0", b"1e309", b"inf", b"99999999999999999999", b"00:61:00.000", b"0:0:0,0", b"-->", b"\0", b"\x1b[2J"),
    *(b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\t", b'"', b"'", b"<a>", b"</", b"&x;", b"&#0;", b"<!DOCTYPE a [", b"---"),
    *(
        b"!!python/object:os.system",
        b"&a [*a]",
        b"[[a]]",
        b"a.b.c = 1",
        b"../x",
        "\u202e".encode(),
        b"," * 5_000,
        b"x" * 30_000,
    ),
)


def mutated_text(data: bytes, rng: np.random.Generator) -> bytes:
    """Replace, remove, double or move words, numbers and lines of a text; sometimes damage the bytes."""
    for _ in range(rng.integers(1, 4)):
        lines = data.split(b"\n")
        at, to = (int(i) for i in rng.integers(len(lines), size=2))
        action = rng.integers(7)
        if action == 0:
            del lines[at]
        elif action == 1:
            lines.insert(to, lines[at])
        elif action == 2:
            lines[at] = _HOSTILE[rng.integers(len(_HOSTILE))]
        elif words := [*_TOKEN.finditer(lines[at])]:
            word = words[rng.integers(len(words))]
            put = b"" if action == 3 else _HOSTILE[rng.integers(len(_HOSTILE))]
            lines[at] = lines[at][: word.start()] + put + lines[at][word.end() :]
        data = b"\n".join(lines)
    return mutated_bytes(data, rng) if rng.random() < 0.2 else data


@dataclass
class Row:
    """What reading mutations came to: how many were tried, how many failed in which way, the most bytes and seconds."""

    reader: str
    tried: int = 0
    uncaught: int = 0
    messages: int = 0
    slow: int = 0
    memory: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Hang(BaseException):
    """A reader waited for too long. No `Exception`, so that no reader takes it for a damaged file."""


def attack(
    reader: str, read: Callable[[Path], object], path: Path, mutate: Mutate, count: int, limits: Limits = LIMITS
) -> tuple[Row, dict[str, str]]:
    """Write mutations to `path` and read them. Return the numbers, and each kind of fault with an example."""
    with _no_records_kept():
        return _attack(Row(reader), read, path, mutate, count, limits)


def _attack(
    row: Row, read: Callable[[Path], object], path: Path, mutate: Mutate, count: int, limits: Limits
) -> tuple[Row, dict[str, str]]:
    found = dict[str, str]()
    # What was freed before would hide what is taken: large allocations come from the system, and go back to it, unless
    # the heap has a gap of their size.
    _of_glibc("mallopt", _MMAP_THRESHOLD, _MMAPPED_FROM)
    for seed in range(FIRST, FIRST + min(count, WARM_UP)):
        path.write_bytes(mutate(np.random.default_rng(seed)))
        with contextlib.suppress(Exception):
            _watched(read, path)
    for seed in range(FIRST, FIRST + count):
        content = mutate(np.random.default_rng(seed))
        row.tried += 1
        path.write_bytes(content)
        fault, seconds, grown = _measured(read, path)
        most = limits.base_bytes + 2 * len(content)
        if seconds > limits.seconds or grown > most:
            # Once more: the first may have met a collection of garbage, or loaded a library.
            gc.collect()
            _of_glibc("malloc_trim", 0)
            path.write_bytes(content)
            again = _measured(read, path)
            seconds, grown = min(seconds, again[1]), min(grown, again[2])
        row.seconds, row.peak_bytes = max(row.seconds, seconds), max(row.peak_bytes, grown)
        faults = [fault] if fault else []
        row.uncaught += fault.startswith("uncaught")
        row.messages += fault.startswith("message")
        if seconds > limits.seconds:
            row.slow += 1
            faults.append("slow")
        if grown > most:
            row.memory += 1
            faults.append("memory")
        for kind in faults:
            found.setdefault(kind, f"seed {seed}: {seconds:.2f} s, {grown / 1e6:.0f} MB for {len(content)} bytes")
    return row, found


@contextlib.contextmanager
def _no_records_kept() -> Iterator[None]:
    """Keep pytest from storing what is logged, with the frames of every error that is an argument."""
    root = logging.getLogger()
    former, root.handlers = root.handlers, [_Forgetful()]
    try:
        yield
    finally:
        root.handlers = former


class _Forgetful(logging.Handler):
    """Formats records, as what prints them would, and forgets them."""

    def emit(self, record: logging.LogRecord) -> None:
        self.format(record)


def _of_glibc(name: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another system
        getattr(ctypes.CDLL(None), name)(*arguments)


def _measured(read: Callable[[Path], object], path: Path) -> tuple[str, float, int]:
    """Read once. Return the kind of fault, or nothing; seconds of processor time; bytes that memory peaked above."""
    before = _reset_peak()
    begin = time.process_time()
    fault = ""
    try:
        _watched(read, path)
    except (CCNetError, BadRecord) as error:
        message = str(error).replace(str(path.parent), "")
        if len(message) > LONGEST_MESSAGE or not message.replace("\n", "").isprintable():
            fault = f"message of {len(message)}: {message[:300]!r}"
    except (Exception, Hang) as error:  # noqa: BLE001  what is looked for
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "site-packages" not in frame.filename][-1]
        where = f"{frames[-1].filename}:{frames[-1].lineno}, from {ours.filename}:{ours.lineno}"
        fault = f"uncaught {type(error).__name__} at {where}: {str(error)[:200]!r}"
    return fault, time.process_time() - begin, max(0, _memory("VmHWM") - before)


def _watched(read: Callable[[Path], object], path: Path) -> None:
    with _ending_hangs(), warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        read(path)


@contextlib.contextmanager
def _ending_hangs() -> Iterator[None]:
    def end(*_: object) -> None:
        raise Hang(f"still reading after {HANGS_AFTER} s")

    former = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, HANGS_AFTER)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def _reset_peak() -> int:
    """Make the highest memory that Linux remembers of this process that of now, and return it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system: the peak is not measured
        return 1 << 62
    return _memory("VmHWM")


def _memory(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), 0)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of rows, with their sum."""
    wide = max([len(row["reader"]) for row in rows] + [5])
    lines = [f"{'reader':{wide}}     tried  uncaught  text  over 1 s  over memory  longest s  peak MB"]
    lines += [
        f"{row['reader']:{wide}} {row['tried']:9,} {row['uncaught']:9} {row['messages']:5} {row['slow']:9}"
        f" {row['memory']:12} {row['seconds']:10.2f} {row['peak_bytes'] / 1e6:8.1f}"
        for row in rows
    ]
    total = {name: sum(row[name] for row in rows) for name in ("tried", "uncaught", "messages", "slow", "memory")}
    lines.append(
        f"{'all':{wide}} {total['tried']:9,} {total['uncaught']:9} {total['messages']:5} {total['slow']:9}"
        f" {total['memory']:12}"
    )
    return lines
