"""The inputs and outputs of an execution context: one block of memory for each direction, and the copies of it.

Shapes: see `runtime.spec.ModelSpec` (B batch, T steps).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.tensorrt import cuda
from runtime.backends.tensorrt.pinned import Block, block_of
from runtime.blocks import BlockLayout
from runtime.spec import AUDIO, LENGTHS, VISUAL, ModelSpec

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Source:
    """The rows of a request in page-locked memory."""

    arrays: Arrays
    rows: int
    pointers: Mapping[str, int]
    block: Block | None
    """Where a caller's rows lie; None for those that were copied into the context's own memory."""


class Inputs:
    """The inputs on the device, as large as the largest batch that was run needs.

    Rows that no request has filled hold silence of one step, and others what an earlier request left there: a batch
    that is rounded up runs on them, and nobody reads what it makes of them.
    """

    def __init__(self, spec: ModelSpec, types: Mapping[str, np.dtype[Any]], rows: int, stream: cuda.Stream) -> None:
        """Allocate the device's block; `clear` must follow."""
        self.rows = rows
        self.layout = BlockLayout.of(spec.input_shapes(rows), types)
        self._length = spec.length
        self._stream = stream
        self._staging: cuda.PinnedArray | None = None
        self._device = cuda.DeviceBuffer(self.layout.nbytes)
        self.addresses = {name: self._device.pointer + offset for name, offset in self.layout.offsets.items()}
        self._steps = np.zeros(rows, np.int64)  # of each row, those that may be other than zero

    def clear(self) -> None:
        """Make all rows silence of one step, when the stream gets there."""
        self._stream.fill(self._device.pointer, self.layout.nbytes, 0)
        self._stream.fill_ones(self.addresses[LENGTHS], self.rows, self.layout.types[LENGTHS].itemsize)
        self._steps[:] = 0

    def source(self, arrays: Arrays) -> Source:
        """Return the rows of a request where the GPU can copy them: where they are, or in memory of this context."""
        rows = len(next(iter(arrays.values())))
        blocks = {block_of(array) for array in arrays.values()}
        block = blocks.pop() if len(blocks) == 1 else None
        if block is None or any(array.dtype != self.layout.types[name] for name, array in arrays.items()):
            if self._staging is None:
                with cuda.ALONE:
                    self._staging = cuda.PinnedArray((self.layout.nbytes,), np.uint8)
            staged = self.layout.arrays(self._staging.array)
            for name, array in arrays.items():
                np.copyto(staged[name][:rows], array, casting="same_kind")
            arrays, block = {name: staged[name][:rows] for name in arrays}, None
        return Source(arrays, rows, {name: array.ctypes.data for name, array in arrays.items()}, block)

    def upload(self, source: Source) -> None:
        """Copy whole rows, all by one copy where they lie on the host as they do on the device."""
        first = next(iter(source.pointers.values()))
        offsets = {name: pointer - first for name, pointer in source.pointers.items()}
        if source.rows == self.rows and offsets == self.layout.offsets:
            self._stream.upload(self._device.pointer, first, self.layout.nbytes)
        else:
            for name, pointer in source.pointers.items():
                self._stream.upload(self.addresses[name], pointer, source.rows * self.layout.row_bytes(name))

    def upload_steps(self, source: Source) -> None:
        """Copy the valid steps of each row alone, and clear what longer videos left behind them."""
        lengths, before = source.arrays[LENGTHS], self._steps.copy()
        self._steps[: source.rows] = self._length  # should one of the copies fail
        for name in (VISUAL, AUDIO):
            row_bytes = self.layout.row_bytes(name)
            step_bytes = row_bytes // self._length
            for row, steps in enumerate(lengths.tolist()):
                at, valid = row * row_bytes, steps * step_bytes
                self._stream.upload(self.addresses[name] + at, source.pointers[name] + at, valid)
                if before[row] > steps:
                    stale = (int(before[row]) - steps) * step_bytes
                    self._stream.fill(self.addresses[name] + at + valid, stale, 0)
        self._stream.upload(self.addresses[LENGTHS], source.pointers[LENGTHS], lengths.nbytes)
        self._steps[: source.rows] = lengths

    def close(self) -> None:
        """Free the memory; nothing must be using it."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._device.close)
            if self._staging is not None:
                stack.callback(self._staging.close)


class Outputs:
    """The outputs on the device and in page-locked memory, as large as the largest batch that was run needs."""

    def __init__(self, spec: ModelSpec, types: Mapping[str, np.dtype[Any]], rows: int, stream: cuda.Stream) -> None:
        """Allocate both blocks."""
        self._rows = rows
        self._layout = BlockLayout.of(spec.output_shapes(rows), types)
        self._stream = stream
        with contextlib.ExitStack() as stack:
            self._device = cuda.DeviceBuffer(self._layout.nbytes)
            stack.callback(self._device.close)
            self._host = cuda.PinnedArray((self._layout.nbytes,), np.uint8)
            stack.callback(self._host.close)
            self._buffers = stack.pop_all()
        self._arrays = self._layout.arrays(self._host.array)
        self.addresses = {name: self._device.pointer + offset for name, offset in self._layout.offsets.items()}

    def download(self, rows: int) -> None:
        """Copy the first rows to the host; all of them by one copy."""
        host = self._host.pointer
        if rows == self._rows:
            self._stream.download(host, self._device.pointer, self._layout.nbytes)
        else:
            for name, offset in self._layout.offsets.items():
                self._stream.download(host + offset, self.addresses[name], rows * self._layout.row_bytes(name))

    def copies(self, rows: int) -> dict[str, npt.NDArray[Any]]:
        """Return copies of the first rows, which must have arrived."""
        return {name: array[:rows].copy() for name, array in self._arrays.items()}

    def poison(self, byte: int) -> None:
        """Fill both sides with a byte, the device when the stream gets there."""
        self._stream.fill(self._device.pointer, self._layout.nbytes, byte)
        self._host.array.fill(byte)

    def close(self) -> None:
        """Free the memory; nothing must be using it."""
        self._arrays = {}
        self._buffers.close()
