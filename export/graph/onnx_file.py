"""A reader of an ONNX file's opset that needs no onnx package: machines that build engines often have none.

An ONNX file is one protobuf message, ModelProto. Only its top-level fields are read; the graph is skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from runtime.errors import ExportError

_OPSET_IMPORT, _DOMAIN, _VERSION = 8, 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_opset(path: str | Path) -> int:
    """Read the version of the default operator set that an ONNX file imports.

    Raises ExportError when the file is missing or is not an ONNX model.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path}: there is no such ONNX file")
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            while stream.tell() < size:
                field, kind = divmod(_varint(stream), 8)
                if field == _OPSET_IMPORT and kind == _BYTES:
                    version = _default_opset(stream)
                    if version is not None:
                        return version
                else:
                    _skip(stream, kind, size)
    except ValueError as error:
        raise ExportError(f"{path}: not an ONNX model ({error}); export it again") from error
    raise ExportError(f"{path}: not an ONNX model (it imports no operator set); export it again")


def graph_bytes(path: Path) -> int:
    """Return the size of an ONNX file with its weights, which large graphs keep beside it."""
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.is_file())


def _default_opset(stream: BinaryIO) -> int | None:
    """Read the version in one OperatorSetIdProto; None when it is of another domain than ONNX's own."""
    end = _varint(stream) + stream.tell()
    domain, version = b"", 0
    while stream.tell() < end:
        field, kind = divmod(_varint(stream), 8)
        if field == _DOMAIN and kind == _BYTES:
            domain = stream.read(_varint(stream))
        elif field == _VERSION and kind == _VARINT:
            version = _varint(stream)
        else:
            _skip(stream, kind, end)
    return version if domain in (b"", b"ai.onnx") else None


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise ValueError("it ends within a field")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a field is too long")


def _skip(stream: BinaryIO, kind: int, end: int) -> None:
    if kind == _VARINT:
        _varint(stream)
        return
    if kind not in (_FIXED64, _BYTES, _FIXED32):
        raise ValueError(f"unknown field type {kind}")
    length = _varint(stream) if kind == _BYTES else 8 if kind == _FIXED64 else 4
    if stream.tell() + length > end:
        raise ValueError("a field is longer than the file")
    stream.seek(length, 1)
