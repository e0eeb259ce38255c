"""An fp32 ONNX graph -> the same graph with the weights of its large products in int8.

Each weight becomes int8 values and one scale per output channel (symmetric, round to nearest), followed by a standard
DequantizeLinear. No calibration data are needed, and nothing of one video depends on another: an engine with int8
products (OpenVINO) quantizes the rows of the other operand on the fly, each by itself; an engine without computes in
fp32 from the int8 weights. The file is about a third of the size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.to_onnx import external_name
from runtime.errors import ExportError, MissingDependency

LEAST_WEIGHTS = 1 << 16
"""Products with fewer weights stay in fp32: they cost little, and quantizing their input costs the same."""
_LARGEST = 127


@dataclass(frozen=True, kw_only=True)
class QuantizedInfo:
    """Facts about a quantized graph."""

    path: Path
    files: tuple[str, ...]
    """File names in the folder of `path`: the graph first, then its external weights."""
    products: int
    """Products whose weights are int8 now."""
    nodes: int
    weight_bytes: int


def quantize_weights(
    source: str | Path,
    target: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    least_weights: int | None = None,
) -> QuantizedInfo:
    """Write `source` to `target` with int8 weights; the source is not changed.

    Quantized are the constant [K, N] right sides of MatMul nodes with at least `least_weights` entries (None:
    `LEAST_WEIGHTS`). `metadata` is added to the file's metadata_props. Raises ExportError when no product is large
    enough, MissingDependency without onnx.
    """
    onnx = _onnx()
    least_weights = LEAST_WEIGHTS if least_weights is None else least_weights
    source, target = Path(source), Path(target)
    model = onnx.load(str(source))
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    chosen = [n for n in graph.node if n.op_type == "MatMul" and _large(weights.get(n.input[1]), least_weights)]
    if not chosen:
        raise ExportError(f"{source}: no product has {least_weights} constant weights or more; keep it in fp32")
    names = dict.fromkeys(node.input[1] for node in chosen)
    restored = {name: f"{name}.restored" for name in names}
    for name in names:
        values, scales = quantize_columns(onnx.numpy_helper.to_array(weights[name]))
        graph.initializer.append(onnx.numpy_helper.from_array(values, f"{name}.int8"))
        graph.initializer.append(onnx.numpy_helper.from_array(scales, f"{name}.scale"))
    for node in chosen:
        node.input[1] = restored[node.input[1]]
    used = {name for node in graph.node for name in node.input}
    for name in names:
        if name not in used:
            graph.initializer.remove(weights[name])
    nodes = [
        onnx.helper.make_node(
            "DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [restored[name]], name=restored[name], axis=1
        )
        for name in names
    ]
    nodes += list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.helper.set_model_props(model, {p.key: p.value for p in model.metadata_props} | dict(metadata or {}))
    target.parent.mkdir(parents=True, exist_ok=True)
    data = target.with_name(external_name(target))
    data.unlink(missing_ok=True)  # onnx appends to a file that is there
    onnx.save_model(model, str(target), save_as_external_data=True, location=data.name, size_threshold=1024)
    onnx.checker.check_model(str(target))
    return QuantizedInfo(
        path=target,
        files=(target.name, data.name) if data.exists() else (target.name,),
        products=len(chosen),
        nodes=len(nodes),
        weight_bytes=data.stat().st_size if data.exists() else target.stat().st_size,
    )


def quantize_columns(weight: npt.NDArray[np.floating[Any]]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """weight [K, N] -> values [K, N] int8, scales [N]: weight is values * scales, to half a scale."""
    scales = (np.abs(weight).max(axis=0) / _LARGEST).astype(np.float32)
    scales[scales == 0] = 1
    values = np.clip(np.rint(weight / scales), -_LARGEST, _LARGEST).astype(np.int8)
    return values, scales


def _large(tensor: Any, least_weights: int) -> bool:
    if tensor is None or len(tensor.dims) != 2 or tensor.data_type != _onnx().TensorProto.FLOAT:
        return False
    return int(tensor.dims[0] * tensor.dims[1]) >= least_weights


def _onnx() -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingDependency("onnx", "export", "quantizing a graph") from error
    return onnx
