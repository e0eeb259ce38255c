"""Work done ahead: a generator that runs in a thread of its own, a bounded number of items before they are taken."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_POLL = 0.1
"""Seconds after which a thread that waits for room looks whether it is still wanted."""


class Ahead(Generic[T]):
    """The items of a generator, in their order. What it raises is raised where the item is taken.

    The generator runs, and is closed, in the thread alone. `close` ends both; leaving the rest untaken is no error.
    """

    def __init__(self, items: Generator[T, Any, Any], count: int) -> None:
        """Start at once. `count`: most items that wait to be taken."""
        self._items = items
        self._ready: queue.Queue[tuple[bool, Any]] = queue.Queue(count)
        self._unwanted = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ccnet-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while True:
            good, item = self._ready.get()
            if good:
                yield item
            elif item is None:
                return
            else:
                raise item

    def close(self) -> None:
        """End the generator and its thread. Safe to call twice."""
        self._unwanted.set()
        self._thread.join()

    def _work(self) -> None:
        end: BaseException | None = None
        try:
            for item in self._items:
                if not self._hand_over((True, item)):
                    break
        except BaseException as error:  # noqa: BLE001 - raised where the items are taken
            end = error
        finally:
            self._items.close()
        self._hand_over((False, end))

    def _hand_over(self, item: tuple[bool, Any]) -> bool:
        """Wait for room; return False when nobody wants the item any more."""
        while not self._unwanted.is_set():
            try:
                self._ready.put(item, timeout=_POLL)
            except queue.Full:
                continue
            return True
        return False
