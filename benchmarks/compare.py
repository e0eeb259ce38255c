"""Have the results changed since the previous run? `python -m benchmarks.compare OLD NEW` (folders or JSON files).

Numbers of different machines are not compared at all: a difference in processor, cores, GPU, or in the major.minor
version of Python or of a library that took part is an error that lists the differences.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import markdown_table
from runtime.errors import CCNetError

NOTICE = 0.05
"""Relative changes below this are not called faster or slower."""


class Incomparable(CCNetError):
    """Two files were not measured on the same kind of machine, or are not benchmark results."""


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[list[str]]:
    """Return rows (name, old, new, new / old, verdict) for every measurement of either result.

    Raises Incomparable when the machines differ.
    """
    differences = machine_differences(old["machine"], new["machine"])
    if differences:
        raise Incomparable(
            f"{new.get('kind', 'results')}: refused to compare results of different machines: " + "; ".join(differences)
        )
    before = {m["name"]: m for m in old["measurements"]}
    after = {m["name"]: m for m in new["measurements"]}
    rows = []
    for name in [*before, *(n for n in after if n not in before)]:
        if name not in before or name not in after:
            there, verdict = (before, "gone") if name in before else (after, "new")
            text = _number(there[name])
            rows.append([name, text if verdict == "gone" else "", text if verdict == "new" else "", "", verdict])
            continue
        change = after[name]["value"] / before[name]["value"] if before[name]["value"] else float("inf")
        verdict = _verdict(change, after[name]["better"])
        rows.append([name, _number(before[name]), _number(after[name]), f"{change:.3f}", verdict])
    return rows


def machine_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return what makes two machines too different to compare numbers; empty when nothing does."""
    a, b = _compared_facts(old), _compared_facts(new)
    return [f"{key}: {a.get(key)} against {b.get(key)}" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def _compared_facts(machine: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts that have to agree, as text."""
    facts = {key: str(machine.get(key)) for key in ("cpu", "cores", "cpu_flags")}
    facts["gpus"] = str([(g.get("name"), g.get("mig.mode.current")) for g in machine.get("gpus") or []])
    facts["python"] = _major_minor(str(machine.get("python")))
    for name, version in machine.get("libraries", {}).items():
        if name != "ccnet":
            facts[name] = _major_minor(version)
    return facts


def _major_minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _verdict(change: float, better: str) -> str:
    if abs(change - 1) <= NOTICE:
        return "same"
    return "better" if (change < 1) == (better == "lower") else "WORSE"


def _number(measurement: Mapping[str, Any]) -> str:
    return f"{measurement['value']:.4g} {measurement['unit']}"


def _results(path: Path) -> dict[str, dict[str, Any]]:
    """Read result files, by name. Raises Incomparable where there is none, or one that can't be read."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = {}
    for file in files:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise Incomparable(f"{file}: can't be read as a benchmark result ({error})") from error
        if isinstance(data, dict) and "measurements" in data and "machine" in data:
            found[file.name] = data
        elif not path.is_dir():
            raise Incomparable(f"{file}: not a benchmark result, which has 'measurements' and 'machine'")
    if not found:
        raise Incomparable(f"{path}: no benchmark results; 'python -m benchmarks --out DIR' makes them")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path, help="previous results: a folder, or one JSON file")
    parser.add_argument("new", type=Path, help="new results: a folder, or one JSON file")
    arguments = parser.parse_args(argv)
    try:
        old, new = _results(arguments.old), _results(arguments.new)
        if arguments.old.is_file() and arguments.new.is_file():
            pairs = [(arguments.new.name, next(iter(old.values())), next(iter(new.values())))]
        else:
            pairs = [(name, old[name], new[name]) for name in old if name in new]
        if not pairs:
            raise Incomparable(f"{arguments.old} and {arguments.new} have no result file in common")
        for name, before, after in pairs:
            print(f"\n{name}: {before['created']} -> {after['created']}")
            print(markdown_table(("measurement", "old", "new", "new / old", ""), compare(before, after)))
    except CCNetError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
