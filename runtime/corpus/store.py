"""Where a run is kept or its features lie: a local folder, or a folder of an object store that fsspec reaches.

Names inside a store are relative, with forward slashes. What is written to a store appears whole: a local file is
renamed into place, an object is put in one request.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import unquote, urlsplit

from runtime.errors import ConfigError
from runtime.files import atomic_file, create_file
from runtime.packages import import_package
from runtime.temporaries import remove_abandoned

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[a-z0-9]+)*://").match


ABANDONED_SECONDS = 3600.0
"""Age of a temporary file of another machine that nobody writes any more."""


class Store(Protocol):
    """A folder by its files. Every method raises OSError where the storage fails."""

    location: str
    """Absolute path, or URL, as another process can open it."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes `start` to `end` of a file. Raises FileNotFoundError when there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one of that name. Returns whether it was written."""

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files and folders in a folder, sorted; none where there is no such folder."""

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None where there is none."""

    def remove(self, name: str = "") -> None:
        """Remove a file or folder with all it holds, where it exists; by default the store itself."""

    def tidy(self, *folders: str) -> None:
        """Remove what processes that were killed left in folders."""


def is_url(location: str | os.PathLike[str]) -> bool:
    """Return whether a location is one for fsspec: a URL, but not one of a local file."""
    return bool(_URL(os.fspath(location))) and local_path(location) is None


def local_path(location: str | os.PathLike[str]) -> str | None:
    """Return the path of a local location, a plain path or `file://`; None for one of another file system."""
    text = os.fspath(location)
    if not _URL(text):
        return text
    parts = urlsplit(text)
    return unquote(parts.path) if parts.scheme in ("file", "local") and parts.netloc in ("", "localhost") else None


def open_store(location: str | os.PathLike[str]) -> Store:
    """Return the store at a path or URL; nothing is created.

    Raises MissingDependency for a URL without fsspec, ConfigError for one that fsspec can't serve.
    """
    path = local_path(location)
    return RemoteStore(os.fspath(location)) if path is None else LocalStore(path)


def join_location(folder: str, name: str) -> str:
    """Return the location of `name` in a folder that is a path or a URL; an absolute name stays as it is."""
    if _URL(name) or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if _URL(folder) else os.path.join(folder, name)


class LocalStore:
    """A folder of this machine's file systems, which it may share with others."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.location = str(self.folder)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        with open(self.folder / name, "rb") as stream:
            stream.seek(start)
            return stream.read() if end is None else stream.read(end - start)

    def write(self, name: str, data: bytes) -> None:
        with atomic_file(self.folder / name) as stream:
            stream.write(data)

    def create(self, name: str, data: bytes) -> bool:
        return create_file(self.folder / name, data)

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self.folder / folder))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None

    def remove(self, name: str = "") -> None:
        path = self.folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def tidy(self, *folders: str) -> None:
        for folder in folders:
            if (self.folder / folder).is_dir():
                remove_abandoned(self.folder / folder, older_than=ABANDONED_SECONDS)


class RemoteStore:
    """A folder behind an fsspec URL, such as `s3://bucket/features`."""

    def __init__(self, location: str) -> None:
        self.location = location
        fsspec = import_package("fsspec", f"{location}: a URL")
        try:
            self._fs, path = fsspec.core.url_to_fs(location)
        except (ImportError, ValueError) as error:  # the package of that file system is missing; no such protocol
            raise ConfigError(f"{location}: can't be opened by fsspec ({error})") from None
        self._root: str = path.rstrip("/")

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        data: bytes = self._fs.cat_file(self._path(name), start=start, end=end)
        return data

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(path, data)

    def create(self, name: str, data: bytes) -> bool:
        if self.size(name) is not None:  # object stores can't do it in one step; who comes second reads what is there
            return False
        self.write(name, data)
        return True

    def names(self, folder: str = "") -> list[str]:
        path = self._path(folder)
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted({str(name).rstrip("/").rpartition("/")[2] for name in found if str(name).rstrip("/") != path})

    def size(self, name: str) -> int | None:
        try:
            return int(self._fs.size(self._path(name)))
        except FileNotFoundError:
            return None

    def remove(self, name: str = "") -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def tidy(self, *folders: str) -> None:
        pass  # a request that was cut off leaves nothing

    @contextlib.contextmanager
    def open_whole(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file that is sent when the block ends without an error."""
        path = self._path(name)
        with tempfile.TemporaryDirectory(prefix="ccnet-") as folder:
            local = os.path.join(folder, "file")
            with open(local, "wb") as stream:
                yield stream
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(local, path)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


@contextlib.contextmanager
def whole_file(location: str) -> Iterator[Any]:
    """Open a file to write at a path or URL; it appears when the block ends without an error."""
    path = local_path(location)
    if path is not None:
        with atomic_file(path) as stream:
            yield stream
        return
    folder, _, name = location.rpartition("/")
    with RemoteStore(folder).open_whole(name) as stream:
        yield stream
