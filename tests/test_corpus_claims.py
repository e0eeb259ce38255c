"""Claims: one owner at a time; a dead one's claim is taken over, a living one's is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.corpus.claims import FileClaims
from runtime.corpus.store import LocalStore


@pytest.fixture
def claims(tmp_path: Path) -> Iterator[tuple[FileClaims, FileClaims]]:
    pair = FileClaims(tmp_path), FileClaims(tmp_path)
    yield pair
    for one in pair:
        one.close()


def test_a_shard_has_one_owner(claims: tuple[FileClaims, FileClaims], tmp_path: Path) -> None:
    mine, yours = claims
    assert mine.acquire(3) == 0
    assert mine.acquire(3) == 0  # to try it again
    assert yours.acquire(3) is None
    assert yours.acquire(4) == 0
    assert yours.attempts() == {}
    mine.release(3)
    assert yours.acquire(3) == 0
    mine.release(3)  # it is yours now
    assert mine.acquire(3) is None
    yours.close()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_goes_when_the_run_is_done_is_no_error(
    claims: tuple[FileClaims, FileClaims], tmp_path: Path
) -> None:
    mine, _ = claims
    assert mine.acquire(1) == 0
    shutil.rmtree(tmp_path)
    assert mine.attempts() == {}
    assert mine.acquire(2) == 0
    mine.release(1)


def claim_and_die(folder: Path, shard: int) -> None:
    """Claim a shard in a process that is killed before it releases it."""
    code = (
        "import os, signal; from pathlib import Path; from runtime.corpus.claims import FileClaims\n"
        f"assert FileClaims(Path({str(folder)!r})).acquire({shard}) is not None\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9


def test_the_claim_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    claim_and_die(tmp_path, 1)
    claim_and_die(tmp_path, 1)  # which takes over from the first
    claims = FileClaims(tmp_path)
    assert claims.attempts() == {1: 2}
    assert claims.acquire(1) == 2
    assert claims.attempts() == {}
    claims.close()
    assert os.listdir(tmp_path) == []


def test_a_process_that_ended_and_was_not_waited_for_is_dead_too(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from runtime.corpus.claims import FileClaims\n"
        "from runtime.files import atomic_file\n"
        "import os, signal\n"
        f"folder = Path({str(tmp_path)!r}); assert FileClaims(folder / 'claims').acquire(1) == 0\n"
        "with atomic_file(folder / 'shard') as stream: os.kill(os.getpid(), signal.SIGKILL)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        claims = FileClaims(tmp_path / "claims")
        assert claims.acquire(1) == 1
        claims.close()
        assert len(list(tmp_path.glob(".shard*"))) == 1
        LocalStore(tmp_path).tidy("")
        assert os.listdir(tmp_path) == ["claims"]


def elsewhere(folder: Path, shard: int, age: float) -> None:
    """Write the claim of a process on another machine, last touched `age` seconds ago."""
    path = folder / f"{shard:06d}"
    path.write_text(json.dumps({"token": "t", "machine": "another", "pid": 1, "started": "1", "attempts": 1}))
    os.utime(path, (time.time() - age,) * 2)


def test_the_claim_of_another_machine_is_taken_over_when_it_expired(
    claims: tuple[FileClaims, FileClaims], tmp_path: Path
) -> None:
    elsewhere(tmp_path, 1, age=100)
    elsewhere(tmp_path, 2, age=300)
    mine, _ = claims
    assert mine.attempts() == {2: 2}
    assert mine.acquire(1) is None
    assert mine.acquire(2) == 2


def test_a_claim_from_the_future_expires_too(claims: tuple[FileClaims, FileClaims], tmp_path: Path) -> None:
    elsewhere(tmp_path, 1, age=-100)  # the clocks of two machines
    elsewhere(tmp_path, 2, age=-3600)  # an owner that was last seen before the clock was set back
    mine, _ = claims
    assert mine.acquire(1) is None
    assert mine.acquire(2) == 2


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"pid": "x", "machine": 3}'])
def test_a_damaged_claim_expires_too(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "000001").write_bytes(content)
    claims = FileClaims(tmp_path)
    assert claims.acquire(1) is None
    os.utime(tmp_path / "000001", (time.time() - 300,) * 2)
    assert claims.acquire(1) == 1
    claims.close()


def test_an_owner_keeps_its_claim_fresh(tmp_path: Path) -> None:
    mine = FileClaims(tmp_path, beat_seconds=0.01)
    assert mine.acquire(1) == 0
    os.utime(tmp_path / "000001", (time.time() - 300,) * 2)
    deadline = time.monotonic() + 10
    while (tmp_path / "000001").stat().st_mtime < time.time() - 100:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    mine.close()


def test_many_take_over_at_once_and_one_has_it(tmp_path: Path) -> None:
    """Processes race for the claims of a dead one; nobody gets a claim that another one holds."""
    code = (
        "import sys, time; from pathlib import Path; from runtime.corpus.claims import FileClaims\n"
        f"claims = FileClaims(Path({str(tmp_path)!r})); sys.stdin.read(1)\n"
        "print([shard for shard in range(100) if claims.acquire(shard) is not None], flush=True); sys.stdin.read()"
    )
    for shard in range(100):
        elsewhere(tmp_path, shard, age=300)
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go")
        process.stdin.flush()
    owned = []
    for process in processes:
        assert process.stdout is not None
        owned += json.loads(process.stdout.readline())
    for process in processes:
        process.communicate()
    assert sorted(owned) == list(range(100))
