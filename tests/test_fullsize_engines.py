"""Engines of the full-size network, built without a GPU: a change that loses fusions or memory fails here.

A random `unav100` network in its deployment form goes to ONNX and through TensorRT-RTX in each precision. Minutes: the
export is most of it. CCNET_FULLSIZE_GRAPHS names a folder that keeps the graphs (2.5 GiB) for the next run.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from export.tensorrt_engine import EngineInfo, build_engine

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Bound:
    """Measured with TensorRT-RTX 1.7.1 for compute capability 8.9 at batch 1; with a little room."""

    kernels: int
    fused_attentions: int
    scratch_mib: int
    opset: int = 20


BOUNDS = {
    "fp32": Bound(kernels=272, fused_attentions=0, scratch_mib=88),  # seen: 268 kernels, 85.2 MiB
    "fp16": Bound(kernels=244, fused_attentions=14, scratch_mib=60),  # seen: 240 kernels, 14 fused, 57.8 MiB
    "bf16": Bound(kernels=244, fused_attentions=14, scratch_mib=60, opset=22),  # seen: as fp16
}
RTX_VERSION = "1.7.1"
DYNAMIC = (1, 8, 32)


@pytest.fixture(scope="module")
def rtx() -> Any:
    module = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'ccnet[rtx]')")
    if not str(module.__version__).startswith(RTX_VERSION):
        pytest.skip(f"the bounds were measured with tensorrt_rtx {RTX_VERSION}, here is {module.__version__}")
    return module


@pytest.fixture(scope="module", params=list(BOUNDS))
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(precision, ONNX file with a dynamic batch), exported once per precision."""
    pytest.importorskip("torch", reason="torch is not installed")
    precision = str(request.param)
    kept = os.environ.get("CCNET_FULLSIZE_GRAPHS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("graphs")
    path = folder / precision / "model.onnx"
    if not path.is_file():
        _export(precision, path)
    yield precision, path  # type: ignore[misc]
    if not kept:
        shutil.rmtree(path.parent)


def _export(precision: str, path: Path) -> None:
    import torch

    from benchmarks.networks import benchmark_config, labels, random_network
    from export.deploy import deployment_form
    from export.to_onnx import export_onnx

    config = benchmark_config("unav100")
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    network = deployment_form(random_network(config), dtype=types[precision])
    export_onnx(network, config.spec(labels(config)), path, opset=BOUNDS[precision].opset, max_batch=32)


def build(graph: tuple[str, Path], profile: tuple[int, int, int]) -> EngineInfo:
    precision, path = graph
    engine = path.with_name("model.engine")
    try:
        return build_engine(
            path,
            engine,
            flavour="tensorrt-rtx",
            precision=precision,  # type: ignore[arg-type]
            profile=profile,
            compute_capabilities=("8.9",),
        )
    finally:
        engine.unlink(missing_ok=True)


def test_engine_of_the_full_network(rtx: Any, graph: tuple[str, Path]) -> None:
    bound = BOUNDS[graph[0]]
    facts = build(graph, (1, 1, 1)).build
    assert facts["kernels"] <= bound.kernels
    assert facts["fused_attentions"] >= bound.fused_attentions
    assert facts["scratch_bytes"] <= bound.scratch_mib << 20
    assert facts["capturable"]
    assert facts["delivered_precisions"].get(graph[0], 0) >= 100  # of some 135 products
    # the dynamic file builds as a whole range of batches too, still capturable
    dynamic = build(graph, DYNAMIC).build
    assert dynamic["capturable"]
    assert dynamic["kernels"] >= facts["kernels"]
