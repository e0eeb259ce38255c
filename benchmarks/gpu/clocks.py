"""Clocks, power and temperature of the GPU while a stage runs, as nvidia-smi samples them."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

INTERVAL_MS = 200
FIELDS = {"clocks.sm": "sm_mhz", "power.draw": "power_w", "temperature.gpu": "celsius"}
REASONS = "clocks_event_reasons.active"
UNSTABLE = 0.025
"""Coefficient of variation of the SM clock above which times are of a changing machine."""


@contextlib.contextmanager
def sampled() -> Iterator[dict[str, Any]]:
    """Sample the first GPU while the block runs; the summary is filled in at its end, empty without nvidia-smi."""
    found: dict[str, Any] = {}
    query = f"--query-gpu={','.join((*FIELDS, REASONS))}"
    with tempfile.TemporaryFile("w+") as output:
        try:
            process = subprocess.Popen(
                ["nvidia-smi", "--id=0", query, "--format=csv,noheader,nounits", f"--loop-ms={INTERVAL_MS}"],
                stdout=output,
                stderr=subprocess.DEVNULL,
            )
        except OSError:
            yield found
            return
        try:
            yield found
        finally:
            process.terminate()
            process.wait()
            output.seek(0)
            found.update(summary(output.read()))


def summary(text: str) -> dict[str, Any]:
    """Summarize lines of `FIELDS` and `REASONS`: minimum, mean and maximum, and whether the SM clock was steady."""
    rows = [line.split(", ") for line in text.splitlines() if line.count(", ") == len(FIELDS)]
    found: dict[str, Any] = {}
    for index, name in enumerate(FIELDS.values()):
        with contextlib.suppress(ValueError):  # "[N/A]" on some cards
            values = np.array([float(row[index]) for row in rows])
            if len(values):
                found[name] = {"min": values.min(), "mean": values.mean(), "max": values.max()}
                if name == "sm_mhz":
                    found["unsteady"] = bool(values.std() > UNSTABLE * values.mean())
    if found:
        found |= {"samples": len(rows), "clock_reasons": sorted({row[-1].strip() for row in rows})}
    return found
