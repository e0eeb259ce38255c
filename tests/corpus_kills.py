"""Corpus runs that are killed at random: what they must end with, however often.

A run is killed when it has come to random places: one of its workers, or the process that drives them, by SIGKILL; the
same command goes on with it. As a program it does so with Ray's actors, and is meant for a network namespace of its
own, because Ray listens on all interfaces.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from builders import features_with, make_bundle, write_features

VIDEOS_PER_KILL = 20
SIZE = 5
"""Videos of a shard."""


def children(pid: int) -> list[int]:
    """Return the processes that a process started and that still run."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def below(pid: int, name: bytes) -> list[int]:
    """Return the processes whose command begins with a name and that descend from a process."""
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        waiting += children(parent)
        try:
            if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(name):
                found.append(parent)
        except OSError:
            continue
    return found


def run_killed(
    folder: Path,
    kills: int,
    seed: int,
    seconds: float,
    workers: Callable[[int], Sequence[int]],
    options: Sequence[str] = (),
) -> dict[str, int]:
    """Kill a run `kills` times until it is done, and check that it holds each video once and nothing else.

    `workers` finds those of a driver. Takes `seconds` at most. Returns how many drivers and workers were killed.
    """
    count = VIDEOS_PER_KILL * kills
    bundle, features, out = make_bundle(folder / "bundle").folder, folder / "features", folder / "run"
    features.mkdir()
    for i in range(count):
        write_features(features, f"v{i:05d}", features_with(12 + i % 9, [(2, 8, i % 4, 3.0 + i / count)]))
    command = [sys.executable, "-m", "ccnet", "predict", str(bundle), "--features", str(features), "--quiet"]
    subprocess.run([*command, "--out", str(folder / "whole.jsonl")], check=True)
    command += ["--out", str(out), "--processes", "2", "--shard-size", str(SIZE), *options]

    draw = np.random.default_rng(seed)
    places = sorted(draw.uniform(0, 0.95 * count / SIZE, kills))  # shards done when the next kill is due
    killed = {"driver": 0, "worker": 0}
    deadline = time.monotonic() + seconds
    status = None
    while status != 0:
        with subprocess.Popen(command) as driver:
            try:
                while (status := driver.poll()) is None:
                    assert time.monotonic() < deadline
                    time.sleep(0.002)
                    if not places or len(list(out.glob("done/??????.json"))) < places[0]:
                        continue
                    time.sleep(draw.uniform(0, 0.02))
                    kind = "worker" if len(places) % 3 else "driver"
                    found = workers(driver.pid) if kind == "worker" else [driver.pid]
                    if found:
                        places.pop(0)
                        killed[kind] += 1
                        os.kill(int(draw.choice(found)), signal.SIGKILL)
            finally:
                driver.kill()
        assert status in (0, 1, -signal.SIGKILL)  # 1: a shard that had bad luck is tried again by the next command

    assert not places
    shards = b"".join(path.read_bytes() for path in sorted(out.glob("shards/*")))
    assert shards == (folder / "whole.jsonl").read_bytes()
    assert [json.loads(line)["video_id"] for line in shards.splitlines()] == [f"v{i:05d}" for i in range(count)]
    expected = {"plan.json", "videos.jsonl", "engine.json", "failed.jsonl"}
    for shard in range(count // SIZE):
        expected |= {f"done/{shard:06d}.json", f"shards/{shard:06d}.jsonl"}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()} == expected
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="empty; holds the run afterwards")
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    killed = run_killed(
        given.folder, given.kills, given.seed, given.seconds, lambda pid: below(pid, b"ray::RayActor"), ["--on", "ray"]
    )
    print(json.dumps(killed))


if __name__ == "__main__":
    main()
