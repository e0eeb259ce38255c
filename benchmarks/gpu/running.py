"""How an engine is run best on a machine: the ways of copying its batches, contexts that share the GPU, priorities.

Stages of `benchmarks.gpu.report`, as those of `benchmarks.gpu.stages`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, get_args

from benchmarks.gpu.settings import Settings, batches_of, bench_plan, engine_of, keep
from runtime.backends.base import Backend
from runtime.backends.tensorrt.backend import TensorRTBackend
from runtime.backends.tensorrt.context import Copies, RunOptions
from runtime.batches import pack
from runtime.errors import EngineError
from runtime.profiling.bench import Candidate, bench
from runtime.profiling.timing import Rules, measure
from runtime.profiling.workload import sample_videos

MOST_SHARED = 8
"""Largest batch that several contexts are tried with; larger ones fill the GPU alone."""


def copies(settings: Settings) -> dict[str, Any]:
    """Time a built engine with every way of copying its batches, side by side, and say which is fastest."""
    path, model_file, spec = engine_of(settings)
    ways: tuple[Copies, ...] = get_args(Copies)
    candidates = [
        Candidate(
            name=way,
            open=partial(TensorRTBackend.open, path, model_file, spec, running=RunOptions(copies=way)),
            status="verified",
        )
        for way in ways
    ]
    plan = bench_plan(settings, model_file.max_batch)
    report = bench(spec, candidates, plan, after_batch=lambda report: keep(settings, _fastest(report)))
    if failed := [f"{e['name']}: {e['not_measured']}" for e in report["candidates"] if e["not_measured"]]:
        raise EngineError(f"not measured: {'; '.join(failed)}")
    return _fastest(report)


def _fastest(report: Mapping[str, Any]) -> dict[str, Any]:
    """Say which way is fastest at each batch size that was timed."""
    fastest = {}
    for batch in {row["batch"] for row in report["rows"]}:
        rows = [row for row in report["rows"] if row["batch"] == batch]
        fastest[str(batch)] = {
            "latency": min(rows, key=lambda row: row["engine_ms"]["p50"])["candidate"],
            "throughput": max(rows, key=lambda row: row["stream_videos_per_second"]["per_second"])["candidate"],
        }
    return {"ways": report["rows"], "fastest": fastest}


def contexts(settings: Settings) -> dict[str, Any]:
    """Count videos per second of one, two and three execution contexts at once, and what a high priority is worth."""
    path, model_file, spec = engine_of(settings)
    found: dict[str, Any] = {"videos_per_second": {}, "under_load_ms": {}}
    batches = [batch for batch in batches_of(settings, model_file.max_batch) if batch <= MOST_SHARED]
    with TensorRTBackend.open(path, model_file, spec) as backend:
        for batch in batches:
            rates = {str(count): _together(backend, batch, count, settings["seconds"]) for count in (1, 2, 3)}
            found["videos_per_second"][str(batch)] = rates
            keep(settings, found)
        if batches:
            for name, high in (("normal", False), ("high priority", True)):
                running = RunOptions(high_priority=high)
                with TensorRTBackend.open(path, model_file, spec, running=running) as urgent:
                    found["under_load_ms"][name] = _under_load(urgent, backend, settings["seconds"])
                keep(settings, found)
    return found


def _together(backend: TensorRTBackend, batch: int, count: int, seconds: float) -> float:
    """Return the videos per second of so many threads, each with a context of its own, over `seconds`."""
    inputs = pack(sample_videos(backend.spec, batch), backend.spec, backend.allocate)
    with contextlib.ExitStack() as stack:
        members = [stack.enter_context(contextlib.closing(backend.fork())) for _ in range(count)]
        for member in members:
            member.infer(*inputs)
        done = _run_until(threading.Event(), seconds, [(member, inputs) for member in members])
    return batch * sum(done) / max(seconds, 1e-9)


def _under_load(urgent: TensorRTBackend, other: TensorRTBackend, seconds: float) -> dict[str, float | int]:
    """Time single videos on one engine while another one is kept busy with its largest batches."""
    single = pack(sample_videos(urgent.spec, 1), urgent.spec, urgent.allocate)
    load = pack(sample_videos(other.spec, other.max_batch), other.spec, other.allocate)
    other.infer(*load)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(_run_until, stop, float("inf"), [(other, load)])
        try:
            timing = measure(lambda: urgent.infer(*single), Rules(warmup_seconds=min(0.3, seconds), seconds=seconds))
        finally:
            stop.set()
        busy.result()
    return timing.summary()


def _run_until(stop: threading.Event, seconds: float, members: Sequence[tuple[Backend, Any]]) -> list[int]:
    """Run each backend in a thread of its own until told to stop or the time is over; return their calls."""
    end = time.perf_counter() + seconds

    def work(member: tuple[Backend, Any]) -> int:
        calls = 0
        while not stop.is_set() and (calls == 0 or time.perf_counter() < end):
            member[0].infer(*member[1])
            calls += 1
        return calls

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(work, members))
