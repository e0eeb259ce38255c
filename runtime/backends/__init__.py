"""Engines behind one protocol. `open_backend` picks and loads one of a bundle's; each engine library is imported
only when it is used."""

from __future__ import annotations

from runtime.backends.base import Backend
from runtime.backends.select import BACKENDS, OnMismatch, OpenedEngine, open_backend, open_engine

__all__ = ["BACKENDS", "Backend", "OnMismatch", "OpenedEngine", "open_backend", "open_engine"]
