"""Progress: how far a long job has come, on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

from runtime.files import give_up

_SECONDS = 10.0
"""Between two plain lines."""


class Progress:
    """Counts to `total`: a tqdm bar on a terminal where tqdm is installed, else a plain line now and then.

    with Progress("predict", total=len(videos)) as progress:
        for video in videos:
            ...
            progress.advance()
    """

    def __init__(self, text: str, *, total: int, initial: int = 0, unit: str = "video", quiet: bool = False) -> None:
        """Show nothing when `quiet`. `initial`: what was done before, which does not count for the rate."""
        self._text, self._total, self._unit, self._quiet = text, total, unit, quiet
        self._count = self._initial = initial
        self._numbers = ""
        self._begun = self._shown = time.monotonic()
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                return
            self._bar = tqdm(total=total, initial=initial, desc=text, unit=unit, leave=False)

    def advance(self, count: int = 1) -> None:
        """Count `count` more."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._quiet and time.monotonic() - self._shown >= _SECONDS:
            self._shown = time.monotonic()
            rate = (self._count - self._initial) / (self._shown - self._begun)
            line = f"{self._text}: {self._count}/{self._total}, {rate:.1f} {self._unit}s/s"
            try:
                print(line + self._numbers, file=sys.stderr, flush=True)
            except OSError:  # a log file on a full disk
                give_up(sys.stderr)

    def show(self, **numbers: float) -> None:
        """Show numbers behind the bar from the next update on, for example `show(loss=0.5)`."""
        self._numbers = "".join(f", {name} {value:.4g}" for name, value in numbers.items())
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in numbers.items()}, refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
