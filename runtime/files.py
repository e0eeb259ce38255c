"""Files that are either whole or absent: atomic writes, content hashes, safe ways to open what a user names."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from runtime.temporaries import naming, resolved, temporary_prefix, tidy_files, umask


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; it takes the name `path` only when the block ends without an error.

    The data reach the disk before the rename, so a kill or a full disk leaves either the old file or none. Of a link,
    what it points to is replaced. A pipe or a device is written to as it is, and so is standard output, named `-`.
    Raises IsADirectoryError for a folder.
    """
    encoding = None if "b" in mode else "utf-8"
    if is_stream(path):
        with naming(Path(path)), _open_stream(path, mode, encoding) as stream:
            yield stream
        return
    path = resolved(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "got a folder, expected the name of a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy_files(path.parent)
    with naming(path):
        handle, temporary = tempfile.mkstemp(prefix=temporary_prefix(path), suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, mode, encoding=encoding) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o666 & ~umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def create_file(path: Path, data: bytes) -> bool:
    """Write a file, whole, unless there is one of that name. Returns whether it was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        handle, name = tempfile.mkstemp(prefix=temporary_prefix(path), suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.chmod(name, 0o666 & ~umask())
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


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    with atomic_file(path, "w") as stream:
        json.dump(data, stream, indent=2, allow_nan=False)
        stream.write("\n")


def _open_stream(path: str | os.PathLike[str], mode: str, encoding: str | None) -> IO[Any]:
    if os.fspath(path) == "-":
        sys.stdout.flush()
        return open(os.dup(1), mode, encoding=encoding)
    return open(path, mode, encoding=encoding)


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Return whether what is written to `path` goes on to a reader or a device: a pipe, a terminal, or `-`."""
    if os.fspath(path) == "-":
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def check_output_file(path: str | os.PathLike[str]) -> None:
    """Raise OSError now where `atomic_file(path)` would later: a folder, or no place that can be written to."""
    if is_stream(path):
        return
    if not os.fspath(path):
        raise FileNotFoundError(errno.ENOENT, "got nothing, expected the name of a file")
    target = resolved(path)
    if target.is_dir() or os.fspath(path).endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, "got a folder, expected the name of a file", str(path))
    check_writable(target.parent)


def check_writable(folder: Path) -> None:
    """Raise OSError unless files can be made in a folder, which may have to be made itself."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "the folder can't be written to", str(there))


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


def is_sidecar(name: str) -> bool:
    """Return whether a file is what macOS writes beside another on foreign disks: `._a.npy` is no data of `._a`."""
    return name.startswith("._")


def file_identity(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Return what differs once a file was written to or replaced: nobody but root can set the time of change."""
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


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


def give_up(stream: IO[str]) -> None:
    """Send what is left of a stream nowhere, where it can't be written: else the flush at the end fails again."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
