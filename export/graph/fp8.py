"""Fp8 matmuls: the largest matmuls of an fp16 ONNX graph, and those of its feed-forward layers, get fp8 operands.

Both operands go through QuantizeLinear and DequantizeLinear (float8e4m3fn, one scale a tensor), which TensorRT 10 and
newer and TensorRT for RTX turn into fp8 kernels on compute capability 8.9 and newer; everything else stays as it was:
attention, norms and heads. A weight is stored in fp8. The scale of the other operand is fixed before the engine is
built, from the largest values that calibration videos bring there. An engine without fp8 computes the same numbers
from the rounded values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.graph.quantize import QuantizedInfo, onnx_package, save_graph
from runtime.errors import ExportError
from runtime.packages import import_package

LARGEST = 448.0
"""Of float8e4m3fn."""
LARGE_SHARE = 0.1
"""A matmul with this share of all weights is large: three of the full-size network, half of all its arithmetic."""
LEAST_WEIGHTS = 1 << 16
"""A feed-forward layer with fewer weights stays as it is: rounding its input would cost what its matmul gains."""
MULTIPLE = 16
"""Rows and columns of a weight have to be a multiple of it for an fp8 kernel."""
MARGIN = 2.0
"""Between the largest value that was seen and the largest one that fits: it costs one of 15 powers of two."""
LEAST_OPSET = 20
"""19 has fp8; from 20 on a feed-forward layer is recognised by its Gelu."""

Feed = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class _Matmul:
    node: Any
    weight: Any


def quantize_fp8(
    source: str | Path,
    target: str | Path,
    feeds: Sequence[Feed],
    *,
    metadata: Mapping[str, str] | None = None,
    least_weights: int | None = None,
) -> QuantizedInfo:
    """Write the fp16 graph `source` with fp8 matmuls to `target`; the source is not changed.

    `feeds`: inputs of the graph, of videos like those that it is for; ONNX Runtime runs them to find the scales.
    `least_weights`: as `LEAST_WEIGHTS`. Raises ExportError for a graph without such matmuls or of an opset that is too
    old, MissingDependency without onnx or onnxruntime.
    """
    onnx = onnx_package()
    source, target = Path(source), Path(target)
    model = onnx.load(str(source))
    opset = max(entry.version for entry in model.opset_import if entry.domain == "")
    if opset < LEAST_OPSET:
        raise ExportError(f"{source}: fp8 needs opset {LEAST_OPSET} or newer, this graph has {opset}")
    least = LEAST_WEIGHTS if least_weights is None else least_weights
    chosen = find_matmuls(model.graph, least)
    if not chosen:
        raise ExportError(f"{source}: no matmul in half precision is large enough for fp8; keep it in fp16")
    largest = _largest_values(source, [matmul.node.input[0] for matmul in chosen], feeds)
    _rewrite(model.graph, chosen, largest)
    files, weight_bytes = save_graph(model, target, metadata or {})
    return QuantizedInfo(
        path=target, files=files, matmuls=len(chosen), nodes=len(model.graph.node), weight_bytes=weight_bytes
    )


def find_matmuls(graph: Any, least_weights: int) -> list[_Matmul]:
    """Return the matmuls of an fp16 graph that fp8 is for, in the order of the graph."""
    half = onnx_package().TensorProto.FLOAT16
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == half}
    total = sum(math.prod(tensor.dims) for tensor in graph.initializer)
    producers = {name: node for node in graph.node for name in node.output}
    consumers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)

    def feeds_gelu(node: Any) -> bool:
        following = consumers.get(node.output[0], [])
        return any(n.op_type == "Gelu" or (n.op_type == "Add" and feeds_gelu(n)) for n in following)

    found = []
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or any(size % MULTIPLE for size in weight.dims[-2:]):
            continue
        before = producers.get(node.input[0])
        feed_forward = feeds_gelu(node) or (before is not None and before.op_type == "Gelu")
        large = math.prod(weight.dims) >= LARGE_SHARE * total
        if large or (feed_forward and math.prod(weight.dims[-2:]) >= least_weights):
            found.append(_Matmul(node, weight))
    return found


def _largest_values(source: Path, tensors: Sequence[str], feeds: Sequence[Feed]) -> dict[str, float]:
    """Run a graph on all feeds and return the largest magnitude in each of its tensors."""
    onnx = onnx_package()
    runtime = import_package("onnxruntime", "finding the scales of an fp8 graph", distribution="onnxruntime")
    model = onnx.load(str(source), load_external_data=False)
    names = list(dict.fromkeys(tensors))
    del model.graph.output[:]
    for index, name in enumerate(names):
        wide, magnitude, largest = (f"calibration.{index}.{step}" for step in ("wide", "magnitude", "largest"))
        model.graph.node.extend(
            [
                onnx.helper.make_node("Cast", [name], [wide], to=onnx.TensorProto.FLOAT),
                onnx.helper.make_node("Abs", [wide], [magnitude]),
                onnx.helper.make_node("ReduceMax", [magnitude], [largest], keepdims=0),
            ]
        )
        model.graph.output.append(onnx.helper.make_tensor_value_info(largest, onnx.TensorProto.FLOAT, []))
    path = source.with_name(f"{source.stem}.calibration.onnx")  # beside the weights, which it shares
    try:
        onnx.save_model(model, str(path))
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = np.max([session.run(None, dict(feed)) for feed in feeds], axis=0)
    finally:
        path.unlink(missing_ok=True)
    for name, value in zip(names, found, strict=True):
        if not np.isfinite(value):
            raise ExportError(f"{source}: tensor '{name}' is not finite on the calibration videos")
    return {name: float(value) for name, value in zip(names, found, strict=True)}


def _rewrite(graph: Any, chosen: Sequence[_Matmul], largest: Mapping[str, float]) -> None:
    """Put the operands of the chosen matmuls through fp8."""
    onnx = onnx_package()
    helper, to_array = onnx.helper, onnx.numpy_helper.to_array
    float8 = onnx.TensorProto.FLOAT8E4M3FN
    graph.initializer.append(helper.make_tensor("fp8.zero", float8, [], [0.0]))

    def scale(name: str, value: float) -> str:
        tensor = np.array(value if value > 0 else 1.0, np.float16)
        graph.initializer.append(onnx.numpy_helper.from_array(tensor, f"{name}.fp8_scale"))
        return f"{name}.fp8_scale"

    rounded: dict[str, str] = {}
    ahead: dict[str, list[Any]] = {}  # nodes to put before the matmul of this output
    for matmul in chosen:
        node, weight = matmul.node, matmul.weight
        before = ahead.setdefault(node.output[0], [])
        for index, name in enumerate(node.input):
            if name not in rounded:
                restored = rounded[name] = f"{name}.fp8_restored"
                if index == 0:
                    size = scale(name, MARGIN * largest[name] / LARGEST)
                    inputs = [name, size, "fp8.zero"]
                    before.append(helper.make_node("QuantizeLinear", inputs, [f"{name}.fp8"], name=f"{name}.fp8"))
                else:
                    values = to_array(weight).astype(np.float32)
                    size = scale(name, float(np.abs(values).max()) / LARGEST)
                    step = float(to_array(graph.initializer[-1]))
                    bits = to_fp8(values / step)
                    tensor = helper.make_tensor(f"{name}.fp8", float8, weight.dims, bits.tobytes(), raw=True)
                    graph.initializer.append(tensor)
                    graph.initializer.remove(weight)
                inputs = [f"{name}.fp8", size, "fp8.zero"]
                before.append(helper.make_node("DequantizeLinear", inputs, [restored], name=restored))
            node.input[index] = rounded[name]
    nodes = [new for node in graph.node for new in (*ahead.get(node.output[0], ()), node)]
    del graph.node[:]
    graph.node.extend(nodes)


def to_fp8(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Round values within +-448 to float8e4m3fn, ties to even, and return its bits."""
    import ml_dtypes

    return np.clip(values, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
