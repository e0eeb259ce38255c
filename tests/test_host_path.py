"""The benchmark of the host path on tiny sizes: it runs, and its results can be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.compare import compare
from benchmarks.host_path import BATCHES, WORKERS, box_rate, main


def test_the_host_path_is_measured_and_written(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--preset", "tiny", "--seconds", "0.01", "--videos", "3"]) == 0
    data = json.loads((tmp_path / "host_path.json").read_text())
    assert len(compare(data, data)) == len(data["measurements"])
    values = {m["name"]: m["value"] for m in data["measurements"]}
    assert all(value > 0 for value in values.values())
    assert sum(name.startswith("stream") for name in values) == 2 * 2 * len(BATCHES) * len(WORKERS)
    page = (tmp_path / "host_path.md").read_text()
    assert "floor: copy the bytes" in page
    assert "**Estimate**, not a measurement: a box of 16 such cores" in page


def test_a_box_is_limited_by_its_cores_or_by_the_interpreter_lock() -> None:
    assert box_rate(cpu_ms=0.5, lock_ms=0.01) == pytest.approx(32_000)
    assert box_rate(cpu_ms=0.5, lock_ms=0.1) == pytest.approx(10_000)
