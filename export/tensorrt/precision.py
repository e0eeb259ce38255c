"""Precision of an engine: what the graph asks for, and what the built engine delivers.

Precision lives in the graph: TensorRT 10 (strongly typed), 11 and RTX take it from there; for 8.6 see `legacy`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from export.tensorrt.options import EnginePrecision
from runtime.errors import ExportError

_BY_NAME = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "FP8": "fp8"}
_BY_TEXT = (
    ("FP8", "fp8"),
    ("E4M3", "fp8"),
    ("BF16", "bf16"),
    ("BFLOAT", "bf16"),
    ("FP16", "fp16"),
    ("HALF", "fp16"),
    ("FP32", "fp32"),
    ("FLOAT", "fp32"),
)
_GRAPH_TYPES = {"fp16": {"fp16"}, "bf16": {"bf16"}, "fp8": {"fp8", "fp16"}}
"""Types below fp32 that the graph of a precision has; none for the others."""
_NARROW = ("fp16", "bf16", "fp8")
_LARGE_GRAPH = 64 << 20
_LARGEST_RATIO = 1.5
"""Half way between weights as they are in the graph and weights twice as wide."""
_LOGGED_OUTPUT = re.compile(r"^Name: .* Outputs: \[ \{.*?Datatype: (\w+)", re.M)


def requested_precisions(network: Any) -> dict[str, int]:
    """Count the layers of a parsed network by the floating point type of their first output."""
    found: Counter[str] = Counter()
    for index in range(network.num_layers):
        output = network.get_layer(index).get_output(0)
        if output is not None and output.dtype.name in _BY_NAME:
            found[_BY_NAME[output.dtype.name]] += 1
    return dict(sorted(found.items()))


def check_requested(requested: dict[str, int], precision: EnginePrecision, onnx_path: Any) -> None:
    """Raise ExportError when the graph's types are not those of the precision that the engine is to have."""
    if {name for name in _NARROW if requested.get(name, 0)} != _GRAPH_TYPES.get(precision, set()):
        types = ", ".join(f"{count} layers {name}" for name, count in requested.items())
        raise ExportError(
            f"{onnx_path}: asked for a {precision} engine of a graph with {types}; precision lives in the graph: "
            f"export it with --precision {precision}"
        )


def inspected_precisions(engine_information: str) -> dict[str, int] | None:
    """Count layers by output type, from the JSON text of TensorRT's engine inspector.

    None where the library does not tell: text that is not JSON, names only, or whole regions compiled into one opaque
    node. Older releases write `Format/Datatype`, 11 splits it; both are read.
    """
    try:
        # names of layers may hold control characters
        layers = json.loads(engine_information, strict=False).get("Layers", [])
    except (ValueError, AttributeError):
        return None
    if not layers or any(not isinstance(layer, dict) for layer in layers):
        return None
    if any("ForeignNode" in str(layer.get("Name", "")) for layer in layers):
        return None
    outputs = [output for layer in layers for output in layer.get("Outputs", [])[:1]]
    return _counted(str(output.get("Datatype") or output.get("Format/Datatype") or "") for output in outputs)


def logged_precisions(layer_listing: str) -> dict[str, int] | None:
    """Count layers by output type, from the listing that the builder of TensorRT for RTX logs.

    Only a GPU lets that library load, and so inspect, an engine; this listing is the inspector's text too. None where
    there is no listing.
    """
    return _counted(_LOGGED_OUTPUT.findall(layer_listing))


def _counted(type_names: Iterable[str]) -> dict[str, int] | None:
    """Count floating point types by their names in any release; None where there are none."""
    found: Counter[str] = Counter()
    for text in type_names:
        name = next((precision for key, precision in _BY_TEXT if key in text.upper()), None)
        if name:
            found[name] += 1
    return dict(sorted(found.items())) or None


def check_size(engine_bytes: int, graph_bytes: int, precision: EnginePrecision) -> None:
    """Raise ExportError when an engine of a half or fp8 graph holds its weights in full.

    Where the library does not tell the types of its layers, nothing else would show that. Small graphs are not
    checked: there kernels weigh more than weights.
    """
    if precision in _GRAPH_TYPES and graph_bytes >= _LARGE_GRAPH and engine_bytes > _LARGEST_RATIO * graph_bytes:
        raise ExportError(
            f"asked for {precision}, but the built engine has {engine_bytes / 1e6:.0f} MB for a {precision} graph of "
            f"{graph_bytes / 1e6:.0f} MB, as if its weights were fp32; nothing was written"
        )


def check_inspected(delivered: dict[str, int] | None, precision: EnginePrecision) -> None:
    """Raise ExportError when an engine shows no layer of its precision, or narrow layers in a full one."""
    if delivered is None:
        return
    narrow = {name for name in _NARROW if name in delivered}
    if (precision in _GRAPH_TYPES and precision not in delivered) or narrow - _GRAPH_TYPES.get(precision, set()):
        raise ExportError(f"asked for {precision}, but the built engine's layers are {delivered}; nothing was written")
