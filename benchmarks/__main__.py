"""All benchmarks of this machine's processor: `python -m benchmarks` (what `make bench` runs).

Each benchmark runs in a process of its own; one that fails is reported at the end and does not take the others with it.
Compare with earlier results by `python -m benchmarks.compare OLD NEW`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from benchmarks.arguments import add_options

SIZED = ("latency", "growth", "roofline", "rtx_engines")
"""Benchmarks of the network; they take the shared options and share the exported graphs."""
FIXED = ("host_path", "postprocessing")
"""Benchmarks that do not depend on the network."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join((*SIZED, *FIXED))}; default: all")
    add_options(parser)
    options, shared = parser.parse_args(argv), list(argv if argv is not None else sys.argv[1:])
    unknown = sorted(set(options.names) - {*SIZED, *FIXED})
    if unknown:
        parser.error(f"unknown benchmark(s) {', '.join(unknown)}; known: {', '.join((*SIZED, *FIXED))}")
    shared = [item for item in shared if item not in options.names]
    failed = []
    for name in options.names or (*SIZED, *FIXED):
        begin = time.perf_counter()
        print(f"{name} ...", flush=True)
        arguments = shared if name in SIZED else ["--out", str(options.out)]
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], check=False)
        print(
            f"{name}: {'done' if done.returncode == 0 else 'FAILED'} in {time.perf_counter() - begin:.0f} s", flush=True
        )
        if done.returncode != 0:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
