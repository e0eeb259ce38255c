"""The torch-free runtime: features -> engine -> decode -> suppress -> events in seconds, and the metric."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.detections import Detections
    from runtime.errors import CCNetError
    from runtime.features import FeatureFiles
    from runtime.localizer import Localizer
    from runtime.spec import ModelSpec

__all__ = ["CCNetError", "Detections", "FeatureFiles", "Localizer", "ModelSpec"]

_HOME = {
    "CCNetError": "runtime.errors",
    "Detections": "runtime.detections",
    "FeatureFiles": "runtime.features",
    "Localizer": "runtime.localizer",
    "ModelSpec": "runtime.spec",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
