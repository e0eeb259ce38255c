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
from export.parity.check import check_parity, with_speeds, with_verdict
from export.parity.compare import ParityReport
from export.parity.reference import Reference
from export.parity.tolerances import graph_precision
from export.tensorrt.build import build_engine
from export.tensorrt.options import EngineOptions, EnginePrecision
from runtime.backends.registry import PRECISIONS, REGISTRY
from runtime.bundle import Bundle, Engine, Format, ModelFile
from runtime.errors import BackendUnavailable, CCNetError, ConfigError, EngineMismatch, ExportError, ParityError
from runtime.machine import library_versions

if TYPE_CHECKING:
    from torch import nn

    from ccnet.checkpoint import Checkpoint
    from ccnet.config import ModelConfig
    from ccnet.network.model import CCNet

Graph = Literal["fused", "reference"]
AUTO = "auto"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export."""

    formats: tuple[Format, ...] = ("onnx",)
    precisions: tuple[str, ...] = ("fp32",)
    """Of `PRECISIONS`, or `("auto",)`: every engine that this machine can run and that passes the parity check."""
    opset: int = 20
    max_batch: int = 32
    opt_batch: int = 1
    """Batch size that TensorRT engines are tuned for."""
    graph: Graph | None = None
    """The network in few operations made for engines, or as it is; None: fused, or reference where it is ablated."""
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)
    """Of every TensorRT engine; its format, precision and profile are set for each."""

    def __post_init__(self) -> None:
        for precision in self.precisions:
            if precision not in (*PRECISIONS, AUTO):
                raise ConfigError(f"precision: got {precision!r}, expected {AUTO} or some of {', '.join(PRECISIONS)}")
        if self.automatic and len(self.precisions) > 1:
            raise ConfigError(f"precision: got {' '.join(self.precisions)}, expected {AUTO} alone")
        if "int8" in self.precisions and set(self.formats) != {"onnx"}:
            raise ConfigError(f"precision: got int8 with format {' '.join(self.formats)}; int8 is for the onnx format")
        if self.engine.given and set(self.formats) == {"onnx"}:
            given = ", ".join(self.engine.given)
            raise ConfigError(f"{given}: for engines only; got format onnx, expected tensorrt or tensorrt-rtx with it")
        if not 1 <= self.opt_batch <= self.max_batch:
            raise ConfigError(f"opt-batch: got {self.opt_batch}, expected 1 to max-batch ({self.max_batch})")
        if self.graph == "reference" and set(self.precisions) - {"fp32", "tf32", AUTO}:
            given = " ".join(self.precisions)
            raise ConfigError(f"precision: got {given}, expected fp32, tf32 or auto: the reference graph has fp32 only")

    @property
    def automatic(self) -> bool:
        return AUTO in self.precisions


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
    asked, others, skipped = _plan(options)
    with new_bundle(
        out,
        spec=checkpoint.spec,
        model=checkpoint.config.model.to_json(),
        checkpoint_sha256=checkpoint.weights_sha256,
        versions={"ccnet": __version__, **library_versions()},
    ) as draft:
        graphs = {REGISTRY[engine.backend].precisions[cast(Any, engine.precision)] for engine in asked}
        for precision in PRECISIONS:
            # int8 weights are put into the fp32 graph
            if precision in graphs or (precision == "fp32" and "int8" in graphs):
                _add_graph(draft, checkpoint, model, options, precision, skipped)
        for engine in asked:
            if REGISTRY[engine.backend].format != "onnx":
                _add_engine(draft, engine, options, skipped)
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


def _plan(options: ExportOptions) -> tuple[list[Engine], list[Engine], dict[str, str]]:
    """Return the engines to build and verify, the other ways to run the ONNX files, and what `auto` leaves out.

    A precision asked for by name is verified on the registry's last ONNX backend that has it, the most portable one.
    """
    asked: dict[tuple[str, str], Engine] = {}
    others: list[Engine] = []
    skipped: dict[str, str] = {}
    for backend, registration in REGISTRY.items():
        if registration.format not in options.formats:
            continue
        onnx = registration.format == "onnx"
        for precision, graph in registration.precisions.items():
            name = f"{backend}-{precision}"
            engine = Engine(
                name=name,
                backend=backend,
                precision=precision,
                model_file=f"onnx-{graph}" if onnx else name,
                status="unverified",
            )
            if options.automatic:
                reason = _unavailable(engine) if onnx else None
                typed = options.graph == "reference" or onnx  # the reference graph is fp32; CPUs emulate half precision
                if reason is None and (not typed or graph in ("fp32", "int8")):
                    asked[name, precision] = engine
                elif reason is not None:
                    skipped[name] = reason
            elif precision in options.precisions:
                key = ("onnx" if onnx else name, precision)
                others += [asked[key]] if key in asked else []
                asked[key] = engine
    return list(asked.values()), others, skipped


def _unavailable(engine: Engine) -> str | None:
    """Return why a backend can't run on this machine, or None."""
    try:
        REGISTRY[engine.backend].load().check_engine(engine.backend, None, engine.precision)
    except BackendUnavailable as error:
        return str(error)
    return None


def _add_graph(
    draft: Draft,
    checkpoint: Checkpoint,
    model: CCNet,
    options: ExportOptions,
    precision: str,
    skipped: dict[str, str],
) -> None:
    """Write the ONNX graph of one precision into the draft."""
    from export.graph.quantize import quantize_weights
    from export.graph.to_onnx import export_onnx

    path = draft.folder / ("model.onnx" if precision == "fp32" else f"model-{precision}.onnx")
    log.info("writing %s (%s graph, opset %d)", path.name, options.graph, options.opset)
    facts: dict[str, Any] = {"graph": options.graph}
    info: Any
    if precision == "int8":
        try:
            info = quantize_weights(draft.folder / "model.onnx", path, metadata={"precision": precision})
        except ExportError as error:
            if not options.automatic:
                raise
            log.info("  left out: %s", error)
            skipped["openvino-int8"] = str(error)
            return
        facts |= {"int8_matmuls": info.matmuls}
    else:
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
        facts |= {"seconds": round(info.seconds, 1)}
    log.info("  %d nodes, %.0f MB of weights", info.nodes, info.weight_bytes / 1e6)
    draft.add_model_file(
        ModelFile(
            name=f"onnx-{precision}",
            format="onnx",
            files=info.files,
            precision=precision,
            max_batch=options.max_batch,
            opset=options.opset,
            build={**facts, "nodes": info.nodes, "weight_bytes": info.weight_bytes},
        )
    )


def _module(model: CCNet, options: ExportOptions, precision: str) -> nn.Module:
    if options.graph == "reference":
        from export.graph.reference import ReferenceGraph

        return ReferenceGraph(model)
    from export.fused.network import fused_network
    from export.parity.tolerances import torch_dtype

    return fused_network(model, dtype=torch_dtype(graph_precision(precision)))


def _add_engine(draft: Draft, engine: Engine, options: ExportOptions, skipped: dict[str, str]) -> None:
    """Build a TensorRT engine into the draft."""
    log.info("building %s", engine.name)
    graph = next(m for m in draft.manifest.model_files if m.name == f"onnx-{graph_precision(engine.precision)}")
    built = dataclasses.replace(
        options.engine,
        format=cast(Any, engine.backend),
        precision=cast(EnginePrecision, engine.precision),
        profile=(1, options.opt_batch, options.max_batch),
    )
    try:
        info = build_engine(draft.folder / graph.files[0], draft.folder / f"{engine.name}.engine", built)
    except ExportError as error:
        if not options.automatic:
            raise
        log.info("  left out: %s", error)
        skipped[engine.name] = str(error)
        return
    draft.add_model_file(info.model_file(name=engine.model_file))


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
