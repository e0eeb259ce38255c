"""The results of a benchmark: one JSON with the machine and named measurements, and one Markdown page.

`measurements` is a flat list that `benchmarks.compare` understands; everything else in the JSON is for reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from runtime.files import atomic_file, write_json
from runtime.machine import machine_facts

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number that can be compared with the same number of another day."""

    name: str
    """Unique in its file, for example `batch 1 / openvino-fp32 / engine p50`."""
    value: float
    unit: str
    better: Literal["lower", "higher"] = "lower"

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def write_result(
    folder: Path,
    kind: str,
    *,
    measurements: Sequence[Measurement],
    page: str,
    machine: Mapping[str, Any] | None = None,
    **details: Any,
) -> Path:
    """Write `<kind>.json` and `<kind>.md` into `folder`, atomically; returns the path of the JSON.

    `machine` should be the facts taken before the measurement; without it they are taken now.
    """
    names = [m.name for m in measurements]
    if len(set(names)) != len(names):
        raise ValueError(f"{kind}: measurement names are not unique: {sorted(n for n in names if names.count(n) > 1)}")
    data = {
        "schema": SCHEMA,
        "kind": kind,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": dict(machine or machine_facts()),
        "measurements": [m.to_json() for m in measurements],
        **details,
    }
    path = folder / f"{kind}.json"
    write_json(path, data)
    with atomic_file(folder / f"{kind}.md", "w") as stream:
        stream.write(page.rstrip() + "\n\n" + machine_note(data["machine"]) + "\n")
    return path


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; the first column is left-aligned, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def machine_note(machine: Mapping[str, Any]) -> str:
    """Say in one paragraph what the numbers above were measured on."""
    flags = ", ".join(machine.get("cpu_flags") or []) or "unknown"
    libraries = ", ".join(f"{k} {v}" for k, v in machine.get("libraries", {}).items() if k != "ccnet")
    gpus = machine.get("gpus")
    gpu = "no GPU" if not gpus else ", ".join(f"{g['name']} (driver {g['driver_version']})" for g in gpus)
    load = machine.get("load_average")
    return (
        f"Machine: {machine.get('cpu')}, {machine.get('cores')} cores ({flags}), {machine.get('memory_gib')} GiB, {gpu}"
        f"; {machine.get('os')}, Python {machine.get('python')}; {libraries}. "
        f"Load average before the run: {'unknown' if load is None else ', '.join(map(str, load))}."
    )
