"""The registry of backends: the one table of what can run a bundle, and what each backend runs.

A backend is a module with four functions, and an entry here:

    check_engine(name, model_file, precision)                        raise unless this machine can run it; reads no file
    open_engine(name, path, model_file, spec, precision, threads)    load it, return a `Backend`
    open_graph(name, path, model_file, tensors, precision, threads)  load a graph of other tensors as a `GraphRunner`
    probe(name)                                                      one line on library and device, for `ccnet doctor`
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from runtime.bundle import Format

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""The most exact one first."""


@dataclass(frozen=True, kw_only=True)
class Registration:
    """One backend."""

    module: str
    format: Format
    """Of the model files that it runs."""
    gpu: bool
    precisions: Mapping[Precision, Precision]
    """Precision of the arithmetic -> type of the ONNX graph that is run or built into the engine. `auto` prefers them
    in this order where no speed was measured: ONNX Runtime emulates fp16 and fp8 on a CPU, so they come last there."""

    def load(self) -> Any:
        """Import the backend's module; the engine library is imported when an engine is checked or opened."""
        return importlib.import_module(self.module)


_TYPED: Mapping[Precision, Precision] = {
    "fp16": "fp16",
    "bf16": "bf16",
    "tf32": "fp32",
    "fp32": "fp32",
    "fp8": "fp8",
}
_TENSORRT, _ONNXRUNTIME = "runtime.backends.tensorrt.backend", "runtime.backends.onnxruntime"

REGISTRY: Mapping[str, Registration] = {
    "tensorrt": Registration(module=_TENSORRT, format="tensorrt", gpu=True, precisions=_TYPED),
    "tensorrt-rtx": Registration(module=_TENSORRT, format="tensorrt-rtx", gpu=True, precisions=_TYPED),
    "onnxruntime-cuda": Registration(
        module=_ONNXRUNTIME, format="onnx", gpu=True, precisions={"fp16": "fp16", "tf32": "fp32", "fp32": "fp32"}
    ),
    "openvino": Registration(
        module="runtime.backends.openvino",
        format="onnx",
        gpu=False,
        precisions={"int8": "int8", "bf16": "fp32", "fp32": "fp32"},
    ),
    "onnxruntime": Registration(
        module=_ONNXRUNTIME, format="onnx", gpu=False, precisions={"fp32": "fp32", "fp16": "fp16", "fp8": "fp8"}
    ),
}
"""By name, in the order in which `auto` prefers them where no speed was measured here."""

BACKENDS = tuple(REGISTRY)


def runs_on_gpu(backend: str) -> bool:
    """Return whether a backend of this name runs on a GPU; False for one that is not registered."""
    return backend in REGISTRY and REGISTRY[backend].gpu
