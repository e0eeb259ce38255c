"""The command line that all benchmarks of the network share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.networks import Networks, benchmark_config
from benchmarks.results import RESULTS
from ccnet.cli.logs import reporting
from runtime.errors import BackendUnavailable, CCNetError
from runtime.profiling.timing import Rules

WORK = Path(__file__).resolve().parents[1] / "build" / "benchmarks"


@dataclass(frozen=True)
class Setting:
    """What to benchmark, by which rules, and where the results go."""

    networks: Networks
    out: Path
    rules: Rules
    compiled: bool = True
    """Whether torch.compile takes part."""


def main(run: Callable[[Setting], Path], description: str | None, argv: list[str] | None = None) -> int:
    """Run one benchmark with the shared options and print the path of its results. Returns the exit status.

    A benchmark whose library is not here is left out; that is not a failure.
    """
    parser = argparse.ArgumentParser(description=description)
    add_options(parser)
    options = parser.parse_args(argv)
    try:
        with reporting():
            print(run(setting(options)))
    except BackendUnavailable as error:
        print(f"left out: {error}", file=sys.stderr)
    except CCNetError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the shared options."""
    parser.add_argument("--preset", default="unav100", help="size of the network (default: the paper's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of checkpoint and graphs, reused (default: build/benchmarks)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured seconds per candidate, at least")
    parser.add_argument("--calls", type=int, default=10, help="measured calls per candidate, at least")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out: compiling takes minutes on few cores"
    )


def setting(options: argparse.Namespace) -> Setting:
    """Return what the options say. Raises ConfigError for an unknown preset."""
    config = benchmark_config(options.preset)
    work = options.work or WORK / options.preset
    rules = Rules(warmup_seconds=min(0.5, options.seconds), seconds=options.seconds, calls=options.calls)
    return Setting(Networks(work, config), options.out, rules, compiled=not options.no_compile)
