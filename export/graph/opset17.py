"""Conversion of a graph from opset 18 to 17: TensorRT 8.6 reads nothing newer, the exporter writes nothing older.

Only what differs between the two is changed; an operator that changed in any other way is an error.
"""

from __future__ import annotations

from typing import Any

from runtime.errors import ExportError

_REDUCTIONS = {"ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare"}
_REDUCTIONS |= {"ReduceLogSum", "ReduceLogSumExp"}


def lower_to_17(model: Any) -> None:
    """Convert an `onnx_ir.Model` of opset 18 to opset 17, in place.

    Raises ExportError naming an operator that has no equivalent, or whose axes are not constant.
    """
    import onnx_ir

    changed = _changed_in_18()
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx") or node.op_type not in changed:
            continue
        if node.op_type in _REDUCTIONS:
            _axes_to_attribute(node, onnx_ir)
        elif node.op_type == "Split":
            node.attributes.pop("num_outputs", None)  # without sizes, 17 splits evenly over the outputs
        elif node.op_type == "Pad" and (len(node.inputs) < 4 or node.inputs[3] is None):
            node.resize_inputs(min(len(node.inputs), 3))
        else:
            raise ExportError(f"opset 17 has no equivalent of {node.op_type} ('{node.name}') of opset 18")
    model.graph.opset_imports[""] = 17


def _axes_to_attribute(node: Any, onnx_ir: Any) -> None:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    keep_all = node.attributes.pop("noop_with_empty_axes", None)
    if axes is None:
        if keep_all is not None and keep_all.as_int():
            raise ExportError(f"opset 17 has no {node.op_type} without axes that reduces nothing ('{node.name}')")
        return
    if axes.const_value is None:
        raise ExportError(f"opset 17 needs constant axes; those of {node.op_type} ('{node.name}') are computed")
    node.attributes["axes"] = onnx_ir.AttrInt64s("axes", [int(axis) for axis in axes.const_value.numpy()])
    node.resize_inputs(1)


def _changed_in_18() -> set[str]:
    import onnx

    schemas = onnx.defs.get_all_schemas_with_history()
    return {schema.name for schema in schemas if schema.domain == "" and schema.since_version == 18}
