"""Runs a rung of a bundle through the gate, the way the runtime opens it, and measures its speed. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from export.parity.compare import ParityReport, compare
from export.parity.reference import Reference
from export.parity.tolerances import tolerance
from runtime.backends.select import open_named
from runtime.bundle import Bundle, Rung
from runtime.features import pack
from runtime.machine import machine_class
from runtime.profiling.timing import Rules, measure_interleaved
from runtime.profiling.workload import sample_videos

SPEED_RULES = Rules(warmup_seconds=0.2, warmup_calls=2, seconds=1.0, calls=7)
"""Enough to rank the rungs; `ccnet bench` measures them properly."""


def gate_rung(bundle: Bundle, rung: Rung, reference: Reference) -> ParityReport:
    """Compare a rung with the reference. Raises BackendUnavailable or EngineMismatch when it can't run here."""
    part = reference.cut(bundle.artifact(rung.artifact).length)
    with open_named(bundle, rung) as backend:
        return compare(backend, part.outputs, part.videos, limits=tolerance(rung.precision))


def judged(rung: Rung, report: ParityReport) -> Rung:
    """The rung with its verdict."""
    return dataclasses.replace(rung, gate="passed" if report.passed else "failed", accuracy=report.summary())


def measured(bundle: Bundle, rungs: Sequence[Rung]) -> list[Rung]:
    """The rungs with their speed at batch 1 on this machine, measured interleaved, one video of full length."""
    spec = bundle.spec
    calls = {}
    backends = []
    for rung in rungs:
        backend = open_named(bundle, rung)
        inputs = pack(sample_videos(spec, 1, steps=backend.spec.length), backend.spec)
        calls[rung.name] = lambda backend=backend, inputs=inputs: backend.infer(*inputs)
        backends.append(backend)
    timings = measure_interleaved(calls, SPEED_RULES) if calls else {}
    for backend in backends:
        backend.close()
    return [dataclasses.replace(rung, speed=_speed(rung, timings[rung.name].summary())) for rung in rungs]


def _speed(rung: Rung, summary: dict[str, Any]) -> dict[str, Any]:
    facts = {"ms_per_video": round(summary["p50"], 3), "p90_ms": round(summary["p90"], 3), "n": summary["n"]}
    return {**facts, "batch": 1, "machine": machine_class(rung.backend)}
