"""A corpus run on nodes that fail: the plan, queue and retries of `runtime.corpus`, and a clock that is made up.

`python -m benchmarks.corpus_simulation [--out DIR] [--nodes N] [--shards-per-node N]`

Everything but the work is the code that a real run executes: `make_plan`, `Run.drive` with its `ShardQueue`, receipts
in a store. The pool is simulated: a node works on one shard after the other, fails at random (exponentially distributed
times), is back after a while with its engine to load, and some shards kill every node that tries them. The process that
drives the run dies too, and the same command is started again. Nothing here measures a machine; the seconds are those
of the made-up clock. Exit status 1 when more than 1% of the work is lost
in a case where it should not be, see `HELD`.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import RESULTS, Measurement, markdown_table, write_result
from runtime.bundle import Bundle, Manifest
from runtime.corpus.plan import Settings, done_file, make_plan
from runtime.corpus.run import Run
from runtime.corpus.schedule import Died, Done, Event, Ready, Task
from runtime.corpus.sources import Entry
from runtime.spec import ModelSpec

HOUR, DAY = 3600.0, 86400.0
LARGEST_LOSS = 0.01
"""Share of the work that may be lost in those cases below where a node works on `HELD` shards between two failures."""
HELD = 140


@dataclass(frozen=True)
class Case:
    """How a cluster behaves."""

    shard_seconds: float
    """Median time that a node takes for a shard; it varies by a tenth."""
    node_mtbf: float
    """Mean seconds between two failures of a node."""
    driver_mtbf: float = 2 * HOUR
    down_seconds: float = 300.0
    """Until a node that failed is back; also until the command is started again."""
    load_seconds: float = 30.0
    """To open the engine."""
    poisonous: int = 5
    """Shards that kill every node that tries them."""


CASES = (
    Case(60, 30 * DAY),
    Case(60, DAY),
    Case(60, 4 * HOUR),
    Case(60, HOUR),
    Case(600, DAY, driver_mtbf=DAY),
    Case(600, 4 * HOUR, driver_mtbf=4 * HOUR),
)


class DriverDied(Exception):
    """The process that drives the run is gone."""


@dataclass
class Cluster:
    """The clock, and what the nodes did; outlives the processes that drive the run."""

    case: Case
    nodes: int
    draw: np.random.Generator
    now: float = 0.0
    useful: float = 0.0
    """Node seconds that went into shards which were finished."""
    lost: float = 0.0
    """Node seconds that went into shards which were not, and have to be worked on again."""
    failures: Counter[str] = field(default_factory=Counter)


class MemoryStore:
    """A store in memory that counts how often each file was written."""

    location = "memory"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.written: Counter[str] = Counter()

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        try:
            return self.files[name][start:end]
        except KeyError:
            raise FileNotFoundError(name) from None

    def write(self, name: str, data: bytes) -> None:
        self.files[name] = data
        self.written[name] += 1

    def create(self, name: str, data: bytes) -> bool:
        if name in self.files:
            return False
        self.write(name, data)
        return True

    def names(self, folder: str = "") -> list[str]:
        prefix = f"{folder}/" if folder else ""
        return sorted({name[len(prefix) :].partition("/")[0] for name in self.files if name.startswith(prefix)})

    def size(self, name: str) -> int | None:
        return len(self.files[name]) if name in self.files else None

    def remove(self, name: str = "") -> None:
        self.files.pop(name, None)

    def tidy(self, *folders: str) -> None:
        pass


@dataclass
class _Node:
    """A node with a worker on it."""

    free: float
    """When it has its engine, or is done with the shard before."""
    fails: float
    shards: deque[int] = field(default_factory=deque)
    begun: float = 0.0
    """When it began the shard that it is at."""


class SimulatedPool:
    """Nodes on the cluster's clock, for one process that drives the run until it dies."""

    restarts = True

    def __init__(self, cluster: Cluster, store: MemoryStore, run: Run, poisonous: frozenset[int]) -> None:
        self.size = cluster.nodes
        self._cluster, self._store, self._run, self._poisonous = cluster, store, run, poisonous
        self._driver_fails = cluster.now + cluster.draw.exponential(cluster.case.driver_mtbf)
        self._nodes: dict[int, _Node] = {}
        self._down: dict[int, float] = {}
        self._events: list[tuple[float, int, int, _Node, str, int]] = []  # time, number, worker, node, what, shard
        self._number = 0

    def start(self, worker: int) -> None:
        cluster = self._cluster
        up = max(cluster.now, self._down.pop(worker, 0.0)) + cluster.case.load_seconds
        node = self._nodes[worker] = _Node(up, up + cluster.draw.exponential(cluster.case.node_mtbf))
        self._push(up, worker, node, "ready", -1)

    def give(self, worker: int, task: Task) -> None:
        node = self._nodes[worker]
        node.shards.append(task.shard)
        if len(node.shards) == 1:
            self._begin(worker, node)

    def _begin(self, worker: int, node: _Node) -> None:
        """Plan how the work on a node's next shard ends."""
        cluster, shard = self._cluster, node.shards[0]
        node.begun = max(cluster.now, node.free)
        node.free = node.begun + cluster.case.shard_seconds * cluster.draw.lognormal(0, 0.1)
        if shard in self._poisonous:
            self._push(node.begun + 0.5 * cluster.case.shard_seconds, worker, node, "poison", shard)
        elif node.free > node.fails:
            self._push(node.fails, worker, node, "node", shard)
        else:
            self._push(node.free, worker, node, "done", shard)

    def _push(self, when: float, worker: int, node: _Node, what: str, shard: int) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, worker, node, what, shard))

    def wait(self) -> list[Event]:
        cluster = self._cluster
        when, _, worker, node, what, shard = heapq.heappop(self._events)
        if when >= self._driver_fails:
            cluster.now = self._driver_fails
            cluster.failures["driver"] += 1
            cluster.lost += sum(max(0.0, cluster.now - n.begun) for n in self._nodes.values() if n.shards)
            raise DriverDied
        cluster.now = max(cluster.now, when)
        if what == "ready":
            return [Ready(worker, {})]
        if what == "done":
            cluster.useful += when - node.begun
            self._store.write(self._run.plan.shard_file(shard), b"")
            self._store.write(done_file(shard), b"{}")
            node.shards.popleft()
            if node.shards:
                self._begin(worker, node)
            return [Done(worker, shard)]
        cluster.failures[what] += 1
        cluster.lost += max(0.0, when - node.begun)
        del self._nodes[worker]
        if what == "node":
            self._down[worker] = when + cluster.case.down_seconds
        return [Died(worker, f"{what} failure")]


def simulate(case: Case, nodes: int, shards_per_node: int, seed: int = 0) -> dict[str, Any]:
    """Run a corpus to its end on failing nodes and return what became of it."""
    cluster = Cluster(case, nodes, np.random.default_rng(seed))
    store = MemoryStore()
    entries = [Entry(f"v{i}") for i in range(nodes * shards_per_node)]
    settings = Settings(format="jsonl", backend="auto", precision=None, long_videos="crop", window_overlap=0.5)
    plan, _ = make_plan(entries, _bundle(), settings, shard_size=1)  # a shard's videos stand as one
    poisonous = frozenset(cluster.draw.choice(plan.shards, case.poisonous, replace=False).tolist())
    commands = 0
    while True:
        commands += 1
        run = Run(store, plan)
        pool = SimulatedPool(cluster, store, run, poisonous)
        try:
            run.drive(pool, advance=lambda _: None, check=lambda: None)
            break
        except DriverDied:
            cluster.now += case.down_seconds
    times = Counter(store.written[done_file(shard)] for shard in range(plan.shards))
    return {
        "once": times[1],
        "given_up": times[0],
        "more_than_once": plan.shards - times[0] - times[1],
        "commands": commands,
        "hours": cluster.now / HOUR,
        "node_failures": cluster.failures["node"],
        "poison_failures": cluster.failures["poison"],
        "driver_failures": cluster.failures["driver"],
        "lost": cluster.lost / (cluster.lost + cluster.useful),
        "busy": (cluster.lost + cluster.useful) / (cluster.now * nodes),
    }


def _bundle() -> Bundle:
    spec = ModelSpec(length=16, levels=2, visual_dim=8, audio_dim=4, labels=("a", "b"))
    manifest = Manifest(
        schema=2,
        spec=spec,
        model={},
        checkpoint_sha256="0" * 64,
        versions={},
        created="",
        files=(),
        model_files=(),
        engines=(),
    )
    return Bundle(Path(), manifest)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corpus_simulation", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--shards-per-node", type=int, default=300)
    options = parser.parse_args(argv)
    rows, measurements, details = [], [], []
    for case in CASES:
        begun = time.perf_counter()
        with _quiet():
            found = simulate(case, options.nodes, options.shards_per_node)
        print(f"{case}: {found} in {time.perf_counter() - begun:.1f} s", flush=True)
        name = (
            f"shards of {case.shard_seconds:g} s, a node fails every {_span(case.node_mtbf)}, "
            f"the driver every {_span(case.driver_mtbf)}"
        )
        measurements.append(Measurement(name=f"{name} / work lost", value=100 * found["lost"], unit="%"))
        details.append({"case": vars(case), **found})
        rows.append(
            (
                name,
                f"{found['hours']:.1f}",
                f"{found['node_failures']:,}",
                str(found["driver_failures"]),
                str(found["given_up"]),
                str(found["more_than_once"]),
                f"{100 * found['lost']:.3f}%",
                f"{100 * found['busy']:.1f}%",
            )
        )
    print(
        write_result(
            options.out, "corpus_simulation", measurements=measurements, page=page(options, rows), runs=details
        )
    )
    held = [found["lost"] for found in details if found["case"]["node_mtbf"] >= HELD * found["case"]["shard_seconds"]]
    return 1 if max(held) > LARGEST_LOSS else 0


def page(options: argparse.Namespace, rows: Sequence[Sequence[str]]) -> str:
    shards = options.nodes * options.shards_per_node
    header = (
        *("", "hours", "node failures", "driver deaths", "shards given up", "done twice", "work lost"),
        "nodes at work",
    )
    return "\n\n".join(
        [
            "# A corpus run on failing nodes, simulated",
            f"{options.nodes:,} nodes, {shards:,} shards, of which {CASES[0].poisonous} kill every node that tries "
            "them. Plan, queue, retries and receipts are the real code; the work and the clock are made up."
            f" A node that failed is back after {CASES[0].down_seconds:g} s and loads its engine for "
            f"{CASES[0].load_seconds:g} s; the process that drives the run takes all nodes' shards with it when it "
            "dies, and is started again as late. Times between failures are means of exponential distributions. Work "
            "that is lost is node time spent on shards that were not finished then.",
            markdown_table(header, rows),
            "The part of the nodes that is not at work is what failures and engine loading cost beside lost work, and "
            "the end of a run, where the last shards are waited for.",
        ]
    )


def _span(seconds: float) -> str:
    return f"{seconds / DAY:g} d" if seconds >= DAY else f"{seconds / HOUR:g} h"


@contextlib.contextmanager
def _quiet() -> Any:
    """Leave out the warnings of workers that die."""
    logger = logging.getLogger("runtime.corpus")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


if __name__ == "__main__":
    sys.exit(main())
