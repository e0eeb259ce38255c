"""Operations and bytes counted from graphs small enough to count by hand, and the floors that follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from benchmarks import roofline  # noqa: E402
from benchmarks.graph_cost import GraphCost, graph_cost  # noqa: E402
from runtime.errors import ExportError  # noqa: E402


def save(path: Path, nodes: list[Any], inputs: dict[str, list[Any]], weights: dict[str, tuple[int, ...]]) -> Path:
    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    tensors = [onnx.numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()]
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", values, [output], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(path))
    return path


def test_matmul_with_a_weight(tmp_path: Path) -> None:
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    path = save(tmp_path / "m.onnx", [node], {"x": ["batch", 7, 5]}, {"w": (5, 3)})
    one, four = graph_cost(path), graph_cost(path, batch=4)
    assert one.operations == 2 * 7 * 5 * 3
    assert four.operations == 4 * one.operations
    assert one.weight_bytes == four.weight_bytes == 4 * 5 * 3
    assert one.io_bytes == 4 * (7 * 5 + 7 * 3)
    assert one.matmuls[0].weight


def test_grouped_convolution_gemm_and_einsum(tmp_path: Path) -> None:
    helper = onnx.helper
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], group=4, pads=[1, 1]),  # [B, 4, 10] -> [B, 8, 10]
        helper.make_node("Flatten", ["c"], ["f"], axis=1),
        helper.make_node("Gemm", ["f", "g"], ["h"], transB=1),  # [B, 80] x [6, 80]^T
        helper.make_node("Einsum", ["h", "e"], ["y"], equation="bi,ij->bj"),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["batch", 4, 10]}, {"k": (8, 1, 3), "g": (6, 80), "e": (6, 2)})
    operations = {op: ops for op, (_, ops) in graph_cost(path).by_op().items()}
    assert operations == {"Conv": 2 * 80 * 3, "Gemm": 2 * 6 * 80, "Einsum": 2 * 2 * 6}


def test_a_matmul_of_unknown_shape_is_an_error(tmp_path: Path) -> None:
    helper = onnx.helper
    nodes = [helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("Cast", ["i"], ["f"], to=1)]
    nodes += [helper.make_node("Transpose", ["f"], ["t"]), helper.make_node("MatMul", ["t", "w"], ["y"], name="odd")]
    path = save(tmp_path / "m.onnx", nodes, {"x": [3, 4]}, {"w": (2, 3)})
    with pytest.raises(ExportError, match="'odd'"):
        graph_cost(path)


def test_floors() -> None:
    cost = GraphCost(batch=4, nodes=1, matmuls=(), weight_bytes=8 * 10**9, io_bytes=10**9, activation_bytes=0)
    device = roofline.Device(
        name="d", precision="fp16", flops=1e12, bytes_per_second=1e12, weight_width=0.5, source="a test"
    )
    # Half-width weights and the io once per batch of 4: (8 / 2 + 1) GB at 1 TB/s = 5 ms, 1.25 ms per video.
    got = roofline.floor(cost, device)
    assert (got.arithmetic, got.memory, got.total) == pytest.approx((0.0, 1.25, 1.25))
