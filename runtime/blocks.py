"""Several arrays one after the other in one block of memory, so that one copy moves all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT = 256
"""Bytes between the starts of arrays are a multiple of it: TensorRT asks this of its addresses."""


@dataclass(frozen=True)
class BlockLayout:
    """Where each array lies in a block, in the order of their names."""

    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, np.dtype[Any]]
    offsets: Mapping[str, int]
    """Bytes from the start of the block."""
    nbytes: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, npt.DTypeLike]) -> BlockLayout:
        """Lay out arrays of these shapes and types."""
        offsets: dict[str, int] = {}
        end = 0
        for name, shape in shapes.items():
            offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
            end = offsets[name] + int(np.prod(shape, dtype=np.int64)) * np.dtype(types[name]).itemsize
        return cls(dict(shapes), {name: np.dtype(types[name]) for name in shapes}, offsets, end)

    def row_bytes(self, name: str) -> int:
        """Return the bytes of one entry along the first axis of an array."""
        return int(np.prod(self.shapes[name][1:], dtype=np.int64)) * self.types[name].itemsize

    def arrays(self, block: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays in `block` [nbytes]."""
        found = {}
        for name, offset in self.offsets.items():
            nbytes = self.shapes[name][0] * self.row_bytes(name)
            found[name] = block[offset : offset + nbytes].view(self.types[name]).reshape(self.shapes[name])
        return found
