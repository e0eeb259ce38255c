"""The bench report as text: what ran, how exact it is, how fast, how it starts and what memory it takes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def bench_text(report: Mapping[str, Any]) -> str:
    """Return the machine and three tables: accuracy, speed, start and memory."""
    machine = report["machine"]
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores"
        + "".join(f"; {gpu['name']}, driver {gpu['driver_version']}" for gpu in machine["gpus"] or ())
        + f"; load {machine['load_average']}",
        _accuracy(report["candidates"]),
    ]
    if report["rows"]:
        parts.append(
            "Speed (ms per call; outside: end to end less the time inside the engine)\n" + _speed(report["rows"])
        )
    started = [c for c in report["candidates"] if c["cold_start"]]
    if started:
        parts.append("Cold start in a fresh process, and memory\n" + _starts(started))
    return "\n\n".join(parts)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns for a terminal: the first one left, the others right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join(line.rstrip() for line in lines)


def _accuracy(candidates: Sequence[Mapping[str, Any]]) -> str:
    """Return one line for each candidate: its status, and either its accuracy or why it was not measured."""
    lines = []
    for candidate in candidates:
        values = {k: v for k, v in candidate["accuracy"].items() if not isinstance(v, dict | list)}
        facts = ", ".join(f"{name} {_value(value)}" for name, value in values.items())
        reason = candidate["not_measured"] and f"not measured: {' '.join(candidate['not_measured'].split())}"
        lines.append("; ".join(filter(None, [f"{candidate['name']}: {candidate['status']}", reason, facts])))
    return "Accuracy\n" + "\n".join(lines)


def _speed(rows: Sequence[Mapping[str, Any]]) -> str:
    header = (
        *("candidate", "B", "engine p50", "p90", "p95", "p99", "mean", "end to end p50", "p99", "outside p50"),
        *("videos/s", "n", "time, first = 1 [95%]"),
    )
    lines = []
    for row in rows:
        engine, whole, outside = row["engine_ms"], row["end_to_end_ms"], row["outside_engine_ms"]
        r = row["engine_ratio"]
        lines.append(
            [
                row["candidate"],
                str(row["batch"]),
                *(_ms(engine[key]) for key in ("p50", "p90", "p95", "p99", "mean")),
                _ms(whole["p50"]),
                _ms(whole["p99"]),
                _ms(outside["p50"]),
                f"{row['stream_videos_per_second']['per_second']:.4g}",
                str(engine["n"]),
                f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]",
            ]
        )
    return text_table(header, lines)


def _starts(candidates: Sequence[Mapping[str, Any]]) -> str:
    header = ("candidate", "import s", "load s", "first result s", "process s", "n", "peak MB", "peak / weights")
    lines = []
    for candidate in candidates:
        runs = candidate["cold_start"]["runs"]
        seconds = [
            f"{statistics.median(run[key] for run in runs):.2f}"
            for key in ("import_s", "load_s", "first_result_s", "total_s")
        ]
        peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
        peak = statistics.median(peaks) if peaks else None
        weights = candidate["weight_bytes"]
        memory = ["-", "-"] if peak is None else [f"{peak / 1e6:.0f}", f"{peak / weights:.2f}" if weights else "-"]
        lines.append([candidate["name"], *seconds, str(len(runs)), *memory])
    return text_table(header, lines)


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
