"""Short versions of what `make soak` does for long: kills at system calls, and long runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
HERE = Path(__file__).parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE)))}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, which ends a process at a system call")
def test_a_kill_leaves_the_old_or_the_new_result() -> None:
    done = run(str(HERE / "kills.py"), "verify", "export (its writer)", "evaluate", "--kills", "3", "--json")
    if "Operation not permitted" in done.stderr:
        pytest.skip("strace is not permitted here")
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["wrong"] for row in rows] == [{}, {}, {}], done.stderr[-2000:]
    assert sum(row["kills"] for row in rows) == 9


def test_memory_threads_and_descriptors_do_not_grow() -> None:
    done = run(str(HERE / "soak.py"), "--share", "0.01")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_localizer_after_fork_says_so() -> None:
    """The threads of an engine library stay in the process that loaded it: a call would wait for them for ever."""
    code = """
import os
from builders import SPEC, OracleBackend, features_with
from runtime.errors import EngineError
from runtime.localizer import Localizer

localizer, video = Localizer([OracleBackend()], SPEC), features_with(20)
localizer(*video)
if os.fork() == 0:
    for use in (lambda: localizer(*video), lambda: localizer.stream([("a", video)])):
        try:
            use()
        except EngineError as error:
            assert "load one in each process" in str(error)
        else:
            os._exit(1)
    os._exit(0)
assert os.wait()[1] == 0
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
