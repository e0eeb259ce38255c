"""Page-locked memory for callers: batches are filled in it, and the GPU copies from it without one more copy.

The memory is Python's own and registered with CUDA, so it outlives the engine that lent it: once the engine is closed
its arrays are as good as any others, only not page-locked any more. `cuda.PinnedArray` is for what no caller sees.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.tensorrt import cuda
from runtime.errors import EngineError

LARGEST_POOL = 4 << 30
"""Bytes that one engine page-locks for its callers at most; beyond it they get memory that is copied once more."""

IDLE_PART = 8
"""That part of it may stay page-locked while nobody uses it."""

log = logging.getLogger("runtime.tensorrt")


class Block:
    """Whole pages that are registered with CUDA."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_DONTFORK"):
            # a child process that shares the pages would make this process write to copies, which CUDA does not read
            self._pages.madvise(mmap.MADV_DONTFORK)
        self.pointer = ctypes.addressof(ctypes.c_ubyte.from_buffer(self._pages))
        cuda.call("cudaHostRegister", self.pointer, nbytes, cuda.bindings().cudaHostRegisterPortable)
        self.registered = True

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike, returned: deque[Block]) -> npt.NDArray[Any]:
        """Return an array in this block; the block goes to `returned` when no array uses it any more."""
        memory = (ctypes.c_ubyte * self.nbytes).from_buffer(self._pages)
        weakref.finalize(memory, returned.append, self).atexit = False  # a deque needs no lock, which might be held
        count = int(np.prod(shape, dtype=np.int64))
        array: npt.NDArray[Any] = np.frombuffer(memoryview(memory), dtype, count=count).reshape(shape)
        return array

    def unregister(self) -> None:
        """Give the page lock back; the memory stays as long as an array is in it."""
        self.registered = False
        cuda.call("cudaHostUnregister", self.pointer)


_registered: tuple[Block, ...] = ()
"""Of all engines of the process. Replaced as a whole, with `cuda.ALONE` held, and read without."""


def block_of(array: npt.NDArray[Any]) -> Block | None:
    """Return the registered block that an array lies in, or None where it is not page-locked."""
    pointer = array.ctypes.data
    for block in _registered:
        if block.pointer <= pointer and pointer + array.nbytes <= block.pointer + block.nbytes:
            return block
    return None


class PinnedPool:
    """The blocks that one engine has lent, used again where they fit. Any thread may allocate."""

    def __init__(self, device: int, largest: int = LARGEST_POOL) -> None:
        self._device = device
        self._largest = largest
        self._blocks: set[Block] = set()
        self._returned: deque[Block] = deque()
        self._closed = False
        self.refusal = ""
        """Why the latest memory is not page-locked; empty where it is."""

    @property
    def nbytes(self) -> int:
        """Bytes that are page-locked, lent or not."""
        return sum(block.nbytes for block in self._blocks)

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array of any content, page-locked where CUDA and the limit allow it; `refusal` says why not.

        Raises EngineError when the engine was closed.
        """
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        with cuda.ALONE:
            if self._closed:
                raise EngineError("the engine was closed: it has no memory for another batch")
            cuda.call("cudaSetDevice", self._device)  # CUDA keeps that choice per thread
            try:
                block = self._take(max(-(-nbytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE)
            except EngineError as error:
                if str(error) != self.refusal:
                    log.warning("batches are copied once more on their way to the GPU: %s", error)
                self.refusal = str(error)
                return np.empty(shape, dtype)
        self.refusal = ""
        return block.lend(shape, dtype, self._returned)

    def close(self) -> None:
        """Unregister all blocks, also those that are lent."""
        with cuda.ALONE, contextlib.ExitStack() as stack:  # goes on to the end also when one fails
            self._closed = True
            for block in list(self._blocks):
                stack.callback(self._drop, block)

    def _take(self, nbytes: int) -> Block:
        """Return a block of this size or up to twice of it, if one was returned; others make room for a new one."""
        idle = sorted((self._returned.popleft() for _ in range(len(self._returned))), key=lambda block: block.nbytes)
        for block in idle:
            if nbytes <= block.nbytes <= 2 * nbytes:
                idle.remove(block)
                self._returned.extend(idle)
                return block
        while idle and (
            self.nbytes + nbytes > self._largest or sum(block.nbytes for block in idle) > self._largest // IDLE_PART
        ):
            self._drop(idle.pop())
        self._returned.extend(idle)
        if self.nbytes + nbytes > self._largest:
            raise EngineError(f"more than {self._largest} bytes would be page-locked")
        return self._add(Block(nbytes))

    def _add(self, block: Block) -> Block:
        global _registered
        self._blocks.add(block)
        _registered = (*_registered, block)
        return block

    def _drop(self, block: Block) -> None:
        global _registered
        self._blocks.discard(block)
        _registered = tuple(other for other in _registered if other is not block)
        block.unregister()
