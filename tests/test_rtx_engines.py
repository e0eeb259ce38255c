"""The benchmark of TensorRT-RTX plans on a tiny network: it counts what each form becomes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'ccnet[rtx]')")

from benchmarks import rtx_engines
from benchmarks.arguments import Setting
from benchmarks.networks import Networks, benchmark_config
from runtime.profiling.timing import Rules


@pytest.mark.slow  # four exports
def test_plans_of_every_form_are_counted(tmp_path: Path) -> None:
    setting = Setting(Networks(tmp_path / "work", benchmark_config("tiny")), tmp_path, Rules(seconds=0, calls=1))
    path = rtx_engines.run(setting)
    named = {m["name"]: m["value"] for m in json.loads(path.read_text())["measurements"]}
    assert named["fused fp32 / kernels"] < named["reference / kernels"]
    assert named["fused fp16 / engine MB"] > 0
    assert "| fused bf16 |" in path.with_suffix(".md").read_text()
