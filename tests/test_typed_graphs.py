"""The ONNX file of each precision, run by engines that compute in the types of the file, on every stress input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

from benchmarks.networks import Networks  # noqa: E402
from ccnet.network.model import released_inputs  # noqa: E402
from export.parity.inputs import stress_inputs  # noqa: E402
from export.parity.tolerances import TOLERANCES  # noqa: E402
from runtime.backends.openvino import OpenVinoBackend  # noqa: E402
from runtime.backends.registry import Precision  # noqa: E402
from runtime.batches import pack  # noqa: E402
from runtime.errors import BackendUnavailable  # noqa: E402
from runtime.spec import INPUT_NAMES  # noqa: E402

pytestmark = pytest.mark.slow  # exporting

Run = Callable[[dict[str, Any]], list[Any]]


def on_onnxruntime(path: Path) -> Run:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda feeds: list(session.run(None, feeds))


def on_reference_evaluator(path: Path) -> Run:
    """Run the standard's own implementation: slow, and true to every type."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    return lambda feeds: list(evaluator.run(None, feeds))


def on_openvino(path: Path) -> Run:
    """Run OpenVINO, which keeps bfloat16 where the file has it, on processors that compute in it."""
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 arithmetic; OpenVINO would compute in float32")
    request = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    return lambda feeds: [value.copy() for value in request.infer(feeds).to_tuple()]


@pytest.mark.parametrize(
    ("precision", "engine"),
    [
        ("fp32", on_onnxruntime),
        ("fp32", on_reference_evaluator),
        ("fp16", on_onnxruntime),
        ("fp16", on_reference_evaluator),
        ("bf16", on_reference_evaluator),  # ONNX Runtime has no bfloat16 matmuls on a CPU
        ("bf16", on_openvino),
    ],
)
def test_typed_graphs_compute_the_network(
    precision: Precision,
    engine: Callable[[Path], Run],
    tiny_graph: Callable[[str], Path],
    tiny_networks: Networks,
) -> None:
    run = engine(tiny_graph("fused" if precision == "fp32" else precision))
    network, spec = tiny_networks.eager(), tiny_networks.spec
    limits = TOLERANCES[precision]
    worst: list[float] = []
    for video in stress_inputs(spec):
        inputs = pack([video.features], spec)
        logits, offsets = run(dict(zip(INPUT_NAMES, inputs, strict=True)))
        with torch.inference_mode():
            released = released_inputs(*(torch.from_numpy(array) for array in inputs))
            expected_logits, expected_offsets = (x.numpy() for x in network(*released))
        valid = spec.grid.valid_points(inputs[2])
        assert np.isfinite(logits).all(), video.name
        assert np.isfinite(offsets).all(), video.name
        off_logits = np.abs(logits - expected_logits)[valid]
        off_offsets = (np.abs(offsets - expected_offsets) / np.maximum(1, np.abs(expected_offsets)))[valid]
        assert off_logits.max() <= limits.max_logits, video.name
        assert off_offsets.max() <= limits.max_offsets, video.name
        worst.append(float(off_logits.max()))
    # A graph that is not typed as asked would be as exact as fp32.
    assert (max(worst) > 1e-4) == (precision != "fp32")


def test_openvino_does_not_run_a_half_precision_graph_as_fp32(
    tiny_graph: Callable[[str], Path], tiny_networks: Networks
) -> None:
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 arithmetic; OpenVINO computes in float32 here, as asked")
    with pytest.raises(BackendUnavailable, match="asked for fp32, but this graph is typed in another precision"):
        OpenVinoBackend.open(tiny_graph("bf16"), tiny_networks.spec, precision="fp32")
