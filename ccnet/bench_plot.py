"""The bench report as a picture: latency and throughput against batch size."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import MissingDependency
from runtime.files import atomic_file


def plot_bench(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw engine and end-to-end latency per call (p50, shaded to p95) and stream throughput of every candidate.

    Raises MissingDependency without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependency("matplotlib", "train", "drawing the bench report") from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault(f"{row['candidate']} (T = {row['length']})", []).append(row)
    for i, (name, rows) in enumerate(groups.items()):
        color = f"C{i % 10}"
        batches = [row["batch"] for row in rows]
        engine = [row["engine_ms"] for row in rows]
        latency.plot(batches, [e["p50"] for e in engine], "o-", color=color, label=name)
        latency.fill_between(batches, [e["p50"] for e in engine], [e["p95"] for e in engine], color=color, alpha=0.15)
        latency.plot(batches, [row["end_to_end_ms"]["p50"] for row in rows], "x:", color=color)
        rates = [row["stream_videos_per_second"]["per_second"] for row in rows]
        throughput.plot(batches, rates, "o-", color=color, label=name)
    latency.set(xlabel="batch", ylabel="ms per call", yscale="log", title="engine (solid, to p95), end to end (dotted)")
    throughput.set(xlabel="batch", ylabel="videos per second", title="stream: read, infer and decode overlapped")
    batches = sorted({row["batch"] for row in report["rows"]})
    for axes in (latency, throughput):
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
    throughput.margins(y=0.1)
    throughput.set_ylim(bottom=0)
    latency.legend(fontsize="small")
    machine = report["machine"]
    gpu = "".join(f", {g['name']}" for g in machine["gpus"] or ())
    figure.suptitle(f"{machine['cpu']}, {machine['cores']} cores{gpu}", fontsize="small")
    save_figure(figure, path)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure as PNG, atomically, without a date in it."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110, metadata={"Software": None})
    with atomic_file(path) as stream:
        stream.write(drawn.getvalue())
