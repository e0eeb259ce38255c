"""The server beside the localizer it serves: latency, throughput, and how it bears bad clients, a full queue, an end.

`python -m benchmarks.serving BUNDLE [--out DIR] [--seconds S] [--rounds N] [--requests N]`

Server, clients and the localizer called directly share this machine and run in rounds. Requests are binary tensors of
the Open Inference Protocol over loopback; every answer is compared with the localizer's, byte by byte.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import RESULTS, Measurement, markdown_table, write_result
from benchmarks.served import (
    CLIENT_CONNECTIONS,
    CLIENTS,
    CONCURRENCY,
    Served,
    Setting,
    bad_clients,
    drained,
    first,
    full_queue,
)
from benchmarks.serving_load import Exchange, exchange, run_load
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
