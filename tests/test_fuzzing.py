"""What a reader is held to: each kind of fault is found, and a good reader has none."""

from __future__ import annotations

import mmap
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fuzzing
import pytest

from runtime.errors import FeatureError


def refuses(path: Path) -> None:
    raise FeatureError("no")


def breaks(path: Path) -> None:
    raise KeyError(path.name)


def talks(path: Path) -> None:
    raise FeatureError("x" * 10_000)


def burns(path: Path) -> None:
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass


def waits(path: Path) -> None:
    time.sleep(30)


def grows(path: Path) -> None:
    """Take memory from the system: what the allocator has free, after other tests, is no growth of the process."""
    with mmap.mmap(-1, 80 << 20) as taken:
        for start in range(0, len(taken), mmap.PAGESIZE):
            taken[start] = 1


@pytest.mark.parametrize(
    ("read", "kind", "count"),
    [
        (refuses, "", 0),
        (breaks, "uncaught KeyError", 2),
        (talks, "message of 10000", 2),
        (burns, "slow", 2),
        (waits, "uncaught Hang", 2),
        pytest.param(grows, "memory", 2, marks=pytest.mark.skipif(sys.platform != "linux", reason="of Linux alone")),
    ],
)
def test_faults_are_found(
    read: Callable[[Path], None], kind: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "HANGS_AFTER", 0.05 if read is waits else 60.0)
    monkeypatch.setattr(fuzzing, "WARM_UP", 0)
    limits = fuzzing.Limits(seconds=0.05 if read is burns else 60.0)
    row, found = fuzzing.attack("r", read, tmp_path / "f", lambda rng: rng.bytes(8), 2, limits)
    assert row.tried == 2
    assert all(name.startswith(kind) for name in found)
    assert len(found) == min(count, 1)
    assert row.uncaught + row.messages + row.slow + row.memory == count
    assert fuzzing.table([row.to_json()])[-1].split()[:2] == ["all", "2"]
