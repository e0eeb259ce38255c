"""The benchmark of TensorRT-RTX plans on a tiny network: it counts what each form becomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'ccnet[rtx]')")

from benchmarks import rtx_engines
from benchmarks.arguments import Setting
from benchmarks.networks import Networks
from runtime.profiling.timing import Rules


@pytest.mark.slow  # the exports
def test_plans_of_every_form_are_counted(
    tiny_networks: Networks, tiny_graph: Callable[[str], Path], tmp_path: Path
) -> None:
    for _, form, _ in rtx_engines.ENGINES:
        tiny_graph(form)
    assert tiny_networks.graph_facts("fp8")["matmuls"] > 0
    setting = Setting(tiny_networks, tmp_path, Rules(seconds=0, calls=1))
    path = rtx_engines.run(setting)
    named = {m["name"]: m["value"] for m in json.loads(path.read_text())["measurements"]}
    assert named["fused fp32 / kernels"] < named["reference / kernels"]
    assert named["fused fp16 / engine MB"] > 0
    assert named["fused fp8 / fp8 kernels"] >= named["fused fp16 / fp8 kernels"] == 0
    assert "| fused fp8 |" in path.with_suffix(".md").read_text()
    assert "| fused bf16 |" in path.with_suffix(".md").read_text()
