"""The page and the comparable numbers of `benchmarks.gpu.report`, from the outcomes of its stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.results import Measurement, markdown_table

Outcomes = Mapping[str, Mapping[str, Any]]

TIMES = {
    "device_ms": "device",
    "device_ms_without_graph": "device, no graph",
    "engine_ms": "engine",
    "end_to_end_ms": "end to end",
}
"""Times of a row: on the device alone, from host arrays to host arrays, from features to events."""


def measurements(done: Outcomes) -> list[Measurement]:
    """Return the numbers that can be compared between two reports."""
    found = []
    for name, row in _rows(done):
        batch = f"batch {row['batch']} / {name}"
        for key, label in TIMES.items():
            if key in row:
                found.append(Measurement(name=f"{batch} / {label} p50", value=row[key]["p50"], unit="ms"))
        rate = row["stream_videos_per_second"]["per_second"]
        found.append(Measurement(name=f"{batch} / throughput", value=rate, unit="videos/s", better="higher"))
    return found


def page(facts: Mapping[str, Any], done: Outcomes) -> str:
    """Write the page as Markdown: engines and their parity first, then speed, roofline, layers, and every stage."""
    sections = [
        f"# Engines on a GPU\n\nCommit {facts['commit']}. Written by `python -m benchmarks.gpu.report`.",
        _engines(done),
        _speeds(done),
        _copies(done),
        _contexts(done),
        _roofline(done),
        _layers(done),
        _stages(done),
    ]
    return "\n\n".join(section for section in sections if section)


def _result(done: Outcomes, name: str) -> Mapping[str, Any]:
    result: Mapping[str, Any] = done.get(name, {}).get("result") or {}
    return result


def _rows(done: Outcomes) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (name, row) of everything that was timed and whose parity check did not fail."""
    for name in done:
        result = _result(done, name)
        if result.get("status", {}).get("passed", True):
            for row in result.get("rows", []):
                yield name.removesuffix(" speed"), row


def _engines(done: Outcomes) -> str:
    rows = []
    for name, outcome in done.items():
        if name.endswith(" build"):
            engine = name.removesuffix(" build")
            result = _result(done, name)
            facts = result.get("engine", {})
            status = done.get(f"{engine} parity check", {})
            parity = "verified" if status.get("status") == "done" else str(status.get("error", "not run"))
            described = _result(done, f"{engine} speed").get("describe", {})
            rows.append(
                [
                    engine,
                    f"{facts['seconds']:.0f} s" if facts else str(outcome.get("error", ""))[:120],
                    str(result.get("profile", "")),
                    _mebibytes(facts.get("engine_bytes")),
                    _mebibytes(described.get("scratch_bytes")),
                    str(facts.get("delivered_precisions") or "unknown"),
                    parity[:160],
                ]
            )
    if not rows:
        return ""
    header = ["Engine", "Built in", "Batches", "Size", "Scratch", "Layers by precision", "Parity check"]
    return "## Engines\n\n" + markdown_table(header, rows)


def _speeds(done: Outcomes) -> str:
    rows = []
    for name, row in sorted(_rows(done), key=lambda item: item[1]["batch"]):
        times = [f"{row[key]['p50']:.3f} / {row[key]['p99']:.3f}" if key in row else "" for key in TIMES]
        rate = row["stream_videos_per_second"]["per_second"]
        rows.append([f"batch {row['batch']}, {name}", *times, f"{rate:.0f}", str(row.get("graph") or "")[:80]])
    if not rows:
        return ""
    header = ["Batch and engine", *(label.capitalize() for label in TIMES.values()), "Videos/s", "CUDA graph"]
    note = (
        "Milliseconds per batch, p50 / p99: on the device alone, back to back (of ONNX Runtime by the host's clock, "
        "its own work included); engine: host arrays to host arrays; end to end: features to events. Videos/s of "
        "`Localizer.stream`, where these overlap."
    )
    slow = "\n".join(f"- {line}" for line in _no_faster(done))
    return "\n\n".join(part for part in (f"## Speed\n\n{note}", markdown_table(header, rows), slow) if part)


def _no_faster(done: Outcomes) -> Iterator[str]:
    """Yield a line for each engine of fewer bits that is no faster than that of fp32: its layers may well be fp32."""
    times = {(name, row["batch"]): row["device_ms"]["p50"] for name, row in _rows(done) if "device_ms" in row}
    for (name, batch), milliseconds in times.items():
        for precision in ("fp16", "bf16", "fp8"):
            full = times.get((name.replace(precision, "fp32"), batch))
            if precision in name and full is not None and milliseconds >= full:
                yield f"batch {batch}, {name} is no faster than with fp32 ({full:.3f} ms)"


def _copies(done: Outcomes) -> str:
    """Say how batches get to the GPU fastest; `runtime.backends.tensorrt.context.Copies` explains the ways."""
    rows = []
    for name in done:
        if name.endswith(" copies"):
            result = _result(done, name)
            for batch, fastest in result.get("fastest", {}).items():
                ways = {row["candidate"]: row for row in result["ways"] if str(row["batch"]) == batch}
                shown = [
                    f"{row['engine_ms']['p50']:.3f} / {row['stream_videos_per_second']['per_second']:.0f}"
                    for row in ways.values()
                ]
                engine = f"batch {batch}, {name.removesuffix(' copies')}"
                rows.append([engine, *shown, fastest["latency"], fastest["throughput"]])
    if not rows:
        return ""
    header = ["Batch and engine", "stream", "graph", "steps", "fastest", "most videos/s"]
    note = "Engine p50 in ms / videos per second. Recorded in a bundle by `ccnet export --copies`."
    return f"## Copies before the graph, within it, of valid steps alone\n\n{note}\n\n" + markdown_table(header, rows)


def _contexts(done: Outcomes) -> str:
    rows, lines = [], []
    for name in done:
        if name.endswith(" contexts"):
            result, engine = _result(done, name), name.removesuffix(" contexts")
            for batch, rates in result.get("videos_per_second", {}).items():
                rows.append([f"batch {batch}, {engine}", *(f"{rate:.0f}" for rate in rates.values())])
            for priority, times in result.get("under_load_ms", {}).items():
                shown = f"{times['p50']:.3f} / {times['p99']:.3f} ms"
                lines.append(f"- one video on {engine}, {priority}, beside its largest batches: {shown} (p50 / p99)")
    if not rows:
        return ""
    table = markdown_table(["Batch and engine", "1 context", "2", "3"], rows)
    return "## Videos per second of contexts that share the GPU\n\n" + "\n\n".join([table, "\n".join(lines)])


def _roofline(done: Outcomes) -> str:
    copy, matmuls = _result(done, "copy"), _result(done, "matmuls")
    lines = []
    if copy:
        lines.append(
            f"- copy of {_mebibytes(copy['bytes'])}: {copy['bytes_per_second'] / 1e9:.0f} GB/s, read and written"
        )
    for precision, rate in matmuls.get("operations_per_second", {}).items():
        lines.append(f"- {precision} matmul of {matmuls['side']} x {matmuls['side']}: {rate / 1e12:.1f} TFLOP/s")
    return "## Roofline of this machine, same run\n\n" + "\n".join(lines) if lines else ""


def _layers(done: Outcomes) -> str:
    parts = []
    for name in done:
        if name.endswith(" layers"):
            for batch, found in _result(done, name).items():
                rows = [[layer[:100], f"{ms:.4f}", f"{ms / found['total_ms']:.1%}"] for layer, ms in found["slowest"]]
                total = f"{found['total_ms']:.3f} ms in {found['layers']} layers"
                title = f"{name.removesuffix(' layers')}, batch {batch}: {total}"
                parts.append(f"### {title}\n\n" + markdown_table(["Layer", "ms", "share"], rows))
    return "## Slowest layers (profiled without CUDA graphs)\n\n" + "\n\n".join(parts) if parts else ""


def _stages(done: Outcomes) -> str:
    rows = []
    for name, outcome in done.items():
        result = _result(done, name)
        fallback = result.get("engine", {}).get("fallback", "")
        told = outcome.get("error") or result.get("summary") or result.get("not_built") or fallback
        why = str(told or "")
        cell = " ".join(why.split()).replace("|", "/")[:300]
        clock = outcome.get("gpu", {}).get("sm_mhz")
        shown = "" if clock is None else f"{clock['min']:.0f} to {clock['max']:.0f}"
        unsteady = ", unsteady" if outcome.get("gpu", {}).get("unsteady") else ""
        rows.append([name, str(outcome["status"]), f"{outcome.get('seconds', 0):.1f}", shown + unsteady, cell])
    return "## Stages\n\n" + markdown_table(["Stage", "Outcome", "s", "SM clock, MHz", "Why"], rows) if rows else ""


def _mebibytes(count: Any) -> str:
    return f"{count / 2**20:.0f} MiB" if count else ""
