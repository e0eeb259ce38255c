"""Claims: who is at which shard, so that processes that share a run's folder don't do the same work twice.

A claim is a small file that its owner touches now and then. It is void when its owner is a process of this machine that
is gone, or was not seen for `EXPIRES_SECONDS`; then whoever comes next takes it over. Nothing that is written depends
on claims being right: two processes at one shard write the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from runtime.files import link_exclusively
from runtime.records import BadRecord, parse_json
from runtime.temporaries import is_zombie

BEAT_SECONDS = 20.0
EXPIRES_SECONDS = 180.0
"""More than a network file system may show an old time of a file (60 s by default) and some missed beats."""


class Claims(Protocol):
    """What a run needs of claims."""

    def acquire(self, shard: int) -> int | None:
        """Claim a shard. Returns how many owners died at it before; None where another living one has it."""

    def release(self, shard: int) -> None:
        """Give up the claim of a shard."""

    def attempts(self) -> dict[int, int]:
        """Return how many owners died at a shard, of those where any did and nobody is now."""

    def close(self) -> None:
        """Release all claims."""


class NoClaims:
    """For stores where a file can't be created exclusively. Processes there need parts of their own."""

    def acquire(self, shard: int) -> int | None:
        return 0

    def release(self, shard: int) -> None:
        pass

    def attempts(self) -> dict[int, int]:
        return {}

    def close(self) -> None:
        pass


class FileClaims:
    """Claims as files of a local or shared folder, by shard number."""

    def __init__(
        self, folder: Path, *, beat_seconds: float = BEAT_SECONDS, expires_seconds: float = EXPIRES_SECONDS
    ) -> None:
        self._folder = folder
        self._expires = expires_seconds
        self._owner = {"token": os.urandom(8).hex(), **_this_process()}
        self._held: set[int] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._beat_seconds = beat_seconds
        self._thread = threading.Thread(target=self._beat, name="ccnet-claims", daemon=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def acquire(self, shard: int) -> int | None:
        if shard in self._held:
            return 0
        while True:
            try:
                attempts = self._acquire(shard)
                break
            except FileNotFoundError:  # another process found the whole run done, and removed the folder
                self._folder.mkdir(parents=True, exist_ok=True)
        if attempts is not None:
            with self._lock:
                self._held.add(shard)
        return attempts

    def _acquire(self, shard: int) -> int | None:
        path = self._path(shard)
        temporary = self._folder / f".{path.name}.{self._owner['token']}"
        try:
            temporary.write_text(json.dumps({**self._owner, "attempts": 0}))
            if link_exclusively(temporary, path):
                return 0
            with self._alone():
                if not self._is_void(path, now=temporary.stat().st_mtime):
                    return None
                attempts = _attempts(_read(path)) + 1
                temporary.write_text(json.dumps({**self._owner, "attempts": attempts}))
                os.replace(temporary, path)
                return attempts
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process at a time take claims over; all, where the file system knows no locks."""
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def release(self, shard: int) -> None:
        with self._lock:
            self._held.discard(shard)
        path = self._path(shard)
        with contextlib.suppress(OSError):  # it may have been taken over, and be gone
            if _read(path).get("token") == self._owner["token"]:
                path.unlink()

    def attempts(self) -> dict[int, int]:
        now_file = self._folder / f".now.{self._owner['token']}"
        found = {}
        with contextlib.suppress(FileNotFoundError):  # as above
            try:
                now_file.write_bytes(b"")
                now = now_file.stat().st_mtime
                for path in self._folder.iterdir():
                    if path.name.isdecimal() and self._is_void(path, now):
                        found[int(path.name)] = _attempts(_read(path)) + 1
            finally:
                now_file.unlink(missing_ok=True)
        return found

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        for shard in sorted(self._held):
            self.release(shard)

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard:06d}"

    def _is_void(self, path: Path, now: float) -> bool:
        try:
            age = now - path.stat().st_mtime  # both times are of the file system's own clock
        except FileNotFoundError:
            return False
        # A time in the future is of before the clock was set back; who lives has touched the file since.
        return abs(age) > self._expires or _is_gone(_read(path))

    def _beat(self) -> None:
        while not self._closed.wait(self._beat_seconds):
            with self._lock:
                held = sorted(self._held)
            for shard in held:
                with contextlib.suppress(OSError):
                    os.utime(self._path(shard))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(path.read_bytes())
    except (OSError, BadRecord):
        return {}
    return data if isinstance(data, dict) else {}


def _attempts(claim: dict[str, Any]) -> int:
    value = claim.get("attempts", 0)
    return value if isinstance(value, int) else 0


def _this_process() -> dict[str, Any]:
    """Return what tells this process from all others: its machine since it was booted, its namespace, id and start."""
    return {"host": os.uname().nodename, "machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return when a process started, in clock ticks since the boot; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_gone(claim: dict[str, Any]) -> bool:
    """Return whether a claim's owner is known to be gone: a process of this machine that does not run any more."""
    machine, pid = claim.get("machine"), claim.get("pid")
    if machine is None or machine != _machine() or not isinstance(pid, int):
        return False
    return _started(pid) != claim.get("started") or is_zombie(pid)
