"""The torch-free runtime: features -> engine -> decode -> suppress -> events in seconds, and the metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.detections import Detections
    from runtime.localizer import Localizer
    from runtime.spec import ModelSpec

__all__ = ["Detections", "Localizer", "ModelSpec"]

_HOME = {"Detections": "runtime.detections", "Localizer": "runtime.localizer", "ModelSpec": "runtime.spec"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
