"""Files that are either whole or absent: atomic writes, content hashes, safe names."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; it takes the name `path` only when the block ends without an error.

    The data reach the disk before the rename, so a kill or a full disk leaves either the old file or none.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as stream:
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
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a temporary folder beside `path`; it takes the place of `path` only when the block ends well.

    Of a link, what it points to is replaced; the link stays.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            try:
                os.replace(path, retired / "old")
                os.replace(temporary, path)
            except BaseException:
                if not path.exists():
                    os.replace(retired / "old", path)
                shutil.rmtree(retired, ignore_errors=True)
                raise
            shutil.rmtree(retired)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Tidy up after a process that was killed inside `atomic_folder(path)`; call it only when nobody else writes there.

    A kill between the two renames leaves the old folder under a hidden name: it is put back. Other leftovers go.
    """
    path = Path(path).resolve()
    for retired in path.parent.glob(f".{path.name}.*.old"):
        if not path.exists() and (retired / "old").is_dir():
            os.replace(retired / "old", path)
        shutil.rmtree(retired, ignore_errors=True)
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    with atomic_file(path, "w") as stream:
        json.dump(data, stream, indent=2, allow_nan=False)
        stream.write("\n")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
