"""What the benchmark of the extraction counts: operations, and an estimate that follows from them."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks.extraction_cost import H100, SHARE, estimate, gigaflops, stages  # noqa: E402
from export.extractors.bundle import graph_module  # noqa: E402
from runtime.video.extractor import GRAPHS, Extractor  # noqa: E402


def test_operations_are_those_that_pytorch_counts(extractor: Extractor, extractor_networks: Any) -> None:
    spec, (rows, columns) = extractor.spec, (16, 21)
    sizes = {"batch": 1, "rows": rows, "columns": columns, "8*rows": 8 * rows, "8*columns": 8 * columns}
    found = stages(extractor, (rows, columns))
    for graph in GRAPHS:
        shapes = [
            [extent if isinstance(extent, int) else sizes[extent] for extent in shape]
            for shape in spec.tensors(graph).inputs.values()
        ]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            graph_module(graph, extractor_networks, spec)(*map(torch.rand, shapes))
        assert found[graph].operations == pytest.approx(counter.get_total_flops(), rel=1e-6), graph
    work = gigaflops(found, spec)
    assert 2 < work["public"] / work["ours"] < 3  # a third of the pairs, but the small I3D of this extractor as often


def test_the_estimate_follows_from_peaks_bytes_and_launches(extractor: Extractor) -> None:
    found = {"vggish": stages(extractor, (16, 21))["vggish"]}
    stage, device = found["vggish"], H100["fp16"]
    moved = (stage.activation_bytes + stage.weight_bytes / 8) / 2
    least = stage.calls * max(stage.operations / device.flops, moved / device.bytes_per_second)
    without = estimate(found, device, {})  # type: ignore[arg-type]
    assert without.floor == pytest.approx(least)
    assert without.believed == pytest.approx((least / SHARE[0], least / SHARE[1]))
    launched = estimate(found, device, {"vggish": 16})  # type: ignore[arg-type]
    assert launched.believed[0] - without.believed[0] == pytest.approx(stage.calls * 2 * 2.5e-6)
