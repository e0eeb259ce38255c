"""A `ccnet serve` process, and how it bears bad clients, its end under load, and a full queue."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving_load import Exchange, Load, run_load, write_exchanges
from runtime.profiling.timing import Rules

CONCURRENCY = 32
CLIENTS, CLIENT_CONNECTIONS = 3, 8
KILLED_EVERY = 2.0
FULL_QUEUE = 8


@dataclass(frozen=True)
class Setting:
    """What to run and for how long."""

    bundle: Path
    out: Path
    rules: Rules
    rounds: int
    videos_per_round: int
    requests: int
    """Of the run with bad clients."""
    drain_after: float
    """Seconds of load before SIGTERM."""


class Served:
    """A `ccnet serve` process."""

    def __init__(self, bundle: Path, *options: str) -> None:
        command = [sys.executable, "-m", "ccnet", "serve", str(bundle), "--port", "0", *options]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self._child.stdout is not None
        host, _, port = self._child.stdout.readline().partition("://")[2].partition(": ")[0].rpartition(":")
        self.host, self.port = host, int(port)

    def rss_mib(self) -> float:
        """Return the resident set."""
        for line in Path(f"/proc/{self._child.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def terminate(self) -> None:
        self._child.send_signal(signal.SIGTERM)

    def wait(self) -> tuple[int, list[dict[str, Any]]]:
        """Return the exit status and the access log."""
        status = self._child.wait(timeout=60)
        self._log.seek(0)
        return status, [json.loads(line) for line in self._log if line.startswith("{")]

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        assert self._child.stdout is not None
        self._child.stdout.close()
        self._log.close()


def first(exchanges: Sequence[Exchange], count: int) -> Iterator[Exchange]:
    return itertools.islice(itertools.cycle(exchanges), count)


def bad_clients(setting: Setting, exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """Load a server from processes that are killed at random, with one bad request in a hundred."""
    chance = random.Random(0)
    ended: list[Load] = []
    killed = 0
    with tempfile.TemporaryDirectory() as folder, Served(setting.bundle) as server:
        path = Path(folder) / "exchanges.npz"
        write_exchanges(path, exchanges)
        clients = [_Client(server, path, setting.requests, seed) for seed in range(CLIENTS)]
        memory: list[float] = []
        next_kill = time.monotonic() + KILLED_EVERY
        try:
            while sum(client.answers for client in clients) + sum(_answers(load) for load in ended) < setting.requests:
                time.sleep(0.1)
                memory.append(server.rss_mib())
                if time.monotonic() > next_kill:
                    next_kill += KILLED_EVERY * chance.uniform(0.5, 1.5)
                    victim = chance.randrange(len(clients))
                    ended.append(clients[victim].kill())
                    killed += 1
                    clients[victim] = _Client(server, path, setting.requests, 100 + killed)
        finally:
            ended += [client.kill() for client in clients]
        settled = memory[len(memory) // 5 :] or [0.0]
        idle = run_load(server.host, server.port, first(exchanges[:-1], 50), 4)
        return {
            "answers": sum(_answers(load) for load in ended),
            "answered": _summed(ended),
            "wrong": sum(load.wrong for load in ended) + idle.wrong,
            "killed_clients": killed,
            "rss_mib": [round(settled[0], 1), round(settled[-1], 1)],
            "grown_mib": round(settled[-1] - settled[0], 1),
        }


def _answers(load: Load) -> int:
    return sum(load.answered.values())


def _summed(loads: Sequence[Load]) -> dict[str, int]:
    statuses = sorted({status for load in loads for status in load.answered})
    return {str(status): sum(load.answered[status] for load in loads) for status in statuses}


class _Client:
    """A process full of clients, which can be killed at any time; what it reported until then counts."""

    def __init__(self, server: Served, path: Path, count: int, seed: int) -> None:
        arguments = [server.host, str(server.port), str(path), str(count), str(CLIENT_CONNECTIONS), str(seed)]
        command = [sys.executable, "-m", "benchmarks.serving_load", *arguments]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._load = Load()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def answers(self) -> int:
        return _answers(self._load)

    def kill(self) -> Load:
        self._child.kill()
        self._child.wait()
        self._reader.join()
        return self._load

    def _read(self) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as lines:
            for line in lines:
                if line.endswith("}\n"):
                    self._load = Load.from_json(json.loads(line))


def drained(setting: Setting, exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """End a server by SIGTERM under load; compare what it says it answered with what the clients got."""
    with Served(setting.bundle) as server:
        threading.Timer(setting.drain_after, server.terminate).start()
        load = run_load(server.host, server.port, itertools.cycle(exchanges), CONCURRENCY)
        begin = time.perf_counter()
        exit_status, records = server.wait()
        answered = sum(record["status"] == 200 for record in records)
        return {
            "exit_status": exit_status,
            "answered_by_the_server": answered,
            "received": load.answered[200],
            "lost": answered - load.answered[200],
            "wrong": load.wrong,
            "refused": load.answered[503],
            "seconds_after_the_last_answer": round(time.perf_counter() - begin, 2),
        }


def full_queue(setting: Setting, exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """Ask for more than a short queue takes."""
    count = setting.videos_per_round
    with Served(setting.bundle, "--queue", str(FULL_QUEUE)) as server:
        run_load(server.host, server.port, first(exchanges, count), 2 * CONCURRENCY)
        before = server.rss_mib()
        load = run_load(server.host, server.port, first(exchanges, 10 * count), 2 * CONCURRENCY)
        return {
            "queue": FULL_QUEUE,
            "clients": 2 * CONCURRENCY,
            "answered": _summed([load]),
            "wrong": load.wrong,
            "unanswered": load.unanswered,
            "grown_mib": round(server.rss_mib() - before, 1),
        }
