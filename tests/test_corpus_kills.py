"""Runs that are killed at random end with each video exactly once, and leave no temporary file.

`make soak` does it a hundred times over 2,000 videos: CCNET_KILLS is the number of kills, CCNET_FUZZ_SEED what they
follow from.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from corpus_kills import children, run_killed

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
if not Path("/proc/self/task").is_dir():
    pytest.skip("finds worker processes in /proc", allow_module_level=True)

KILLS = int(os.environ.get("CCNET_KILLS", "8"))
SEED = int(os.environ.get("CCNET_FUZZ_SEED", "0"))


def test_each_video_exactly_once(tmp_path: Path) -> None:
    killed = run_killed(tmp_path, KILLS, SEED, 60 + 10 * KILLS, children)
    assert killed["driver"] >= KILLS // 3
    assert killed["worker"] > 0
