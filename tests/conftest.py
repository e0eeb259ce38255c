"""Shared fixtures: the reference data, which lie beside a checkout where they are available."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import shared_path


@pytest.fixture(scope="session")
def annotations_file() -> Path:
    """The published UnAV-100 annotation file."""
    return shared_path("data/unav100_annotations.json")
