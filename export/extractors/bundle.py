"""Weights -> extractor: the five graphs as ONNX and engines, each compared with its network where it runs.

Read downward: `make_extractor`, then its steps in order.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ccnet import __version__
from export.bundle_writer import FolderDraft, new_folder, refuse_foreign
from export.engines import AUTO, EngineRequest, add_engine, plan_engines
from export.extractors.check import check_engine, failing, with_verdict
from export.extractors.graphs import EncodeGraph, FlowFeaturesGraph, FlowGraph, RgbGraph, SoundGraph, without_norms
from export.extractors.i3d import I3D
from export.extractors.raft import RAFT
from export.extractors.reference import REFERENCE, Float32, Outputs, example_inputs, write_reference
from export.extractors.vggish import Vggish
from export.graph.to_onnx import export_graph
from export.parity.tolerances import EXTRACTOR_PRECISIONS, graph_precision, torch_dtype
from runtime.backends.registry import PRECISIONS, REGISTRY
from runtime.bundle import ModelFile
from runtime.errors import BackendUnavailable, CCNetError, ConfigError, EngineMismatch, ParityError
from runtime.machine import library_versions
from runtime.video.container import LARGEST_ASPECT
from runtime.video.extractor import (
    BATCHES,
    GRAPHS,
    MANIFEST,
    SCHEMA,
    Extractor,
    ExtractorManifest,
    ExtractorSpec,
    GraphName,
    graph_of,
    read_extractor,
)

log = logging.getLogger(__name__)

OPSET = 20
LARGEST_BATCH = 64
USUAL_ASPECT, ENGINE_ASPECT = 16 / 9, 2.5
"""Longer side / shorter side that TensorRT engines are tuned for, and that they take at most: their memory is planned
for the largest frame, in which both sides are the longer one."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The four networks, in eval mode."""

    rgb: I3D
    flow: I3D
    raft: RAFT
    vggish: Vggish

    def spec(self, **sizes: Any) -> ExtractorSpec:
        """Return the sizes of an extractor of these networks; `sizes` replace those of the published features."""
        return ExtractorSpec(
            encoding_dim=2 * self.raft.hidden,
            rgb_dim=self.rgb.feature_dim,
            flow_dim=self.flow.feature_dim,
            audio_dim=self.vggish.feature_dim,
            **sizes,
        )


def make_extractor(
    networks: Networks,
    spec: ExtractorSpec,
    weights: Mapping[str, str],
    out: str | Path,
    request: EngineRequest | None = None,
) -> tuple[Extractor, dict[str, str]]:
    """Write the extractor `out`: every graph in every format and precision that is asked for, verified where it runs.

    `weights`: SHA-256 of the weight file of each network. `request`: without one, ONNX in fp32. Returns the extractor,
    and why engines were not run here. Raises ParityError, leaving no extractor, when an engine fails (with `auto`: when
    every one of a graph does) or none of an ONNX file can run; ExportError when a graph or engine can't be made;
    ConfigError for a precision that extractors have no graphs of; BundleError when `out` is something else.
    """
    request = request or EngineRequest()
    for precision in request.precisions:
        if precision not in (*EXTRACTOR_PRECISIONS, AUTO):
            raise ConfigError(
                f"precision: got {precision!r}, extractors have {', '.join(EXTRACTOR_PRECISIONS)}, or {AUTO}"
            )
    refuse_foreign(Path(out), MANIFEST)
    manifest = ExtractorManifest(
        schema=SCHEMA,
        spec=spec,
        weights=dict(weights),
        versions={"ccnet": __version__, **library_versions()},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        files=(),
        model_files=(),
        engines=(),
    )
    skipped: dict[str, str] = {}
    reference: Outputs = {}
    with new_folder(out, manifest) as draft:
        for graph in GRAPHS:
            add_graph(draft, graph, networks, request, skipped)
            reference[graph] = eager_outputs(graph, graph_module(graph, networks, spec), spec, reference)
        write_reference(draft.folder / REFERENCE, reference)
        draft.add_file(REFERENCE)
        draft.write()
        _check(draft, reference, request, skipped)
    return read_extractor(out), skipped


def eager_outputs(graph: GraphName, module: nn.Module, spec: ExtractorSpec, so_far: Outputs) -> dict[str, Float32]:
    """Run the network of a graph on its example inputs; `so_far`: outputs of the graphs before."""
    inputs = example_inputs(graph, spec, so_far.get("encode", {}))
    with torch.no_grad():
        outputs = module(*map(torch.from_numpy, inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {name: tensor.numpy() for name, tensor in zip(spec.tensors(graph).outputs, outputs, strict=True)}


def graph_module(graph: GraphName, networks: Networks, spec: ExtractorSpec, precision: str = "fp32") -> nn.Module:
    """Return the module of a graph in a precision of `graph_precision`, in eval mode."""
    dtype = torch_dtype(graph_precision(precision))
    module: nn.Module
    if graph == "encode":
        module = EncodeGraph(networks.raft, dtype=dtype)
    elif graph == "flow":
        module = FlowGraph(networks.raft, crop=spec.crop, iterations=spec.iterations, dtype=dtype)
    elif graph == "i3d_rgb":
        module = RgbGraph(networks.rgb, dtype=dtype)
    elif graph == "i3d_flow":
        module = FlowFeaturesGraph(networks.flow, dtype=dtype)
    else:
        module = SoundGraph(networks.vggish, dtype=dtype)
    return module.eval()


def add_graph(
    draft: FolderDraft[ExtractorManifest],
    graph: GraphName,
    networks: Networks,
    request: EngineRequest,
    skipped: dict[str, str],
) -> None:
    """Write a graph's ONNX file of each precision, build its engines, and list the ways to run them."""
    spec = draft.manifest.spec
    asked, others, absent = plan_engines(request, allowed=EXTRACTOR_PRECISIONS)
    skipped.update({f"{graph}-{name}": reason for name, reason in absent.items()})
    sources = {REGISTRY[engine.backend].precisions[cast(Any, engine.precision)] for engine in asked}
    for precision in PRECISIONS:
        if precision in sources:
            _add_onnx(draft, graph, graph_module(graph, networks, spec, precision), precision)
    named = [
        dataclasses.replace(engine, name=f"{graph}-{engine.name}", model_file=f"{graph}-{engine.model_file}")
        for engine in (*asked, *others)
    ]
    for engine in named:
        if REGISTRY[engine.backend].format != "onnx":
            source = f"{graph}-onnx-{graph_precision(engine.precision)}"
            onnx = next(m for m in draft.manifest.model_files if m.name == source)
            most = BATCHES[graph]
            add_engine(draft, engine, onnx, request, skipped, batches=(1, most, most), extents=_extents(graph, spec))
        if engine.name not in skipped:
            draft.set_engine(engine)


def _extents(graph: GraphName, spec: ExtractorSpec) -> dict[str, tuple[int, ...]]:
    """Return the sides of a frame, in cells, that TensorRT engines of a graph take; the shorter one is `side`."""
    cells = (spec.cells(1), spec.cells(USUAL_ASPECT), spec.cells(ENGINE_ASPECT))
    upright = (spec.cells(1), spec.cells(1), spec.cells(ENGINE_ASPECT))
    return {"rows": upright, "columns": cells} if graph in ("encode", "flow") else {}


def _add_onnx(draft: FolderDraft[ExtractorManifest], graph: GraphName, module: nn.Module, precision: str) -> None:
    spec = draft.manifest.spec
    tensors = spec.tensors(graph)
    name = f"{graph}.onnx" if precision == "fp32" else f"{graph}-{precision}.onnx"
    free = {axis for shape in tensors.inputs.values() for axis in _names(shape)}
    cells = spec.cells(1), spec.cells(LARGEST_ASPECT)
    sizes = {"batch": (1, LARGEST_BATCH), "rows": cells, "columns": cells}
    inputs = tuple(_example(shape, spec) for shape in tensors.inputs.values())
    log.info("writing %s", name)
    info = export_graph(
        without_norms(module),
        tensors,
        inputs,
        draft.folder / name,
        sizes={axis: sizes[axis] for axis in ("batch", "rows", "columns") if axis in free},
        opset=OPSET,
        metadata={**draft.manifest.weights, "ccnet_version": __version__, "graph": graph, "precision": precision},
    )
    log.info("  %d nodes, %.0f MB of weights, %.0f s", info.nodes, info.weight_bytes / 1e6, info.seconds)
    draft.add_model_file(
        ModelFile(
            name=f"{graph}-onnx-{precision}",
            format="onnx",
            files=info.files,
            precision=precision,
            max_batch=LARGEST_BATCH,
            opset=OPSET,
            build={"nodes": info.nodes, "weight_bytes": info.weight_bytes, "seconds": round(info.seconds, 1)},
        )
    )


def _names(shape: tuple[int | str, ...]) -> list[str]:
    return [extent.rpartition("*")[2] for extent in shape if isinstance(extent, str)]


def _example(shape: tuple[int | str, ...], spec: ExtractorSpec) -> Tensor:
    """Draw an input to trace with, of two different sides."""
    side, longer = spec.side, spec.side + 32
    sizes = {"batch": 2, "rows": side // 8, "columns": longer // 8, "8*rows": side, "8*columns": longer}
    return torch.rand([extent if isinstance(extent, int) else sizes[extent] for extent in shape])


def _check(
    draft: FolderDraft[ExtractorManifest], reference: Outputs, request: EngineRequest, skipped: dict[str, str]
) -> None:
    """Run the parity check on every engine that runs here, and put the verdicts into the draft."""
    extractor = read_extractor(draft.folder)
    for engine in extractor.manifest.engines:
        log.info("comparing %s with its network", engine.name)
        try:
            report = check_engine(extractor, engine, reference)
        except CCNetError as error:
            if not request.automatic and not isinstance(error, BackendUnavailable | EngineMismatch):
                raise
            log.info("  not run here: %s", error)
            skipped[engine.name] = str(error)
            continue
        if not report["passed"] and not request.automatic:
            raise ParityError(failing(engine, report))
        draft.set_engine(with_verdict(engine, report), report)
    if "onnx" in request.formats:
        for graph in GRAPHS:
            of_graph = [engine for engine in draft.manifest.engines if graph_of(engine.name) == graph]
            if not any(engine.status == "verified" for engine in of_graph):
                listed = "\n".join(f"  {name}: {reason.splitlines()[0]}" for name, reason in skipped.items())
                raise ParityError(f"{graph}: no engine of this machine could be compared and passed:\n{listed}")
