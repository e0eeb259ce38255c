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

import torch
from torch import nn

from export.graph.opset17 import lower_to_17
from runtime.errors import ExportError
from runtime.packages import distribution_of, missing
from runtime.spec import AUDIO, INPUT_NAMES, LENGTHS, OUTPUT_NAMES, VISUAL, ModelSpec

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
    path = Path(path)
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ExportError(f"opset: got {opset}, expected {MIN_OPSET} to {MAX_OPSET}")
    if max_batch < 1 or (batch is not None and batch < 1):
        raise ExportError(f"batch: got max_batch {max_batch} and batch {batch}, expected 1 or more")
    started = time.perf_counter()
    with _quiet() as log:
        # The exporter writes nothing older than 18, and keeps 18 without an error when lowering it fails.
        program = _onnx_program(_exported(module, spec, max_batch, batch), max(opset, 18), log)
        model = program.model
        if opset == 17:
            lower_to_17(model)
        _label(model, metadata or {}, opset)
        weight_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
        _save(model, path, external=weight_bytes > EXTERNAL_BYTES)
    files = (path.name, external_name(path)) if weight_bytes > EXTERNAL_BYTES else (path.name,)
    graph = audit(path, spec, opset=opset, batch=batch)
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
    axis: int | str = BATCH_AXIS if batch is None else batch
    names = [
        (INPUT_NAMES, model.graph.input, spec.input_shapes),
        (OUTPUT_NAMES, model.graph.output, spec.output_shapes),
    ]
    for expected_names, values, shapes in names:
        if tuple(value.name for value in values) != expected_names:
            raise ExportError(f"{path}: got tensors {[v.name for v in values]}, expected {list(expected_names)}")
        for value, shape in zip(values, shapes(1).values(), strict=True):
            _check_value(path, value, (axis, *shape[1:]))
    _check_types(path, model)
    if opset < 18:
        _check_old_operators(path, model)
    return model


def _check_value(path: Path, value: Any, expected: tuple[int | str, ...]) -> None:
    onnx = _onnx()
    tensor = value.type.tensor_type
    shape = dimensions(value)
    if shape != expected:
        raise ExportError(f"{path}: tensor '{value.name}' has shape {shape}, expected {expected}")
    wanted = onnx.TensorProto.INT32 if value.name == LENGTHS else onnx.TensorProto.FLOAT
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


def _exported(module: nn.Module, spec: ModelSpec, max_batch: int, batch: int | None) -> torch.export.ExportedProgram:
    """Trace the module and prove that its batch axis is free: a module that fixes it is an error here."""
    module.eval()
    shapes: dict[str, Any] | None = None
    if batch is None:
        # A range of one value would make the axis static, the exporter specialises on an example batch of 1, and where
        # the range ends at the example's 2 it no longer sees that the inputs share one axis.
        axis = torch.export.Dim(BATCH_AXIS, min=1, max=max(max_batch, 3))
        shapes = {name: {0: axis} for name in INPUT_NAMES}
    try:
        with torch.no_grad():
            return torch.export.export(module, example_inputs(spec, batch or 2), dynamic_shapes=shapes)
    except Exception as error:
        raise ExportError(f"torch.export could not trace the network: {error}") from error


def _onnx_program(exported: torch.export.ExportedProgram, opset: int, log: io.StringIO) -> Any:
    _onnx()
    try:
        program = torch.onnx.export(
            exported,
            input_names=list(INPUT_NAMES),
            output_names=list(OUTPUT_NAMES),
            opset_version=opset,
            custom_translation_table={torch.ops.aten.split_with_sizes.default: _split},
            verbose=False,
        )
    except Exception as error:
        raise ExportError(f"torch.onnx could not translate the network: {error}\n{log.getvalue()[-2000:]}") from error
    if program is None:
        raise ExportError("torch.onnx returned no program")
    graph: Any = program.model.graph
    axes = {str(value.shape[0]) for value in graph.inputs if not isinstance(value.shape[0], int)}
    if len(axes) == 1:
        program.rename_axes({axes.pop(): BATCH_AXIS})
    return program


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
