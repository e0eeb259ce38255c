"""Engines of the full-size network, built without a GPU: a change that loses fusions or memory fails here.

A random `unav100` checkpoint goes through the exporter into a bundle with a TensorRT-RTX engine in each precision. It
takes minutes and 4 GiB of disk: the graphs are most of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rtx_plan import read_plan
from export.tensorrt.build import build_engine
from export.tensorrt.options import EngineOptions
from runtime.bundle import Bundle

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Bound:
    """Measured with TensorRT-RTX 1.7.1 for compute capability 8.9 at batch 1; with a little room."""

    kernels: int
    fused_attentions: int
    scratch_bytes: int


BOUNDS = {
    "fp32": Bound(kernels=275, fused_attentions=0, scratch_bytes=102_000_000),  # seen: 271 kernels, 98.5 MB
    "fp16": Bound(kernels=251, fused_attentions=14, scratch_bytes=66_000_000),  # seen: 247 kernels, 14 fused, 63.8 MB
    "bf16": Bound(kernels=251, fused_attentions=14, scratch_bytes=66_000_000),  # seen: as fp16
}
RTX_VERSION = "1.7.1"
TARGET = "8.9"
DYNAMIC = (1, 8, 32)


@pytest.fixture(scope="module")
def rtx() -> Any:
    module = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'ccnet[rtx]')")
    if not str(module.__version__).startswith(RTX_VERSION):
        pytest.skip(f"the bounds were measured with tensorrt_rtx {RTX_VERSION}, here is {module.__version__}")
    return module


@pytest.fixture(scope="module")
def bundle(rtx: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Graphs and engines of all precisions, made as `ccnet export --format tensorrt-rtx` makes them."""
    pytest.importorskip("torch", reason="torch is not installed")
    from benchmarks.networks import benchmark_config, labels, random_network
    from ccnet.checkpoint import read_checkpoint, save_checkpoint
    from ccnet.torch_backend import TorchBackend
    from export.bundle import ExportOptions, make_bundle
    from export.parity.inputs import synthetic_inputs
    from export.parity.reference import Reference, record
    from runtime.bundle import read_bundle

    folder = tmp_path_factory.mktemp("fullsize")
    config = benchmark_config("unav100")
    network = random_network(config)
    save_checkpoint(folder / "checkpoint", network, config=config, labels=labels(config))
    checkpoint = read_checkpoint(folder / "checkpoint")
    videos = synthetic_inputs(checkpoint.spec, count=1)
    with TorchBackend(network, checkpoint.spec) as eager:
        reference = Reference(checkpoint.spec, checkpoint.weights_sha256, videos, record(eager, videos))
    request = ExportOptions(
        formats=("tensorrt-rtx",),
        precisions=tuple(BOUNDS),
        max_batch=1,
        engine=EngineOptions(compute_capabilities=(TARGET,)),
    )
    made = make_bundle(checkpoint, network, reference, folder / "bundle", request)
    assert {engine.name for engine in made.engines} == {f"tensorrt-rtx-{precision}" for precision in BOUNDS}
    yield read_bundle(folder / "bundle")
    shutil.rmtree(folder)


@pytest.mark.parametrize("precision", list(BOUNDS))
def test_engine_of_the_full_network(bundle: Bundle, precision: str) -> None:
    bound, model_file = BOUNDS[precision], bundle.model_file(f"tensorrt-rtx-{precision}")
    facts, plan = model_file.build, read_plan(bundle.path(model_file), str(model_file.library_version))
    assert plan.kernels <= bound.kernels
    assert plan.fused_attentions >= bound.fused_attentions
    assert plan.scratch_bytes <= bound.scratch_bytes
    assert plan.capturable
    assert plan.matrix_kernels.get(precision, 0) >= 100  # of some 135 matmuls
    assert facts["layers"] > plan.kernels
    assert facts["engine_bytes"] == bundle.path(model_file).stat().st_size
    assert facts["seconds"] > 0


@pytest.mark.parametrize("precision", list(BOUNDS))
def test_the_same_graph_builds_for_a_range_of_batches(bundle: Bundle, precision: str, tmp_path: Path) -> None:
    graph = bundle.path(bundle.model_file(f"onnx-{precision}"))
    chosen: Any = {"format": "tensorrt-rtx", "precision": precision}
    options = EngineOptions(**chosen, profile=DYNAMIC, compute_capabilities=(TARGET,))
    info = build_engine(graph, tmp_path / "dynamic.engine", options)
    plan = read_plan(info.path, info.library_version)
    info.path.unlink()  # hundreds of megabytes
    static = bundle.path(bundle.model_file(f"tensorrt-rtx-{precision}"))
    assert plan.capturable
    assert plan.kernels >= read_plan(static, info.library_version).kernels
