"""Int8 weights: the weights of the large matmuls of an fp32 ONNX graph become int8.

Each weight becomes int8 values and one scale per output channel (symmetric, round to nearest), followed by a standard
DequantizeLinear. It needs no calibration data, and no video influences another: an engine with int8 matmuls
(OpenVINO) quantizes the other operand row by row at run time; an engine without them computes in fp32 from the int8
weights. The file is about a third of the size.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.graph.to_onnx import dimensions, external_name
from runtime.errors import ExportError
from runtime.packages import missing

LEAST_WEIGHTS = 1 << 16
"""Matmuls with fewer weights stay in fp32: they cost little, and quantizing their input would cost as much."""
_LARGEST = 127


@dataclass(frozen=True, kw_only=True)
class QuantizedInfo:
    """Facts about a quantized graph."""

    path: Path
    files: tuple[str, ...]
    """File names in the folder of `path`: the graph, then its external weights."""
    matmuls: int
    """Matmuls whose weights are int8, a stack of matmuls counting each one; or matmul nodes in fp8."""
    nodes: int
    weight_bytes: int


def quantize_weights(
    source: str | Path,
    target: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    least_weights: int | None = None,
) -> QuantizedInfo:
    """Write the graph `source` with int8 weights to `target`; the source is not changed.

    Quantized are constant right operands [K, N] of MatMul nodes, and [S, K, N] where the left operand is a stack of S
    matrices too, of at least `least_weights` entries per matrix (None: `LEAST_WEIGHTS`). `metadata` is added to the
    file's metadata_props. Raises ExportError when no matmul is large enough, MissingDependency without onnx.
    """
    onnx = onnx_package()
    least_weights = LEAST_WEIGHTS if least_weights is None else least_weights
    source, target = Path(source), Path(target)
    model = onnx.load(str(source))
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {value.name: dimensions(value) for value in (*graph.value_info, *graph.input)}

    rewritten: list[Any] = []
    restored: dict[str, list[str]] = {}
    matmuls = 0
    for node in graph.node:
        weight: Any = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        stack = 0 if weight is None else _stack(weight, shapes.get(node.input[0], ()), least_weights)
        if not stack:
            rewritten.append(node)
            continue
        if weight.name not in restored:
            restored[weight.name] = _int8_matrices(weight, graph, rewritten)
        if len(weight.dims) == 3:
            rewritten += _unstacked(node, restored[weight.name], graph)
        else:
            node.input[1] = restored[weight.name][0]
            rewritten.append(node)
        matmuls += stack
    if not matmuls:
        raise ExportError(f"{source}: no matmul has {least_weights} constant weights or more; keep it in fp32")
    del graph.node[:]
    graph.node.extend(rewritten)
    used = {name for node in graph.node for name in node.input}
    for name in restored:
        if name not in used:
            graph.initializer.remove(weights[name])

    files, weight_bytes = save_graph(model, target, metadata or {})
    return QuantizedInfo(path=target, files=files, matmuls=matmuls, nodes=len(rewritten), weight_bytes=weight_bytes)


def save_graph(model: Any, target: Path, metadata: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    """Write an onnx.ModelProto and its weights, and check it. Returns the names of the files and the weights' bytes."""
    onnx = onnx_package()
    onnx.helper.set_model_props(model, {p.key: p.value for p in model.metadata_props} | dict(metadata))
    target.parent.mkdir(parents=True, exist_ok=True)
    data = target.with_name(external_name(target))
    data.unlink(missing_ok=True)  # onnx appends to a file that is there
    onnx.save_model(model, str(target), save_as_external_data=True, location=data.name, size_threshold=1024)
    if data.exists():
        shutil.copymode(target, data)  # onnx lets its owner alone read it
    onnx.checker.check_model(str(target))
    if data.exists():
        return (target.name, data.name), data.stat().st_size
    return (target.name,), target.stat().st_size


def _stack(weight: Any, left: Sequence[int | str], least_weights: int) -> int:
    """Return how many matrices of a constant to quantize: 1, the size of a stack, or 0 to leave it as it is."""
    dims = list(weight.dims)
    if weight.data_type != onnx_package().TensorProto.FLOAT or math.prod(dims[-2:]) < least_weights:
        return 0
    if len(dims) == 2:
        return 1
    return int(dims[0]) if len(dims) == 3 and len(left) == 3 and left[0] == dims[0] else 0


def _int8_matrices(weight: Any, graph: Any, nodes: list[Any]) -> list[str]:
    """Add int8 values and scales of each matrix and the nodes that restore them; return the restored names."""
    onnx = onnx_package()
    values = onnx.numpy_helper.to_array(weight)
    matrices = [values] if values.ndim == 2 else list(values)
    names = []
    for i, matrix in enumerate(matrices):
        name = weight.name if values.ndim == 2 else f"{weight.name}.{i}"
        quantized, scales = quantize_columns(matrix)
        graph.initializer.append(onnx.numpy_helper.from_array(quantized, f"{name}.int8"))
        graph.initializer.append(onnx.numpy_helper.from_array(scales, f"{name}.scale"))
        restored = f"{name}.restored"
        inputs = [f"{name}.int8", f"{name}.scale"]
        nodes.append(onnx.helper.make_node("DequantizeLinear", inputs, [restored], name=restored, axis=1))
        names.append(restored)
    return names


def _unstacked(node: Any, matrices: list[str], graph: Any) -> list[Any]:
    """Return a stacked matmul as one matmul for each of its restored matrices."""
    onnx = onnx_package()
    helper, x, y = onnx.helper, node.input[0], node.output[0]
    sizes = f"ones.{len(matrices)}"
    if sizes not in {tensor.name for tensor in graph.initializer}:
        ones = np.ones(len(matrices), np.int64)
        graph.initializer.append(onnx.numpy_helper.from_array(ones, sizes))
    left = [f"{y}.left.{i}" for i in range(len(matrices))]
    parts = [f"{y}.{i}" for i in range(len(matrices))]
    matmuls = [
        helper.make_node("MatMul", [row, matrix], [part], name=part)
        for row, matrix, part in zip(left, matrices, parts, strict=True)
    ]
    return [
        helper.make_node("Split", [x, sizes], left, name=f"{y}.split", axis=0),
        *matmuls,
        helper.make_node("Concat", parts, [y], name=f"{y}.concat", axis=0),
    ]


def quantize_columns(weight: npt.NDArray[np.floating[Any]]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Quantize weight [K, N] to values [K, N] int8 and scales [N]: weight is values * scales, to half a scale."""
    scales = (np.abs(weight).max(axis=0) / _LARGEST).astype(np.float32)
    scales[scales == 0] = 1
    values = np.clip(np.rint(weight / scales), -_LARGEST, _LARGEST).astype(np.int8)
    return values, scales


def onnx_package() -> Any:
    """Import onnx. Raises MissingDependency without it."""
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise missing("onnx", "quantizing a graph") from error
    return onnx
