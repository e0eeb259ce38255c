"""Files that are either whole or absent: atomic writes, content hashes, safe names."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_LOCKED: set[str] = set()
"""Lock files that this process holds: to the system, a second lock of it is the same one."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; it takes the name `path` only when the block ends without an error.

    The data reach the disk before the rename, so a kill or a full disk leaves either the old file or none. Of a link,
    what it points to is replaced. A pipe or a device is written to as it is, and so is standard output, named `-`.
    Raises IsADirectoryError for a folder.
    """
    encoding = None if "b" in mode else "utf-8"
    if is_stream(path):
        with _open_stream(path, mode, encoding) as stream:
            yield stream
        return
    path = _resolved(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "got a folder, expected the name of a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy_files(path.parent)
    with _naming(path):
        handle, temporary = tempfile.mkstemp(prefix=_prefix(path), suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, mode, encoding=encoding) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an error of writing name `path`: the system names no file that is full, and ours has a temporary name."""
    try:
        yield
    except OSError as error:
        full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or _is_temporary(error.filename, path):
            error.filename = str(path)
        raise


def _is_temporary(name: object, path: Path) -> bool:
    return isinstance(name, str) and name.startswith(str(path.parent / _prefix(path)))


def create_file(path: Path, data: bytes) -> bool:
    """Write a file, whole, unless there is one of that name. Returns whether it was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path):
        handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.chmod(name, 0o666 & ~_umask())
            return link_exclusively(Path(name), path)
        finally:
            os.unlink(name)


def link_exclusively(written: Path, path: Path) -> bool:
    """Give a file a second name, unless that is taken. Returns whether it got it."""
    try:
        os.link(written, path)  # unlike a rename, fails where the name is taken
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        try:  # a file system without hard links
            with open(path, "xb") as stream:
                stream.write(written.read_bytes())
        except FileExistsError:
            return False
    return True


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Return whether what is written to `path` goes on to a reader or a device: a pipe, a terminal, or `-`."""
    if os.fspath(path) == "-":
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading. Raises OSError for a pipe, a device or a folder, and does not wait for any of them."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return os.fdopen(handle, "rb")


def open_input(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open what a user names as an input: a file, or a pipe that this process was given, as `<(zcat F)` gives one.

    Raises OSError for anything else, and waits for none of it: a named pipe may have no writer, a device no end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISFIFO(mode) and os.path.realpath(path).startswith("/proc/"):
        os.set_blocking(handle, True)
    elif not stat.S_ISREG(mode):
        os.close(handle)
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe"}
        got = kinds.get(stat.S_IFMT(mode), "a device")
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, f"got {got}, expected a file", os.fspath(path))
    return os.fdopen(handle, "rb")


def file_identity(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Return what differs once a file was written to or replaced: nobody but root can set the time of change."""
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def user_cache_folder() -> Path | None:
    """Return this user's folder for compiled code, which nobody else can write to; None where there can be none.

    It is `ccnet` in $XDG_CACHE_HOME or ~/.cache, made with mode 700.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "ccnet"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
        if not folder.is_absolute() or not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
            return None
        if stat.S_IMODE(facts.st_mode) & 0o077:
            folder.chmod(0o700)
    except OSError:
        return None
    return folder


def check_output_file(path: str | os.PathLike[str]) -> None:
    """Raise OSError now where `atomic_file(path)` would later: a folder, or no place that can be written to."""
    if is_stream(path):
        return
    target = _resolved(path)
    if target.is_dir() or os.fspath(path).endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, "got a folder, expected the name of a file", str(path))
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "the folder can't be written to", str(parent))


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a temporary folder beside `path`; it takes the place of `path` only when the block ends well.

    On Linux the two are exchanged in one step, so that a whole folder is there at every moment. Of a link, what it
    points to is replaced; the link stays. Raises OSError for a mount point, which can't be replaced, before the block.
    """
    path = _resolved(path)
    if _is_mount(path):
        raise OSError(errno.EBUSY, "a mount point can't be replaced; name a folder inside it", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    with _naming(path):
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=".partial", dir=path.parent))
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
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
    retired = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=".old", dir=path.parent))
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


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Tidy up after processes that were killed inside `atomic_folder(path)`.

    A kill between the two renames leaves the old folder under a hidden name: it is put back. Other leftovers go. What a
    process that still runs is writing stays.
    """
    path = Path(os.path.realpath(path))
    if not path.exists():
        for retired in _orphans(path.parent, re.escape(path.name)):
            if (retired / "old").is_dir():
                os.replace(retired / "old", path)
                break
    for orphan in _orphans(path.parent, re.escape(path.name)):
        shutil.rmtree(orphan, ignore_errors=True)


@functools.cache
def _tidy_files(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder, once: listing it for every file is slow."""
    for orphan in _orphans(folder, ".*"):
        with contextlib.suppress(OSError):
            orphan.unlink()  # a folder stays: `recover_folder` may have to put it back


def remove_abandoned(folder: Path, *, older_than: float) -> None:
    """Remove temporary files in a folder whose process is gone, and those untouched for so many seconds."""
    _tidy_files.__wrapped__(folder)
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if path.is_file() and time.time() - path.stat().st_mtime > older_than:
                path.unlink()


def _prefix(path: Path) -> str:
    """Return how the temporary names of this process begin: hidden, with its id and a mark of the machine."""
    return f".{path.name}.{os.getpid()}-{_machine()}."


def _machine() -> str:
    return f"{zlib.crc32(os.uname().nodename.encode()):08x}"


def _orphans(folder: Path, target: str) -> list[Path]:
    """Return temporary files and folders of targets that match, of this user, whose process on this machine is gone."""
    name = re.compile(rf"\.{target}\." + r"(\d+)-" + _machine() + r"\..*\.(partial|old)")
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


def give_up(stream: IO[str]) -> None:
    """Send what is left of a stream nowhere, where it can't be written: else the flush at the end fails again."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _resolved(path: str | os.PathLike[str]) -> Path:
    """Return what a path points to in the end. Raises OSError where links lead in a circle."""
    resolved = Path(os.path.realpath(path))
    if resolved.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    return resolved


def _is_mount(path: Path) -> bool:
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return os.path.ismount(path)
    mounted = {line.split()[4].decode("unicode_escape", "replace") for line in lines}
    return str(path) in mounted


def _open_stream(path: str | os.PathLike[str], mode: str, encoding: str | None) -> IO[Any]:
    if os.fspath(path) == "-":
        sys.stdout.flush()
        return open(os.dup(1), mode, encoding=encoding)
    return open(path, mode, encoding=encoding)


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    with atomic_file(path, "w") as stream:
        json.dump(data, stream, indent=2, allow_nan=False)
        stream.write("\n")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
