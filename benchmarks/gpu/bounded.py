"""Processes that end in time, with all that they have started."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.signals import StopRequest

LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Ended:
    """A process that has ended, or was."""

    status: int
    output: str
    """Of standard output and standard error."""
    why_killed: str = ""
    interrupted: bool = False
    """This process was asked to stop: by Ctrl-C, or by SIGTERM, as where a machine is lent for a while."""


def run_bounded(command: Sequence[str], limit: float, *, cwd: Path, environment: Mapping[str, str]) -> Ended:
    """Run a process, and end it and what it has started when it takes longer than `limit` seconds, or at Ctrl-C."""
    why, end = "", time.monotonic() + limit
    # a file, not a pipe: nobody waits for what a process leaves behind
    with tempfile.TemporaryFile("w+", errors="replace") as output, StopRequest() as stop:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while not why:
                try:
                    process.wait(max(0.0, min(LOOK_SECONDS, end - time.monotonic())))
                    break
                except subprocess.TimeoutExpired:
                    if stop.requested:
                        why = "the report was interrupted"
                    elif time.monotonic() >= end:
                        why = f"took longer than {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return Ended(process.returncode, output.read(), why, stop.requested)
