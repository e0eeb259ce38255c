"""Operations and bytes of an extractor's graphs, and what they say of a GPU that is not here.

One multiply-add counts as two operations. Bytes are those of every convolution and matmul: inputs, weights and outputs
once, what lies between them taken as fused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.graph_cost import graph_cost
from benchmarks.roofline import Device
from runtime.video.extractor import BATCHES, GRAPHS, Extractor, ExtractorSpec, GraphName

PUBLIC_ENCODINGS = 1.5
"""Of a pair in the public program: features of two frames, context of one; both encoders cost the same."""
LEVELS = 4
"""Of the correlation pyramid."""
SHARE = (0.6, 0.25)
"""Of a GPU's peak that convolutions of this size are believed to reach: at best, and without much tuning."""
LAUNCH_SECONDS = 2.5e-6
"""Of one kernel within a CUDA graph, believed."""
MEAN_SECONDS = 42.15
"""Of the videos of UnAV-100."""
H100 = {
    precision: Device(
        name="NVIDIA H100 SXM",
        precision=precision,
        flops=flops,
        bytes_per_second=3.35e12,
        weight_width=width / 4,
        source="data sheet, dense; not measured",
    )
    for precision, flops, width in (("fp32", 67e12, 4), ("tf32", 494e12, 4), ("fp16", 989e12, 2))
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one call of a graph costs at batch 1."""

    graph: GraphName
    operations: int
    weight_bytes: int
    activation_bytes: int
    """In fp32."""
    calls: float
    """For a second of video."""


def stages(extractor: Extractor, cells: tuple[int, int]) -> dict[GraphName, Stage]:
    """Count every graph, for frames of so many rows and columns of cells. Raises ExportError as `graph_cost`."""
    spec = extractor.spec
    return {graph: _stage(extractor, graph, cells, _calls(graph, spec)) for graph in GRAPHS}


def _calls(graph: GraphName, spec: ExtractorSpec) -> float:
    frames = spec.time_base.fps
    return frames if graph in ("encode", "flow") else frames / spec.stride


def _stage(extractor: Extractor, graph: GraphName, cells: tuple[int, int], calls: float) -> Stage:
    path = extractor.folder / f"{graph}.onnx"
    if graph == "flow":
        return _flow_stage(path, extractor.spec, cells, calls)
    cost = graph_cost(path, extents=dict(zip(("rows", "columns"), cells, strict=True)))
    moved = sum(_size(matmul.shapes[0]) + _size(matmul.shapes[2]) for matmul in cost.matmuls)
    return Stage(
        graph=graph,
        operations=cost.operations,
        weight_bytes=cost.weight_bytes,
        activation_bytes=4 * moved,
        calls=calls,
    )


def _flow_stage(path: Path, spec: ExtractorSpec, cells: tuple[int, int], calls: float) -> Stage:
    """Count the flow graph: all its convolutions keep the size, and one matmul correlates the cells.

    Shape inference does not get through its reshapes of dynamic sizes.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    weights = [shapes[node.input[1]] for node in graph.node if node.op_type == "Conv"]
    count = cells[0] * cells[1]
    others = sum((cells[0] >> level) * (cells[1] >> level) for level in range(LEVELS))
    channels = sum(weight[0] + weight[1] for weight in weights)
    return Stage(
        graph="flow",
        operations=2 * count * (sum(map(_size, weights)) + others * spec.encoding_dim),
        weight_bytes=4 * sum(_size(shapes[name]) for name in {n.input[1] for n in graph.node if n.op_type == "Conv"}),
        activation_bytes=4 * count * (channels + others + 2 * spec.encoding_dim),
        calls=calls,
    )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of a GPU for a second of video."""

    floor: float
    """All operations at the peak rate, or all bytes at the peak rate, whichever takes longer in each graph."""
    believed: tuple[float, float]
    """At the shares of `SHARE`, with the launches of kernels."""


def estimate(found: Mapping[GraphName, Stage], device: Device, kernels: Mapping[GraphName, int]) -> Estimate:
    """Estimate a GPU from its peaks. `kernels`: of a call of each graph, where they are known.

    It is arithmetic on a data sheet: nothing here has run on such a device.
    """
    floors, shared = 0.0, [0.0, 0.0]
    for graph, stage in found.items():
        batch = BATCHES[graph]
        moved = device.weight_width * (stage.activation_bytes + stage.weight_bytes / batch)
        arithmetic, memory = stage.operations / device.flops, moved / device.bytes_per_second
        launches = kernels.get(graph, 0) * LAUNCH_SECONDS / batch
        floors += stage.calls * max(arithmetic, memory)
        for index, share in enumerate(SHARE):
            shared[index] += stage.calls * (max(arithmetic / share, memory / share) + launches)
    return Estimate(floor=floors, believed=(shared[0], shared[1]))


def gigaflops(found: Mapping[GraphName, Stage], spec: ExtractorSpec) -> dict[str, float]:
    """Return GFLOP of a second of video: ours, and of the public program's schedule with the same graphs.

    The latter computes 24 pairs for every step, each with the features of both frames and the context of one.
    """
    steps = spec.time_base.fps / spec.stride
    others = sum(stage.operations * stage.calls for name, stage in found.items() if name not in ("encode", "flow"))
    pairs = steps * spec.window
    return {
        "ours": sum(stage.operations * stage.calls for stage in found.values()) / 1e9,
        "public": (others + pairs * (PUBLIC_ENCODINGS * found["encode"].operations + found["flow"].operations)) / 1e9,
    }


def to_json(found: Mapping[GraphName, Stage]) -> dict[str, Any]:
    """Return the stages for a result file."""
    return {graph: dict(vars(stage)) for graph, stage in found.items()}
