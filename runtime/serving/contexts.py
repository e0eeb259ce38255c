"""Contexts: the execution contexts that the models of a server share, handed out in the order they are asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from runtime.backends.base import Backend


class Contexts:
    """Execution contexts of one network. Their lock is the one that everything around them is guarded by."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.count = len(backends)
        self.lock = threading.Lock()
        self.on_release: list[Callable[[], None]] = []
        """Called, with the lock held, when a context has become free."""
        self._free = list(backends)
        self._released = threading.Condition(self.lock)
        self._tickets: deque[object] = deque()  # of the threads that wait, the first one first

    def acquire(self) -> Backend:
        """Wait for a context; nobody who asks later gets one sooner. Takes the lock."""
        with self.lock:
            ticket = object()
            self._tickets.append(ticket)
            while not self._free or self._tickets[0] is not ticket:
                self._released.wait()
            self._tickets.popleft()
            return self._free.pop()

    def acquire_now(self) -> Backend | None:
        """Return a free context that no thread waits for, or None. The caller holds the lock."""
        return self._free.pop() if len(self._free) > len(self._tickets) else None

    def release(self, backend: Backend) -> None:
        """Give a context back. Takes the lock."""
        with self.lock:
            self._free.append(backend)
            self._released.notify_all()
            for notify in self.on_release:
                notify()
