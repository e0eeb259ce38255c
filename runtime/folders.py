"""Folders that are either whole or absent, and folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runtime.files import check_writable
from runtime.temporaries import naming, orphans, resolved, temporary_prefix, temporary_stem, umask

_LOCKED: set[str] = set()
"""Lock files that this process holds: to the system, a second lock of it is the same one."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_output_folder(path: str | os.PathLike[str], *, replaced: bool = False) -> None:
    """Raise OSError now where a folder could not be filled, or, if `replaced`, `atomic_folder(path)` later."""
    if not os.fspath(path):
        raise FileNotFoundError(errno.ENOENT, "got nothing, expected the name of a folder")
    target = resolved(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "got a file, expected the name of a folder", str(path))
    if replaced:
        _refuse_mount(target)
    check_writable(target.parent if replaced else target)


def _refuse_mount(path: Path) -> None:
    if _is_mount(path):
        raise OSError(errno.EBUSY, "a mount point can't be replaced; name a folder inside it", str(path))


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a temporary folder beside `path`; it takes the place of `path` only when the block ends well.

    On Linux the two are exchanged in one step, so that a whole folder is there at every moment. Of a link, what it
    points to is replaced; the link stays. Raises OSError for a mount point, which can't be replaced, before the block.
    """
    path = resolved(path)
    _refuse_mount(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    with naming(path):
        temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(path), suffix=".partial", dir=path.parent))
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~umask())
            if not path.exists():
                os.replace(temporary, path)
            elif exchange(temporary, path):
                shutil.rmtree(temporary)
            else:
                _replace_in_two_steps(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _replace_in_two_steps(temporary: Path, path: Path) -> None:
    """Replace a folder where the system can't exchange two; a kill in between is what `recover_folder` mends."""
    retired = Path(tempfile.mkdtemp(prefix=temporary_prefix(path), suffix=".old", dir=path.parent))
    try:
        os.replace(path, retired / "old")
        os.replace(temporary, path)
    except BaseException:
        if not path.exists():
            os.replace(retired / "old", path)
        shutil.rmtree(retired, ignore_errors=True)
        raise
    shutil.rmtree(retired)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two files or folders in one step. Return False where the system or the file system can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE))
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Tidy up after processes that were killed inside `atomic_folder(path)`.

    A kill between the two renames leaves the old folder under a hidden name: it is put back. Other leftovers go. What a
    process that still runs is writing stays.
    """
    path = Path(os.path.realpath(path))
    if not path.exists():
        for retired in orphans(path.parent, re.escape(temporary_stem(path))):
            if (retired / "old").is_dir():
                os.replace(retired / "old", path)
                break
    for orphan in orphans(path.parent, re.escape(temporary_stem(path))):
        shutil.rmtree(orphan, ignore_errors=True)


def _is_mount(path: Path) -> bool:
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return os.path.ismount(path)
    mounted = {line.split()[4].decode("unicode_escape", "replace") for line in lines}
    return str(path) in mounted


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes, and other threads of this one, out of a folder that is written to for a long time.

    The lock is of the file `.lock` in it and ends with the process, however that ends; processes that it started do not
    hold it. Raises FolderInUse, which says who has it. A file system without locks is used without one.
    """
    path = Path(folder) / ".lock"
    fresh = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    key = os.path.realpath(path)
    if key in _LOCKED:
        raise FolderInUse(f"process {os.getpid()}, this one")
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise FolderInUse(stream.read(200).strip() or "another process") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        _LOCKED.add(key)
        try:
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            stream.flush()
            yield
        finally:
            _LOCKED.discard(key)
            if fresh and os.listdir(path.parent) == [path.name]:  # nothing came of it
                path.unlink()
                path.parent.rmdir()


class FolderInUse(Exception):
    """A folder is locked; the text says by whom."""
