"""`ccnet doctor`: show which engines this machine can run, and what each of the others lacks."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from ccnet.cli.options import print_text
from runtime.backends.registry import REGISTRY
from runtime.machine import machine_facts
from runtime.packages import missing


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="show which engines this machine can use, and what others lack",
        description="Show this machine, which backends it can use, and what each of the others lacks. Exit status 1 "
        "when none can be used.",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Return 0 when at least one backend can be used here, else 1."""
    report = examine()
    if arguments.json:
        print_text(json.dumps(report, indent=2))
    else:
        print_text(_text(report))
    return 0 if any(row["usable"] for row in report["backends"].values()) else 1


def examine() -> dict[str, Any]:
    """Return `{"machine": facts, "backends": {name: {"usable", "detail"}}, "tools": {...}}`; never raises."""
    return {
        "machine": machine_facts(),
        "backends": {name: _tried(partial(entry.load().probe, name)) for name, entry in REGISTRY.items()},
        "tools": {name: _tried(probe) for name, probe in _TOOLS.items()},
    }


def _tried(probe: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"usable": True, "detail": probe()}
    except Exception as error:  # noqa: BLE001  a broken installation may raise anything, and that is the finding
        return {"usable": False, "detail": str(error) or type(error).__name__}


def _package(name: str, purpose: str) -> Callable[[], str]:
    """Return a probe that looks a package up without importing it, which can take seconds."""

    def probe() -> str:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            raise missing(name, purpose) from None

    return probe


def _suppression() -> str:
    from runtime.kernels.build import library_path
    from runtime.kernels.library import kernels

    kernels()
    return f"compiled kernels ready ({library_path().name})"


_TOOLS: dict[str, Callable[[], str]] = {
    "suppression": _suppression,
    "train": _package("torch", "training"),
    "export": _package("onnxscript", "exporting"),
    "parquet": _package("pyarrow", "writing Parquet"),
    "progress bar": _package("tqdm", "a progress bar (optional)"),
}


def _text(report: dict[str, Any]) -> str:
    machine = report["machine"]
    flags = " ".join(machine["cpu_flags"] or [])
    gpus = machine["gpus"]
    lines = [
        f"python      {machine['python']} on {machine['os']}",
        f"processor   {machine['cpu']}, {machine['cores']} core(s), {machine['memory_gib']} GiB; {flags}",
        *(
            [f"gpu         {g['name']}, driver {g['driver_version']}, {g['memory.total']}" for g in gpus]
            if gpus
            else ["gpu         none (nvidia-smi is absent, or shows none)"]
        ),
        "",
    ]
    for title in ("backends", "tools"):
        lines.append(title)
        lines += [
            f"  {'yes' if row['usable'] else 'no ':3} {name:17} {row['detail']}" for name, row in report[title].items()
        ]
    return "\n".join(lines)
