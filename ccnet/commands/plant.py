"""`ccnet plant` (not written yet)."""

from __future__ import annotations

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    subparsers.add_parser("plant", help="not written yet")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    raise NotImplementedError
