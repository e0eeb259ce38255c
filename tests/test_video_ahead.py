"""A generator that runs ahead in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import pytest

from runtime.video.ahead import Ahead


def wait_for(condition: threading.Event) -> None:
    assert condition.wait(10)


def test_items_come_in_order_and_are_made_before_they_are_taken() -> None:
    made: list[int] = []
    full, closed = threading.Event(), threading.Event()

    def items() -> Generator[int, None, None]:
        try:
            for number in range(20):
                made.append(number)
                if number == 3:
                    full.set()
                yield number
        finally:
            closed.set()

    ahead = Ahead(items(), 3)
    wait_for(full)  # nobody has taken one: three wait, and the fourth has no room
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    assert list(ahead) == list(range(20))
    wait_for(closed)
    ahead.close()
    ahead.close()


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Generator[int, None, None]:
        yield 1
        raise ValueError("of the second")

    ahead = Ahead(items(), 8)
    taken: list[int] = []
    with pytest.raises(ValueError, match="of the second"):
        taken.extend(ahead)
    ahead.close()
    late = Ahead(items(), 1)  # the error waits for room
    assert next(iter(late)) == 1
    late.close()


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_the_rest_may_be_left(taken: int) -> None:
    closed_in: list[str] = []

    def items() -> Generator[int, None, None]:
        try:
            yield from range(1000)
        finally:
            closed_in.append(threading.current_thread().name)

    ahead = Ahead(items(), 2)
    for _, number in zip(range(taken), ahead, strict=False):
        assert number < taken
    ahead.close()
    assert closed_in == ["ccnet-ahead"]
    assert "ccnet-ahead" not in [thread.name for thread in threading.enumerate()]
