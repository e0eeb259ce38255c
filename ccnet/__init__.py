"""CCNet: dense audio-visual event localization. Names are imported when they are used; only `CCNet` needs PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ccnet.checkpoint import load_checkpoint, save_checkpoint
    from ccnet.config import Config, ModelConfig, preset
    from ccnet.network.model import CCNet
    from runtime.localizer import Localizer

__version__ = "0.2.0"
__all__ = ["CCNet", "Config", "Localizer", "ModelConfig", "load_checkpoint", "preset", "save_checkpoint"]

_HOME = {
    "CCNet": "ccnet.network.model",
    "Config": "ccnet.config",
    "Localizer": "runtime.localizer",
    "ModelConfig": "ccnet.config",
    "load_checkpoint": "ccnet.checkpoint",
    "preset": "ccnet.config",
    "save_checkpoint": "ccnet.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ccnet' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
