"""How far a long walk has come: a tqdm bar where tqdm is installed, else a plain line now and then, on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

_SECONDS = 5.0


class Progress:
    """Counts to `total`; silent when `quiet`."""

    def __init__(self, text: str, total: int, *, quiet: bool = False) -> None:
        self._text, self._total, self._quiet = text, total, quiet
        self._count = 0
        self._begin = self._shown = time.monotonic()
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                return
            self._bar = tqdm(total=total, desc=text, unit="video", leave=False)

    def advance(self) -> None:
        self._count += 1
        if self._bar is not None:
            self._bar.update()
        elif not self._quiet and time.monotonic() - self._shown >= _SECONDS:
            self._shown = time.monotonic()
            rate = self._count / (self._shown - self._begin)
            print(f"{self._text}: {self._count}/{self._total}, {rate:.1f} per second", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
