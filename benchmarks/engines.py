"""The engines that run an ONNX file on a CPU, by the names used in results."""

from __future__ import annotations

from pathlib import Path

from runtime.backends.base import Backend
from runtime.errors import BackendUnavailable
from runtime.spec import ModelSpec

ONNX_ENGINES = ("onnxruntime-fp32", "openvino-fp32", "openvino-bf16")


def open_graph(name: str, path: Path, spec: ModelSpec) -> Backend:
    """Load an ONNX file in one of `ONNX_ENGINES`. Raises BackendUnavailable where library or arithmetic are absent."""
    backend, _, precision = name.rpartition("-")
    if backend == "openvino":
        from runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend.open(path, spec, precision=precision)
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend.open(path, spec, precision=precision)


def available_engines(path: Path, spec: ModelSpec) -> tuple[dict[str, Backend], dict[str, str]]:
    """Those of `ONNX_ENGINES` that run `path` here, opened, and for the others the reason why not."""
    opened: dict[str, Backend] = {}
    absent: dict[str, str] = {}
    for name in ONNX_ENGINES:
        try:
            opened[name] = open_graph(name, path, spec)
        except BackendUnavailable as error:  # noqa: PERF203 - three engines
            absent[name] = str(error)
    return opened, absent
