"""CCNet: dense audio-visual event localization. Importing this package does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ccnet.checkpoint import load_checkpoint, save_checkpoint
    from ccnet.config import Config, ModelConfig
    from ccnet.network.model import CCNet

__version__ = "0.1.0"
__all__ = ["CCNet", "Config", "ModelConfig", "load_checkpoint", "save_checkpoint"]

_HOME = {
    "CCNet": "ccnet.network.model",
    "Config": "ccnet.config",
    "ModelConfig": "ccnet.config",
    "load_checkpoint": "ccnet.checkpoint",
    "save_checkpoint": "ccnet.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ccnet' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
