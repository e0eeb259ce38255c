"""Corpus runs: one process, worker processes, job-array parts and Ray actors, against a plain loop over the videos.

`python -m benchmarks.corpus --demo DEMO [--out DIR] [--videos N] [--rounds N]`

DEMO is what `ccnet demo` made; its videos are repeated by links until there are as many as wanted. Every engine has one
thread. Ray runs in a network namespace of its own, since it binds all interfaces; where that or Ray can't be had, it is
left out. Its workers get the priority that all others have; by default they step back behind every other process.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import RESULTS, Measurement, markdown_table, write_result
from runtime.bundle import read_bundle
from runtime.corpus.plan import read_plan
from runtime.corpus.store import LocalStore
from runtime.detections import event_line
from runtime.features import FeatureFiles, find_videos
from runtime.localizer import Localizer
from runtime.machine import machine_facts

LOOP, STREAM, ONE, TWO, PARTS, RAY = (
    "plain loop",
    "one process, to a pipe",
    "one process, resumable",
    "--processes 2",
    "--shard 0/2 and 1/2",
    "--on ray, 2 actors",
)
NAMESPACE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
LOOPBACK = ("sh", "-c", 'ip link set lo up && exec "$@"', "sh")


@dataclass(frozen=True)
class Ran:
    """One way through the corpus."""

    per_second: float
    """Videos per second from the first shard, or the opened engine, to the end."""
    seconds: float
    """Of the whole command, with the start of its processes."""


@dataclass(frozen=True)
class Work:
    """What is run."""

    bundle: Path
    features: Path
    folder: Path
    ids: list[str]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corpus", description=__doc__)
    parser.add_argument("--demo", type=Path, required=True, help="folder that 'ccnet demo' made")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--videos", type=int, default=1800)
    parser.add_argument("--rounds", type=int, default=2, help="of all ways, one after the other")
    options = parser.parse_args(argv)
    machine = machine_facts()
    with tempfile.TemporaryDirectory() as name:
        work = prepare(options.demo, Path(name), options.videos)
        ways: dict[str, Callable[[Work], Ran]] = {LOOP: loop, STREAM: stream, ONE: one, TWO: two, PARTS: parts}
        if ray_can_run():
            ways[RAY] = on_ray
        rounds: dict[str, list[Ran]] = {way: [] for way in ways}
        for round_, (way, run) in itertools.product(range(options.rounds), ways.items()):
            ran = run(work)
            print(f"round {round_}, {way}: {ran.per_second:.1f} videos/s, {ran.seconds:.1f} s", flush=True)
            rounds[way].append(ran)
    path = write_result(
        options.out,
        "corpus",
        measurements=[
            Measurement(name=way, value=fastest(rans).per_second, unit="videos/s", better="higher")
            for way, rans in rounds.items()
        ],
        page=page(rounds, len(work.ids)),
        machine=machine,
    )
    print(path)
    return 0


def prepare(demo: Path, folder: Path, count: int) -> Work:
    """Link the demo's videos until there are `count`."""
    spec = read_bundle(demo / "bundle").spec
    source, features = demo / "features", folder / "features"
    features.mkdir()
    there = find_videos(source, spec.layout)
    ids = [f"v{i:06d}" for i in range(count)]
    for video_id, original in zip(ids, itertools.cycle(there), strict=False):
        for suffix in (*spec.layout.visual, *spec.layout.audio):
            os.symlink((source / f"{original}{suffix}.npy").resolve(), features / f"{video_id}{suffix}.npy")
    return Work(demo / "bundle", features, folder, ids)


def loop(work: Work) -> Ran:
    """Do what a person writes first: read a video, localize it, write its line."""
    begun = time.perf_counter()
    with Localizer.load(work.bundle, threads=1) as localizer, open(work.folder / "loop.jsonl", "wb") as out:
        opened = time.perf_counter()
        for video_id in work.ids:
            features = FeatureFiles(work.features, video_id).read(localizer.spec)
            found = localizer(features.visual, features.audio)
            out.write(event_line(video_id, localizer.spec.time_base.covered_seconds(features.steps), found))
        end = time.perf_counter()
    return Ran(len(work.ids) / (end - opened), end - begun)


def stream(work: Work) -> Ran:
    begun = time.perf_counter()
    with subprocess.Popen(command(work, "-"), stdout=subprocess.PIPE) as process:
        if process.stdout is None:
            raise RuntimeError("no pipe")
        first, lines = 0.0, 0
        for _ in process.stdout:
            first = first or time.perf_counter()
            lines += 1
        end = time.perf_counter()
    if process.returncode or lines != len(work.ids):
        raise RuntimeError(f"predict ended with {process.returncode} after {lines} videos")
    return Ran((lines - 1) / (end - first), end - begun)


def one(work: Work) -> Ran:
    return run_shards(work, lambda out: [command(work, out)])


def two(work: Work) -> Ran:
    return run_shards(work, lambda out: [command(work, out, "--processes", "2")])


def parts(work: Work) -> Ran:
    return run_shards(work, lambda out: [command(work, out, "--shard", f"{i}/2") for i in range(2)])


def on_ray(work: Work) -> Ran:
    ray = ("--on", "ray", "--processes", "2")
    fair = ("env", "RAY_worker_niceness=0")
    return run_shards(work, lambda out: [[*NAMESPACE, *LOOPBACK, *fair, *command(work, out, *ray)]])


def run_shards(work: Work, commands: Callable[[str], list[list[str]]]) -> Ran:
    """Run commands side by side into a new folder, and take the rate from when its shards were done."""
    out = work.folder / "run"
    begun = time.perf_counter()
    processes = [subprocess.Popen(each, stdout=subprocess.DEVNULL) for each in commands(str(out))]
    statuses = [process.wait() for process in processes]
    seconds = time.perf_counter() - begun
    plan = read_plan(LocalStore(out))
    if any(statuses) or plan is None:
        raise RuntimeError(f"predict ended with {statuses}")
    done = sorted((path.stat().st_mtime, plan.videos_of(int(path.stem))) for path in out.glob("done/*.json"))
    videos = sum(count for _, count in done[1:])
    ran = Ran(videos / (done[-1][0] - done[0][0]), seconds)
    shutil.rmtree(out)
    return ran


def command(work: Work, out: str, *options: str) -> list[str]:
    source = ("--features", str(work.features), "--out", out, "--threads", "1", "--quiet")
    return [sys.executable, "-m", "ccnet", "predict", str(work.bundle), *source, *options]


def ray_can_run() -> bool:
    """Return whether Ray is here and can have a network namespace of its own; say so where not."""
    if importlib.util.find_spec("ray") is None:
        print("left out: Ray, which is not installed", file=sys.stderr)
        return False
    try:
        done = subprocess.run([*NAMESPACE, *LOOPBACK, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        print("left out: Ray, for which there is no unshare command", file=sys.stderr)
        return False
    if done.returncode != 0:
        print("left out: Ray, for which there is no network namespace", file=sys.stderr)
        return False
    return True


def fastest(rans: Sequence[Ran]) -> Ran:
    return max(rans, key=lambda ran: ran.per_second)


def ratios(rounds: Mapping[str, Sequence[Ran]], way: str, peer: str) -> str:
    """Return the median of the rates of a way relative to a peer's in the same round, and their range."""
    values = [a.per_second / b.per_second for a, b in zip(rounds[way], rounds[peer], strict=True)]
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def page(rounds: Mapping[str, Sequence[Ran]], count: int) -> str:
    rows = [
        (way, f"{fastest(rans).per_second:.1f}", ratios(rounds, way, LOOP), f"{min(ran.seconds for ran in rans):.1f}")
        for way, rans in rounds.items()
    ]
    sections = [
        "# Corpus runs",
        f"{count:,} videos of the demo, every engine with one thread, batch 1, in {len(rounds[LOOP])} rounds. The rate "
        "is taken from the first shard to the last, or from the opened engine on, and is that of the fastest round; "
        "ratios are taken within a round, their median and range. The seconds are those of the whole command, with the "
        "start of its processes and, for Ray, of its cluster.",
        markdown_table(("", "videos/s", "x plain loop", "seconds"), rows),
    ]
    if RAY in rounds:
        sections.append(
            f"Two actors on Ray reach {ratios(rounds, RAY, TWO)} of the rate of two local processes. A run of seconds "
            "is not what a cluster is for: its start alone takes longer."
        )
    return "\n\n".join(sections)


if __name__ == "__main__":
    sys.exit(main())
