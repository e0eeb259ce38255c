"""What does TensorRT-RTX make of the graphs, without a GPU? `python -m benchmarks.rtx_engines`.

Builds the reference graph and the fused network for one video and counts what their plans hold: kernels, fused
attentions, scratch memory, and how long building takes. No engine runs. Nothing is written where the library is absent
or its plans are of another format.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.arguments import Setting, main
from benchmarks.results import Measurement, markdown_table, write_result
from benchmarks.rtx_plan import check_version, read_plan
from export.tensorrt.build import build_engine
from export.tensorrt.options import EngineOptions, EnginePrecision
from runtime.backends.tensorrt.library import load_library
from runtime.machine import machine_facts

log = logging.getLogger("benchmarks")

TARGET = "8.9"
"""Compute capability to build for."""
ENGINES: tuple[tuple[str, str, EnginePrecision], ...] = (
    ("reference", "reference", "fp32"),
    ("fused fp32", "fused", "fp32"),
    ("fused fp16", "fp16", "fp16"),
    ("fused bf16", "bf16", "bf16"),
    ("fused fp8", "fp8", "fp8"),
)
"""Name in the results, graph, precision."""
COLUMNS = {
    "kernels": "kernels",
    "fused_attentions": "fused attentions",
    "fp8_kernels": "fp8 kernels",
    "scratch_bytes": "scratch MB",
    "engine_bytes": "engine MB",
    "layers": "layers at parse",
    "seconds": "build s",
}


def run(setting: Setting) -> Path:
    """Build, write `rtx_engines.json` and `.md`, and return the JSON's path. Raises BackendUnavailable."""
    check_version(load_library("tensorrt-rtx").__version__)
    machine = machine_facts()
    facts: dict[str, dict[str, Any]] = {}
    for name, graph, precision in ENGINES:
        path = setting.networks.graph(graph)
        log.info("building %s", name)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            options = EngineOptions(format="tensorrt-rtx", precision=precision, compute_capabilities=(TARGET,))
            info = build_engine(path, Path(folder) / "model.engine", options)
            plan = dataclasses.asdict(read_plan(info.path, info.library_version))
        facts[name] = {"nodes": setting.networks.graph_facts(graph)["nodes"], **info.build, **plan}
    return write_result(
        setting.out,
        "rtx_engines",
        measurements=[
            Measurement(name=f"{name} / {COLUMNS[key]}", value=_shown(key, built[key]), unit="", better=_better(key))
            for name, built in facts.items()
            for key in COLUMNS
        ],
        page=page(facts),
        machine=machine,
        compute_capability=TARGET,
        engines=facts,
    )


def page(facts: dict[str, dict[str, Any]]) -> str:
    """Write the Markdown page."""
    reference_seconds = facts["reference"]["seconds"]
    rows = [
        [
            name,
            f"{built['nodes']:,}",
            *(f"{_shown(key, built[key]):,.4g}" for key in COLUMNS),
            f"{reference_seconds / built['seconds']:.1f}x",
        ]
        for name, built in facts.items()
    ]
    return "\n\n".join(
        [
            "# TensorRT-RTX engines",
            f"Random weights, ONNX with a dynamic batch axis, optimization profile (1, 1, 1), built without a GPU for "
            f"compute capability {TARGET}. Counted in the plan that the engine embeds; no engine was run. The last "
            "column says how many times as fast as the reference graph it builds.",
            markdown_table(("network", "ONNX nodes", *COLUMNS.values(), "build"), rows),
        ]
    )


def _shown(key: str, value: float) -> float:
    return value / 1e6 if key.endswith("_bytes") else float(value)


def _better(key: str) -> Any:
    return "higher" if key in ("fused_attentions", "fp8_kernels") else "lower"


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
