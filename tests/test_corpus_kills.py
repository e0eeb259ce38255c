"""Runs that are killed at random end with each video exactly once, and leave no temporary file.

A run is killed when it has come to random places: one of its worker processes or the process that drives them, by
SIGKILL. `make soak` does it a hundred times over 2,000 videos: CCNET_KILLS is the number of kills, CCNET_FUZZ_SEED what
they follow from.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from builders import features_with, make_bundle, write_features

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
if not Path("/proc/self/task").is_dir():
    pytest.skip("finds worker processes in /proc", allow_module_level=True)

KILLS = int(os.environ.get("CCNET_KILLS", "8"))
SEED = int(os.environ.get("CCNET_FUZZ_SEED", "0"))
VIDEOS_PER_KILL = 20
SIZE = 5
SECONDS = 60 + 10 * KILLS


def children(pid: int) -> list[int]:
    """Return the processes that a process started and that still run."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def test_each_video_exactly_once(tmp_path: Path) -> None:
    count = VIDEOS_PER_KILL * KILLS
    bundle, features, out = make_bundle(tmp_path / "bundle").folder, tmp_path / "features", tmp_path / "run"
    features.mkdir()
    for i in range(count):
        write_features(features, f"v{i:05d}", features_with(12 + i % 9, [(2, 8, i % 4, 3.0 + i / count)]))
    command = [sys.executable, "-m", "ccnet", "predict", str(bundle), "--features", str(features), "--quiet"]
    subprocess.run([*command, "--out", str(tmp_path / "whole.jsonl")], check=True)

    draw = np.random.default_rng(SEED)
    places = sorted(draw.uniform(0, count / SIZE - 1, KILLS))  # shards done when the next kill is due
    killed = {"driver": 0, "worker": 0}
    deadline = time.monotonic() + SECONDS
    status = None
    while status != 0:
        options = ("--out", str(out), "--processes", "2", "--shard-size", str(SIZE))
        with subprocess.Popen([*command, *options]) as driver:
            try:
                while (status := driver.poll()) is None:
                    assert time.monotonic() < deadline
                    time.sleep(0.002)
                    if not places or len(list(out.glob("done/??????.json"))) < places[0]:
                        continue
                    time.sleep(draw.uniform(0, 0.02))
                    workers = children(driver.pid)
                    places.pop(0)
                    to_driver = not workers or len(places) % 3 == 0
                    victim = driver.pid if to_driver else workers[draw.integers(len(workers))]
                    killed["driver" if victim == driver.pid else "worker"] += 1
                    os.kill(victim, signal.SIGKILL)
            finally:
                driver.kill()
        assert status in (0, 1, -signal.SIGKILL)  # 1: a shard that had bad luck is tried again by the next command

    assert not places
    assert killed["driver"] >= KILLS // 3
    assert killed["worker"] > 0
    shards = b"".join(path.read_bytes() for path in sorted(out.glob("shards/*")))
    assert shards == (tmp_path / "whole.jsonl").read_bytes()
    assert [json.loads(line)["video_id"] for line in shards.splitlines()] == [f"v{i:05d}" for i in range(count)]
    expected = {"plan.json", "videos.jsonl", "engine.json", "failed.jsonl"}
    for shard in range(count // SIZE):
        expected |= {f"done/{shard:06d}.json", f"shards/{shard:06d}.jsonl"}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()} == expected
