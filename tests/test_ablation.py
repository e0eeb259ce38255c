"""The synthetic ablation: its rows are networks of their own, and its page says what the runs gave."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.ablation import CONFIG, VARIANTS, Job, report
from ccnet.config import with_overrides
from runtime.files import write_json


def keep(work: Path, row: int, seed: int, average: float) -> None:
    scores = {"map": [average] * 5, "average": average, "parameters": 1, "last_loss": 1.0, "steps": 7, "cpu_seconds": 1}
    write_json(Job(VARIANTS[row], seed, work).result, scores)


def test_every_row_is_another_network_that_differs_in_its_switches_only() -> None:
    configs = [with_overrides(CONFIG, variant.overrides) for variant in VARIANTS]
    assert len({json.dumps(config.to_json()) for config in configs}) == len(VARIANTS)
    assert {config.train for config in configs} == {CONFIG.train}
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)


def test_the_page_pairs_the_seeds_and_leaves_unfinished_rows_out(tmp_path: Path) -> None:
    for seed, full, without in ((0, 0.50, 0.40), (1, 0.60, 0.45)):
        keep(tmp_path, 0, seed, full)
        keep(tmp_path, 3, seed, without)
    keep(tmp_path, 1, 0, 0.99)  # its second seed is missing
    page = report(tmp_path, [0, 1], tmp_path / "out", {})
    assert "| CCNet, all parts | 55.0 | 55.0 | 55.0 | 55.0 | 55.0 | 55.0 | 50.0 / 60.0 |  |" in page
    row = "| without CMI and TCG | 42.5 | 42.5 | 42.5 | 42.5 | 42.5 | 42.5 | 40.0 / 45.0 | -12.5 (-15.0, -10.0) |"
    assert row in page
    assert "99.0" not in page
    data = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert {m["name"]: m["value"] for m in data["measurements"]} == {
        "CCNet, all parts / mAP Avg": 55.0,
        "without CMI and TCG / mAP Avg": 42.5,
    }
    assert data["settings"]["seeds"] == [0, 1]
