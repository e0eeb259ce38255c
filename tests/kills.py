"""Kills at system calls that change a file: what is left is the old or the new result, and the next run tidies up.

`python tests/kills.py [--kills N] [CASE ...]` runs every case in child processes that strace ends at one call each, N
of all the calls of all cases, evenly chosen, and prints a table; exit status 1 where something was lost. For each: the
result is whole, the same command then succeeds and makes the same bytes, and nothing hidden is left beside the result.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kill_cases
import numpy as np
from kill_cases import CASES, Case

CALLS = (
    *(
        "open",
        "openat",
        "creat",
        "write",
        "pwrite64",
        "writev",
        "rename",
        "renameat",
        "renameat2",
        "unlink",
        "unlinkat",
    ),
    *("mkdir", "mkdirat", "rmdir", "ftruncate", "truncate", "fsync", "chmod", "fchmod", "link", "symlink"),
)
TIMEOUT = 120


def run_child(act: Callable[[Path], object], folder: Path, trace: Sequence[str] = (), *, late: bool = False) -> int:
    """Run in a child process; return how it ended as `os.waitpid` codes it.

    strace with these options is attached before `act`, or, if `late`, where that calls `kill_cases.begin`.
    """
    waiting, go = os.pipe()
    told, begins = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        os.close(told)

        def begin() -> None:
            os.write(begins, b"x")
            os.close(begins)
            os.read(waiting, 1)
            kill_cases.begin = lambda: None

        kill_cases.begin = begin
        quiet = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            signal.alarm(TIMEOUT)
            if not late:
                begin()
            act(folder)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(waiting)
    os.close(begins)
    tracer = None
    if os.read(told, 1) and trace:  # else it has ended before anything begins
        tracer = subprocess.Popen(["strace", *trace, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        if "attached" not in (line := tracer.stderr.readline()):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise OSError(f"strace: {line.strip()}")
    os.close(go)
    _, status = os.waitpid(pid, 0)
    if tracer is not None:
        tracer.communicate()
    os.close(told)
    return status


def changing_calls(log: str) -> list[tuple[str, int]]:
    """Return (call, how many of its kind it is) of the calls in a log of strace that change a file, of any thread."""
    seen: Counter[tuple[str, str]] = Counter()
    points: dict[tuple[str, int], None] = {}
    for line in log.splitlines():
        match = re.match(r"(\d*) *(\w+)\(", line)
        if match is None:
            continue
        thread, call = match.groups()
        seen[thread, call] += 1  # strace counts by thread, too
        if call not in ("open", "openat") or "O_WRONLY" in line or "O_RDWR" in line:
            points[call, seen[thread, call]] = None
    return [*points]


def prepare(case: Case, folder: Path) -> None:
    """Prepare in a child: the process that forks has no threads of a library."""
    if status := run_child(case.prepare, folder):
        raise RuntimeError(f"{case.name}: preparing ends with {status}: {Path(f'{folder}.log').read_text()[-500:]}")


def find_points(case: Case, folder: Path) -> list[tuple[str, int]]:
    """Run a case to its end, and return the calls at which it can be killed."""
    log = folder.parent / "calls"
    trace = ["-e", f"trace={','.join(f'?{call}' for call in CALLS)}", "-o", str(log), *_threads(case)]
    if status := run_child(case.act, folder, trace, late=case.late):
        raise RuntimeError(f"{case.name}: ends with {status} when it is left alone")
    return changing_calls(log.read_text(errors="replace"))


def _threads(case: Case) -> list[str]:
    return ["-f"] if case.threads else []


def result(case: Case, folder: Path) -> dict[str, bytes]:
    """Return the files of a result that are the same after every run, by their names."""
    found = (path for pattern in case.same for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def kill_at(case: Case, before: Path, whole: Path, folder: Path, point: tuple[str, int]) -> str | None:
    """Kill a case at one call; return what is wrong afterwards, or None. `whole`: where nobody killed it."""
    shutil.copytree(before, folder, symlinks=True)
    call, number = point
    trace = ["-o", os.devnull, "-e", f"inject={call}:signal=KILL:when={number}", *_threads(case)]
    status = run_child(case.act, folder, trace, late=case.late)
    if status and not os.WIFSIGNALED(status):
        return f"not killed: {(folder.parent / f'{folder.name}.log').read_text()[-300:]}"
    try:
        case.check(folder)
    except Exception as error:  # noqa: BLE001
        return f"after the kill: {error!r}"
    if run_child(case.act, folder):
        return f"the next run fails: {(folder.parent / f'{folder.name}.log').read_text()[-300:]}"
    try:
        case.check(folder)
    except Exception as error:  # noqa: BLE001
        return f"after the next run: {error!r}"
    there, wanted = result(case, folder), result(case, whole)
    if other := sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name)):
        return f"not the bytes of a run left alone: {', '.join(other)}"
    orphans = [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".lock"]
    return f"left behind: {', '.join(orphans)}" if orphans else None


def run_case(case: Case, kills: int | None) -> dict[str, Any]:
    """Kill a case at `kills` of its calls, evenly chosen; None: at all. Return the row of the table."""
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        root = Path(name)
        (root / "before").mkdir()
        prepare(case, root / "before")
        shutil.copytree(root / "before", root / "whole", symlinks=True)
        points = find_points(case, root / "whole")
        count = min(len(points), *(limit for limit in (kills, case.most) if limit is not None), len(points))
        chosen = [points[i] for i in np.unique(np.linspace(0, len(points) - 1, count).round().astype(int))]
        wrong = {}
        for number, point in enumerate(chosen):
            if problem := kill_at(case, root / "before", root / "whole", root / f"killed{number}", point):
                wrong["{}:{}".format(*point)] = problem
            shutil.rmtree(root / f"killed{number}")
        return {"case": case.name, "calls": len(points), "kills": len(chosen), "wrong": wrong}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--kills", type=int, metavar="N", help="of each case; default: at every call")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    rows = []
    for case in CASES:
        if arguments.cases and not {case.name, case.name.split()[0]} & {*arguments.cases}:
            continue
        rows.append(run_case(case, arguments.kills))
        if not arguments.json:
            row = rows[-1]
            print(
                f"{row['case']:<28} {row['calls']:5} calls {row['kills']:5} kills {len(row['wrong']):3} wrong",
                flush=True,
            )
            for point, problem in row["wrong"].items():
                print(f"    {point}: {problem}")
    if arguments.json:
        print(json.dumps(rows))
    else:
        print(f"{sum(row['kills'] for row in rows)} kills")
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
