"""Long runs: memory, threads and descriptors do not grow with what was done.

`python tests/soak.py [--share X]` does 100,000 predictions, 1,000 opens and closes, 200,000 videos of a stream with a
slow consumer, 2,000 abandoned streams and 2,000 streams with failing readers, or a share of each, and prints what
memory, threads and descriptors did; exit status 1 where something grew.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from builders import SPEC, OracleBackend, features_with, make_bundle

from runtime.localizer import Localizer
from runtime.machine import rss_bytes

VIDEO = features_with(20, [(3, 8, 1, 2.0)])
GROWTH = 2e6
"""Bytes that memory may have grown by over the later half of a run: the allocator's own noise is below it."""
_SAMPLES = 20
_MOST_AHEAD = 100


def predictions(count: int, folder: Path) -> Iterator[None]:
    with Localizer([OracleBackend()], SPEC) as localizer:
        for _ in range(count):
            if len(localizer(*VIDEO)) != 1:
                raise RuntimeError("an event was lost")
            yield


def opens(count: int, folder: Path) -> Iterator[None]:
    if not (folder / "bundle").exists():
        make_bundle(folder / "bundle")
    for _ in range(count):
        with Localizer.load(folder / "bundle", "onnxruntime", threads=1) as localizer:
            localizer(*VIDEO)
        yield


def slow_consumer(count: int, folder: Path) -> Iterator[None]:
    taken = 0

    def videos() -> Iterator[tuple[str, Any]]:
        nonlocal taken
        for i in range(count):
            taken = i + 1
            yield f"v{i}", VIDEO

    with Localizer([OracleBackend()], SPEC) as localizer:
        for number, result in enumerate(localizer.stream(videos(), batch_size=4)):
            if result.error is not None:
                raise result.error
            if taken - number > _MOST_AHEAD:
                raise RuntimeError(f"the stream took {taken} videos before the consumer had {number}")
            if number % 1000 == 0:
                time.sleep(0.01)
            yield


def abandoned(count: int, folder: Path) -> Iterator[None]:
    with Localizer([OracleBackend()], SPEC) as localizer:
        for _ in range(count):
            stream = localizer.stream((f"v{i}", VIDEO) for i in range(50))
            next(stream)
            del stream
            yield


def failing_readers(count: int, folder: Path) -> Iterator[None]:
    def fail() -> Any:
        raise LookupError("of a caller")

    with Localizer([OracleBackend()], SPEC) as localizer:
        for _ in range(count):
            try:
                for _ in localizer.stream([("a", VIDEO), ("b", fail), ("c", VIDEO)]):
                    pass
            except LookupError:  # noqa: PERF203
                yield
            else:
                raise RuntimeError("the caller's exception was lost")


RUNS: dict[str, tuple[int, Callable[[int, Path], Iterator[None]]]] = {
    "predictions": (100_000, predictions),
    "opens and closes": (1_000, opens),
    "slow consumer": (200_000, slow_consumer),
    "abandoned streams": (2_000, abandoned),
    "failing readers": (2_000, failing_readers),
}


def measure(name: str, share: float, folder: Path) -> dict[str, Any]:
    """Do a run and return memory's slope over its later half, and how many threads and descriptors are left over."""
    whole, steps = RUNS[name]
    count = max(2 * _SAMPLES, round(whole * share))
    for _ in steps(2, folder):  # what is loaded once is no growth
        pass
    gc.collect()
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    begin = time.perf_counter()
    done, memory = [], []
    for number, _ in enumerate(steps(count, folder), 1):
        if number % (count // _SAMPLES) == 0:
            done.append(number)
            memory.append(rss_bytes() or 0)
    gc.collect()
    after = threading.active_count(), len(os.listdir("/proc/self/fd"))
    half = len(done) // 2
    slope = float(np.polyfit(done[half:], memory[half:], 1)[0])
    grown = slope * (done[-1] - done[half])
    return {
        "run": name,
        "count": count,
        "seconds": round(time.perf_counter() - begin, 1),
        "bytes_each": round(slope, 2),
        "threads_left": after[0] - before[0],
        "descriptors_left": after[1] - before[1],
        "good": bool(grown < GROWTH and after == before),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, metavar="X", help="of the counts (default: 1)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        rows = []
        for name in RUNS:
            rows.append(measure(name, arguments.share, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    return 0 if all(row["good"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
