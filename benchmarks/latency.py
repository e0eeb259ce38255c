"""The forms of the network side by side in one run: `python -m benchmarks.latency`.

Eager PyTorch, torch.compile, the straightforward ONNX graph and the fused network on every CPU engine, interleaved,
on the same full-length video at batch 1. Each is first compared with eager; one that is off by more than the tolerance
of its precision gets no speed.

Shapes:  B batch   P points of all levels   C classes
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.arguments import Setting, parse
from benchmarks.engines import INT8_ENGINES, ONNX_ENGINES, available_engines
from benchmarks.plots import bars
from benchmarks.results import Measurement, markdown_table, write_result
from export.parity.tolerances import tolerance
from runtime.batches import pack
from runtime.machine import machine_facts
from runtime.profiling.timing import Ratio, Timing, measure_interleaved, ratio
from runtime.profiling.workload import sample_videos

if TYPE_CHECKING:
    from runtime.backends.base import BaseBackend, Float32, Int32

GRAPHS = {
    "reference": ("reference", ONNX_ENGINES),
    "fused": ("fused", ONNX_ENGINES),
    "int8": ("fused", INT8_ENGINES),
}
"""Graph -> the name of its form in the results, and the engines that run it."""
EAGER, COMPILED = "eager fp32", "torch.compile fp32"


@dataclass
class Entry:
    """One way to run the network in this comparison."""

    name: str
    max_logits: float
    """Largest difference to eager at valid points."""
    max_offsets: float
    """The same of the offsets, relative to max(1, |offset|)."""
    passed: bool
    timing: Timing | None = None
    to: dict[str, Ratio] = field(default_factory=dict)
    """How many times as fast as other entries."""


def run(setting: Setting) -> Path:
    """Measure, write `latency.json`, `.md` and `.png`; returns the JSON's path."""
    machine = machine_facts()
    spec = setting.networks.spec
    inputs = pack(sample_videos(spec, 1), spec)
    absent: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        backends: dict[str, BaseBackend] = {k: stack.enter_context(b) for k, b in _torch_backends(setting).items()}
        for graph, (form, engines) in GRAPHS.items():
            opened, missing = available_engines(setting.networks.graph(graph), spec, engines)
            backends |= {f"{form} {name}": stack.enter_context(backend) for name, backend in opened.items()}
            absent |= {f"{form} {name}": reason for name, reason in missing.items()}
        reference = backends[EAGER].infer(*inputs)
        entries = {name: _compared(name, b, inputs, reference) for name, b in backends.items()}
        calls = {name: _call(backends[name], inputs) for name, entry in entries.items() if entry.passed}
        timings = measure_interleaved(calls, setting.rules)
    for name, timing in timings.items():
        entries[name].timing = timing
        for base in _bases(name):
            if base in timings:
                entries[name].to[base] = ratio(timings[base], timing)
    facts = {graph: setting.networks.graph_facts(graph) for graph in GRAPHS}
    path = write_result(
        setting.out,
        "latency",
        measurements=[
            Measurement(name=f"{name} p50", value=t.summary()["p50"], unit="ms") for name, t in timings.items()
        ],
        page=page(list(entries.values()), facts, absent),
        machine=machine,
        rules=setting.rules.to_json(),
        preset_length=spec.length,
        graphs=facts,
        not_available=absent,
        rows=[_row(entry) for entry in entries.values()],
    )
    medians = {name: timing.median * 1e3 for name, timing in timings.items()}
    bars(path.with_suffix(".png"), medians, title="One full-length video, batch 1 (p50)", unit="ms")
    return path


def _torch_backends(setting: Setting) -> dict[str, BaseBackend]:
    import torch

    from ccnet.torch_backend import TorchBackend

    spec, model = setting.networks.spec, setting.networks.eager()
    if not setting.compiled:
        return {EAGER: TorchBackend(model, spec)}
    compiled: Any = torch.compile(model)
    return {EAGER: TorchBackend(model, spec), COMPILED: TorchBackend(compiled, spec)}


def _compared(
    name: str, backend: BaseBackend, inputs: tuple[Float32, Float32, Int32], reference: tuple[Float32, Float32]
) -> Entry:
    """Compare one full-length video, at which every point is valid. The whole parity check is part of the export."""
    logits, offsets = backend.infer(*inputs)
    off_logits = np.abs(logits - reference[0])
    off_offsets = np.abs(offsets - reference[1]) / np.maximum(1, np.abs(reference[1]))
    limits = tolerance(backend.precision)
    passed = (
        off_logits.max() <= limits.max_logits
        and off_logits.mean() <= limits.mean_logits
        and off_offsets.max() <= limits.max_offsets
        and off_offsets.mean() <= limits.mean_offsets
    )
    return Entry(name, float(off_logits.max()), float(off_offsets.max()), bool(passed))


def _call(backend: BaseBackend, inputs: tuple[Float32, Float32, Int32]) -> Callable[[], Any]:
    return lambda: backend.infer(*inputs)


def _bases(name: str) -> list[str]:
    """What an entry is compared with: eager, and the straightforward graph on the same engine in fp32."""
    if name in (EAGER, COMPILED):
        return [EAGER]
    library = name.partition(" ")[2].rpartition("-")[0]
    return [EAGER, f"straightforward {library}-fp32"]


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "passed": entry.passed,
        "max_logits": entry.max_logits,
        "max_offsets": entry.max_offsets,
        "engine_ms": None if entry.timing is None else entry.timing.summary(),
        "times_as_fast_as": {base: r.to_json() for base, r in entry.to.items()},
    }


def page(entries: list[Entry], facts: dict[str, dict[str, Any]], absent: dict[str, str]) -> str:
    """The Markdown page."""
    rows = []
    for entry in entries:
        cells = [entry.name, f"{entry.max_logits:.1e}", f"{entry.max_offsets:.1e}"]
        if entry.timing is None:
            rows.append([*cells, "no speed: off by more than its tolerance", *[""] * 7])
            continue
        s = entry.timing.summary()
        cells += [f"{s[key]:.1f}" for key in ("p50", "p90", "p95", "p99", "mean")]
        cells.append(str(s["n"]))
        eager = entry.to.get(EAGER)
        plain = next((r for base, r in entry.to.items() if base != EAGER), None)
        rows.append([*cells, str(eager or ""), str(plain or "")])
    header = ("form and engine", "max logits", "max offsets", "p50 ms", "p90", "p95", "p99", "mean", "n")
    graphs = [
        (form, f"{f['nodes']:,}", f"{f['weight_bytes'] / 1e6:.0f}", f"{f['seconds']:.0f}") for form, f in facts.items()
    ]
    parts = [
        "# Latency of the forms",
        "One full-length video at batch 1, engine only, all rows interleaved in one run. Differences are to eager; "
        "the last columns say how many times as fast a row is (median over the rounds, 95% bootstrap interval).",
        markdown_table((*header, "vs eager", "vs straightforward, same engine"), rows),
        markdown_table(("graph", "nodes", "weights MB", "written in s"), graphs),
    ]
    if absent:
        parts.append("Not available here:\n\n" + "\n".join(f"- {name}: {why}" for name, why in absent.items()))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    print(run(parse(__doc__, argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
