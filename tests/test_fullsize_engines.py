"""Engines of the full-size network, built without a GPU: a change that loses fusions or memory fails here.

The graphs have a fixed batch of 1, which exports in half the time of a dynamic batch and gives the same plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from builders import Exported

from benchmarks.rtx_plan import read_plan
from export.tensorrt.build import EngineInfo, build_engine
from export.tensorrt.options import EngineOptions

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Bound:
    """Measured with TensorRT-RTX 1.7.1 for compute capability 8.9 at batch 1; with a little room."""

    kernels: int
    fused_attentions: int
    scratch_bytes: int


BOUNDS = {
    "fp32": Bound(kernels=274, fused_attentions=0, scratch_bytes=102_000_000),  # seen: 270 kernels, 99.0 MB
    "fp16": Bound(kernels=251, fused_attentions=14, scratch_bytes=66_000_000),  # seen: 247 kernels, 14 fused, 63.6 MB
}
"""bfloat16 gives the plan of float16."""
RTX_VERSION = "1.7.1"
TARGET = "8.9"


@pytest.fixture(scope="module", autouse=True)
def rtx() -> None:
    module = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'ccnet[rtx]')")
    if not str(module.__version__).startswith(RTX_VERSION):
        pytest.skip(f"the bounds were measured with tensorrt_rtx {RTX_VERSION}, here is {module.__version__}")


def build(graph: Path, engine: Path, precision: Any, profile: tuple[int, int, int]) -> EngineInfo:
    options = EngineOptions(format="tensorrt-rtx", precision=precision, profile=profile, compute_capabilities=(TARGET,))
    return build_engine(graph, engine, options)


@pytest.fixture(scope="module", params=list(BOUNDS))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineInfo]:
    """The engine of a random `unav100` network in one precision. Its files take 2 GB."""
    pytest.importorskip("torch", reason="torch is not installed")
    from benchmarks.networks import benchmark_config, labels, random_network
    from export.fused.network import fused_network
    from export.graph.to_onnx import export_onnx
    from export.parity.tolerances import torch_dtype

    config = benchmark_config("unav100")
    graph = tmp_path_factory.mktemp("fullsize") / "model.onnx"
    network = fused_network(random_network(config), dtype=torch_dtype(request.param))
    exported = export_onnx(network, config.spec(labels(config)), graph, batch=1)
    info = build(graph, graph.with_suffix(".engine"), request.param, (1, 1, 1))
    for name in exported.files:
        graph.with_name(name).unlink()
    yield info
    info.path.unlink()


def test_engine_of_the_full_network(built: EngineInfo) -> None:
    precision = built.options.precision
    bound, plan = BOUNDS[precision], read_plan(built.path, built.library_version)
    assert plan.kernels <= bound.kernels
    assert plan.fused_attentions >= bound.fused_attentions
    assert plan.scratch_bytes <= bound.scratch_bytes
    assert plan.capturable
    assert plan.matrix_kernels.get(precision, 0) >= 100  # of some 135 matmuls
    assert built.build["layers"] > plan.kernels
    assert built.build["engine_bytes"] == built.path.stat().st_size
    assert built.build["seconds"] > 0


def test_one_graph_builds_for_one_batch_size_and_for_a_range(six_levels: Exported, tmp_path: Path) -> None:
    one, many = (
        build(six_levels.path, tmp_path / f"{profile[2]}.engine", "fp32", profile)
        for profile in ((1, 1, 1), (1, 8, 32))
    )
    assert read_plan(many.path, many.library_version).capturable
    assert read_plan(many.path, many.library_version).kernels >= read_plan(one.path, one.library_version).kernels
