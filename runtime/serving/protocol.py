"""The Open Inference Protocol, version 2: requests and responses of `infer` as JSON and as binary tensors.

A binary tensor lies behind the JSON of the message (the `binary_tensor_data` extension): the JSON's length is in the
header `Inference-Header-Content-Length`, each tensor's in its parameter `binary_data_size`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson

from runtime.errors import RequestError
from runtime.schema import quote, show

EXTENSIONS = ("binary_tensor_data", "model_configuration")
HEADER_LENGTH = "inference-header-content-length"

Array: TypeAlias = npt.NDArray[Any]

_TYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{
        f"{kind}{bits}": np.dtype(f"<{kind[0].lower()}{bits // 8}")
        for kind in ("INT", "UINT")
        for bits in (8, 16, 32, 64)
    },
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_MOST_DIMENSIONS = 8
LARGEST_JSON = 1 << 24
"""Bytes; parsed numbers take ten times as many, and everybody waits while they are parsed."""


@dataclass(frozen=True)
class Tensor:
    """A model's input or output: -1 for a dimension that is not fixed."""

    name: str
    datatype: str
    """`FP32`, `INT64`, ...; `BYTES` for text."""
    shape: tuple[int, ...]
    optional: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True)
class InferRequest:
    """A request whose tensors are whole; whether they fit the model is for the model to say."""

    inputs: Mapping[str, Array]
    """Views of the request's body where they came as binary data."""
    outputs: Mapping[str, bool]
    """Outputs asked for, and whether as binary data; empty: all of them."""
    binary: bool = False
    """Whether outputs that are not named are to be binary data."""
    request_id: str | None = None


def parse_infer(body: bytes | bytearray, header_length: str | None) -> InferRequest:
    """Parse the body of an `infer` request; `header_length`: the header of that name.

    Raises RequestError for what is not a request of the protocol.
    """
    size = _header_size(header_length, len(body))
    if size > LARGEST_JSON:
        raise RequestError(f"{size} bytes of JSON, at most {LARGEST_JSON} are taken; send binary tensors", status=413)
    with memoryview(body) as view:
        head = _parse_json(view[:size])
    data = _Binary(body, size)
    inputs: dict[str, Array] = {}
    for entry in _objects(head, "inputs"):
        name = _text(entry, "name")
        if name in inputs:
            raise RequestError(f"input {quote(name, 60)}: given twice")
        inputs[name] = _input(name, entry, data)
    if data.left:
        raise RequestError(f"{data.left} bytes are left behind the binary data of the inputs; check binary_data_size")
    outputs = {_text(entry, "name"): _flag(entry, "binary_data", None) for entry in _objects(head, "outputs", [])}
    binary = bool(_flag(head, "binary_data_output", False))
    request_id = head.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise RequestError(f"id: got {show(request_id)}, expected a string")
    asked = {name: binary if flag is None else flag for name, flag in outputs.items()}
    return InferRequest(inputs, asked, binary, request_id)


def infer_response(
    model: str, version: str, request: InferRequest, outputs: Mapping[str, Array | Sequence[str]]
) -> tuple[list[Any], int | None]:
    """Return the pieces of a response's body, and the length of its JSON where binary data follow it.

    Raises RequestError for an output that was asked for and is not there.
    """
    asked = request.outputs or dict.fromkeys(outputs, request.binary)
    if unknown := next((name for name in asked if name not in outputs), None):
        raise RequestError(f"output {quote(unknown, 60)}: {model} has {', '.join(outputs)}")
    entries: list[dict[str, Any]] = []
    pieces: list[Any] = []
    for name, binary in asked.items():
        entry, data = _output(name, outputs[name], binary=binary)
        entries.append(entry)
        if binary:
            pieces.append(data)
    head: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": entries}
    if request.request_id is not None:
        head["id"] = request.request_id
    text_head = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    return [text_head, *pieces], (len(text_head) if pieces else None)


def _output(name: str, value: Array | Sequence[str], *, binary: bool) -> tuple[dict[str, Any], Any]:
    """Return how a tensor is described, with its data unless they are `binary`; and those."""
    entry: dict[str, Any] = {"name": name}
    if isinstance(value, np.ndarray):
        flat = np.ascontiguousarray(value).reshape(-1)
        entry |= {"datatype": _NAMES[value.dtype], "shape": list(value.shape)}
        data: Any = flat.view(np.uint8).data if binary else flat
    else:
        entry |= {"datatype": "BYTES", "shape": [len(value)]}
        data = _text_bytes(value) if binary else list(value)
    entry |= {"parameters": {"binary_data_size": len(data)}} if binary else {"data": data}
    return entry, data


class _Binary:
    """The binary data behind the JSON of a request, taken piece by piece."""

    def __init__(self, body: bytes | bytearray, start: int) -> None:
        self._body, self._at = body, start

    @property
    def left(self) -> int:
        return len(self._body) - self._at

    def take(self, name: str, dtype: np.dtype[Any], count: int, size: Any) -> Array:
        if size != count * dtype.itemsize or type(size) is not int:
            raise RequestError(
                f"input {name}: binary_data_size is {show(size)}, its shape has {count * dtype.itemsize}"
            )
        if size > self.left:
            raise RequestError(f"input {name}: truncated: {self.left} bytes of data are left, expected {size}")
        array = np.frombuffer(self._body, dtype, count, self._at)
        self._at += size
        return array


def _header_size(header_length: str | None, size: int) -> int:
    if header_length is None:
        return size
    if not header_length.isascii() or not header_length.isdigit() or len(header_length) > 12:
        raise RequestError(f"{HEADER_LENGTH}: got {show(header_length)}, expected a number of bytes")
    length = int(header_length)
    if length > size:
        raise RequestError(f"{HEADER_LENGTH}: got {length}, the body has {size} bytes")
    return length


def _parse_json(text: memoryview) -> dict[str, Any]:
    try:
        head = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RequestError(
            f"the body is not valid JSON ({error}); binary tensors need the header {HEADER_LENGTH}"
        ) from None
    if not isinstance(head, dict):
        raise RequestError(f"the body: got {show(head)}, expected an object with inputs")
    return head


def _input(name: str, entry: dict[str, Any], data: _Binary) -> Array:
    name = quote(name, 60)
    datatype, shape = _text(entry, "datatype"), entry.get("shape")
    dtype = _TYPES.get(datatype)
    if dtype is None:
        raise RequestError(f"input {name}: got datatype {quote(datatype, 60)}, expected one of {', '.join(_TYPES)}")
    good = isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS and all(type(n) is int and n >= 0 for n in shape)
    if not good or not isinstance(shape, list):
        raise RequestError(f"input {name}: got shape {show(shape)}, expected a list of dimensions")
    count = math.prod(shape)
    size = _parameters(entry).get("binary_data_size")
    if size is not None:
        return _shaped(data.take(name, dtype, count, size), shape, name)
    if "data" not in entry:
        raise RequestError(f"input {name}: has neither data nor the parameter binary_data_size")
    try:
        values = np.array(entry["data"])
        if values.size and (values.dtype.kind not in "iuf" or (values.dtype.kind == "f" and dtype.kind != "f")):
            raise ValueError(f"got {values.dtype}")
        if values.size and dtype.kind in "iu":
            limits = np.iinfo(dtype)
            if not limits.min <= values.min() <= values.max() <= limits.max:
                raise ValueError("a number is out of range")
        with np.errstate(over="ignore"):
            converted = values.astype(dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestError(f"input {name}: data are not numbers of type {datatype} ({quote(error)})") from None
    if converted.size != count:
        raise RequestError(f"input {name}: got {converted.size} numbers, its shape {show(shape)} has {count}")
    return _shaped(converted, shape, name)


def _shaped(array: Array, shape: list[int], name: str) -> Array:
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError):  # nothing in all, with dimensions that no array has
        raise RequestError(f"input {name}: got shape {show(shape)}, expected one that an array can have") from None


def _objects(head: dict[str, Any], key: str, default: Any = None) -> list[dict[str, Any]]:
    entries = head.get(key, default)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RequestError(f"{key}: got {show(entries)}, expected a list of objects")
    return entries


def _parameters(entry: dict[str, Any]) -> dict[str, Any]:
    parameters = entry.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise RequestError(f"parameters: got {show(parameters)}, expected an object")
    return parameters


def _text(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{key}: got {show(value)}, expected a string")
    return value


def _flag(entry: dict[str, Any], key: str, default: bool | None) -> Any:
    value = _parameters(entry).get(key, default)
    if value is not default and not isinstance(value, bool):
        raise RequestError(f"{key}: got {show(value)}, expected true or false")
    return value


def _text_bytes(texts: Any) -> bytes:
    """Return strings as a binary tensor: each with its length in front, 4 bytes, little-endian."""
    encoded = [text.encode() for text in texts]
    return b"".join(part for text in encoded for part in (len(text).to_bytes(4, "little"), text))
