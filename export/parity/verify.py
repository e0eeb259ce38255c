"""Verify engines of a finished bundle on this machine and write the results into it. Needs no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from export.bundle_writer import changed_bundle
from export.parity.check import check_parity, with_verdict
from export.parity.compare import ParityReport
from export.parity.reference import Reference
from runtime.backends.select import matching_engines
from runtime.bundle import Bundle, Engine, read_bundle
from runtime.errors import BackendUnavailable, BundleError, EngineError, EngineMismatch, ParityError
from runtime.spec import ModelSpec

log = logging.getLogger(__name__)


def check_fits(bundle: Bundle, spec: ModelSpec, checkpoint_sha256: str) -> None:
    """Raises BundleError when a reference or checkpoint is not of the network that the bundle holds."""
    if checkpoint_sha256 != bundle.manifest.checkpoint_sha256 or spec.input_shapes(1) != bundle.spec.input_shapes(1):
        raise BundleError(
            f"{bundle.folder} was made from checkpoint {bundle.manifest.checkpoint_sha256[:16]}, "
            f"the reference is of {checkpoint_sha256[:16]}; use the checkpoint that was exported"
        )


def engines_to_verify(bundle: Bundle, backend: str | None, precision: str | None) -> list[Engine]:
    """Return the unverified engines, or all that fit the given backend and precision, failed ones too.

    Raises BackendUnavailable when none fits what was asked for.
    """
    if backend is None and precision is None:
        return [engine for engine in bundle.manifest.engines if engine.status == "unverified"]
    return matching_engines(bundle, backend or "auto", precision=precision, failed=True)


def verify(
    folder: str | Path, engines: Sequence[Engine], reference: Reference, *, all_must_run: bool = True
) -> list[str]:
    """Run the parity check on `engines`, write every result into the bundle, atomically, and return the verified names.

    ParityError is raised for engines that fail, BackendUnavailable for those that can't run here; with `all_must_run`
    off, ONNX files are passed over where their backend is absent. What the others gave is written all the same.
    """
    bundle = read_bundle(folder)
    reports: dict[str, ParityReport] = {}
    unavailable: list[str] = []
    for engine in engines:
        log.info("comparing %s with the eager network", engine.name)
        try:
            reports[engine.name] = check_parity(bundle, engine, reference)
        except (BackendUnavailable, EngineMismatch, EngineError) as error:
            log.info("  can't run here: %s", error)
            if all_must_run or bundle.model_file(engine.model_file).format != "onnx":
                unavailable.append(f"{engine.name}: {error}")
        else:
            log.info("%s", reports[engine.name].text())
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
