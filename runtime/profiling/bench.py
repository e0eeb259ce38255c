"""Speed of every verified way to run a bundle on this machine, each with its accuracy beside it.

Engine only (packed inputs -> logits and offsets) and end to end (host features -> events) are measured separately, for
several batch sizes, by the rules of `timing`; all candidates run interleaved in the same rounds. Throughput is counted
on `Localizer.stream`. Cold start and memory come from fresh processes (`cold_start`). An engine that did not pass the
parity check is listed without any speed.

Shapes:  B batch   T steps   Cv, Ca visual / audio feature width
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends.base import Backend, Bool, Float32
from runtime.backends.select import load_engine
from runtime.bundle import Bundle, Engine
from runtime.errors import CCNetError
from runtime.features import VideoFeatures, pack
from runtime.machine import machine_facts
from runtime.profiling.cold_start import measure_cold_start
from runtime.profiling.timing import Rules, Timing, measure_interleaved, ratio, steady_rate
from runtime.profiling.workload import sample_videos
from runtime.spec import ModelSpec

if TYPE_CHECKING:
    from runtime.localizer import Localizer
    from runtime.pipeline import Localized

SCHEMA = 1
VERIFIED = ("verified", "reference")
"""Parity check verdicts whose speed may be shown; `reference` is the model that the others are compared with."""
_COLD_STARTS = 3


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the network. It is measured only if its accuracy is verified."""

    name: str
    open: Callable[[], Backend]
    status: str
    """`passed`, `not-run`, `failed`, or `reference`; `to-verify` when `verify` says it."""
    accuracy: dict[str, Any] = field(default_factory=dict)
    verify: Callable[[Backend], tuple[str, dict[str, Any]]] | None = None
    """Checks the opened backend and returns its status and accuracy; for what no bundle vouches for."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file that it runs."""
    weight_bytes: int | None = None
    """Size of those files."""
    cold_start: tuple[str, ...] | None = None
    """Arguments of the process that measures its cold start, see `runtime.profiling.cold_start`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure."""

    rules: Rules = field(default_factory=Rules)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    cold_starts: int = _COLD_STARTS

    def rules_for(self, batch: int) -> Rules:
        """The same number of videos for every batch size, but at least three calls and one of warm-up."""
        calls = max(3, math.ceil(self.rules.calls / batch))
        return replace(self.rules, calls=calls, warmup_calls=max(1, math.ceil(self.rules.warmup_calls / batch)))


def engine_candidates(bundle: Bundle, backends: Sequence[str] = ()) -> list[Candidate]:
    """Return one candidate for each engine of the manifest, or for those of the named backends."""
    engines = bundle.manifest.engines
    return [_engine_candidate(bundle, engine) for engine in engines if not backends or engine.backend in backends]


def _engine_candidate(bundle: Bundle, engine: Engine) -> Candidate:
    model_file = bundle.model_file(engine.model_file)
    records = {record.name: record for record in bundle.manifest.files if record.name in model_file.files}

    def open_it() -> Backend:
        return load_engine(bundle, engine)

    arguments = [str(bundle.folder), "--backend", engine.backend, "--precision", engine.precision]
    return Candidate(
        name=engine.name,
        open=open_it,
        status=engine.status,
        accuracy=engine.accuracy,
        files={name: record.sha256 for name, record in records.items()},
        weight_bytes=sum(record.size for record in records.values()),
        cold_start=tuple(arguments),
    )


def bench(
    spec: ModelSpec,
    candidates: Sequence[Candidate],
    plan: Plan | None = None,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure all candidates and return the report, as JSON.

    All candidates are open at the same time, so memory must hold them all. One that can't be opened here is listed with
    the reason. Ratios are those of a candidate's engine to the first verified candidate.
    """
    plan = plan or Plan()
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "bench",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "rules": plan.rules.to_json(),
        "candidates": [],
        "rows": [],
    }
    cold, unable = {}, {}
    for candidate in candidates:
        if candidate.status in VERIFIED and candidate.cold_start is not None:
            progress(f"cold start of {candidate.name}")
            try:
                cold[candidate.name] = measure_cold_start(candidate.cold_start, repeats=plan.cold_starts)
            except CCNetError as error:
                unable[candidate.name] = str(error)
    with contextlib.ExitStack() as stack:
        opened: dict[str, Backend] = {}
        for candidate in candidates:
            entry = _entry(candidate, cold.get(candidate.name))
            report["candidates"].append(entry)
            if candidate.name in unable:
                entry["not_measured"] = unable[candidate.name]
                continue
            backend = _open(candidate, entry, stack, progress)
            if backend is not None:
                opened[candidate.name] = backend
        if opened:
            report["rows"] = _measure(spec, opened, plan, progress)
    report["machine"]["load_average_after"] = machine_facts()["load_average"]
    return report


def _open(
    candidate: Candidate, entry: dict[str, Any], stack: contextlib.ExitStack, progress: Callable[[str], None]
) -> Backend | None:
    """The backend, if it can be opened and is verified; else None, and `entry["not_measured"]` says why."""
    if candidate.status in VERIFIED or candidate.verify is not None:
        progress(f"loading {candidate.name}")
        try:
            backend = stack.enter_context(contextlib.closing(candidate.open()))
            entry["engine"] = backend.describe()
            if candidate.verify is not None:
                progress(f"comparing {candidate.name}")
                entry["status"], entry["accuracy"] = candidate.verify(backend)
        except CCNetError as error:
            entry["not_measured"] = str(error)
            return None
        if entry["status"] in VERIFIED:
            return backend
    entry["not_measured"] = f"parity check: {entry['status']}; no speed without proof of accuracy"
    return None


def _entry(candidate: Candidate, cold: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "status": candidate.status,
        "accuracy": candidate.accuracy,
        "files": candidate.files,
        "weight_bytes": candidate.weight_bytes,
        "cold_start": cold,
        "engine": None,
        "not_measured": None,
    }


def _measure(
    spec: ModelSpec, opened: dict[str, Backend], plan: Plan, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure all candidates at every batch size. Returns the rows of the report."""
    from runtime.localizer import Localizer

    watches = {name: Stopwatch(backend) for name, backend in opened.items()}
    localizers = {name: Localizer([watch], watch.spec) for name, watch in watches.items()}
    rows = []
    for batch in plan.batches:
        names = [name for name, backend in opened.items() if backend.max_batch >= batch]
        if not names:
            progress(f"batch {batch}: none takes so many videos at once")
            continue
        progress(f"batch {batch}: {', '.join(names)}")
        rules = plan.rules_for(batch)
        videos = sample_videos(spec, batch)
        inputs = pack(videos, spec)
        calls: dict[str, Callable[[], Any]] = {}
        for name in names:
            calls[f"engine {name}"] = _engine_call(opened[name], inputs)
            calls[f"end_to_end {name}"] = _whole_call(localizers[name], watches[name], videos)
        for name in names:
            watches[name].whole_ns.clear()
        timings = measure_interleaved(calls, rules)
        base = timings[f"engine {names[0]}"]
        for name in names:
            engine, whole = timings[f"engine {name}"], timings[f"end_to_end {name}"]
            outside = Timing(whole.seconds - np.asarray(watches[name].whole_ns[-whole.n :]) / 1e9)
            rate = _stream_rate(opened[name], videos, batch, rules)
            rows.append(
                {
                    "candidate": name,
                    "batch": batch,
                    "engine_ms": engine.summary(),
                    "end_to_end_ms": whole.summary(),
                    "outside_engine_ms": outside.summary(),
                    "stream_videos_per_second": rate,
                    "engine_ratio": {"to": names[0], **ratio(engine, base).to_json()},
                }
            )
    return rows


def _engine_call(backend: Backend, inputs: tuple[Float32, Float32, Bool]) -> Callable[[], Any]:
    return lambda: backend.infer(*inputs)


def _whole_call(localizer: Localizer, watch: Stopwatch, videos: list[VideoFeatures]) -> Callable[[], Any]:
    """Host features to events; what part of it was spent inside the engine goes to `watch.whole_ns`."""

    def call() -> None:
        before = watch.inside_ns
        localizer.batch(videos)
        watch.whole_ns.append(watch.inside_ns - before)

    return call


def _stream_rate(backend: Backend, videos: list[VideoFeatures], batch: int, rules: Rules) -> dict[str, float | int]:
    """Videos per second of an endless stream. The plain backend, because a stream may open a second context of it."""
    from runtime.localizer import Localizer

    endless = ((f"video {i}", video) for i, video in enumerate(itertools.cycle(videos)))
    stream = Localizer([backend], backend.spec).stream(endless, batch_size=batch)
    with contextlib.closing(stream):
        # The last video of each batch is what is counted: those of one batch come out together.
        rate = steady_rate(itertools.islice(_checked(stream), batch - 1, None, batch), rules)
    return {"per_second": rate.per_second * batch, "videos": rate.results * batch, "seconds": rate.seconds}


def _checked(stream: Iterator[Localized]) -> Iterator[Localized]:
    for result in stream:
        if result.error is not None:
            raise result.error
        yield result


class Stopwatch:
    """A backend that counts the time spent inside another one."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.precision = backend.name, backend.precision
        self.spec, self.max_batch = backend.spec, backend.max_batch
        self.inside_ns = 0
        """Nanoseconds in `infer` so far."""
        self.whole_ns: list[int] = []
        """Nanoseconds in `infer` of each measured end-to-end call."""

    def infer(self, visual: Float32, audio: Float32, mask: Bool) -> tuple[Float32, Float32]:
        begin = time.perf_counter_ns()
        try:
            return self._backend.infer(visual, audio, mask)
        finally:
            self.inside_ns += time.perf_counter_ns() - begin

    def describe(self) -> dict[str, Any]:
        return self._backend.describe()

    def close(self) -> None:
        self._backend.close()

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
