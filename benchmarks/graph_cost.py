"""Operations and bytes of an ONNX graph, counted from its nodes and inferred shapes.

One multiply-add counts as two operations. Only matmuls (Conv, MatMul, Gemm, Einsum) are counted as operations; what
the other nodes do is a matter of moving memory and counted in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from runtime.errors import ExportError

MATMULS = ("Conv", "MatMul", "Gemm", "Einsum")
_BYTES = {
    onnx.TensorProto.FLOAT: 4,
    onnx.TensorProto.DOUBLE: 8,
    onnx.TensorProto.INT64: 8,
    onnx.TensorProto.INT32: 4,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.BFLOAT16: 2,
    onnx.TensorProto.INT8: 1,
    onnx.TensorProto.UINT8: 1,
    onnx.TensorProto.BOOL: 1,
}

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """One node that multiplies."""

    name: str
    op: str
    shapes: tuple[Shape, Shape, Shape]
    """Left (or input), right (or weight), output."""
    operations: int
    weight: bool
    """One side is a constant, so its bytes are read once per call, however large the batch."""


@dataclass(frozen=True, kw_only=True)
class GraphCost:
    """What one call of a graph costs at a given batch size."""

    batch: int
    nodes: int
    matmuls: tuple[Matmul, ...]
    weight_bytes: int
    """Constants, each read at least once per call."""
    io_bytes: int
    """Graph inputs and outputs."""
    activation_bytes: int
    """What is read and written if every node goes through memory: an upper bound that fusion lowers."""

    @property
    def operations(self) -> int:
        return sum(matmul.operations for matmul in self.matmuls)

    def by_op(self) -> dict[str, tuple[int, int]]:
        """Return nodes and operations by operator."""
        table: dict[str, tuple[int, int]] = {}
        for matmul in self.matmuls:
            count, operations = table.get(matmul.op, (0, 0))
            table[matmul.op] = (count + 1, operations + matmul.operations)
        return table

    def largest(self, count: int) -> list[Matmul]:
        """Return the `count` matmuls of the most operations."""
        return sorted(self.matmuls, key=lambda m: -m.operations)[:count]


def graph_cost(path: str | Path, *, batch: int = 1, extents: Mapping[str, int] | None = None) -> GraphCost:
    """Count an ONNX file. External weights are not read.

    `extents`: of the symbolic axes by name, that of `8*rows` is `rows`; every other one is the batch. Raises
    ExportError naming the node when a shape that is needed can't be inferred.
    """
    model = onnx.load(str(path), load_external_data=False)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _fix_axes(model, batch, extents or {})
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = model.graph
    shapes, widths = _tensors(graph)
    constants = {tensor.name for tensor in graph.initializer}
    matmuls = []
    activation_bytes = 0
    for node in graph.node:
        if node.op_type in MATMULS:
            matmuls.append(_matmul(node, shapes, constants))
        if node.op_type != "Constant":
            moved = {*node.input, *node.output} - constants - {""}
            activation_bytes += sum(math.prod(shapes[n]) * widths[n] for n in moved if n in shapes)
    ends = [*graph.input, *graph.output]
    return GraphCost(
        batch=batch,
        nodes=len(graph.node),
        matmuls=tuple(matmuls),
        weight_bytes=sum(math.prod(shapes[n]) * widths[n] for n in constants),
        io_bytes=sum(math.prod(shapes[v.name]) * widths[v.name] for v in ends),
        activation_bytes=activation_bytes,
    )


def _fix_axes(model: Any, batch: int, extents: Mapping[str, int]) -> None:
    """Set every symbolic axis of the inputs, and drop the shape annotations that this makes wrong."""
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.WhichOneof("value") != "dim_value":
                factor, _, name = dim.dim_param.rpartition("*")
                dim.dim_value = int(factor or 1) * extents[name] if name in extents else batch
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]


def _tensors(graph: Any) -> tuple[dict[str, Shape], dict[str, int]]:
    """Return shape and element size of every tensor whose shape is known."""
    shapes: dict[str, Shape] = {}
    widths: dict[str, int] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        dims = tensor.shape.dim
        if tensor.HasField("shape") and all(d.WhichOneof("value") == "dim_value" for d in dims):
            shapes[value.name] = tuple(d.dim_value for d in dims)
            widths[value.name] = _BYTES.get(tensor.elem_type, 4)
    for tensor in graph.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
        widths[tensor.name] = _BYTES.get(tensor.data_type, 4)
    return shapes, widths


def _matmul(node: Any, shapes: Mapping[str, Shape], constants: set[str]) -> Matmul:
    names = (node.input[0], node.input[1], node.output[0])
    for name in names:
        if name not in shapes:
            raise ExportError(f"node '{node.name}' ({node.op_type}): the shape of '{name}' can't be inferred")
    left, right, out = (shapes[name] for name in names)
    operations = 2 * math.prod(out) * _inner(node, left, right)
    return Matmul(
        name=node.name or node.output[0],
        op=node.op_type,
        shapes=(left, right, out),
        operations=operations,
        weight=bool({node.input[0], node.input[1]} & constants),
    )


def _inner(node: Any, left: Shape, right: Shape) -> int:
    """Return the multiply-adds per output element."""
    if node.op_type == "MatMul":
        return left[-1]
    if node.op_type == "Gemm":
        transposed = next((a.i for a in node.attribute if a.name == "transA"), 0)
        return left[0] if transposed else left[1]
    if node.op_type == "Conv":
        return math.prod(right[1:])  # [out, in / groups, kernel...]
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
    terms, _, result = equation.partition("->")
    first, second = terms.split(",")
    sizes = {**dict(zip(first, left, strict=True)), **dict(zip(second, right, strict=True))}
    return math.prod(size for letter, size in sizes.items() if letter not in result)
