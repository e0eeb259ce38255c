"""Run the parity check on an engine of a bundle, opened as the runtime opens it, and measure its speed. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from export.parity.compare import ParityReport, compare
from export.parity.reference import Reference
from export.parity.tolerances import tolerance
from runtime.backends.registry import runs_on_gpu
from runtime.backends.select import load_engine
from runtime.bundle import Bundle, Engine
from runtime.features import pack
from runtime.machine import machine_class
from runtime.profiling.timing import Rules, measure_interleaved
from runtime.profiling.workload import sample_videos

SPEED_RULES = Rules(warmup_seconds=0.2, warmup_calls=2, seconds=1.0, calls=7)
"""Enough to rank the engines; `ccnet bench` measures them properly."""


def check_parity(bundle: Bundle, engine: Engine, reference: Reference) -> ParityReport:
    """Compare an engine with the reference. Raises BackendUnavailable or EngineMismatch when it can't run here."""
    with load_engine(bundle, engine) as backend:
        return compare(backend, reference.outputs, reference.videos, limits=tolerance(engine.precision))


def with_verdict(engine: Engine, report: ParityReport) -> Engine:
    """The engine with its verdict."""
    return dataclasses.replace(engine, status="verified" if report.passed else "failed", accuracy=report.summary())


def measured(bundle: Bundle, engines: Sequence[Engine]) -> list[Engine]:
    """The engines with their speed at batch 1 on this machine, measured interleaved, one video of full length."""
    spec = bundle.spec
    calls = {}
    backends = []
    for engine in engines:
        backend = load_engine(bundle, engine)
        inputs = pack(sample_videos(spec, 1), spec)
        calls[engine.name] = lambda backend=backend, inputs=inputs: backend.infer(*inputs)
        backends.append(backend)
    timings = measure_interleaved(calls, SPEED_RULES) if calls else {}
    for backend in backends:
        backend.close()
    return [dataclasses.replace(engine, speed=_speed(engine, timings[engine.name].summary())) for engine in engines]


def _speed(engine: Engine, summary: dict[str, Any]) -> dict[str, Any]:
    facts = {"ms_per_video": round(summary["p50"], 3), "p90_ms": round(summary["p90"], 3), "n": summary["n"]}
    return {**facts, "batch": 1, "machine": machine_class(gpu=runs_on_gpu(engine.backend))}
