"""Feature files as people send them: one `.npz`, or the `.npy` files of a video as a form.

What an upload unpacks to is known before anything is unpacked, and bounded; nothing is unpickled.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import FeatureError, RequestError
from runtime.features import VideoFeatures, join_files, parse_npy
from runtime.schema import quote
from runtime.spec import AUDIO, VISUAL, ModelSpec

_MOST_FILES = 32
_DIRECTORY_BYTES = 1 << 14
_HEADER_BYTES = 1 << 14
_END, _END64 = b"PK\x05\x06", b"PK\x06\x07"


@dataclass(frozen=True)
class Form:
    """A form: files by their names, and other fields."""

    files: Mapping[str, bytes]
    fields: Mapping[str, str]


def features_of_files(files: Mapping[str, bytes | memoryview], spec: ModelSpec, name: str) -> VideoFeatures:
    """Return the features of one video from the contents of its `.npy` files.

    The files are told by the ends of their names, as in a feature folder (`spec.layout`), or are called `visual` and
    `audio`. Raises FeatureError, with `name` in front, for a missing file, and as `runtime.features.read_video`.
    """
    chosen = _choose(list(files), spec, name)
    visual, audio = ({file: parse_npy(files[file], f"{name}: {file}") for file in group} for group in chosen)
    return join_files(visual, audio, spec.visual_dim, spec.audio_dim, where=name)


def unpack_npz(body: bytes | bytearray, limit: int) -> dict[str, bytes]:
    """Return the files of an `.npz` archive by name, `limit` bytes at most of all together.

    Raises FeatureError for anything but an archive such as `numpy.savez` and `savez_compressed` write, RequestError
    (413) for one that unpacks to more.
    """
    _check_directory(body)
    unpacked: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            entries = archive.infolist()
            if len(entries) > _MOST_FILES:
                raise FeatureError(f"npz: holds {len(entries)} files, expected those of one video")
            if sum(entry.file_size for entry in entries) > limit:
                raise RequestError(f"npz: unpacks to more than {limit} bytes, the largest that is taken", status=413)
            for entry in entries:
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
                    raise FeatureError(f"npz: {quote(entry.filename, 60)}: packed in a way that numpy does not write")
                with archive.open(entry) as stream:
                    content = stream.read(entry.file_size + 1)  # without a number it may unpack far more at once
                if len(content) != entry.file_size:
                    raise FeatureError(f"npz: {quote(entry.filename, 60)}: truncated")
                unpacked[quote(entry.filename, 60)] = content
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError, struct.error) as error:
        raise FeatureError(f"npz: damaged, or no archive as numpy.savez writes it ({quote(error)})") from None
    return unpacked


def parse_form(body: bytes | bytearray, boundary: bytes) -> Form:
    """Parse a `multipart/form-data` body. Raises RequestError for one that is malformed or has too many parts."""
    parts = Parts()
    parts.parser(boundary)(bytes(body))
    parts.finish()
    return parts.form()


def _choose(names: list[str], spec: ModelSpec, where: str) -> tuple[list[str], list[str]]:
    """Return which files make up the visual and which the audio features, in the order of the layout."""
    plain = {name: name.removesuffix(".npy") for name in names}
    whole = {VISUAL: [n for n in names if plain[n] == VISUAL], AUDIO: [n for n in names if plain[n] == AUDIO]}
    groups: list[list[str]] = []
    for modality, suffixes in ((VISUAL, spec.layout.visual), (AUDIO, spec.layout.audio)):
        if whole[modality]:
            groups.append(whole[modality])
            continue
        group = []
        for suffix in suffixes:
            found = [name for name in names if plain[name].endswith(suffix) or plain[name] == suffix.lstrip("_")]
            if len(found) != 1:
                expected = " + ".join(f"*{s}.npy" for s in suffixes)
                what = f"has {len(found)} files *{suffix}.npy" if found else f"has no file *{suffix}.npy"
                got = ", ".join(quote(name, 60) for name in names) or "no files"
                raise FeatureError(f"{where}: {what}; got {got}, expected {expected} or {modality}.npy")
            group += found
        groups.append(group)
    return groups[0], groups[1]


def _check_directory(body: bytes | bytearray) -> None:
    """Check the end of an archive, before the list of its files is read: that list may be all there is to it."""
    end = body[-22:]
    if len(end) < 22 or end[:4] != _END or end[20:] != b"\0\0" or body[-42:-38] == _END64:
        raise FeatureError("npz: not an archive as numpy.savez writes it, or cut off; nothing else is unpacked")
    size = int.from_bytes(end[12:16], "little")
    if size > _DIRECTORY_BYTES:
        raise FeatureError(f"npz: its list of files has {size} bytes; expected the files of one video")


class Parts:
    """Collects the parts of a form from the parser's callbacks."""

    def __init__(self) -> None:
        self._ended = False
        self._files: dict[str, bytes] = {}
        self._fields: dict[str, str] = {}
        self._headers: dict[bytes, bytes] = {}
        self._field = self._value = b""
        self._header_bytes = 0
        self._content: list[bytes] = []

    def parser(self, boundary: bytes) -> Callable[[bytes], None]:
        """Return what takes the body, in pieces. It raises RequestError for one that is malformed."""
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import MultipartParser

        def refuse(error: FormParserError) -> RequestError:
            return RequestError(f"form: malformed ({quote(error)})")

        try:
            parser = MultipartParser(boundary, self.callbacks())  # type: ignore[arg-type]
        except FormParserError as error:
            raise refuse(error) from None

        def write(piece: bytes) -> None:
            try:
                parser.write(piece)
            except FormParserError as error:
                raise refuse(error) from None

        return write

    def finish(self) -> None:
        """Raise RequestError unless the body came to its end."""
        if not self._ended:
            raise RequestError("form: truncated")

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def form(self) -> Form:
        return Form(self._files, self._fields)

    def _begin(self) -> None:
        self._headers, self._field, self._value, self._content = {}, b"", b"", []
        self._header_bytes = 0
        if len(self._files) + len(self._fields) >= _MOST_FILES:
            raise RequestError(f"form: more than {_MOST_FILES} parts")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._value += data[start:end]

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > _HEADER_BYTES:
            raise RequestError(f"form: a part has more than {_HEADER_BYTES} bytes of headers")

    def _header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._content.append(data[start:end])

    def _end(self) -> None:
        name, file_name = self._names()
        content = b"".join(self._content)
        if file_name is not None:
            self._add(self._files, file_name or name, content)
            return
        try:
            self._add(self._fields, name, content.decode())
        except UnicodeDecodeError:
            raise RequestError("form: a field is not UTF-8") from None

    def _names(self) -> tuple[str, str | None]:
        """Return the name of this part, and the name of its file where it is one."""
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        try:
            name, file_name = (options[key].decode() if key in options else None for key in (b"name", b"filename"))
        except UnicodeDecodeError:
            raise RequestError("form: a name is not UTF-8") from None
        if name is None and file_name is None:
            raise RequestError("form: a part has neither a name nor a file name")
        return name or "", file_name

    def _add(self, parts: dict[str, Any], name: str, content: bytes | str) -> None:
        if name in parts:
            raise RequestError(f"form: two parts are called {quote(name, 60)}")
        parts[name] = content

    def _finish(self) -> None:
        self._ended = True
