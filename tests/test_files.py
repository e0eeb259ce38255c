"""Atomic writes: whatever goes wrong while writing, the old content stays whole."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runtime.folders
from runtime.files import atomic_file, sha256_file, write_json
from runtime.folders import atomic_folder


def test_a_finished_write_replaces_the_file(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.json"
    write_json(target, {"a": 1})
    write_json(target, {"a": 2})
    assert target.read_text() == '{\n  "a": 2\n}\n'
    assert os.listdir(target.parent) == ["x.json"]


def test_an_error_inside_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")

    def write() -> None:
        with atomic_file(target) as stream:
            stream.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.json"
    write_json(target, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(target, "new")
    assert target.read_text() == '"old"\n'
    assert os.listdir(tmp_path) == ["x.json"]


def test_not_a_number_never_reaches_a_json_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert os.listdir(tmp_path) == []


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def fill(content: str, *, fail: bool) -> None:
        with atomic_folder(target) as folder:
            (folder / "a").write_text(content)
            if fail:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fill("never", fail=True)
    assert os.listdir(tmp_path) == []
    fill("first", fail=False)
    with pytest.raises(RuntimeError):
        fill("never", fail=True)
    assert (target / "a").read_text() == "first"
    fill("second", fail=False)
    assert (target / "a").read_text() == "second"
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "\U0001f415" * 63])
def test_the_longest_names(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, 1)
    with atomic_folder(tmp_path / f"{name[:-1]}y") as folder:
        (folder / "a").touch()
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("name", ["x", "a\nb", "y" * 250])
def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    target.write_bytes(b"old")
    code = (
        "import sys, time\n"
        "from runtime.files import atomic_file\n"
        "with atomic_file(sys.argv[1]) as stream:\n"
        "    stream.write(b'half'); stream.flush(); print('writing', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert target.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2
    write_json(tmp_path / "z", 1)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "z"])  # what the killed process left is gone


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_around_the_exchange_leaves_a_whole_folder(tmp_path: Path, moment: str) -> None:
    """And the next run removes what the killed one left, but not what a running one is writing."""
    target = tmp_path / "bundle"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    child = os.fork()
    if child == 0:
        original = runtime.folders.exchange

        def fatal(first: Path, second: Path) -> bool:
            if moment == "after":
                original(first, second)
            os.kill(os.getpid(), signal.SIGKILL)
            return True

        runtime.folders.exchange = fatal
        with atomic_folder(target) as folder:
            (folder / "a").write_text("new")
        os._exit(0)
    os.waitpid(child, 0)
    assert (target / "a").read_text() == {"before": "old", "after": "new"}[moment]
    assert len(os.listdir(tmp_path)) == 2
    with atomic_folder(target) as folder:
        (folder / "a").write_text("newest")
        with atomic_folder(target) as second:
            (second / "a").write_text("another")
        assert (folder / "a").read_text() == "newest"
    assert (target / "a").read_text() == "newest"
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("dangling", "link"):
        (tmp_path / name).symlink_to(tmp_path / "there" / name)
    (tmp_path / "there" / "link").write_text("old")
    for name in ("dangling", "link"):
        write_json(tmp_path / name, 1)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "there" / name).read_text() == "1\n"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True) as reader:
        write_json(tmp_path / "pipe", [1])
        assert reader.communicate(timeout=30)[0] == "[\n  1\n]\n"
    assert os.listdir(tmp_path) == ["pipe"]
    assert not (tmp_path / "pipe").is_file()


def test_a_folder_and_a_mount_point_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="got a folder"):
        write_json(tmp_path, 1)
    with pytest.raises(OSError, match="mount point"), atomic_folder("/proc"):
        pytest.fail("the block must not run")


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"ccnet" * 1_000_000)
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
