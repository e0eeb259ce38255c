"""Compilation of the few numeric loops that NumPy can't express. Importing this module imports numba (about 0.4 s)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(signature: str) -> Callable[[Function], Function]:
    """Compile a function for one signature, now; the machine code is cached on disk for the next process.

    IEEE arithmetic as written (no fast math); the GIL is released. Where no cache folder can be written, the
    function is compiled in every process instead.
    """

    def decorate(function: Function) -> Function:
        options = {"nogil": True, "error_model": "numpy"}
        try:
            return numba.njit(signature, cache=True, **options)(function)  # type: ignore[no-any-return]
        except (OSError, RuntimeError):  # no writable cache folder, or the disk is full
            return numba.njit(signature, **options)(function)  # type: ignore[no-any-return]

    return decorate
