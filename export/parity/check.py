"""Run the parity check on engines of a bundle, opened as the runtime opens them, and record the result (no torch)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from export.bundle_writer import changed_bundle
from export.parity.compare import ParityReport, compare
from export.parity.reference import Reference
from export.parity.tolerances import tolerance
from runtime.backends.registry import runs_on_gpu
from runtime.backends.select import load_engine, matching_engines
from runtime.batches import pack
from runtime.bundle import Bundle, Engine, ModelFolder, read_bundle
from runtime.errors import BackendUnavailable, BundleError, EngineError, EngineMismatch, ParityError
from runtime.machine import machine_class
from runtime.profiling.timing import Rules, measure_interleaved
from runtime.profiling.workload import sample_videos
from runtime.spec import ModelSpec

SPEED_RULES = Rules(warmup_seconds=0.2, warmup_calls=2, seconds=1.0, calls=7)
"""Enough to rank the engines; `ccnet bench` measures them properly."""

log = logging.getLogger(__name__)

Report = TypeVar("Report")


def check_fits(bundle: Bundle, spec: ModelSpec, checkpoint_sha256: str) -> None:
    """Raise BundleError when a reference or checkpoint is not of the network that the bundle holds."""
    if checkpoint_sha256 != bundle.manifest.checkpoint_sha256 or spec.input_shapes(1) != bundle.spec.input_shapes(1):
        raise BundleError(
            f"{bundle.folder} was made from checkpoint {bundle.manifest.checkpoint_sha256[:16]}, "
            f"the reference is of {checkpoint_sha256[:16]}; use the checkpoint that was exported"
        )


def engines_to_verify(folder: ModelFolder[Any], backend: str | None, precision: str | None) -> list[Engine]:
    """Return the unverified engines, or all that fit the given backend and precision, failed ones too.

    Raises BackendUnavailable when none fits what was asked for.
    """
    if backend is None and precision is None:
        return [engine for engine in folder.manifest.engines if engine.status == "unverified"]
    return matching_engines(folder, backend or "auto", precision=precision, failed=True)


def run_checks(
    folder: ModelFolder[Any],
    engines: Sequence[Engine],
    check: Callable[[Engine], Report],
    *,
    against: str,
    all_must_run: bool,
) -> tuple[dict[str, Report], list[str]]:
    """Return the report of every engine that runs here, by name, and which ones do not, and why.

    `against`: what engines are compared with, for the log. Without `all_must_run`, ONNX files whose backend is absent
    are passed over.
    """
    reports: dict[str, Report] = {}
    unavailable: list[str] = []
    for engine in engines:
        log.info("comparing %s with %s", engine.name, against)
        try:
            reports[engine.name] = check(engine)
        except (BackendUnavailable, EngineMismatch, EngineError) as error:
            log.info("  can't run here: %s", error)
            if all_must_run or folder.model_file(engine.model_file).format != "onnx":
                unavailable.append(f"{engine.name}: {error}")
    return reports, unavailable


def verify(
    folder: str | Path, engines: Sequence[Engine], reference: Reference, *, all_must_run: bool = True
) -> list[str]:
    """Run the parity check on `engines`, write every result into the bundle, atomically, and return the verified names.

    ParityError is raised for engines that fail, BackendUnavailable for those that can't run here; with `all_must_run`
    off, ONNX files are passed over where their backend is absent. What the others gave is written all the same.
    """
    bundle = read_bundle(folder)

    def check(engine: Engine) -> ParityReport:
        report = check_parity(bundle, engine, reference)
        log.info("%s", report.text())
        return report

    reports, unavailable = run_checks(bundle, engines, check, against="the eager network", all_must_run=all_must_run)
    if reports:
        with changed_bundle(folder) as draft:
            for engine in engines:
                if report := reports.get(engine.name):
                    draft.set_engine(with_verdict(engine, report), report.to_json())
    if failed := [name for name, report in reports.items() if not report.passed]:
        raise ParityError(f"{folder}: {', '.join(failed)} failed the parity check and will not be run")
    if unavailable:
        raise BackendUnavailable(f"{folder}: could not be run here:\n  " + "\n  ".join(unavailable))
    return list(reports)


def check_parity(bundle: Bundle, engine: Engine, reference: Reference) -> ParityReport:
    """Compare an engine with the reference. Raises BackendUnavailable or EngineMismatch when it can't run here."""
    with load_engine(bundle, engine) as backend:
        return compare(backend, reference.outputs, reference.videos, limits=tolerance(engine.precision))


def with_verdict(engine: Engine, report: ParityReport) -> Engine:
    """Return the engine with status and accuracy from its report."""
    return dataclasses.replace(engine, status="verified" if report.passed else "failed", accuracy=report.summary())


def with_speeds(bundle: Bundle, engines: Sequence[Engine]) -> list[Engine]:
    """Return the engines with their speed here: one video of full length at batch 1, all measured interleaved."""
    inputs = pack(sample_videos(bundle.spec, 1), bundle.spec)
    with contextlib.ExitStack() as stack:
        backends = [stack.enter_context(load_engine(bundle, engine)) for engine in engines]
        calls = {e.name: partial(backend.infer, *inputs) for e, backend in zip(engines, backends, strict=True)}
        timings = measure_interleaved(calls, SPEED_RULES) if calls else {}
    return [dataclasses.replace(engine, speed=_speed(engine, timings[engine.name].summary())) for engine in engines]


def _speed(engine: Engine, summary: dict[str, Any]) -> dict[str, Any]:
    facts = {"ms_per_video": round(summary["p50"], 3), "p90_ms": round(summary["p90"], 3), "n": summary["n"]}
    return {**facts, "batch": 1, "machine": machine_class(gpu=runs_on_gpu(engine.backend))}
