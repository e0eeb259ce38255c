"""StopRequest: Ctrl-C and SIGTERM as a question that long work asks itself at places where it can stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While the block runs, the first SIGINT or SIGTERM is noted; a second SIGINT interrupts at once.

    Only the main thread can take signals over; elsewhere they keep their meaning and `signal_number` stays None.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        """True once the work should stop."""
        return self.signal_number is not None

    @property
    def number(self) -> int:
        """The signal that asked; SIGINT where none did."""
        return self.signal_number or signal.SIGINT

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
