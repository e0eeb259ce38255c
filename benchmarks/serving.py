"""The server beside the localizer it serves: latency, throughput, and how it bears bad clients, a full queue, an end.

`python -m benchmarks.serving BUNDLE [--out DIR] [--seconds S] [--rounds N] [--requests N]`

Server, clients and the localizer called directly share this machine and run in rounds. Requests are binary tensors of
the Open Inference Protocol over loopback; every answer is compared with the localizer's, byte by byte.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import RESULTS, Measurement, markdown_table, write_result
from benchmarks.serving_load import Exchange, Load, exchange, run_load, write_exchanges
from runtime.backends.base import Backend, Float32, Int32
from runtime.features import VideoFeatures
from runtime.localizer import Localizer
from runtime.machine import machine_facts, usable_cores
from runtime.profiling.timing import Rules, Timing
from runtime.profiling.workload import sample_videos

VIDEOS = 99
"""Good ones of different lengths; one more is bad."""
TURN, PAUSE = 10, 0.05
OUTSIDE = ", outside the engine"
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("bundle", type=Path, help="bundle folder, such as that of `ccnet demo`")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=5.0, help="of the latency measurement, at least")
    parser.add_argument("--rounds", type=int, default=5, help="of the throughput measurement")
    parser.add_argument("--requests", type=int, default=10_000, help="of the run with bad clients")
    options = parser.parse_args(argv)
    rules = Rules(seconds=options.seconds, calls=50)
    setting = Setting(options.bundle, options.out, rules, options.rounds, 300, options.requests, 2.0)
    print(run(setting))
    return 0


def run(setting: Setting) -> Path:
    """Measure everything and write the results; returns the path of the JSON."""
    machine, niceness = machine_facts(), os.nice(0)
    with Localizer.load(setting.bundle) as localizer:
        videos = mixed_videos(localizer)
        exchanges = [exchange(video, localizer) for video in videos]
        print("latency ...", file=sys.stderr, flush=True)
        times = latency(setting, localizer, videos, exchanges)
        print("throughput ...", file=sys.stderr, flush=True)
        rates = throughput(setting, localizer, videos, exchanges)
    print("bad clients ...", file=sys.stderr, flush=True)
    bad = bad_clients(setting, [*exchanges, bad_exchange(localizer, videos[0])])
    print("an end under load, a full queue ...", file=sys.stderr, flush=True)
    ended, full = drained(setting, exchanges), full_queue(setting, exchanges)
    added = {"": added_ms(times), OUTSIDE: added_ms(times, OUTSIDE)}
    shares = {name: float(np.median(np.divide(rate, rates["Localizer.stream"]))) for name, rate in rates.items()}
    return write_result(
        setting.out,
        "serving",
        measurements=[
            *(Measurement(name=f"{name}, p50", value=t.median * 1e3, unit="ms") for name, t in times.items()),
            *(Measurement(name=f"added by the server{part}", value=ms, unit="ms") for part, ms in added.items()),
            *(
                Measurement(
                    name=f"{name}, {CONCURRENCY} clients", value=float(np.median(r)), unit="videos/s", better="higher"
                )
                for name, r in rates.items()
            ),
            *(
                Measurement(name=f"{name} / Localizer.stream", value=share, unit="times", better="higher")
                for name, share in shares.items()
                if name in SERVERS
            ),
            Measurement(name="bad clients, resident memory grown", value=bad["grown_mib"], unit="MiB"),
        ],
        page=page(niceness, times, added, rates, shares, bad, ended, full),
        machine=machine,
        latency_ms={name: timing.summary() for name, timing in times.items()},
        videos_per_second=rates,
        bad_clients=bad,
        end_under_load=ended,
        full_queue=full,
    )


SERVERS: Mapping[str, tuple[str, ...]] = {
    "ccnet serve": (),
    "ccnet serve --contexts N --threads 1": ("--contexts", str(usable_cores()), "--threads", "1"),
    "ccnet serve --batch 8": ("--batch", "8"),
}
"""N: as many as there are cores."""


def mixed_videos(localizer: Localizer) -> list[VideoFeatures]:
    """Return videos of many lengths."""
    lengths = np.random.default_rng(0).integers(localizer.spec.length // 8, localizer.spec.length + 1, VIDEOS)
    return [sample_videos(localizer.spec, 1, steps=int(n), seed=i)[0] for i, n in enumerate(lengths)]


def bad_exchange(localizer: Localizer, video: VideoFeatures) -> Exchange:
    visual = video.visual.copy()
    visual[-1, -1] = np.nan
    return exchange(VideoFeatures(visual, video.audio), localizer)


class TimedEngine:
    """An engine whose calls are timed."""

    def __init__(self, engine: Backend) -> None:
        self.name, self.precision, self.spec, self.max_batch = (
            engine.name,
            engine.precision,
            engine.spec,
            engine.max_batch,
        )
        self.describe, self.close = engine.describe, engine.close
        self.seconds: list[float] = []
        self._engine = engine

    def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        begin = time.perf_counter()
        outputs = self._engine.infer(visual, audio, lengths)
        self.seconds.append(time.perf_counter() - begin)
        return outputs


def latency(
    setting: Setting, localizer: Localizer, videos: Sequence[VideoFeatures], exchanges: Sequence[Exchange]
) -> dict[str, Timing]:
    """Time single videos, called directly and asked for on one connection, in turns of some calls each.

    Before each turn there is a pause: the threads of the other side's engine look for more work for a while. Each way
    is given whole, and without the call of the engine, whose time varies more on a shared machine than what is added.
    """
    engine = TimedEngine(localizer.backends[0])
    direct = Localizer([engine], localizer.spec)
    seconds: dict[str, list[float]] = {"Localizer": [], "ccnet serve": []}
    with Served(setting.bundle) as server, socket.create_connection((server.host, server.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways: dict[str, Callable[[int], object]] = {
            "Localizer": lambda i: direct(videos[i].visual, videos[i].audio),
            "ccnet serve": lambda i: ask(connection, exchanges[i]),
        }
        turns = 0
        while turns < 2 or turns <= setting.rules.calls // TURN or sum(seconds["Localizer"]) < setting.rules.seconds:
            for name, call in ways.items():
                time.sleep(PAUSE)
                for i in range(TURN):
                    begin = time.perf_counter()
                    call((turns * TURN + i) % VIDEOS)
                    seconds[name].append(time.perf_counter() - begin)
            turns += 1
        server.terminate()
        _, records = server.wait()
    timings: dict[str, Timing] = {}
    for name, inside in (
        ("Localizer", engine.seconds),
        ("ccnet serve", [record["engine_ms"] / 1e3 for record in records]),
    ):
        whole = np.array(seconds[name][TURN:])  # the first turn warms up
        timings |= {name: Timing(whole), f"{name}{OUTSIDE}": Timing(whole - inside[TURN:])}
    return timings


def ask(connection: socket.socket, exchange: Exchange) -> None:
    """Send a request and read its answer, which must be the right one."""
    connection.sendall(exchange.request)
    received = b""
    size = -1
    while size < 0 or len(received) < size:
        received += connection.recv(1 << 20)
        end = received.find(b"\r\n\r\n")
        if size < 0 <= end:
            size = end + 4 + int(received[:end].lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    assert received.endswith(exchange.body or b"")


def added_ms(times: Mapping[str, Timing], part: str = "") -> float:
    """Return the median over the turns of how much longer the server's median is, in milliseconds."""
    served, direct = (
        np.median(times[f"{name}{part}"].seconds.reshape(-1, TURN), axis=1) for name in ("ccnet serve", "Localizer")
    )
    return float(np.median(served - direct)) * 1e3


def throughput(
    setting: Setting, localizer: Localizer, videos: Sequence[VideoFeatures], exchanges: Sequence[Exchange]
) -> dict[str, list[float]]:
    """Count videos per second of the stream and of servers with 32 clients, in rounds."""
    count = setting.videos_per_round
    rates: dict[str, list[float]] = {name: [] for name in ("Localizer.stream", *SERVERS)}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(Served(setting.bundle, *options)) for name, options in SERVERS.items()}
        for _ in range(setting.rounds + 1):  # the first round warms up
            begin = time.perf_counter()
            items = ((f"v{i}", (v.visual, v.audio)) for i, v in zip(range(count), itertools.cycle(videos)))
            assert sum(1 for _ in localizer.stream(items)) == count
            rates["Localizer.stream"].append(count / (time.perf_counter() - begin))
            for name, server in servers.items():
                begin = time.perf_counter()
                load = run_load(server.host, server.port, first(exchanges, count), CONCURRENCY)
                rates[name].append(count / (time.perf_counter() - begin))
                assert load.answered == {200: count}
                assert load.wrong == 0
    return {name: values[1:] for name, values in rates.items()}


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


def page(
    niceness: int,
    times: Mapping[str, Timing],
    added: Mapping[str, float],
    rates: Mapping[str, Sequence[float]],
    shares: Mapping[str, float],
    bad: Mapping[str, Any],
    ended: Mapping[str, Any],
    full: Mapping[str, Any],
) -> str:
    """The Markdown page."""
    summaries = {name: timing.summary() for name, timing in times.items()}
    return "\n\n".join(
        [
            "# Server",
            "`ccnet serve` beside the localizer called directly, on a machine that server and clients share. Requests "
            "are binary tensors over loopback; every answer was compared with the localizer's, byte by byte.",
            f"One client; latency and throughput were measured at niceness {niceness}:",
            markdown_table(
                ("", "p50 ms", "p90 ms", "p99 ms", "n"),
                [[name, *(f"{s[p]:.2f}" for p in ("p50", "p90", "p99")), str(s["n"])] for name, s in summaries.items()],
            ),
            f"In turns of {TURN} requests the server's median is {added['']:.2f} ms above the localizer's (the median "
            "of all turns). Without the engine's own time, which other load on the machine moves most, it is "
            f"**{added[OUTSIDE]:.2f} ms** above.",
            f"{CONCURRENCY} clients, medians of {len(rates['Localizer.stream'])} rounds; N is the number of cores:",
            markdown_table(
                ("", "videos/s", "of the stream"),
                [[name, f"{np.median(rate):.0f}", f"{shares[name]:.2f}"] for name, rate in rates.items()],
            ),
            f"**Bad clients.** {bad['answers']} answers to {CLIENTS} processes of {CLIENT_CONNECTIONS} clients; "
            f"{bad['killed_clients']} of them were killed (SIGKILL) and replaced, and 1 request in 100 is bad: by "
            f"status {bad['answered']}, wrong answers: **{bad['wrong']}**. Resident memory after a fifth of the time "
            f"and at the end: {bad['rss_mib'][0]} and {bad['rss_mib'][1]} MiB.",
            f"**SIGTERM under load.** {ended['answered_by_the_server']} requests were answered with events, clients "
            f"received {ended['received']} of them: **{ended['lost']} lost**; {ended['refused']} got 503; "
            f"exit status {ended['exit_status']}.",
            f"**Full queue** ({full['queue']} places, {full['clients']} clients that ask again at once): by status "
            f"{full['answered']}, wrong answers: {full['wrong']}; resident memory grew by {full['grown_mib']} MiB.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
