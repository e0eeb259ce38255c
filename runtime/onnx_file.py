"""A reader of ONNX files that needs no onnx package: what a graph wants from other files, before a library sees it.

An ONNX file is one protobuf message, ModelProto, of fields that hold further messages. Weights are passed over.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import BundleError
from runtime.files import open_regular

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Types of a field. The length of `BYTES` stands before it."""

_DEEPEST = 64

_TENSOR, _EXTERNAL_DATA = "TensorProto", 13
_MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR, 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: _TENSOR,
        6: "GraphProto",
        10: _TENSOR,
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: _TENSOR, 2: _TENSOR},
}
"""Fields of each message through which a tensor can be reached."""


def external_files(path: str | Path) -> set[str]:
    """Return the locations from which the tensors of an ONNX file take their data, as the file spells them.

    Raises BundleError for what is not a whole ONNX file.
    """
    try:
        return set(_locations(map_file(path), "ModelProto", 0))
    except ValueError as error:  # an empty file, too
        raise BundleError(f"{path}: not an ONNX model ({error}); copy the bundle again") from None
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror})") from None


def map_file(path: str | Path) -> memoryview:
    """Return the content of a file, which stays mapped as long as a part of it is in use.

    Raises ValueError for an empty file, OSError for one that can't be read.
    """
    with open_regular(path) as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def fields(message: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Yield number, type and bytes of each field of a message; of a varint as they are encoded.

    Raises ValueError where the bytes are no message.
    """
    at, end = 0, len(message)
    while at < end:
        tag, at = varint(message, at)
        number, kind = divmod(tag, 8)
        start = at
        if kind == VARINT:
            _, at = varint(message, at)
        elif kind == BYTES:
            length, start = varint(message, at)
            at = start + length
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"unknown field type {kind}")
        if at > end:
            raise ValueError("a field is longer than the file")
        yield number, kind, message[start:at]


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at a byte of a message, and where it ends. Raises ValueError for none."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends within a field")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a field is too long")


def _locations(message: memoryview, kind: str, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} messages")
    if kind == _TENSOR:
        for number, of, value in fields(message):
            if number == _EXTERNAL_DATA and of == BYTES:
                entry = {key: bytes(text) for key, _, text in fields(value)}
                if entry.get(1) == b"location":
                    yield entry.get(2, b"").decode("utf-8", "replace")
        return
    inner = _MESSAGES[kind]
    for number, of, value in fields(message):
        if number in inner and of == BYTES:
            yield from _locations(value, inner[number], depth + 1)
