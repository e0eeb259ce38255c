"""From nothing to the first events: import, load and first result of a bundle, and the memory that takes.

`python -m runtime.profiling.cold_start BUNDLE ENGINE` is the fresh process; it prints one JSON object with seconds and
bytes. The first events are those of one video of full length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runtime.errors import BackendUnavailable, CCNetError, EngineError
from runtime.machine import peak_rss_bytes, rss_bytes

_TIMEOUT_S = 600.0
_CHILD = """import sys
sys.path[0] = sys.argv.pop(1)  # in place of the current folder
from runtime.profiling.cold_start import main
sys.exit(main())"""


def measure_cold_start(bundle: Path, engine: str, *, repeats: int = 3) -> dict[str, Any]:
    """Run this module `repeats` times in fresh processes, one after the other; every run is kept.

    `engine`: its name in the manifest of `bundle`.

    Returns `{"runs": [...]}`: seconds for import_s, load_s, first_result_s and total_s (process start to exit), bytes
    for imported_bytes, loaded_bytes and peak_bytes. Raises EngineError with the child's message when a run fails.
    """
    runs = []
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        # Not -m, which looks for packages in the current folder first.
        command = [sys.executable, "-c", _CHILD, str(Path(__file__).parents[2]), str(bundle), engine]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"cold start: no result after {_TIMEOUT_S:.0f} s: {' '.join(command)}") from error
        total = (time.perf_counter_ns() - begin) / 1e9
        if done.returncode != 0:
            raise EngineError(f"cold start failed: {' '.join(command)}: {done.stderr.strip()[-2000:]}")
        runs.append({**json.loads(done.stdout.splitlines()[-1]), "total_s": total})
    return {"runs": runs}


def main(argv: list[str] | None = None) -> int:
    """Open an engine and localize one video; print the times and the memory that this process took."""
    parser = argparse.ArgumentParser(prog="runtime.profiling.cold_start")
    parser.add_argument("bundle")
    parser.add_argument("engine", help="its name in the manifest")
    arguments = parser.parse_args(argv)
    begin = time.perf_counter_ns()
    import runtime.localizer
    from runtime.backends.select import load_engine
    from runtime.bundle import read_bundle
    from runtime.profiling.workload import sample_videos

    imported = time.perf_counter_ns()
    imported_bytes = rss_bytes()
    try:
        bundle = read_bundle(arguments.bundle)
        engine = next((e for e in bundle.manifest.engines if e.name == arguments.engine), None)
        if engine is None:
            raise BackendUnavailable(f"{bundle.folder} has no engine '{arguments.engine}'")
        backend = load_engine(bundle, engine)
        localizer = runtime.localizer.Localizer([backend], backend.spec)
        loaded = time.perf_counter_ns()
        loaded_bytes = rss_bytes()
        (video,) = sample_videos(backend.spec, 1)
        sampled = time.perf_counter_ns()
        localizer(video.visual, video.audio)
        done = time.perf_counter_ns()
    except CCNetError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    result = {
        "import_s": (imported - begin) / 1e9,
        "load_s": (loaded - imported) / 1e9,
        "first_result_s": (done - sampled) / 1e9,
        "imported_bytes": imported_bytes,
        "loaded_bytes": loaded_bytes,
        "peak_bytes": peak_rss_bytes(),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
