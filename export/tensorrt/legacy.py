"""What only TensorRT 8.6 needs of a build. To drop that release, delete this file and the branches that call it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.backends.tensorrt.legacy import is_legacy
from runtime.errors import ExportError

__all__ = [
    "MAX_OPSET",
    "Attempt",
    "attempts",
    "check_supported",
    "configure",
    "is_legacy",
    "network_flags",
    "parser_error",
    "prefer_precisions",
]

MAX_OPSET = 17
NARROW_BATCH = 8
"""Largest batch of the first profile that is tried where that of the range asked for gives no engine."""


@dataclass(frozen=True)
class Attempt:
    """A way of building an engine."""

    profile: tuple[int, ...]
    bound: bool = True
    """The fp32 layers of a half graph have to stay fp32; otherwise that is a preference."""

    def __str__(self) -> str:
        text = f"for batches {self.profile}"
        return text if self.bound else f"{text}, the precision of the graph's fp32 layers a preference"


def attempts(precision: str, profile: tuple[int, ...]) -> list[Attempt]:
    """Return the ways of building an engine, what was asked for first; each is for where those before it give none.

    8.6 may find no kernel where the batch is dynamic, or where layers of a half engine are bound to fp32.
    """
    least, tuned, most = profile
    narrow = (min(least, NARROW_BATCH), min(tuned, NARROW_BATCH), min(most, NARROW_BATCH))
    found = [Attempt(each) for each in (profile, narrow, (1, 1, 1))]
    if precision == "fp16":
        found += [Attempt(profile, bound=False), Attempt((1, 1, 1), bound=False)]
    return list(dict.fromkeys(found))


def check_supported(trt: Any, precision: str, opset: int) -> None:
    """Raise ExportError for a graph that 8.6 can't build, or would compute wrongly."""
    library = f"{trt.__name__} {trt.__version__}"
    if precision == "fp8":
        raise ExportError(f"{library} does not support fp8; use --precision fp16 or TensorRT 10 or newer")
    if precision == "bf16":
        raise ExportError(f"{library} does not support bfloat16; use --precision fp16 or TensorRT 10 or newer")
    if opset > MAX_OPSET:
        raise ExportError(
            f"{library} reads ONNX up to opset {MAX_OPSET} and computes later reductions wrongly without an error; "
            f"this graph has opset {opset}: export it with --opset {MAX_OPSET}"
        )


def network_flags(trt: Any) -> int:
    """Return the flags of a network whose batch is an axis of its tensors; 8.6 knows no strongly typed networks."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)


def parser_error(error: Any) -> str:
    """Return one error of the ONNX parser, which has no method for the node's name: its text gives the number."""
    return f"node {error.node()}: {error.desc()} [{getattr(error.code(), 'name', error.code())}]"


def configure(trt: Any, network: Any, config: Any, precision: str) -> None:
    """Allow half kernels for a half graph, but not in its fp32 layers, and keep cuBLAS and cuDNN out of the engine."""
    if precision == "fp16":
        # types in the graph alone do not bring half kernels
        config.set_flag(trt.BuilderFlag.FP16)
        _pin_float_layers(trt, network, config)
    sources = trt.TacticSource
    outside = sum(1 << int(source) for source in (sources.CUBLAS, sources.CUBLAS_LT, sources.CUDNN))
    config.set_tactic_sources(config.get_tactic_sources() & ~outside)


def prefer_precisions(trt: Any, config: Any) -> None:
    """Let the builder leave the pinned types where it finds no kernel of them."""
    config.clear_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)


def _pin_float_layers(trt: Any, network: Any, config: Any) -> None:
    """Keep the fp32 layers in fp32: with the FP16 flag 8.6 would compute statistics and exponentials in half too."""
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        tensors = [tensor for tensor in (*inputs, *outputs) if tensor is not None]
        # casts and constants carry their type already; what moves data only may follow its neighbours
        if layer.type.name in ("CAST", "CONSTANT", "SHAPE", "SHUFFLE", "SLICE", "GATHER", "CONCATENATION", "IDENTITY"):
            continue
        if outputs and all(tensor.dtype == trt.DataType.FLOAT for tensor in tensors):
            layer.precision = trt.DataType.FLOAT
            for i in range(len(outputs)):
                layer.set_output_type(i, trt.DataType.FLOAT)
