"""Videos as people send them: in a form as `video`, or as the body itself; written to a file as they come."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import IO

from starlette.requests import Request

from runtime.errors import RequestError
from runtime.schema import quote
from runtime.serving.bodies import Body
from runtime.serving.uploads import Parts

_PIECE = 1 << 20
"""Bytes that are written at a time."""
_FIELD_BYTES = 1 << 12


class Upload:
    """A video file without a name on disk: nothing is left of it, however the server ends."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(prefix="ccnet-")  # noqa: SIM115  closed by whoever holds it
        self.fields: dict[str, str] = {}
        self.name = "video"
        """Of the file, without its ending."""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the disk is full, which was said
            self.file.close()


async def receive_upload(request: Request, body: Body, limit: int, upload: Upload) -> None:
    """Fill `upload` from the body of a request; nothing of a video stays in memory.

    Raises RequestError as `Body.pieces`, for a form that is malformed or has no video, and (507) for a full disk.
    """
    from python_multipart.multipart import parse_options_header

    kind, parameters = parse_options_header(request.headers.get("content-type", ""))
    write: Callable[[bytes], object] = upload.file.write
    parts = None
    if kind == b"multipart/form-data":
        parts = _VideoParts(upload.file)
        write = parts.parser(parameters.get(b"boundary", b""))
    try:
        waiting = bytearray()
        async for piece in body.pieces(request, limit):
            waiting += piece
            if len(waiting) >= _PIECE:
                await asyncio.to_thread(write, bytes(waiting))  # a disk may be slow, and a form of many line breaks
                waiting.clear()
        await asyncio.to_thread(write, bytes(waiting))
        await asyncio.to_thread(upload.file.flush)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise RequestError(f"the video can't be kept in {tempfile.gettempdir()} ({reason})", status=507) from None
    if parts is not None:
        parts.finish()
        upload.fields, upload.name = dict(parts.form().fields), parts.file_name


class _VideoParts(Parts):
    """The parts of a form of which `video` is a file that does not fit into memory."""

    def __init__(self, video: IO[bytes]) -> None:
        super().__init__()
        self._video = video
        self.file_name = "video"
        self._seen = self._inside = False
        self._bytes = 0

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {**super().callbacks(), "on_headers_finished": self._headers_finished}

    def finish(self) -> None:
        super().finish()
        if not self._seen:
            raise RequestError("form: has no file 'video'; curl sends one by -F video=@FILE")

    def _headers_finished(self) -> None:
        name, file_name = self._names()
        self._inside = name == "video" and file_name is not None
        if self._inside and self._seen:
            raise RequestError("form: two parts are called video")
        if not self._inside and file_name is not None:
            raise RequestError(f"form: got a file {quote(name, 60)}, expected one, called video")
        if self._inside:
            self._seen = True
            self.file_name = PurePosixPath((file_name or "").replace("\\", "/")).stem or "video"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._inside:
            self._video.write(data[start:end])
            return
        self._bytes += end - start
        if self._bytes > _FIELD_BYTES:
            raise RequestError(f"form: more than {_FIELD_BYTES} bytes beside the video", status=413)
        super()._data(data, start, end)

    def _end(self) -> None:
        if not self._inside:
            super()._end()
