"""Export from torch to ONNX: a graph, and a file of weights beside it, that are what was asked for.

The exporter can return a static graph where a dynamic one was asked for, or another opset, without an error. So
`torch.export` proves first that the batch axis is free, and the finished file is read back and audited.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from export.graph.opset17 import lower_to_17
from runtime.errors import ExportError
from runtime.packages import distribution_of, missing
from runtime.spec import AUDIO, LENGTHS, VISUAL, GraphTensors, ModelSpec, Shape

MIN_OPSET, MAX_OPSET = 17, 23
"""17 brings LayerNormalization and is the last one TensorRT 8.6 reads; 20 brings Gelu; none above 23 was tried."""
EXTERNAL_BYTES = 64 << 20
"""Weights of more bytes than this go to a file of their own beside the graph."""
BATCH_AXIS = "batch"


@dataclass(frozen=True, kw_only=True)
class OnnxInfo:
    """Facts about an exported graph."""

    path: Path
    files: tuple[str, ...]
    """File names in the folder of `path`: the graph, then its external weights, where it has any."""
    opset: int
    nodes: int
    operators: dict[str, int]
    """Number of nodes of each operator type, most frequent first."""
    weight_bytes: int
    seconds: float


def export_onnx(
    module: nn.Module,
    spec: ModelSpec,
    path: str | Path,
    *,
    opset: int = 20,
    max_batch: int = 32,
    batch: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> OnnxInfo:
    """Export `module`, whose forward takes and returns the tensors of `runtime.spec.ModelSpec`, to an ONNX file.

    The batch axis is dynamic from 1 to `max_batch` (ONNX itself can't state the bound; the manifest does), or fixed
    to `batch`. Weights above `EXTERNAL_BYTES` go to `<path>.data`. `metadata` becomes the file's metadata_props.

    Raises ExportError when the exporter fails or the file is not what was asked for, MissingDependency without onnx.
    """
    if max_batch < 1 or (batch is not None and batch < 1):
        raise ExportError(f"batch: got max_batch {max_batch} and batch {batch}, expected 1 or more")
    tensors, sizes = spec.tensors, {}
    if batch is None:
        # A range of one value would make the axis static, the exporter specialises on an example batch of 1, and where
        # the range ends at the example's 2 it no longer sees that the inputs share one axis.
        sizes[BATCH_AXIS] = (1, max(max_batch, 3))
    else:
        tensors = tensors.sized(batch=batch)
    return export_graph(
        module, tensors, example_inputs(spec, batch or 2), path, sizes=sizes, opset=opset, metadata=metadata
    )


def export_graph(
    module: nn.Module,
    tensors: GraphTensors,
    inputs: tuple[torch.Tensor, ...],
    path: str | Path,
    *,
    sizes: Mapping[str, tuple[int, int]],
    opset: int = 20,
    metadata: Mapping[str, str] | None = None,
) -> OnnxInfo:
    """Export any module whose forward takes and returns the tensors that `tensors` names, in that order.

    `inputs`: examples to trace with. `sizes`: smallest and largest value of every free extent. Writes and raises as
    `export_onnx`.
    """
    path = Path(path)
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ExportError(f"opset: got {opset}, expected {MIN_OPSET} to {MAX_OPSET}")
    started = time.perf_counter()
    with _quiet() as log:
        # The exporter writes nothing older than 18, and keeps 18 without an error when lowering it fails.
        program = _onnx_program(_exported(module, tensors, inputs, sizes), tensors, max(opset, 18), log)
        model = program.model
        if opset == 17:
            lower_to_17(model)
        _label(model, metadata or {}, opset)
        weight_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
        _save(model, path, external=weight_bytes > EXTERNAL_BYTES)
    files = (path.name, external_name(path)) if weight_bytes > EXTERNAL_BYTES else (path.name,)
    graph = audit_graph(path, tensors, opset=opset)
    operators = Counter(node.op_type for node in graph.graph.node)
    return OnnxInfo(
        path=path,
        files=files,
        opset=opset,
        nodes=sum(operators.values()),
        operators=dict(operators.most_common()),
        weight_bytes=weight_bytes,
        seconds=time.perf_counter() - started,
    )


def external_name(path: Path) -> str:
    """Return the name of the file that holds a large graph's weights."""
    return f"{path.name}.data"


def example_inputs(spec: ModelSpec, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw inputs to trace with: videos of full, half, full, ... length. Shapes as in `ModelSpec`."""
    generator = torch.Generator().manual_seed(0)
    shapes = spec.input_shapes(batch)
    lengths = torch.full(shapes[LENGTHS], spec.length, dtype=torch.int32)
    lengths[1::2] = spec.length // 2
    mask = torch.arange(spec.length)[:, None] < lengths[:, None, None]
    visual = torch.randn(shapes[VISUAL], generator=generator) * mask
    audio = torch.randn(shapes[AUDIO], generator=generator) * mask
    return visual, audio, lengths


def audit(path: Path, spec: ModelSpec, *, opset: int, batch: int | None) -> Any:
    """Check a graph of `export_onnx`; see `audit_graph`."""
    return audit_graph(path, spec.tensors if batch is None else spec.tensors.sized(batch=batch), opset=opset)


def audit_graph(path: Path, tensors: GraphTensors, *, opset: int) -> Any:
    """Read a written graph back and check everything that the exporter does not promise.

    Returns it as an onnx.ModelProto, without its external weights. Raises ExportError naming what is wrong.
    """
    onnx = _onnx()
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path}: the ONNX checker refuses it: {error}") from error
    model = onnx.load(str(path), load_external_data=False)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets.get("") != opset or set(opsets) != {""}:
        raise ExportError(f"{path}: got operator sets {opsets}, expected the standard one at {opset}")
    for shapes, values in ((tensors.inputs, model.graph.input), (tensors.outputs, model.graph.output)):
        if [value.name for value in values] != list(shapes):
            raise ExportError(f"{path}: got tensors {[v.name for v in values]}, expected {list(shapes)}")
        for value in values:
            _check_value(path, value, shapes[value.name], tensors.types.get(value.name, np.float32))
    _check_types(path, model)
    if opset < 18:
        _check_old_operators(path, model)
    return model


def _check_value(path: Path, value: Any, expected: Shape, kind: type[np.generic]) -> None:
    onnx = _onnx()
    tensor = value.type.tensor_type
    shape = dimensions(value)
    if shape != tuple(expected):
        raise ExportError(f"{path}: tensor '{value.name}' has shape {shape}, expected {expected}")
    wanted = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    if tensor.elem_type != wanted:
        got = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise ExportError(f"{path}: tensor '{value.name}' is {got}, expected {onnx.TensorProto.DataType.Name(wanted)}")


def dimensions(value: Any) -> tuple[int | str, ...]:
    """Return the shape of an onnx.ValueInfoProto: numbers, and names of dynamic axes."""
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def _check_types(path: Path, model: Any) -> None:
    """Refuse float64 anywhere: engines convert it silently or do not take it."""
    double = _onnx().TensorProto.DOUBLE
    wide = [tensor.name for tensor in model.graph.initializer if tensor.data_type == double]
    wide += [value.name for value in model.graph.value_info if value.type.tensor_type.elem_type == double]
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.t.data_type == double or (node.op_type == "Cast" and attribute.i == double):
                wide.append(node.name)
    if wide:
        raise ExportError(f"{path}: float64 at {', '.join(wide[:5])}; keep float64 out of the module's forward")


def _check_old_operators(path: Path, model: Any) -> None:
    """Refuse operators of later opsets, which TensorRT 8.6 reads wrongly without an error.

    It ignores the axes input that reductions got in opset 18 and reduces over everything.
    """
    reductions = {"ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSumExp"}
    bad = [n.name for n in model.graph.node if n.op_type == "Gelu" or (n.op_type in reductions and len(n.input) > 1)]
    if bad:
        raise ExportError(f"{path}: operators of a later opset at {', '.join(bad[:5])}")


def _exported(
    module: nn.Module,
    tensors: GraphTensors,
    inputs: tuple[torch.Tensor, ...],
    sizes: Mapping[str, tuple[int, int]],
) -> torch.export.ExportedProgram:
    """Trace the module and prove that its free extents are free: a module that fixes one is an error here."""
    module.eval()
    free = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in sizes.items()}

    def extent(text: str) -> Any:
        factor, _, name = text.rpartition("*")
        return int(factor) * free[name] if factor else free[name]

    shapes = {
        name: {axis: extent(size) for axis, size in enumerate(shape) if isinstance(size, str)}
        for name, shape in tensors.inputs.items()
    }
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=tuple(shapes.values()) if sizes else None)
    except Exception as error:
        raise ExportError(f"torch.export could not trace the network: {error}") from error


def _onnx_program(exported: torch.export.ExportedProgram, tensors: GraphTensors, opset: int, log: io.StringIO) -> Any:
    _onnx()
    try:
        program = torch.onnx.export(
            exported,
            input_names=list(tensors.inputs),
            output_names=list(tensors.outputs),
            opset_version=opset,
            custom_translation_table={torch.ops.aten.split_with_sizes.default: _split},
            verbose=False,
        )
    except Exception as error:
        raise ExportError(f"torch.onnx could not translate the network: {error}\n{log.getvalue()[-2000:]}") from error
    if program is None:
        raise ExportError("torch.onnx returned no program")
    _name_axes(program, tensors)
    return program


def _name_axes(program: Any, tensors: GraphTensors) -> None:
    """Give the exporter's symbols the names of `tensors`; where one symbol would need two names, the audit sees it."""
    import onnx_ir

    graph: Any = program.model.graph
    names: dict[str, str] = {}
    for values, shapes in ((graph.inputs, tensors.inputs), (graph.outputs, tensors.outputs)):
        for value, shape in zip(values, shapes.values(), strict=True):
            for found, wanted in zip(value.shape, shape, strict=False):
                if not isinstance(found, int) and isinstance(wanted, str):
                    symbol, name = str(found).rpartition("*")[2], wanted.rpartition("*")[2]
                    names.setdefault(symbol, name)
    program.rename_axes(names)
    for values in (graph.inputs, graph.outputs):
        for value in values:
            value.shape = onnx_ir.Shape([_renamed(extent, names) for extent in value.shape])


def _renamed(extent: Any, names: Mapping[str, str]) -> Any:
    """Return an extent with its symbol renamed: renaming axes leaves multiples of one alone."""
    if isinstance(extent, int):
        return extent
    factor, star, symbol = str(extent).rpartition("*")
    return f"{factor}{star}{names.get(symbol, symbol)}"


def _split(x: Any, sizes: Any, dim: int = 0) -> Any:
    """Translate split_with_sizes to Split; sizes that depend on the batch must be equal (`fused.parts.equal_parts`)."""
    from onnxscript import opset18 as op

    if all(isinstance(size, int) for size in sizes):
        return op.SplitToSequence(x, op.Constant(value_ints=list(sizes)), axis=dim)
    if len({id(size) for size in sizes}) > 1:
        raise ExportError(f"a split into {len(sizes)} parts whose sizes depend on the batch and are not one value")
    return op.Split(x, axis=dim, num_outputs=len(sizes))


def _label(model: Any, metadata: Mapping[str, str], opset: int) -> None:
    """Replace what the exporter notes about source files of this machine by `metadata`."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    model.doc_string = None
    if opset < 19:
        model.ir_version = 8  # what opset 17 and 18 came with: readers of that age refuse a newer one


def _save(model: Any, path: Path, *, external: bool) -> None:
    import onnx_ir

    path.parent.mkdir(parents=True, exist_ok=True)
    if external:
        onnx_ir.save(model, path, external_data=external_name(path))
    else:
        onnx_ir.save(model, path)


def _onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401 - the exporter needs it
    except ModuleNotFoundError as error:
        raise missing(distribution_of(error.name) or "onnx", "writing ONNX") from error
    return onnx


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Keep the exporter's progress text and its warnings about absent packages off the terminal; yield the text."""
    log = io.StringIO()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(log), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield log
    finally:
        logger.setLevel(level)
