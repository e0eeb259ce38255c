"""The ONNX file of each precision, run by engines that compute in the types of the file, on every stress input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

from benchmarks.networks import benchmark_config, labels, random_network  # noqa: E402
from export.deploy import deployment_form  # noqa: E402
from export.inputs import stress_inputs  # noqa: E402
from export.precision import TOLERANCES, GraphPrecision, torch_dtype  # noqa: E402
from export.to_onnx import export_onnx  # noqa: E402
from runtime.features import pack  # noqa: E402

pytestmark = pytest.mark.slow  # exporting

Run = Callable[[dict[str, Any]], list[Any]]


def on_onnxruntime(path: Path) -> Run:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda feeds: list(session.run(None, feeds))


def on_reference_evaluator(path: Path) -> Run:
    """The standard's own implementation: slow, and true to every type."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    return lambda feeds: list(evaluator.run(None, feeds))


@pytest.mark.parametrize(
    ("precision", "engine"),
    [
        ("fp32", on_onnxruntime),
        ("fp32", on_reference_evaluator),
        ("fp16", on_onnxruntime),
        ("fp16", on_reference_evaluator),
        ("bf16", on_reference_evaluator),  # ONNX Runtime has no bfloat16 products on a CPU
    ],
)
def test_typed_graphs_compute_the_network(
    precision: GraphPrecision, engine: Callable[[Path], Run], tmp_path: Path
) -> None:
    config = benchmark_config("tiny")
    spec = config.spec(labels(config))
    network = random_network(config)
    path = tmp_path / "model.onnx"
    export_onnx(
        deployment_form(network, dtype=torch_dtype(precision)), spec, path, opset=22 if precision == "bf16" else 20
    )
    run = engine(path)
    limits = TOLERANCES[precision]
    worst: list[float] = []
    for video in stress_inputs(spec):
        visual, audio, mask = pack([video.features], spec)
        logits, offsets = run({"visual": visual, "audio": audio, "mask": mask})
        with torch.inference_mode():
            inputs = (torch.from_numpy(x) for x in (visual, audio, mask))
            expected_logits, expected_offsets = (x.numpy() for x in network(*inputs))
        valid = spec.grid.valid_points(mask[:, 0])
        assert np.isfinite(logits).all(), video.name
        assert np.isfinite(offsets).all(), video.name
        off_logits = np.abs(logits - expected_logits)[valid]
        off_offsets = (np.abs(offsets - expected_offsets) / np.maximum(1, np.abs(expected_offsets)))[valid]
        assert off_logits.max() <= limits.max_logits, video.name
        assert off_offsets.max() <= limits.max_offsets, video.name
        worst.append(float(off_logits.max()))
    # A graph that is not typed as asked would be as exact as fp32.
    assert (max(worst) > 1e-4) == (precision != "fp32")
