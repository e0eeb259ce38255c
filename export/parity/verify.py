"""Proves rungs of a finished bundle on this machine and writes the verdicts into it. Torch-free."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from export.bundle_writer import changed_bundle
from export.parity.check import gate_rung, judged
from export.parity.compare import ParityReport
from export.parity.reference import Reference
from runtime.backends.select import matching_rungs, rejected_rungs
from runtime.bundle import Bundle, Rung, read_bundle
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


def rungs_to_prove(bundle: Bundle, backend: str | None, precision: str | None) -> list[Rung]:
    """Unproven rungs, or all that fit the given backend and precision, listed in the manifest, rejected, or neither.

    Raises BackendUnavailable when none fits what was asked for.
    """
    if backend is None and precision is None:
        return [rung for rung in bundle.manifest.rungs if rung.gate == "not-run"]
    found = rejected_rungs(bundle, backend or "auto", precision=precision)
    lengths = sorted({artifact.length for artifact in bundle.manifest.artifacts}, reverse=True)
    for length in lengths:
        with contextlib.suppress(BackendUnavailable):
            found += matching_rungs(bundle, backend or "auto", precision=precision, length=length)
    # Without any, the error of the bundle's own T says what there is.
    return found or matching_rungs(bundle, backend or "auto", precision=precision)


def prove(folder: str | Path, rungs: Sequence[Rung], reference: Reference, say: Say = print) -> list[ParityReport]:
    """Run the gate on `rungs` and write every verdict into the bundle, atomically.

    A rung that fails is moved to the rejected ones, so that it is never run again, and ParityError is raised when all
    is written. Raises BackendUnavailable when some can't run here; the verdicts of the others are written.
    """
    bundle = read_bundle(folder)
    outcomes: list[tuple[Rung, ParityReport]] = []
    blocked: list[str] = []
    for rung in rungs:
        say(f"comparing {rung.name} with the eager network")
        try:
            report = gate_rung(bundle, rung, reference)
        except (BackendUnavailable, EngineMismatch, EngineError) as error:
            say(f"  can't run here: {error}")
            blocked.append(f"{rung.name}: {error}")
            continue
        say(report.text())
        outcomes.append((rung, report))
    if outcomes:
        with changed_bundle(folder) as draft:
            for rung, report in outcomes:
                draft.set_rung(judged(rung, report), report.to_json())
    failed = [rung.name for rung, report in outcomes if not report.passed]
    if failed:
        raise ParityError(f"{folder}: {', '.join(failed)} failed the gate; the bundle lists them as rejected")
    if blocked:
        raise BackendUnavailable(f"{folder}: could not be run here:\n  " + "\n  ".join(blocked))
    return [report for _, report in outcomes]
