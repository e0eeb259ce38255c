"""What the runtime needs for TensorRT 8.6 and 10.0. To drop them, delete this file and the lines that call it."""

from __future__ import annotations

from typing import Any

from runtime.backends.tensorrt.library import library_version


def is_legacy(trt: Any) -> bool:
    """Return whether the library is TensorRT 8."""
    return library_version(trt)[0] == 8


def scratch_bytes(engine: Any) -> int:
    """Return the scratch memory that an execution context needs."""
    current = hasattr(engine, "device_memory_size_v2")
    return int(engine.device_memory_size_v2 if current else engine.device_memory_size)


def create_execution_context(engine: Any) -> Any:
    """Create an execution context without scratch memory, for 8.6, which knows no allocation strategies."""
    return engine.create_execution_context_without_device_memory()


def set_scratch(context: Any, pointer: int, nbytes: int) -> None:
    """Give an execution context its scratch memory."""
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(pointer, nbytes)
    else:
        context.device_memory = pointer
