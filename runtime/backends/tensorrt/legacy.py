"""What the runtime needs for TensorRT 8.6 and 10.0. To drop them, delete this file and the lines that call it."""

from __future__ import annotations

from typing import Any

from runtime.backends.tensorrt.library import library_version


def is_legacy(trt: Any) -> bool:
    """Return whether the library is TensorRT 8."""
    return library_version(trt)[0] == 8


def scratch_bytes(engine: Any) -> int:
    """Return the scratch memory that the largest batch of the profile needs."""
    current = hasattr(engine, "device_memory_size_v2")
    return int(engine.device_memory_size_v2 if current else engine.device_memory_size)


def create_execution_context(engine: Any) -> Any:
    """Create an execution context without scratch memory, for 8.6, which knows no allocation strategies."""
    return engine.create_execution_context_without_device_memory()


def scratch_bytes_of_shapes(context: Any, largest: int) -> int:
    """Return the scratch memory that a context needs for its input shapes, at most `largest`, that of the profile.

    8.6 knows the latter alone, and so does a library that could not tell: it returns 0.
    """
    if not hasattr(context, "update_device_memory_size_for_shapes"):
        return largest
    return int(context.update_device_memory_size_for_shapes()) or largest


def set_scratch(context: Any, pointer: int, nbytes: int) -> None:
    """Give an execution context its scratch memory."""
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(pointer, nbytes)
    else:
        context.device_memory = pointer
