"""The speed of every verified way to run a network on this machine, with its accuracy beside it.

Engine only (packed inputs -> logits and offsets) and end to end (host features -> events) are measured separately, for
several batch sizes, by the rules of `timing`; all candidates run interleaved in the same rounds. Throughput is counted
on `Localizer.stream`. Cold start and memory come from fresh processes (`cold_start`). An engine that did not pass its
parity check gets no speed. Progress goes to the log.

Shapes:  B batch   T steps   Cv, Ca visual / audio feature width
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends.base import Backend, Float32, Int32
from runtime.backends.select import load_engine
from runtime.batches import pack
from runtime.bundle import Bundle, Engine
from runtime.errors import CCNetError
from runtime.features import VideoFeatures
from runtime.machine import machine_facts
from runtime.profiling.cold_start import measure_cold_start
from runtime.profiling.timing import Rules, Timing, measure_interleaved, ratio, steady_rate
from runtime.profiling.workload import sample_batches
from runtime.spec import ModelSpec

if TYPE_CHECKING:
    from runtime.localizer import Localizer
    from runtime.pipeline import Localized

SCHEMA = 2
VERIFIED = ("verified", "reference")
"""Verdicts of the parity check whose speed may be shown; `reference` is what the others are compared with."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the network. It is measured only if it is verified, or is the reference."""

    name: str
    open: Callable[[], Backend]
    status: str
    """`verified`, `unverified`, `failed`, or `reference`."""
    accuracy: dict[str, Any] = field(default_factory=dict)
    verify: Callable[[Backend], tuple[str, dict[str, Any]]] | None = None
    """Checks the opened backend and returns its status and accuracy, where no manifest states them."""
    peer: str | None = None
    """Name of another candidate that its engine is compared with, besides the first."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file that it runs."""
    weight_bytes: int | None = None
    """Size of those files."""
    bundle: Path | None = None
    """The bundle from which a fresh process opens it by its name, to measure its cold start."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure."""

    rules: Rules = field(default_factory=Rules)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    cold_starts: int = 3
    """Fresh processes per candidate."""

    def rules_for(self, batch: int) -> Rules:
        """Return rules with the same number of videos for every batch size, at least three calls and one of warm-up."""
        calls = max(3, math.ceil(self.rules.calls / batch))
        return replace(self.rules, calls=calls, warmup_calls=max(1, math.ceil(self.rules.warmup_calls / batch)))


def engine_candidates(bundle: Bundle, backends: Sequence[str] = ()) -> list[Candidate]:
    """Return one candidate for each engine of the manifest, or for those of the named backends."""
    engines = bundle.manifest.engines
    return [_engine_candidate(bundle, engine) for engine in engines if not backends or engine.backend in backends]


def _engine_candidate(bundle: Bundle, engine: Engine) -> Candidate:
    model_file = bundle.model_file(engine.model_file)
    records = [record for record in bundle.manifest.files if record.name in model_file.files]
    return Candidate(
        name=engine.name,
        open=partial(load_engine, bundle, engine),
        status=engine.status,
        accuracy=engine.accuracy,
        files={record.name: record.sha256 for record in records},
        weight_bytes=sum(record.size for record in records),
        bundle=bundle.folder,
    )


def bench(
    spec: ModelSpec,
    candidates: Sequence[Candidate],
    plan: Plan | None = None,
    *,
    after_batch: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure all candidates and return the report, as JSON. `after_batch` is given what there is of it so far.

    All candidates are open at the same time, so memory must hold them all. One that can't be opened here is listed with
    the reason. Ratios are those of an engine's time to that of the first candidate in a row's batch, and of its peer.
    """
    plan = plan or Plan()
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "bench",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "rules": plan.rules.to_json(),
        "candidates": [_entry(candidate) for candidate in candidates],
        "rows": [],
    }
    entries = list(zip(candidates, report["candidates"], strict=True))
    for candidate, entry in entries:  # before this process holds any of them in memory
        if candidate.status in VERIFIED and candidate.bundle is not None:
            log.info("cold start of %s", candidate.name)
            try:
                entry["cold_start"] = measure_cold_start(candidate.bundle, candidate.name, repeats=plan.cold_starts)
            except CCNetError as error:
                entry["not_measured"] = str(error)
    with contextlib.ExitStack() as stack:
        opened: dict[str, Backend] = {}
        for candidate, entry in entries:
            backend = None if entry["not_measured"] else _open(candidate, entry, stack)
            if backend is not None:
                opened[candidate.name] = backend
        peers = {candidate.name: candidate.peer for candidate in candidates if candidate.peer}
        for batch in plan.batches:
            report["rows"] += _measure(spec, opened, peers, batch, plan.rules_for(batch))
            if after_batch is not None:
                after_batch(report)
    report["machine"]["load_average_after"] = machine_facts()["load_average"]
    return report


def _open(candidate: Candidate, entry: dict[str, Any], stack: contextlib.ExitStack) -> Backend | None:
    """Return the backend if it can be opened and is verified; else None, and `entry["not_measured"]` says why."""
    if candidate.status in VERIFIED or candidate.verify is not None:
        log.info("loading %s", candidate.name)
        try:
            backend = stack.enter_context(contextlib.closing(candidate.open()))
            entry["engine"] = backend.describe()
            if candidate.verify is not None:
                log.info("comparing %s", candidate.name)
                entry["status"], entry["accuracy"] = candidate.verify(backend)
        except CCNetError as error:
            entry["not_measured"] = str(error)
            return None
        if entry["status"] in VERIFIED:
            return backend
    if entry["status"] == "failed":
        entry["not_measured"] = "it failed the parity check"
    else:
        entry["not_measured"] = f"its accuracy was never verified; run 'ccnet verify {candidate.bundle or 'BUNDLE'}'"
    return None


def _entry(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "status": candidate.status,
        "accuracy": candidate.accuracy,
        "files": candidate.files,
        "weight_bytes": candidate.weight_bytes,
        "cold_start": None,
        "engine": None,
        "not_measured": None,
    }


def _measure(
    spec: ModelSpec, opened: Mapping[str, Backend], peers: Mapping[str, str], batch: int, rules: Rules
) -> list[dict[str, Any]]:
    """Measure all candidates that take so many videos at once. Returns the rows of the report."""
    from runtime.localizer import Localizer

    watches = {name: Stopwatch(backend) for name, backend in opened.items() if backend.max_batch >= batch}
    if not watches:
        log.info("batch %d: no candidate takes so many videos at once", batch)
        return []
    log.info("batch %d: %s", batch, ", ".join(watches))
    batches = sample_batches(spec, batch)
    calls: dict[str, Callable[[], Any]] = {}
    for name, watch in watches.items():
        allocate = getattr(opened[name], "allocate", None)  # memory of its own, which is where a Localizer has them
        inputs = [(pack(videos, spec, allocate),) for videos in batches]
        localizer = Localizer([watch], spec)
        calls[f"engine {name}"] = _rotating(partial(_infer, opened[name]), inputs)
        calls[f"end_to_end {name}"] = _rotating(partial(_localize, localizer, watch), [(videos,) for videos in batches])
    timings = measure_interleaved(calls, rules)
    first = next(iter(watches))
    rows = []
    for name, watch in watches.items():
        engine, whole = timings[f"engine {name}"], timings[f"end_to_end {name}"]
        outside = Timing(whole.seconds - np.asarray(watch.inside_ns[-whole.n :]) / 1e9)
        row = {
            "candidate": name,
            "batch": batch,
            "engine_ms": engine.summary(),
            "end_to_end_ms": whole.summary(),
            "outside_engine_ms": outside.summary(),
            "stream_videos_per_second": _stream_rate(opened[name], batches, batch, rules),
            "engine_ratio": {"to": first, **ratio(engine, timings[f"engine {first}"]).to_json()},
        }
        if peers.get(name) in watches:
            row["peer_ratio"] = {"to": peers[name], **ratio(engine, timings[f"engine {peers[name]}"]).to_json()}
        rows.append(row)
    return rows


def _rotating(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Callable[[], Any]:
    """Return a function that makes a call with the next arguments each time, so that no cache holds all of them."""
    turns = itertools.cycle(arguments)
    return lambda: call(*next(turns))


def _infer(backend: Backend, inputs: tuple[Float32, Float32, Int32]) -> Any:
    return backend.infer(*inputs)


def _localize(localizer: Localizer, watch: Stopwatch, videos: list[VideoFeatures]) -> None:
    """Turn host features into events; what part of it was spent inside the engine goes to `watch.inside_ns`."""
    watch.inside_ns.append(0)
    localizer.batch(videos)


def _stream_rate(
    backend: Backend, batches: list[list[VideoFeatures]], batch: int, rules: Rules
) -> dict[str, float | int]:
    """Count videos per second of an endless stream, on the backend itself: a stream may fork it."""
    from runtime.localizer import Localizer

    videos = itertools.cycle(itertools.chain.from_iterable(batches))
    endless = ((f"video {i}", video) for i, video in enumerate(videos))
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
    """A backend that adds the time spent inside another one to the last entry of `inside_ns`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.precision = backend.name, backend.precision
        self.spec, self.max_batch = backend.spec, backend.max_batch
        self.inside_ns: list[int] = []
        """Nanoseconds in `infer` of each end-to-end call."""
        if hasattr(backend, "allocate"):
            self.allocate = backend.allocate

    def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        begin = time.perf_counter_ns()
        try:
            return self._backend.infer(visual, audio, lengths)
        finally:
            self.inside_ns[-1] += time.perf_counter_ns() - begin

    def describe(self) -> dict[str, Any]:
        return self._backend.describe()

    def close(self) -> None:
        self._backend.close()
