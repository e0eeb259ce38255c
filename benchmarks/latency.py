"""How fast is each way to run the network on this machine? `python -m benchmarks.latency`.

Eager PyTorch, torch.compile, the reference graph and the fused network on every engine for a CPU, measured as
`ccnet bench` does: interleaved, on full-length videos. Each is first compared with eager; one that is off by more than
the tolerance of its precision gets no speed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import Setting, main
from benchmarks.results import Measurement, markdown_table, write_result
from ccnet.plots import plot_bench
from export.parity.tolerances import tolerance
from runtime.backends.base import Backend, Outputs
from runtime.batches import pack
from runtime.profiling.bench import Candidate, Plan, bench
from runtime.profiling.workload import sample_videos

GRAPHS = {"reference": "reference", "fused": "fused", "int8": "fused"}
"""Graph -> the name of its network in the results."""
EAGER, COMPILED = "eager fp32", "torch.compile fp32"
BATCHES = (1, 8)
"""The fused network runs at all of them, its peers at the first."""
TIMES = {"engine_ms": "engine", "end_to_end_ms": "end to end"}


def run(setting: Setting) -> Path:
    """Measure, write `latency.json`, `.md` and `.png`; returns the JSON's path."""
    networks = setting.networks
    report = bench(networks.spec, candidates(setting), Plan(rules=setting.rules, batches=BATCHES))
    graphs = {graph: networks.graph_facts(graph) for graph in GRAPHS}
    path = write_result(
        setting.out,
        "latency",
        measurements=measurements(report["rows"]),
        page=page(report, graphs),
        machine=report["machine"],
        rules=report["rules"],
        graphs=graphs,
        candidates=report["candidates"],
        rows=report["rows"],
    )
    plot_bench(report, path.with_suffix(".png"))
    return path


def candidates(setting: Setting) -> list[Candidate]:
    """Return eager PyTorch, the reference; then its peers and the fused network, each to be compared with eager."""
    import torch

    from ccnet.torch_backend import TorchBackend

    networks, model = setting.networks, setting.networks.eager()
    spec = networks.spec
    inputs = pack(sample_videos(spec, 1), spec)
    eager = partial(TorchBackend, model, spec, max_batch=1)
    verify = partial(compare, inputs, eager().infer(*inputs))
    found = [Candidate(name=EAGER, open=eager, status="reference")]
    if setting.compiled:
        compiled: Any = torch.compile(model)
        opened = partial(TorchBackend, compiled, spec, max_batch=1)
        found.append(Candidate(name=COMPILED, open=opened, status="unverified", verify=verify))
    for graph, network in GRAPHS.items():
        reference = network == "reference"
        for engine, open_it in networks.engines(graph, max_batch=1 if reference else max(BATCHES)).items():
            peer = None if reference else f"reference {engine.rpartition('-')[0]}-fp32"
            name = f"{network} {engine}"
            found.append(Candidate(name=name, open=open_it, status="unverified", verify=verify, peer=peer))
    return found


def compare(inputs: Any, expected: Outputs, backend: Backend) -> tuple[str, dict[str, Any]]:
    """Compare one full-length video, at which every point is valid, with eager. Returns status and differences.

    The whole parity check is part of the export.
    """
    logits, offsets = backend.infer(*inputs)
    off_logits = np.abs(logits - expected[0])
    off_offsets = np.abs(offsets - expected[1]) / np.maximum(1, np.abs(expected[1]))
    differences = {
        "max_logits": float(off_logits.max()),
        "mean_logits": float(off_logits.mean()),
        "max_offsets": float(off_offsets.max()),
        "mean_offsets": float(off_offsets.mean()),
    }
    limits = vars(tolerance(backend.precision))
    passed = all(difference <= limits[name] for name, difference in differences.items())
    return "verified" if passed else "failed", differences


def measurements(rows: Sequence[Mapping[str, Any]]) -> list[Measurement]:
    """Return the numbers that can be compared between two runs."""
    found = []
    for row in rows:
        name = f"batch {row['batch']} / {row['candidate']}"
        found += [Measurement(name=f"{name} / {TIMES[key]} p50", value=row[key]["p50"], unit="ms") for key in TIMES]
        rate = row["stream_videos_per_second"]["per_second"]
        found.append(Measurement(name=f"{name} / throughput", value=rate, unit="videos/s", better="higher"))
    return found


def page(report: Mapping[str, Any], graphs: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the Markdown page."""
    accuracy = {candidate["name"]: candidate["accuracy"] for candidate in report["candidates"]}
    first, batches = [], []
    for row in report["rows"]:
        engine, name = row["engine_ms"], row["candidate"]
        common = [
            f"{row['end_to_end_ms']['p50']:.1f}",
            f"{row['stream_videos_per_second']['per_second']:.4g}",
            str(engine["n"]),
        ]
        if row["batch"] == BATCHES[0]:
            off = [f"{accuracy[name].get(key, 0):.1e}" for key in ("max_logits", "max_offsets")]
            times = [f"{engine[key]:.1f}" for key in ("p50", "p90", "p95", "p99", "mean")]
            ratios = [_times_as_fast(row.get(key)) for key in ("engine_ratio", "peer_ratio")]
            first.append([name, *off, *times, *common, *ratios])
        else:
            per_video = engine["p50"] / row["batch"]
            batches.append([f"{name}, batch {row['batch']}", f"{engine['p50']:.1f}", f"{per_video:.1f}", *common])
    written = [
        (name, f"{f['nodes']:,}", f"{f['weight_bytes'] / 1e6:.0f}", f"{f['seconds']:.0f}") for name, f in graphs.items()
    ]
    common_header = ("end to end p50", "videos/s", "n")
    differences = ("max logits", "max offsets")
    times_header = ("engine p50 ms", "p90", "p95", "p99", "mean")
    ratio_header = ("vs eager", "vs reference graph, same engine")
    parts = [
        "# Latency",
        "One full-length video at batch 1, all rows interleaved in one run. Engine: packed inputs to logits and "
        "offsets; end to end: features to events; videos/s of `Localizer.stream`, where these overlap. Differences are "
        "to eager; the last columns say how many times as fast the engine is (median over the rounds, 95% bootstrap "
        "interval).",
        markdown_table(("network and engine", *differences, *times_header, *common_header, *ratio_header), first),
        "More videos in a call. OpenVINO runs a batch video after video.",
        markdown_table(("", "engine p50 ms", "ms per video", *common_header), batches),
        markdown_table(("graph", "nodes", "weights MB", "written in s"), written),
    ]
    absent = {c["name"]: c["not_measured"] for c in report["candidates"] if c["not_measured"]}
    if absent:
        parts.append("Not measured:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in absent.items()))
    return "\n\n".join(parts)


def _times_as_fast(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return ""
    return f"{1 / ratio['median']:.2f}x [{1 / ratio['high']:.2f}, {1 / ratio['low']:.2f}]"


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
