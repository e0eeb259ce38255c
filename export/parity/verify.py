"""Verifies engines of a finished bundle on this machine and writes the verdicts into it. Torch-free."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from export.bundle_writer import changed_bundle
from export.parity.check import check_parity, with_verdict
from export.parity.compare import ParityReport
from export.parity.reference import Reference
from runtime.backends.select import failed_engines, matching_engines
from runtime.bundle import Bundle, Engine, read_bundle
from runtime.errors import BackendUnavailable, BundleError, EngineError, EngineMismatch, ParityError
from runtime.spec import ModelSpec

Say = Callable[[str], None]


def check_fits(bundle: Bundle, spec: ModelSpec, checkpoint_sha256: str) -> None:
    """Raises BundleError when a reference or checkpoint is not of the network that the bundle holds."""
    if checkpoint_sha256 != bundle.manifest.checkpoint_sha256 or spec.input_shapes(1) != bundle.spec.input_shapes(1):
        raise BundleError(
            f"{bundle.folder} was made from checkpoint {bundle.manifest.checkpoint_sha256[:16]}, "
            f"the reference is of {checkpoint_sha256[:16]}; use the checkpoint that was exported"
        )


def engines_to_verify(bundle: Bundle, backend: str | None, precision: str | None) -> list[Engine]:
    """Unverified engines, or all that fit the given backend and precision, listed in the manifest, failed, or neither.

    Raises BackendUnavailable when none fits what was asked for.
    """
    if backend is None and precision is None:
        return [engine for engine in bundle.manifest.engines if engine.status == "unverified"]
    found = failed_engines(bundle, backend or "auto", precision=precision)
    with contextlib.suppress(BackendUnavailable):
        found += matching_engines(bundle, backend or "auto", precision=precision)
    return found or matching_engines(bundle, backend or "auto", precision=precision)


def verify(folder: str | Path, engines: Sequence[Engine], reference: Reference, say: Say = print) -> list[ParityReport]:
    """Run the parity check on `engines` and write every verdict into the bundle, atomically.

    An engine that fails is moved to the failed ones, so that it is never run again, and ParityError is raised when all
    is written. Raises BackendUnavailable when some can't run here; the verdicts of the others are written.
    """
    bundle = read_bundle(folder)
    outcomes: list[tuple[Engine, ParityReport]] = []
    blocked: list[str] = []
    for engine in engines:
        say(f"comparing {engine.name} with the eager network")
        try:
            report = check_parity(bundle, engine, reference)
        except (BackendUnavailable, EngineMismatch, EngineError) as error:
            say(f"  can't run here: {error}")
            blocked.append(f"{engine.name}: {error}")
            continue
        say(report.text())
        outcomes.append((engine, report))
    if outcomes:
        with changed_bundle(folder) as draft:
            for engine, report in outcomes:
                draft.set_engine(with_verdict(engine, report), report.to_json())
    failed = [engine.name for engine, report in outcomes if not report.passed]
    if failed:
        raise ParityError(f"{folder}: {', '.join(failed)} failed the parity check; the bundle lists them as rejected")
    if blocked:
        raise BackendUnavailable(f"{folder}: could not be run here:\n  " + "\n  ".join(blocked))
    return [report for _, report in outcomes]
