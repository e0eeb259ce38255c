"""CCNet: dense audio-visual event localization. Names are imported when they are used; only `CCNet` needs PyTorch.

from ccnet import Localizer, load_bundle, load_checkpoint, train
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccnet.version import __version__ as __version__

if TYPE_CHECKING:
    from ccnet.api import load_bundle, train
    from ccnet.checkpoint import load_checkpoint, save_checkpoint
    from ccnet.config import Config, ModelConfig, preset
    from ccnet.network.model import CCNet
    from runtime.localizer import Localizer

__all__ = [
    "CCNet",
    "Config",
    "Localizer",
    "ModelConfig",
    "load_bundle",
    "load_checkpoint",
    "preset",
    "save_checkpoint",
    "train",
]

_HOME = {
    "CCNet": "ccnet.network.model",
    "Config": "ccnet.config",
    "Localizer": "runtime.localizer",
    "ModelConfig": "ccnet.config",
    "load_bundle": "ccnet.api",
    "load_checkpoint": "ccnet.checkpoint",
    "preset": "ccnet.config",
    "save_checkpoint": "ccnet.checkpoint",
    "train": "ccnet.api",
}


def check_packages() -> None:
    """Raise ImportError, naming the file, where a module of the user is found in place of a package of ours.

    Python looks into the user's folders first, and would only say that 'runtime' is not a package.
    """
    here = Path(__file__).resolve().parents[1]
    for package in ("runtime", "export"):
        found = importlib.util.find_spec(package)
        if found is None:  # a lean installation may lack `export`
            continue
        if found.origin is None or Path(found.origin).resolve().parents[1] != here:
            raise ImportError(
                f"{found.origin or package}: not the package '{package}' that belongs to {here / 'ccnet'}; "
                "rename what is called so, or take its folder off the module search path (PYTHONPATH)"
            )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ccnet' has no attribute {name!r}")
    check_packages()
    return getattr(importlib.import_module(_HOME[name]), name)
