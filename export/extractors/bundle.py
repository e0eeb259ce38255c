"""Weights -> extractor: the five graphs, each compared with its network in PyTorch on every engine that runs here.

Read downward: `make_extractor`, then its steps in order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ccnet import __version__
from export.bundle_writer import FolderDraft, new_folder, refuse_foreign
from export.extractors.graphs import EncodeGraph, FlowFeaturesGraph, FlowGraph, RgbGraph, SoundGraph, without_norms
from export.extractors.i3d import I3D
from export.extractors.raft import RAFT
from export.extractors.vggish import Vggish
from export.graph.to_onnx import export_graph
from export.parity.tolerances import ExtractorTolerance, extractor_tolerance
from runtime.backends.graphs import GraphRunner
from runtime.backends.registry import REGISTRY
from runtime.bundle import Engine, ModelFile
from runtime.errors import BackendUnavailable, ParityError
from runtime.machine import library_versions
from runtime.video.container import LARGEST_ASPECT
from runtime.video.engines import load_graph
from runtime.video.extractor import (
    GRAPHS,
    MANIFEST,
    SCHEMA,
    Extractor,
    ExtractorManifest,
    ExtractorSpec,
    GraphName,
    read_extractor,
)
from runtime.video.logmel import BANDS, EXAMPLE

log = logging.getLogger(__name__)

OPSET = 20
LARGEST_BATCH = 64


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


@dataclass(frozen=True)
class Comparison:
    """A graph on one engine against its network in PyTorch."""

    engine: Engine
    report: dict[str, Any]


def make_extractor(
    networks: Networks, spec: ExtractorSpec, weights: Mapping[str, str], out: str | Path
) -> tuple[Extractor, dict[str, str]]:
    """Write the extractor `out`: every graph as ONNX, compared on each CPU engine that this machine has.

    `weights`: SHA-256 of the weight file of each network. Returns the extractor, and why engines were not run here.
    Raises ParityError, leaving no extractor, when an engine fails; ExportError when a graph can't be made;
    BundleError when `out` is something else.
    """
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
    with new_folder(out, manifest) as draft:
        for graph in GRAPHS:
            module = graph_module(graph, networks, spec)
            _add_graph(draft, graph, module, spec, weights)
            for engine in _engines(graph):
                draft.set_engine(engine)
            draft.write()
            folder = read_extractor(draft.folder)
            examples = example_inputs(graph, spec, networks)
            for engine in _engines(graph):
                outcome = _compare(folder, graph, engine, module, examples)
                if isinstance(outcome, str):
                    skipped[engine.name] = outcome
                    continue
                draft.set_engine(outcome.engine, outcome.report)
        if not all(any(e.status == "verified" for e in read_engines(draft, graph)) for graph in GRAPHS):
            listed = "\n".join(f"  {name}: {reason.splitlines()[0]}" for name, reason in skipped.items())
            raise ParityError(f"{out}: a graph could not be compared on any engine of this machine:\n{listed}")
    return read_extractor(out), skipped


def graph_module(graph: GraphName, networks: Networks, spec: ExtractorSpec) -> nn.Module:
    """Return the module of a graph, in eval mode."""
    module: nn.Module
    if graph == "encode":
        module = EncodeGraph(networks.raft)
    elif graph == "flow":
        module = FlowGraph(networks.raft, crop=spec.crop, iterations=spec.iterations)
    elif graph == "i3d_rgb":
        module = RgbGraph(networks.rgb)
    elif graph == "i3d_flow":
        module = FlowFeaturesGraph(networks.flow)
    else:
        module = SoundGraph(networks.vggish)
    return module.eval()


def example_inputs(graph: GraphName, spec: ExtractorSpec, networks: Networks) -> tuple[Tensor, ...]:
    """Draw inputs like those of a video: drifting smooth pictures, their encodings, rounded flow, log-mel of noise."""
    draw = torch.Generator().manual_seed(0)
    if graph in ("encode", "flow"):
        rows, columns = spec.side // 8, spec.side // 8 + 4
        coarse = torch.rand(1, 3, rows, columns + 1, generator=draw) * 255
        still = nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(0, 255)
        pictures = torch.cat([still[..., shift : shift + 8 * columns] for shift in (0, 2, 5)])
        if graph == "encode":
            return (pictures[:2],)
        with torch.no_grad():
            features, context = networks.raft.encode(pictures)
        return features[:2], features[1:], context[:2]
    if graph == "vggish":
        loudness = torch.linspace(-3, 1, 2)[:, None, None]
        return (torch.randn(2, EXAMPLE, BANDS, generator=draw) + loudness,)
    channels = 3 if graph == "i3d_rgb" else 2
    coarse = torch.rand(2 * spec.window, channels, spec.crop // 8, spec.crop // 8, generator=draw) * 256
    stacks = nn.functional.interpolate(coarse, size=(spec.crop, spec.crop), mode="bilinear").round()
    return (stacks.reshape(2, spec.window, channels, spec.crop, spec.crop),)


def _add_graph(
    draft: FolderDraft[ExtractorManifest],
    graph: GraphName,
    module: nn.Module,
    spec: ExtractorSpec,
    weights: Mapping[str, str],
) -> None:
    tensors, name = spec.tensors(graph), f"{graph}.onnx"
    free = {axis for shape in tensors.inputs.values() for axis in _names(shape)}
    cells = spec.side // 8, spec.side // 8 * LARGEST_ASPECT
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
        metadata={**weights, "ccnet_version": __version__, "graph": graph},
    )
    log.info("  %d nodes, %.0f MB of weights, %.0f s", info.nodes, info.weight_bytes / 1e6, info.seconds)
    draft.add_model_file(
        ModelFile(
            name=f"{graph}-onnx-fp32",
            format="onnx",
            files=info.files,
            precision="fp32",
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


def _engines(graph: GraphName) -> list[Engine]:
    """Return the ways to run a graph's ONNX file in full precision."""
    return [
        Engine(
            name=f"{graph}-{backend}-fp32",
            backend=backend,
            precision="fp32",
            model_file=f"{graph}-onnx-fp32",
            status="unverified",
        )
        for backend, registration in REGISTRY.items()
        if registration.format == "onnx"
    ]


def read_engines(draft: FolderDraft[ExtractorManifest], graph: GraphName) -> list[Engine]:
    """Return the engines of a graph that a draft has."""
    return [engine for engine in draft.manifest.engines if engine.name.startswith(f"{graph}-")]


def _compare(
    extractor: Extractor, graph: GraphName, engine: Engine, module: nn.Module, inputs: tuple[Tensor, ...]
) -> Comparison | str:
    """Return the comparison, or why the engine can't run on this machine. Raises ParityError when it fails."""
    try:
        runner = load_graph(extractor, engine)
    except BackendUnavailable as error:
        return str(error)
    with contextlib.closing(runner):
        report = compare_graph(runner, graph, module, inputs)
    log.info("  %s: %s", engine.name, ", ".join(f"{c['name']} {c['value']:.2g}" for c in report["checks"]))
    if not report["passed"]:
        failing = [
            f"{c['name']} {c['value']:.3g}, allowed {c['limit']:.3g}" for c in report["checks"] if not c["passed"]
        ]
        raise ParityError(f"{engine.name} does not compute what the network computes: {'; '.join(failing)}")
    accuracy = {check["name"]: check["value"] for check in report["checks"]}
    return Comparison(dataclasses.replace(engine, status="verified", accuracy=accuracy), report)


def compare_graph(
    runner: GraphRunner, graph: GraphName, module: nn.Module, inputs: tuple[Tensor, ...]
) -> dict[str, Any]:
    """Return the report of a graph on an engine: each output's differences, relative to its largest value.

    For `flow`, whose output is rounded, the largest difference is in levels, and the mean is the share of them.
    """
    with torch.no_grad():
        outputs = module(*inputs)
    expected = outputs if isinstance(outputs, tuple) else (outputs,)
    found = runner.run(*(tensor.numpy() for tensor in inputs))
    limits: ExtractorTolerance = extractor_tolerance(runner.precision, rounded=graph == "flow")
    checks = []
    for name, got, want in zip(runner.tensors.outputs, found, expected, strict=True):
        scale = 1.0 if graph == "flow" else float(want.abs().max()) or 1.0
        gap = np.abs(got - cast(Tensor, want).numpy()) / scale
        for kind, value, limit in (("max", gap.max(), limits.largest), ("mean", gap.mean(), limits.mean)):
            good = bool(np.isfinite(value) and value <= limit)
            checks.append({"name": f"{kind}_{name}", "value": float(value), "limit": limit, "passed": good})
    return {"candidate": runner.describe(), "checks": checks, "passed": all(check["passed"] for check in checks)}
