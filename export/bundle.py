"""Checkpoint -> bundle: graphs, engines, and the parity check on every way to run them.

Read downward: `make_bundle`, then its steps in order.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ccnet import __version__
from export.bundle_writer import Draft, new_bundle, refuse_foreign
from export.parity.check import check_parity, measured, with_verdict
from export.parity.compare import ParityReport
from export.parity.reference import Reference
from export.parity.tolerances import PRECISIONS, graph_precision
from export.tensorrt.build import build_engine
from export.tensorrt.options import EngineOptions, EnginePrecision
from runtime.backends.select import TENSORRT_BACKENDS
from runtime.backends.tensorrt.library import TensorRTFormat
from runtime.bundle import Bundle, Engine, Format, ModelFile
from runtime.errors import BackendUnavailable, CCNetError, ConfigError, EngineMismatch, ExportError, ParityError
from runtime.machine import library_versions

if TYPE_CHECKING:
    from torch import nn

    from ccnet.checkpoint import Checkpoint
    from ccnet.config import ModelConfig
    from ccnet.network.model import CCNet

Graph = Literal["fused", "reference"]
Say = Callable[[str], None]

log = logging.getLogger(__name__)

AUTO = "auto"
_LADDER = ("fp32", "tf32", "bf16", "fp16")
"""What `auto` tries, as far as this machine has it."""
_REFERENCE_LADDER = ("fp32", "tf32")
"""The same for the reference graph, which has fp32 types alone."""
_ONNX_WAYS: dict[str, tuple[tuple[str, str], ...]] = {
    "fp32": (("onnxruntime", "fp32"),),
    "tf32": (("onnxruntime-cuda", "tf32"),),
    "fp16": (("onnxruntime", "fp16"),),
    "bf16": (("openvino", "bf16"),),
    "int8": (("openvino", "int8"),),
}
"""Backend and graph that verify a precision asked for by name, for the ONNX format."""
_ONNX_LADDER = (
    ("onnxruntime", "fp32"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
    ("onnxruntime-cuda", "fp32"),
    ("onnxruntime-cuda", "tf32"),
)
"""Ways to run the fp32 graph, and the one with int8 weights, that `auto` tries."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to export."""

    formats: tuple[Format, ...] = ("onnx",)
    precisions: tuple[str, ...] = ("fp32",)
    """Of `PRECISIONS`, or `("auto",)`: every engine that this machine can run and that passes the check."""
    opset: int = 20
    max_batch: int = 32
    opt_batch: int = 1
    """Batch size that engines are tuned for."""
    graph: Graph | None = None
    """The network in few operations made for engines, or as it is; None: fused, or reference where it is ablated."""
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)
    """Of every engine; its format, precision and profile are set for each."""

    def __post_init__(self) -> None:
        for precision in self.precisions:
            if precision not in (*_ONNX_WAYS, AUTO):
                raise ConfigError(f"precision: got {precision!r}, expected {AUTO} or some of {', '.join(_ONNX_WAYS)}")
        if AUTO in self.precisions and len(self.precisions) > 1:
            raise ConfigError(f"precision: got {' '.join(self.precisions)}, expected {AUTO} alone")
        if "int8" in self.precisions and set(self.formats) != {"onnx"}:
            raise ConfigError(f"precision: got int8 with format {' '.join(self.formats)}; int8 is for the onnx format")
        if self.engine.given and set(self.formats) == {"onnx"}:
            given = ", ".join(self.engine.given)
            raise ConfigError(f"{given}: for engines only; got format onnx, expected tensorrt or tensorrt-rtx with it")
        if not 1 <= self.opt_batch <= self.max_batch:
            raise ConfigError(f"opt-batch: got {self.opt_batch}, expected 1 to max-batch ({self.max_batch})")
        if self.graph == "reference" and set(self.precisions) - {*_REFERENCE_LADDER, AUTO}:
            given = " ".join(self.precisions)
            raise ConfigError(f"precision: got {given}, expected fp32, tf32 or auto: the reference graph has fp32 only")

    @property
    def automatic(self) -> bool:
        return AUTO in self.precisions

    @property
    def ladder(self) -> tuple[str, ...]:
        """Precisions of engines that `auto` tries."""
        return _REFERENCE_LADDER if self.graph == "reference" else _LADDER


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was made of each engine."""

    engines: tuple[Engine, ...]
    rejected: tuple[Engine, ...]
    reports: dict[str, ParityReport]
    skipped: dict[str, str]
    """Engines that can't be built or run on this machine, and why."""


def make_bundle(
    checkpoint: Checkpoint, model: CCNet, reference: Reference, out: str | Path, request: Request, say: Say = print
) -> Result:
    """Write the bundle `out`, every engine that can run here verified against `reference`.

    `say` is told each step. Raises ParityError, leaving no bundle, when an engine that was asked for fails the check
    (with `auto`: when every one does); ExportError when a graph or engine can't be made; BundleError when `out` is
    something else.
    """
    out = Path(out)
    refuse_foreign(out)
    config = checkpoint.config
    if request.graph is None:
        request = dataclasses.replace(request, graph=_graph_for(config.model))
    with new_bundle(
        out,
        spec=checkpoint.spec,
        model=config.model.to_json(),
        checkpoint_sha256=checkpoint.weights_sha256,
        versions={"ccnet": __version__, **library_versions()},
    ) as draft:
        engines: list[Engine] = []
        not_built: dict[str, str] = {}
        for precision in _graphs(request):
            _add_graph(draft, checkpoint, model, request, precision, say)
        written = {model_file.name for model_file in draft.manifest.model_files}
        engines += [engine for engine in _onnx_engines(request) if engine.model_file in written]
        for format, precision in _engines(request):
            try:
                engines.append(_add_engine(draft, request, format, precision, say))
            except ExportError as error:  # noqa: PERF203 - building takes minutes
                if not request.automatic:
                    raise
                say(f"  left out: {error}")
                not_built[f"{format}-{precision}"] = str(error)
        result = _check_all(draft, engines, reference, request, say)
        return dataclasses.replace(result, skipped={**not_built, **result.skipped})


def _graph_for(config: ModelConfig) -> Graph:
    """Return the graph of a network of this structure; an ablated one gets the reference graph, and a warning."""
    from export.fused.network import unfusable

    reason = unfusable(config)
    if reason is None:
        return "fused"
    log.warning("%s: writing the reference graph, which is slower than the fused network of the paper", reason)
    return "reference"


def _graphs(request: Request) -> list[str]:
    """Types of the graphs to write. The ladder and int8 graphs start from fp32."""
    engines = any(format != "onnx" for format in request.formats)
    wanted = (request.ladder if engines else ("fp32",)) if request.automatic else request.precisions
    graphs = {"fp32"} if request.automatic or "int8" in wanted else set()
    if request.automatic and "onnx" in request.formats and _runs_int8():
        graphs.add("int8")
    for precision in wanted:
        # bf16 on a CPU is OpenVINO's arithmetic on the fp32 graph; a typed graph is what engines are built from
        graphs.add("fp32" if precision == "bf16" and not engines else graph_precision(precision))
    return [precision for precision in PRECISIONS if precision in graphs]


def _add_graph(draft: Draft, checkpoint: Checkpoint, model: CCNet, request: Request, precision: str, say: Say) -> None:
    from export.graph.to_onnx import export_onnx

    name = f"onnx-{precision}"
    file = _graph_file(name)
    if precision == "int8":
        _add_int8(draft, request, name, say)
        return
    say(f"writing {file} ({precision}, {request.graph} graph, opset {request.opset})")
    info = export_onnx(
        _module(model, request, precision),
        checkpoint.spec,
        draft.folder / file,
        opset=request.opset,
        max_batch=request.max_batch,
        metadata={
            "checkpoint_sha256": checkpoint.weights_sha256,
            "precision": precision,
            "graph": str(request.graph),
            "opset": str(request.opset),
            "ccnet_version": __version__,
        },
    )
    say(f"  {info.nodes} nodes, {info.weight_bytes / 1e6:.0f} MB of weights, {info.seconds:.0f} s")
    facts = {"graph": request.graph, "nodes": info.nodes, "weight_bytes": info.weight_bytes}
    draft.add_model_file(
        ModelFile(
            name=name,
            format="onnx",
            files=info.files,
            precision=precision,
            max_batch=request.max_batch,
            opset=info.opset,
            build={**facts, "seconds": round(info.seconds, 1)},
        )
    )


def _add_int8(draft: Draft, request: Request, name: str, say: Say) -> None:
    """The fp32 graph again, with int8 weights."""
    from export.graph.quantize import quantize_weights

    file = _graph_file(name)
    say(f"writing {file} (int8 weights)")
    source = draft.folder / _graph_file("onnx-fp32")
    try:
        info = quantize_weights(source, draft.folder / file, metadata={"precision": "int8"})
    except ExportError as error:
        if not request.automatic:
            raise
        say(f"  left out: {error}")
        return
    say(f"  {info.matmuls} matmuls in int8, {info.weight_bytes / 1e6:.0f} MB of weights")
    facts = {"graph": request.graph, "nodes": info.nodes, "weight_bytes": info.weight_bytes}
    draft.add_model_file(
        ModelFile(
            name=name,
            format="onnx",
            files=info.files,
            precision="int8",
            max_batch=request.max_batch,
            opset=request.opset,
            build={**facts, "int8_matmuls": info.matmuls},
        )
    )


def _graph_file(name: str) -> str:
    return "model.onnx" if name == "onnx-fp32" else f"model{name.removeprefix('onnx')}.onnx"


def _runs_int8() -> bool:
    from runtime.backends.openvino import check_available

    try:
        check_available("int8")
    except BackendUnavailable:
        return False
    return True


def _module(model: CCNet, request: Request, precision: str) -> nn.Module:
    if request.graph == "reference":
        return model
    from export.fused.network import fused_network
    from export.parity.tolerances import torch_dtype

    return fused_network(model, dtype=torch_dtype(graph_precision(precision)))


def _onnx_engines(request: Request) -> list[Engine]:
    """Ways to run the graphs without an engine of their own, none of them verified yet."""
    if "onnx" not in request.formats:
        return []
    ways = _ONNX_LADDER if request.automatic else tuple(way for p in request.precisions for way in _ONNX_WAYS[p])
    return [
        Engine(
            name=f"{backend}-{precision}",
            backend=backend,
            precision=precision,
            model_file="onnx-" + (precision if precision in ("fp16", "int8") else "fp32"),
            status="unverified",
        )
        for backend, precision in ways
    ]


def _engines(request: Request) -> Iterator[tuple[TensorRTFormat, str]]:
    for format in request.formats:
        if format != "onnx":
            for precision in request.ladder if request.automatic else request.precisions:
                yield format, precision


def _add_engine(draft: Draft, request: Request, format: TensorRTFormat, precision: str, say: Say) -> Engine:
    name = f"{format}-{precision}"
    graph = next(m for m in draft.manifest.model_files if m.name == f"onnx-{graph_precision(precision)}")
    say(f"building {name}")
    options = dataclasses.replace(
        request.engine,
        format=format,
        precision=cast(EnginePrecision, precision),
        profile=(1, request.opt_batch, request.max_batch),
    )
    info = build_engine(draft.folder / graph.files[0], draft.folder / f"{name}.engine", options)
    draft.add_model_file(info.model_file(name=name))
    return Engine(name=name, backend=format, precision=precision, model_file=name, status="unverified")


def _check_all(draft: Draft, engines: list[Engine], reference: Reference, request: Request, say: Say) -> Result:
    for engine in engines:
        draft.set_engine(engine)
    bundle = draft.bundle()
    reports: dict[str, ParityReport] = {}
    skipped: dict[str, str] = {}
    verdicts: list[Engine] = []
    for engine in engines:
        say(f"comparing {engine.name} with the eager network")
        outcome = _check_one(bundle, engine, reference, automatic=request.automatic)
        if isinstance(outcome, ParityReport):
            say(outcome.text())
            reports[engine.name] = outcome
            verdicts.append(with_verdict(engine, outcome))
            if not request.automatic:
                outcome.require()
        else:
            say(f"  not run here: {outcome}")
            skipped[engine.name] = outcome
    passed = [engine for engine in verdicts if engine.status == "verified"]
    if request.automatic and not passed:
        raise ParityError(
            f"no engine passed the parity check; failed: {', '.join(reports)}; not run here: {', '.join(skipped)}"
        )
    if request.automatic:
        passed = measured(bundle, passed)
    rejected = [engine for engine in verdicts if engine.status == "failed"]
    for engine in (*passed, *rejected):
        draft.set_engine(engine, reports[engine.name].to_json())
    for name in skipped:
        engine = next(engine for engine in engines if engine.name == name)
        if engine.backend not in TENSORRT_BACKENDS:
            draft.drop_engine(name)  # nothing was built for it; whoever has that backend can verify it there
    return Result(engines=draft.manifest.engines, rejected=tuple(rejected), reports=reports, skipped=skipped)


def _check_one(bundle: Bundle, engine: Engine, reference: Reference, *, automatic: bool) -> ParityReport | str:
    """The report, or why the engine can't run on this machine.

    An engine may well be built for another one. Of the ladder whatever fails is left out; a way to run a graph that
    was asked for must run.
    """
    try:
        return check_parity(bundle, engine, reference)
    except (BackendUnavailable, EngineMismatch) as error:
        if automatic or engine.backend in TENSORRT_BACKENDS:
            return str(error)
        raise
    except CCNetError as error:
        if automatic:
            return str(error)
        raise
