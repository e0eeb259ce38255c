"""The parity check of an extractor's engines: every graph against what the network in PyTorch made of the same inputs.

Needs no torch: the network's outputs are in the extractor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.bundle_writer import changed_folder
from export.extractors.reference import Float32, Outputs, example_inputs, read_reference
from export.parity.check import run_checks
from export.parity.tolerances import extractor_tolerance
from runtime.backends.graphs import GraphRunner
from runtime.bundle import Engine
from runtime.errors import BackendUnavailable, ParityError
from runtime.video.engines import load_graph
from runtime.video.extractor import Extractor, GraphName, graph_of, read_extractor

log = logging.getLogger(__name__)


def check_engine(extractor: Extractor, engine: Engine, reference: Outputs) -> dict[str, Any]:
    """Return the report of an engine. Raises BackendUnavailable or EngineMismatch when it can't run here."""
    graph = graph_of(engine.name)
    inputs = example_inputs(graph, extractor.spec, reference["encode"])
    with contextlib.closing(load_graph(extractor, engine)) as runner:
        report = compare_graph(runner, graph, inputs, reference[graph])
    log.info("  %s: %s", engine.name, ", ".join(f"{c['name']} {c['value']:.2g}" for c in report["checks"]))
    return report


def compare_graph(
    runner: GraphRunner, graph: GraphName, inputs: Sequence[Float32], expected: Mapping[str, Float32]
) -> dict[str, Any]:
    """Return the report of a graph on an engine: each output's differences, relative to its largest value.

    For `flow`, whose output is rounded, differences are in levels, of which 6.4 are a pixel.
    """
    found = runner.run(*inputs)
    limits = extractor_tolerance(graph, runner.precision)
    checks = []
    for name, got in zip(runner.tensors.outputs, found, strict=True):
        want = expected[name]
        scale = 1.0 if graph == "flow" else float(np.abs(want).max()) or 1.0
        gap = np.abs(got - want) / scale
        for kind, value, limit in (("max", gap.max(), limits.largest), ("mean", gap.mean(), limits.mean)):
            good = bool(np.isfinite(value) and value <= limit)
            checks.append({"name": f"{kind}_{name}", "value": float(value), "limit": limit, "passed": good})
    return {"candidate": runner.describe(), "checks": checks, "passed": all(check["passed"] for check in checks)}


def with_verdict(engine: Engine, report: Mapping[str, Any]) -> Engine:
    """Return the engine with status and accuracy from its report."""
    accuracy = {check["name"]: check["value"] for check in report["checks"]}
    return dataclasses.replace(engine, status="verified" if report["passed"] else "failed", accuracy=accuracy)


def failing(engine: Engine, report: Mapping[str, Any]) -> str:
    """Say which checks an engine did not pass."""
    checks = [f"{c['name']} {c['value']:.3g}, allowed {c['limit']:.3g}" for c in report["checks"] if not c["passed"]]
    return f"{engine.name} does not compute what the network computes: {'; '.join(checks)}"


def verify_extractor(folder: str | Path, engines: Sequence[Engine], *, all_must_run: bool = True) -> list[str]:
    """Run the parity check on `engines`, write every verdict into the extractor, and return the verified names.

    Raises as `export.parity.check.verify`.
    """
    extractor = read_extractor(folder)
    reference = read_reference(extractor)
    reports, unavailable = run_checks(
        extractor,
        engines,
        lambda engine: check_engine(extractor, engine, reference),
        against="its network",
        all_must_run=all_must_run,
    )
    judged = [engine for engine in engines if engine.name in reports]
    if judged:
        with changed_folder(folder, read_extractor) as draft:
            for engine in judged:
                draft.set_engine(with_verdict(engine, reports[engine.name]), reports[engine.name])
    if failed := [failing(engine, reports[engine.name]) for engine in judged if not reports[engine.name]["passed"]]:
        raise ParityError(f"{folder}: will not be run:\n  " + "\n  ".join(failed))
    if unavailable:
        raise BackendUnavailable(f"{folder}: could not be run here:\n  " + "\n  ".join(unavailable))
    return [engine.name for engine in judged]
