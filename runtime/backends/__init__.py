"""Engines behind one protocol. `open_backend` picks and loads one of a bundle's; each engine library is imported
only when it is used."""

from __future__ import annotations

from runtime.backends.base import Backend
from runtime.backends.select import BACKENDS, OnMismatch, Opened, open_backend, open_rung

__all__ = ["BACKENDS", "Backend", "OnMismatch", "Opened", "open_backend", "open_rung"]
