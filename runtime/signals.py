"""StopRequest: Ctrl-C and SIGTERM as a question that long work asks itself at places where it can stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a scheduler's request, and a terminal that was closed."""


class StopRequest:
    """Inside the block the first SIGINT, SIGTERM or SIGHUP is only noted; a second SIGINT raises KeyboardInterrupt.

    Only the main thread can take signals over; elsewhere they keep their effect and nothing is noted. SIGHUP stays
    ignored where it is, which is what `nohup` is for.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        """The signal that asked to stop; 0: none did."""
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the work should stop."""
        return self.signal_number != 0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
