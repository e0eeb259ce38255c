"""Int8 weights: what is quantized, how far values move, and that nothing depends on the rest of the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from ccnet.torch_backend import TorchBackend  # noqa: E402
from export.bundle import ExportOptions, make_bundle  # noqa: E402
from export.graph.quantize import quantize_columns, quantize_weights  # noqa: E402
from export.graph.reference import ReferenceGraph  # noqa: E402
from export.parity.inputs import stress_inputs, synthetic_inputs  # noqa: E402
from export.parity.reference import Reference, record  # noqa: E402
from export.parity.tolerances import TOLERANCES  # noqa: E402
from runtime.backends.select import open_engine  # noqa: E402
from runtime.bundle import read_bundle  # noqa: E402
from runtime.errors import ConfigError, ExportError  # noqa: E402
from runtime.profiling.timing import Rules  # noqa: E402
from runtime.spec import ModelSpec  # noqa: E402


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """x [B, 5, 256] -> a large matmul, ReLU, a matmul that is too small; the large weight is used twice."""
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
    helper.set_model_props(model, {"graph": "fused"})
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


def test_only_large_matmuls_are_quantized(graph: Path, tmp_path: Path) -> None:
    before = graph.read_bytes()
    info = quantize_weights(graph, tmp_path / "out" / "int8.onnx", metadata={"precision": "int8"})
    assert graph.read_bytes() == before
    assert info.matmuls == 2
    assert info.files == ("int8.onnx", "int8.onnx.data")
    model = onnx.load(str(info.path))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types["large.int8"] == onnx.TensorProto.INT8
    assert types["small"] == onnx.TensorProto.FLOAT
    assert "large" not in types
    assert {p.key: p.value for p in model.metadata_props} == {"graph": "fused", "precision": "int8"}
    assert (graph.stat().st_size - info.weight_bytes) > 0.7 * 4 * 256 * 256


def test_stacked_matmuls_are_taken_apart(tmp_path: Path) -> None:
    """[2, B, 64] @ [2, 64, 64] becomes two int8 matmuls; one matrix for a whole stack stays."""
    onnxruntime = pytest.importorskip("onnxruntime")
    helper, rng = onnx.helper, np.random.default_rng(0)
    weight, shared = rng.normal(size=(2, 64, 64)), rng.normal(size=(1, 64, 64))
    nodes = [helper.make_node("MatMul", ["x", "stack"], ["a"]), helper.make_node("MatMul", ["a", "shared"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, "batch", 64])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, "batch", 64])]
    tensors = [
        onnx.numpy_helper.from_array(w.astype(np.float32), name) for name, w in (("stack", weight), ("shared", shared))
    ]
    for opset in (17, 20):
        model = helper.make_model(
            helper.make_graph(nodes, "g", inputs, outputs, tensors), opset_imports=[helper.make_opsetid("", opset)]
        )
        model = onnx.shape_inference.infer_shapes(model)
        model.ir_version = 8
        onnx.save(model, str(tmp_path / "fp32.onnx"))
        info = quantize_weights(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", least_weights=64 * 64)
        assert info.matmuls == 2
        written = onnx.load(str(info.path))
        assert {
            t.name for t in written.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1
        } == {"shared"}
        x = rng.normal(size=(2, 5, 64)).astype(np.float32)
        before, after = (
            onnxruntime.InferenceSession(str(tmp_path / name)).run(None, {"x": x})[0]
            for name in ("fp32.onnx", "int8.onnx")
        )
        # Each weight moves by half a scale (about 0.3 / 127 here) at most; 64 of them, then 64 more, add up at random.
        assert 0 < np.abs(after - before).max() < 0.05 * np.abs(before).max()


def test_written_again_it_does_not_grow(graph: Path, tmp_path: Path) -> None:
    first = quantize_weights(graph, tmp_path / "int8.onnx")
    assert quantize_weights(graph, tmp_path / "int8.onnx").weight_bytes == first.weight_bytes


def test_whoever_may_read_the_graph_may_read_its_weights(graph: Path, tmp_path: Path) -> None:
    found = quantize_weights(graph, tmp_path / "int8.onnx")
    assert len(found.files) == 2
    assert len({(tmp_path / name).stat().st_mode for name in found.files}) == 1


def test_a_graph_without_large_matmuls_is_an_error(graph: Path, tmp_path: Path) -> None:
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
        # Weights and rows carry 7 bits: about 0.8% for each matmul; 3% is twice what was seen.
        assert np.sqrt(((together[i] - expected[i]) ** 2).mean()) < 0.03 * size
        assert np.abs(together[i] - alone[i]).max() < 1e-5 * size


class Matmuls(nn.Module):
    """The network's forward contract, in matmuls alone."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        width, classes = spec.visual_dim + spec.audio_dim, spec.num_classes
        self.levels, self.classes = spec.levels, classes
        self.hidden = nn.Parameter(torch.randn(width, width, generator=generator) / width**0.5)
        self.out = nn.Parameter(torch.randn(width, 3 * classes, generator=generator) / width**0.5)

    def forward(self, visual: Tensor, audio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = (torch.cat([visual, audio], dim=1) * mask).transpose(1, 2)
        x = torch.relu(x @ self.hidden) @ self.out
        points = torch.cat([x[:, :: 2**level] for level in range(self.levels)], dim=1)
        offsets = torch.relu(points[..., self.classes :]) + 1
        return 0.2 * points[..., : self.classes] - 1, offsets.unflatten(2, (-1, 2))


@pytest.fixture
def making(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a bundle of a small network in given precisions."""
    pytest.importorskip("openvino")
    spec = ModelSpec(length=16, levels=2, visual_dim=128, audio_dim=128, labels=("a", "b", "c"))
    model = Matmuls(spec).eval()
    checkpoint: Any = SimpleNamespace(
        spec=spec, weights_sha256="0" * 64, config=SimpleNamespace(model=SimpleNamespace(to_json=dict))
    )
    videos = stress_inputs(spec) + synthetic_inputs(spec, count=4)
    with TorchBackend(model, spec) as eager:
        reference = Reference(spec, "0" * 64, videos, record(eager, videos))
    monkeypatch.setattr("export.fused.network.fused_network", lambda model, **_: ReferenceGraph(model))
    # Four videos and a random network: a single near tie is worth half a point of mAP, which says nothing about int8.
    loose = replace(TOLERANCES["int8"], average_map=0.05)
    monkeypatch.setitem(TOLERANCES, "int8", loose)
    monkeypatch.setattr("export.parity.check.SPEED_RULES", Rules(seconds=0, calls=3))

    def make(out: Path, *precisions: str) -> Any:
        request = ExportOptions(precisions=precisions, max_batch=4, graph="fused")
        return make_bundle(checkpoint, model, reference, out, request)  # type: ignore[arg-type]

    return make


def test_an_int8_engine_is_verified_and_runs(making: Any, tmp_path: Path) -> None:
    result = making(tmp_path / "bundle", "int8")
    assert [(r.name, r.status, r.model_file) for r in result.engines] == [("openvino-int8", "verified", "onnx-int8")]
    bundle = read_bundle(tmp_path / "bundle")
    bundle.verify()
    assert bundle.model_file("onnx-int8").build["int8_matmuls"] == 1
    with open_engine(bundle, "openvino", precision="int8").backend as backend:
        assert backend.describe()["matmul_precisions"]["i8"] == 1  # not fp32 from int8 weights
    # What the parity check saw is int8: fp32 would be a thousand times nearer.
    assert result.reports["openvino-int8"].summary()["max_logits"] > 1e-3


def test_auto_leaves_int8_out_where_no_matmul_is_large_enough(
    making: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.graph.quantize.LEAST_WEIGHTS", 1 << 20)
    names = {engine.name for engine in making(tmp_path / "bundle", "auto").engines}
    assert "openvino-fp32" in names
    assert "openvino-int8" not in names
    with pytest.raises(ExportError, match="keep it in fp32"):
        making(tmp_path / "other", "int8")
    assert not (tmp_path / "other").exists()


def test_int8_is_for_the_onnx_format() -> None:
    with pytest.raises(ConfigError, match="int8 is for the onnx format"):
        ExportOptions(formats=("onnx", "tensorrt-rtx"), precisions=("int8",))
