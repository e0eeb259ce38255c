"""Int8 weights: what is quantized, how far values move, and that nothing depends on the rest of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from export.quantize import quantize_columns, quantize_weights  # noqa: E402
from runtime.errors import ExportError  # noqa: E402


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """x [B, 5, 256] -> a large product, ReLU, a product that is too small; the large weight is used twice."""
    helper, rng = onnx.helper, np.random.default_rng(0)
    weights = {"large": rng.normal(size=(256, 256)), "small": rng.normal(size=(256, 3))}
    nodes = [
        helper.make_node("MatMul", ["x", "large"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "large"], ["c"]),
        helper.make_node("MatMul", ["c", "small"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 5, 256])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 5, 3])]
    tensors = [onnx.numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, tensors), opset_imports=[helper.make_opsetid("", 17)]
    )
    helper.set_model_props(model, {"form": "deployment"})
    model.ir_version = 8
    onnx.save(model, str(tmp_path / "fp32.onnx"))
    return tmp_path / "fp32.onnx"


def test_columns_are_off_by_half_a_scale_at_most() -> None:
    weight = np.random.default_rng(1).normal(size=(64, 16)) * np.logspace(-6, 3, 16)
    weight[:, 3] = 0
    values, scales = quantize_columns(weight)
    assert values.dtype == np.int8
    assert np.abs(values).max() == 127
    # Half a step, and a little for the rounding of the scale to float32.
    assert np.all(np.abs(values * scales - weight) <= 0.5001 * scales)
    assert not values[:, 3].any()


def test_only_large_products_are_quantized(graph: Path, tmp_path: Path) -> None:
    before = graph.read_bytes()
    info = quantize_weights(graph, tmp_path / "out" / "int8.onnx", metadata={"precision": "int8"})
    assert graph.read_bytes() == before
    assert info.products == 2
    assert info.files == ("int8.onnx", "int8.onnx.data")
    model = onnx.load(str(info.path))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types["large.int8"] == onnx.TensorProto.INT8
    assert types["small"] == onnx.TensorProto.FLOAT
    assert "large" not in types
    assert {p.key: p.value for p in model.metadata_props} == {"form": "deployment", "precision": "int8"}
    assert (graph.stat().st_size - info.weight_bytes) > 0.7 * 4 * 256 * 256


def test_written_again_it_does_not_grow(graph: Path, tmp_path: Path) -> None:
    first = quantize_weights(graph, tmp_path / "int8.onnx")
    assert quantize_weights(graph, tmp_path / "int8.onnx").weight_bytes == first.weight_bytes


def test_a_graph_without_large_products_is_an_error(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="keep it in fp32"):
        quantize_weights(graph, tmp_path / "int8.onnx", least_weights=1 << 20)
    assert not (tmp_path / "int8.onnx").exists()


def run_onnxruntime(path: Path, x: Any) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def run_openvino(path: Path, x: Any) -> Any:
    openvino = pytest.importorskip("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}
    return openvino.Core().compile_model(str(path), "CPU", settings)(x)[0]


@pytest.mark.parametrize("run", [run_onnxruntime, run_openvino])
def test_results_stay_close_and_do_not_depend_on_the_batch(run: Any, graph: Path, tmp_path: Path) -> None:
    info = quantize_weights(graph, tmp_path / "int8.onnx")
    x = np.random.default_rng(2).normal(size=(3, 5, 256)).astype(np.float32)
    x[1] *= 1000  # a loud neighbour must not take resolution away from the others
    together = run(info.path, x)
    alone = np.concatenate([run(info.path, x[i : i + 1]) for i in range(3)])
    expected = run_onnxruntime(graph, x)
    for i in range(3):
        size = np.sqrt((expected[i] ** 2).mean())
        # Weights and rows carry 7 bits: about 0.8% each and product; 3% is twice what was seen.
        assert np.sqrt(((together[i] - expected[i]) ** 2).mean()) < 0.03 * size
        assert np.abs(together[i] - alone[i]).max() < 1e-5 * size
