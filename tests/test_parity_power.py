"""The page on false alarms and misses of the parity check: it can be made, and a gross mistake is on it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import parity_power


def test_a_page_of_one_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_power, "JUDGED", ("fp32",))
    chosen = tuple(m for m in parity_power.MISTAKES if m.strength in ("100% of the way", "level 2 of 4"))
    monkeypatch.setattr(parity_power, "MISTAKES", chosen)
    parity_power.main(["--seeds", "1", "--out", str(tmp_path / "parity.md")])
    lines = (tmp_path / "parity.md").read_text().splitlines()
    assert "| fp32, annotations | 0 of 1 | 0 of 1 | - | - |" in lines
    (shifted,) = (line for line in lines if line.startswith("| one level shifted by one step, level 2 of 4 |"))
    assert "| 0 of 1 |" in shifted
