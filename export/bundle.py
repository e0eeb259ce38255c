"""Checkpoint -> bundle: graphs, engines, and the parity check of every way to run them.

Read downward: `make_bundle`, then its steps in order.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ccnet import __version__
from export.bundle_writer import Draft, new_bundle
from export.engines import AUTO, EngineRequest, add_engine, plan_engines
from export.parity.check import check_parity, with_speeds, with_verdict
from export.parity.compare import ParityReport
from export.parity.reference import Reference
from export.parity.tolerances import graph_precision
from runtime.backends.registry import PRECISIONS, REGISTRY
from runtime.batches import pack
from runtime.bundle import Bundle, Engine, ModelFile
from runtime.errors import BackendUnavailable, CCNetError, ConfigError, EngineMismatch, ExportError, ParityError
from runtime.machine import library_versions
from runtime.spec import INPUT_NAMES

if TYPE_CHECKING:
    from torch import nn

    from ccnet.checkpoint import Checkpoint
    from ccnet.config import ModelConfig
    from ccnet.network.model import CCNet

Graph = Literal["fused", "reference"]
FP8_OPSET = 20
"""As `export.graph.fp8.LEAST_OPSET`, which needs onnx."""
CALIBRATION_VIDEOS = 16
DERIVED = {"int8": "fp32", "fp8": "fp16"}
"""Precisions whose numbers are put into the finished graph of another one."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(EngineRequest):
    """What to export."""

    opset: int = 20
    max_batch: int = 32
    opt_batch: int = 1
    """Batch size that TensorRT engines are tuned for."""
    graph: Graph | None = None
    """The network in few operations made for engines, or as it is; None: fused, or reference where it is ablated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "fp8" in self.precisions and self.opset < FP8_OPSET:
            raise ConfigError(f"opset: got {self.opset} with precision fp8, expected {FP8_OPSET} or newer")
        if "int8" in self.precisions and set(self.formats) != {"onnx"}:
            raise ConfigError(f"precision: got int8 with format {' '.join(self.formats)}; int8 is for the onnx format")
        if self.opt_batch != 1 and set(self.formats) == {"onnx"}:
            raise ConfigError("opt-batch: for engines only; got format onnx, expected tensorrt or tensorrt-rtx with it")
        if not 1 <= self.opt_batch <= self.max_batch:
            raise ConfigError(f"opt-batch: got {self.opt_batch}, expected 1 to max-batch ({self.max_batch})")
        if self.graph == "reference" and set(self.precisions) - {"fp32", "tf32", AUTO}:
            given = " ".join(self.precisions)
            raise ConfigError(f"precision: got {given}, expected fp32, tf32 or auto: the reference graph has fp32 only")


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What became of each engine."""

    engines: tuple[Engine, ...]
    reports: dict[str, ParityReport]
    skipped: dict[str, str]
    """Engines that were asked for but can't be built or run on this machine, and why."""


def make_bundle(
    checkpoint: Checkpoint, model: CCNet, reference: Reference, out: str | Path, options: ExportOptions
) -> ExportResult:
    """Write the bundle `out`, every engine that was asked for and can run here verified against `reference`.

    The manifest also lists the other ways to run its ONNX files, unverified. Raises ParityError, leaving no bundle,
    when an engine that was asked for fails the check (with `auto`: when every one does); ExportError when a graph or
    engine can't be made; BundleError when `out` is something else.
    """
    if options.graph is None:
        options = dataclasses.replace(options, graph=_graph_for(checkpoint.config.model))
    asked, others, skipped = plan_engines(options, typed=options.graph != "reference")
    with new_bundle(
        out,
        spec=checkpoint.spec,
        model=checkpoint.config.model.to_json(),
        checkpoint_sha256=checkpoint.weights_sha256,
        versions={"ccnet": __version__, **library_versions()},
    ) as draft:
        graphs = {REGISTRY[engine.backend].precisions[cast(Any, engine.precision)] for engine in asked}
        for precision in PRECISIONS:
            if precision in graphs or precision in {DERIVED.get(graph) for graph in graphs}:
                if precision in DERIVED:
                    _add_derived_graph(draft, reference, options, precision, skipped)
                else:
                    _add_graph(draft, checkpoint, model, options, precision)
        for engine in asked:
            if REGISTRY[engine.backend].format != "onnx":
                source = f"onnx-{graph_precision(engine.precision)}"
                graph = next(m for m in draft.manifest.model_files if m.name == source)
                batches = (1, options.opt_batch, options.max_batch)
                add_engine(draft, engine, graph, options, skipped, batches=batches)
        for engine in (*asked, *others):
            if any(model_file.name == engine.model_file for model_file in draft.manifest.model_files):
                draft.set_engine(engine)
        return _check(draft, [engine for engine in asked if engine.name not in skipped], reference, options, skipped)


def _graph_for(config: ModelConfig) -> Graph:
    """Return the graph of a network of this structure; an ablated one gets the reference graph, and a warning."""
    from export.fused.network import unfusable

    reason = unfusable(config)
    if reason is None:
        return "fused"
    log.warning("%s: writing the reference graph, which is slower than the fused network of the paper", reason)
    return "reference"


def _graph_path(draft: Draft, precision: str) -> Path:
    return draft.folder / ("model.onnx" if precision == "fp32" else f"model-{precision}.onnx")


def _add_graph(draft: Draft, checkpoint: Checkpoint, model: CCNet, options: ExportOptions, precision: str) -> None:
    """Write the ONNX graph of one precision into the draft."""
    from export.graph.to_onnx import export_onnx

    path = _graph_path(draft, precision)
    log.info("writing %s (%s graph, opset %d)", path.name, options.graph, options.opset)
    info = export_onnx(
        _module(model, options, precision),
        checkpoint.spec,
        path,
        opset=options.opset,
        max_batch=options.max_batch,
        metadata={
            "checkpoint_sha256": checkpoint.weights_sha256,
            "precision": precision,
            "graph": str(options.graph),
            "opset": str(options.opset),
            "ccnet_version": __version__,
        },
    )
    _add_onnx(draft, info, precision, options, {"seconds": round(info.seconds, 1)})


def _add_derived_graph(
    draft: Draft, reference: Reference, options: ExportOptions, precision: str, skipped: dict[str, str]
) -> None:
    """Write the graph of another precision with int8 weights or fp8 matmuls into the draft."""
    source, path = _graph_path(draft, DERIVED[precision]), _graph_path(draft, precision)
    log.info("writing %s", path.name)
    metadata = {"precision": precision}
    try:
        if precision == "fp8":
            from export.graph.fp8 import quantize_fp8

            info = quantize_fp8(source, path, calibration_feeds(reference), metadata=metadata)
        else:
            from export.graph.quantize import quantize_weights

            info = quantize_weights(source, path, metadata=metadata)
    except ExportError as error:
        if not options.automatic:
            raise
        log.info("  left out: %s", error)
        skipped["openvino-int8"] = str(error)
        return
    _add_onnx(draft, info, precision, options, {f"{precision}_matmuls": info.matmuls})


def _add_onnx(draft: Draft, info: Any, precision: str, options: ExportOptions, facts: dict[str, Any]) -> None:
    log.info("  %d nodes, %.0f MB of weights", info.nodes, info.weight_bytes / 1e6)
    draft.add_model_file(
        ModelFile(
            name=f"onnx-{precision}",
            format="onnx",
            files=info.files,
            precision=precision,
            max_batch=options.max_batch,
            opset=options.opset,
            build={"graph": options.graph, **facts, "nodes": info.nodes, "weight_bytes": info.weight_bytes},
        )
    )


def calibration_feeds(reference: Reference) -> list[dict[str, Any]]:
    """Return the inputs of some videos that the parity check runs on, spread over all kinds of them."""
    step = max(1, len(reference.videos) // CALIBRATION_VIDEOS)
    chosen = reference.videos[::step][:CALIBRATION_VIDEOS]
    return [dict(zip(INPUT_NAMES, pack([video.features], reference.spec), strict=True)) for video in chosen]


def _module(model: CCNet, options: ExportOptions, precision: str) -> nn.Module:
    if options.graph == "reference":
        from export.graph.reference import ReferenceGraph

        return ReferenceGraph(model)
    from export.fused.network import fused_network
    from export.parity.tolerances import torch_dtype

    return fused_network(model, dtype=torch_dtype(graph_precision(precision)))


def _check(
    draft: Draft, engines: list[Engine], reference: Reference, options: ExportOptions, skipped: dict[str, str]
) -> ExportResult:
    """Run the parity check on the engines and put status, report and, with `auto`, speed into the draft."""
    bundle = draft.bundle()
    reports: dict[str, ParityReport] = {}
    checked: list[Engine] = []
    for engine in engines:
        log.info("comparing %s with the eager network", engine.name)
        outcome = _compare(bundle, engine, reference, automatic=options.automatic)
        if isinstance(outcome, str):
            log.info("  not run here: %s", outcome)
            skipped[engine.name] = outcome
            continue
        log.info("%s", outcome.text())
        if not options.automatic:
            outcome.require()
        reports[engine.name] = outcome
        checked.append(with_verdict(engine, outcome))
    verified = [engine for engine in checked if engine.status == "verified"]
    if options.automatic and not verified:
        raise ParityError(
            f"no engine passed the parity check; failed: {', '.join(reports)}; not run here: {', '.join(skipped)}"
        )
    if options.automatic:
        verified = with_speeds(bundle, verified)
    for engine in (*verified, *(engine for engine in checked if engine.status == "failed")):
        draft.set_engine(engine, reports[engine.name].to_json())
    return ExportResult(engines=draft.manifest.engines, reports=reports, skipped=skipped)


def _compare(bundle: Bundle, engine: Engine, reference: Reference, *, automatic: bool) -> ParityReport | str:
    """Return the report, or why the engine can't run on this machine.

    A TensorRT engine may well be built for another machine; an ONNX file that was asked for must run.
    """
    try:
        return check_parity(bundle, engine, reference)
    except (BackendUnavailable, EngineMismatch) as error:
        if automatic or REGISTRY[engine.backend].format != "onnx":
            return str(error)
        raise
    except CCNetError as error:
        if automatic:
            return str(error)
        raise
