"""Temporary names of files and folders that are being written, and what killed processes left under such names."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

_LONGEST_STEM = 200
"""Bytes; file systems take names of 255."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of writing name `path`: the system names no file that is full, and ours has a temporary name."""
    try:
        yield
    except OSError as error:
        full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or _is_temporary(error.filename, path):
            error.filename = str(path)
        raise


def _is_temporary(name: object, path: Path) -> bool:
    return isinstance(name, str) and name.startswith(str(path.parent / temporary_prefix(path)))


def temporary_prefix(path: Path) -> str:
    """Return how the temporary names of this process begin: hidden, with its id and a mark of the machine."""
    return f".{temporary_stem(path)}.{os.getpid()}-{_machine()}."


def temporary_stem(path: Path) -> str:
    """Return what of a name goes into the temporary one: all of it, unless that would make it too long."""
    name = os.fsencode(path.name)
    if len(name) <= _LONGEST_STEM:
        return path.name
    return f"{path.name[: _LONGEST_STEM // 4]}-{hashlib.sha256(name).hexdigest()[:16]}"


def _machine() -> str:
    return f"{zlib.crc32(os.uname().nodename.encode()):08x}"


def orphans(folder: Path, target: str) -> list[Path]:
    """Return temporary files and folders of targets that match, of this user, whose process on this machine is gone."""
    name = re.compile(rf"\.{target}\." + r"(\d+)-" + _machine() + r"\..*\.(partial|old)", re.DOTALL)
    found = []
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return []
    for entry in entries:
        match = name.fullmatch(entry.name)
        if match is None or _is_running(int(match[1])):
            continue
        with contextlib.suppress(OSError):
            if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                found.append(Path(entry.path))
    return sorted(found)


@functools.cache
def tidy_files(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder, once: listing it for every file is slow."""
    for orphan in orphans(folder, ".*"):
        with contextlib.suppress(OSError):
            orphan.unlink()  # a folder stays: `recover_folder` may have to put it back


def remove_abandoned(folder: Path, *, older_than: float) -> None:
    """Remove temporary files in a folder whose process is gone, and those untouched for so many seconds."""
    tidy_files.__wrapped__(folder)
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if path.is_file() and time.time() - path.stat().st_mtime > older_than:
                path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return not is_zombie(pid)


def is_zombie(pid: int) -> bool:
    """Return whether a process has ended and its parent has not asked for its status, which some never do."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (OSError, IndexError):
        return False


def resolved(path: str | os.PathLike[str]) -> Path:
    """Return what a path points to in the end. Raises OSError where links lead in a circle."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    return target


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
