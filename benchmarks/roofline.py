"""How fast could the network be, and how near do the engines come? `python -m benchmarks.roofline`.

Operations and bytes are counted in the exported fused graph. The peaks of this machine (a large matmul in
each precision that an engine computes in, a large copy) are measured in the same rounds as the engines, so the share
reached compares like with like. Peaks of devices that are not here are stated with their source.

Shapes:  B batch
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.arguments import Setting, main
from benchmarks.graph_cost import GraphCost, graph_cost
from benchmarks.results import Measurement, markdown_table, write_result
from export.parity.tolerances import graph_precision, torch_dtype
from runtime.batches import pack
from runtime.machine import machine_facts
from runtime.profiling.timing import Timing, measure_interleaved
from runtime.profiling.workload import sample_videos

BATCHES = (1, 8, 32)
MATRIX = 2048
"""Side of the square matrices of the peak measurement: 17 GFLOP, so large that reading them costs little beside."""
COPY_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device can do at most."""

    name: str
    precision: str
    flops: float
    """Operations per second."""
    bytes_per_second: float
    weight_width: float
    """Bytes of a weight relative to the fp32 graph's."""
    source: str


H200 = Device(
    name="NVIDIA H200",
    precision="fp16",
    flops=790e12,
    bytes_per_second=3.9e12,
    weight_width=0.5,
    source="practical values of large matmuls and reads; not measured here",
)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Least milliseconds per video."""

    arithmetic: float
    memory: float

    @property
    def total(self) -> float:
        """Arithmetic and reading can overlap at best."""
        return max(self.arithmetic, self.memory)


def floor(cost: GraphCost, device: Device) -> Floor:
    """Return the floors per video: matmuls at the peak rate; weights, inputs and outputs moved once per batch."""
    moved = cost.weight_bytes * device.weight_width + cost.io_bytes
    return Floor(
        arithmetic=cost.operations / device.flops / cost.batch * 1e3,
        memory=moved / device.bytes_per_second / cost.batch * 1e3,
    )


def peak_calls(precisions: Collection[str]) -> dict[str, Callable[[], Any]]:
    """Return the calls whose speed is taken as this machine's peak: a copy, and a matmul in each precision."""
    import torch

    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    for precision in precisions:
        dtype = torch_dtype(graph_precision(precision))
        left, right = torch.randn(MATRIX, MATRIX).to(dtype), torch.randn(MATRIX, MATRIX).to(dtype)
        calls[f"matmul {precision}"] = partial(torch.mm, left, right, out=torch.empty(MATRIX, MATRIX, dtype=dtype))
    return calls


def this_machine(precision: str, matmul: Timing, copy: Timing) -> Device:
    """Return the peaks of this machine in one precision, from the timings of `peak_calls`."""
    return Device(
        name="this machine",
        precision=precision,
        flops=2 * MATRIX**3 / matmul.median,
        bytes_per_second=2 * COPY_BYTES / copy.median,
        weight_width=0.5 if precision == "bf16" else 1.0,
        source=f"measured in the same rounds: {MATRIX}x{MATRIX} matmul, {COPY_BYTES >> 20} MiB copy (read + write)",
    )


def run(setting: Setting) -> Path:
    """Measure, write `roofline.json` and `roofline.md`; returns the JSON's path."""
    machine = machine_facts()
    spec = setting.networks.spec
    graph = setting.networks.graph("fused")
    costs = {batch: graph_cost(graph, batch=batch) for batch in BATCHES}
    with contextlib.ExitStack() as stack:
        inputs = pack(sample_videos(spec, 1), spec)
        opened, absent = setting.networks.open_engines("fused", stack)
        precisions = {name: backend.precision for name, backend in opened.items()}
        arithmetic = list(dict.fromkeys(["fp32", *precisions.values()]))
        calls = peak_calls(arithmetic)
        calls |= {name: partial(backend.infer, *inputs) for name, backend in opened.items()}
        # By number: to wait for seconds of a copy would take hundreds of rounds of all engines.
        rules = replace(setting.rules, seconds=0, calls=max(setting.rules.calls, 2))
        timings = measure_interleaved(calls, rules)
    here = {p: this_machine(p, timings[f"matmul {p}"], timings["copy"]) for p in arithmetic}
    devices = (*here.values(), H200)
    engines = {name: timings[name] for name in precisions}
    shares = {name: floor(costs[1], here[precisions[name]]).total / (t.median * 1e3) for name, t in engines.items()}
    measurements = [
        *(
            Measurement(name=f"peak matmul {p}", value=d.flops / 1e9, unit="GFLOP/s", better="higher")
            for p, d in here.items()
        ),
        Measurement(name="peak copy", value=here["fp32"].bytes_per_second / 1e9, unit="GB/s", better="higher"),
        Measurement(name="graph nodes", value=costs[1].nodes, unit="nodes"),
        Measurement(name="operations per video", value=costs[1].operations / 1e9, unit="GFLOP"),
        *(Measurement(name=f"share reached by {n}", value=s, unit="", better="higher") for n, s in shares.items()),
    ]
    return write_result(
        setting.out,
        "roofline",
        measurements=measurements,
        page=page(costs, devices, engines, shares),
        machine=machine,
        rules=rules.to_json(),
        not_available=absent,
        devices=[vars(device) for device in devices],
        floors_ms={f"{d.name}, {d.precision}": {b: vars(floor(c, d)) for b, c in costs.items()} for d in devices},
        timings_ms={name: t.summary() for name, t in timings.items()},
    )


def page(
    costs: dict[int, GraphCost], devices: Sequence[Device], engines: dict[str, Timing], shares: dict[str, float]
) -> str:
    """Write the Markdown page."""
    one = costs[1]
    by_op = [
        (op, str(count), f"{operations / 1e9:.4g}", f"{operations / one.operations:.1%}")
        for op, (count, operations) in sorted(one.by_op().items(), key=lambda item: -item[1][1])
    ]
    largest = [
        (
            f"`{m.name}`",
            m.op,
            *(" x ".join(map(str, shape)) for shape in m.shapes[:2]),
            f"{m.operations / one.operations:.1%}",
        )
        for m in one.largest(12)
    ]
    floors = [
        (f"{d.name}, {d.precision}", str(batch), *(f"{v:.4g}" for v in (f.arithmetic, f.memory, f.total)))
        for d in devices
        for batch, cost in costs.items()
        for f in [floor(cost, d)]
    ]
    peaks = [
        (f"{d.name}, {d.precision}", f"{d.flops / 1e9:,.0f}", f"{d.bytes_per_second / 1e9:,.1f}", d.source)
        for d in devices
    ]
    reached = [
        (name, f"{t.median * 1e3:.2f}", f"{one.operations / t.median / 1e9:,.1f}", f"{shares[name]:.1%}", str(t.n))
        for name, t in engines.items()
    ]
    return "\n\n".join(
        [
            "# Roofline",
            f"Counted in the exported fused graph at batch 1: {one.nodes} nodes, {one.operations / 1e9:.4g} GFLOP "
            f"in {len(one.matmuls)} matmuls, {one.weight_bytes / 1e6:.4g} MB of weights, {one.io_bytes / 1e6:.4g} MB "
            f"of inputs and outputs, {one.activation_bytes / 1e6:.4g} MB of activations if all went through memory.",
            markdown_table(("operator", "nodes", "GFLOP", "share"), by_op),
            "The largest matmuls:",
            markdown_table(("node", "operator", "left", "right", "share of operations"), largest),
            "## Floors\n\nLeast time per video: matmuls at the peak rate; weights read once per batch, inputs and "
            "outputs once; the two can overlap at best.",
            markdown_table(("device", "GFLOP/s", "GB/s", "source"), peaks),
            markdown_table(("device", "batch", "arithmetic ms", "memory ms", "floor ms"), floors),
            "## Share reached on this machine, batch 1",
            markdown_table(("engine", "p50 ms", "GFLOP/s", "share of the floor in its precision", "n"), reached),
        ]
    )


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
