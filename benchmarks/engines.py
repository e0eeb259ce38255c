"""The engines that run an ONNX file on a CPU, by the names used in results."""

from __future__ import annotations

from pathlib import Path

from runtime.backends.base import BaseBackend
from runtime.errors import BackendUnavailable
from runtime.spec import ModelSpec

ONNX_ENGINES = ("onnxruntime-fp32", "openvino-fp32", "openvino-bf16")
"""For fp32 graphs."""
INT8_ENGINES = ("openvino-int8",)
"""For graphs with int8 weights."""


def open_graph(name: str, path: Path, spec: ModelSpec) -> BaseBackend:
    """Load an ONNX file in a named engine. Raises BackendUnavailable where library or arithmetic are absent."""
    backend, _, precision = name.rpartition("-")
    if backend == "openvino":
        from runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend.open(path, spec, precision=precision)
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend.open(path, spec, precision=precision)


def available_engines(
    path: Path, spec: ModelSpec, names: tuple[str, ...] = ONNX_ENGINES
) -> tuple[dict[str, BaseBackend], dict[str, str]]:
    """Those of the named engines that run `path` here, opened, and for the others the reason why not."""
    opened: dict[str, BaseBackend] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            opened[name] = open_graph(name, path, spec)
        except BackendUnavailable as error:  # noqa: PERF203 - three engines
            absent[name] = str(error)
    return opened, absent
