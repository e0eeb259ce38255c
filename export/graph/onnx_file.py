"""What the export asks of an ONNX file without the onnx package: machines that build engines often have none."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import ExportError
from runtime.onnx_file import BYTES, VARINT, fields, map_file, varint

_OPSET_IMPORT, _DOMAIN, _VERSION = 8, 1, 2


def read_opset(path: str | Path) -> int:
    """Read the version of the default operator set that an ONNX file imports.

    Raises ExportError when the file is missing or is not an ONNX model.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path}: there is no such ONNX file")
    try:
        for number, kind, value in fields(map_file(path)):
            if number == _OPSET_IMPORT and kind == BYTES and (version := _version(value)):
                return version
    except ValueError as error:
        raise ExportError(f"{path}: not an ONNX model ({error}); export it again") from error
    raise ExportError(f"{path}: not an ONNX model (it imports no operator set); export it again")


def graph_bytes(path: Path) -> int:
    """Return the size of an ONNX file with its weights, which large graphs keep beside it."""
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.is_file())


def _version(operator_set: memoryview) -> int:
    """Read the version in one OperatorSetIdProto; 0 when it is of another domain than ONNX's own."""
    domain, version = b"", 0
    for number, kind, value in fields(operator_set):
        if number == _DOMAIN and kind == BYTES:
            domain = bytes(value)
        elif number == _VERSION and kind == VARINT:
            version, _ = varint(value, 0)
    return version if domain in (b"", b"ai.onnx") else 0
