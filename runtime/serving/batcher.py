"""Dynamic micro-batching: requests of one model wait in a bounded queue, and threads take them in batches.

One thread at a time collects. It copies a request into its batch as soon as it arrives, and closes the batch when it is
full, or when an execution context is free and the oldest request in it has waited long enough for company. While every
context is busy waiting costs nothing, so batches grow with the load without being told to.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from runtime.backends.base import Backend, Float32, Int32
from runtime.errors import RequestError
from runtime.serving.contexts import Contexts

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Times:
    """When a request was where: `time.perf_counter()` seconds, 0 where it has not been yet."""

    submitted: float = 0.0
    taken: float = 0.0
    engine: float = 0.0
    engine_done: float = 0.0
    finished: float = 0.0
    batch: int = 0
    """Rows of the engine call."""


@dataclass(eq=False, slots=True, kw_only=True)
class Ticket:
    """What a request carries through a batcher, beside its content."""

    done: Callable[[], None] = lambda: None
    """Called from a thread of the batcher when the request has its result, unless it was cancelled."""
    rows: int = 1
    """Of the batch that it takes up."""
    times: Times = field(default_factory=Times)
    cancelled: bool = False


class Job(Protocol):
    """A request: anything with a ticket, to which a runner gives a result."""

    ticket: Ticket
    result: Any


J = TypeVar("J", bound=Job)


class _Hands(threading.local):
    """What one thread holds."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []  # taken and not finished
        self.backend: Backend | None = None  # reserved for the batch that is closed next


class Cancelled(Exception):
    """Every request of a batch was cancelled before its turn came."""


class Batcher(Generic[J]):
    """The queue of one model and the threads that empty it."""

    def __init__(
        self,
        name: str,
        contexts: Contexts,
        run: Callable[[Batcher[J]], None],
        *,
        threads: int,
        max_wait: float,
        queue_limit: int,
    ) -> None:
        """Start the threads.

        `run(batcher)` is what each does: take jobs, call `infer` for each batch of them, and hand in those that have a
        result to `finish`, until `take` gives none. `max_wait`: seconds that a request waits for others while a context
        is free. `queue_limit`: jobs that may wait to be taken by a thread.
        """
        self.name = name
        self.queue_limit = queue_limit
        self._contexts, self._run, self._max_wait = contexts, run, max_wait
        self._hands = _Hands()
        # All of this is guarded by the lock.
        self._lock = contexts.lock
        self._arrived, self._turn = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queue: deque[J] = deque()
        self._collector: int | None = None
        self._closed = False
        self._seconds = 0.0  # of the engine for a row, a moving average
        contexts.on_release.append(self._arrived.notify)
        self._threads = [
            threading.Thread(target=self._work, name=f"ccnet-{name}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._queue)

    @property
    def full(self) -> bool:
        """Whether the queue takes no more."""
        return len(self._queue) >= self.queue_limit

    def refusal(self) -> RequestError:
        """Return the error for a request that finds the queue full, with an estimate of when to come back."""
        seconds = len(self._queue) * self._seconds / self._contexts.count
        return RequestError(
            f"{self.name}: {len(self._queue)} requests are waiting already; try again later",
            status=503,
            retry_after=min(60, 1 + int(seconds)),
        )

    def submit(self, job: J) -> None:
        """Queue a job. Raises RequestError (503) where the queue is full."""
        job.ticket.times.submitted = time.perf_counter()
        with self._lock:
            if self.full:
                raise self.refusal()
            self._queue.append(job)
            self._arrived.notify()

    def cancel(self, job: J) -> None:
        """Take a job out that nobody waits for any more; one that a thread has already taken may still be run."""
        with self._lock:
            job.ticket.cancelled = True
            if job in self._queue:
                self._queue.remove(job)

    def close(self) -> None:
        """Let the threads finish what is queued, and wait for them."""
        with self._lock:
            self._closed = True
            self._arrived.notify_all()
            self._turn.notify_all()
        for thread in self._threads:
            thread.join()

    def take(self, count: int, wait: bool) -> Sequence[J]:
        """Return jobs of up to `count` rows for the batch of this thread; see `runtime.pipeline.Take`.

        With `wait` the batch is empty, and none means the end. Without, none means that the batch is closed.
        """
        hands, me = self._hands, threading.get_ident()
        if wait:
            self._give_back()  # reserved for a batch that came to nothing
        with self._lock:
            while self._collector not in (None, me) and not (self._closed and not self._queue):
                if not wait:  # windows of a long video are in the batch; what arrives goes to whoever collects
                    return ()
                self._turn.wait()
            self._collector = me
            while True:
                if jobs := self._pop(count):
                    hands.jobs += jobs
                    return jobs
                if self._closed or (self._queue and not wait):  # the next one does not fit
                    break
                if wait:
                    self._arrived.wait()
                    continue
                if not hands.jobs:  # what is in the batch are windows of a video that has failed since
                    break
                hands.backend = hands.backend or self._contexts.acquire_now()
                if hands.backend is None:
                    self._arrived.wait()
                    continue
                left = hands.jobs[0].ticket.times.submitted + self._max_wait - time.perf_counter()
                if left <= 0:
                    break
                self._arrived.wait(left)
            self._stop_collecting()
            return ()

    def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        """Run the batch of this thread; see `Backend.infer`. Raises Cancelled where nobody waits for it any more."""
        hands = self._hands
        with self._lock:
            self._stop_collecting()
        backend, hands.backend = hands.backend or self._contexts.acquire(), None
        try:
            if all(job.ticket.cancelled for job in hands.jobs):
                raise Cancelled
            begun = time.perf_counter()
            outputs = backend.infer(visual, audio, lengths)
            ended = time.perf_counter()
        finally:
            self._contexts.release(backend)
        for job in hands.jobs:
            times = job.ticket.times
            times.engine, times.engine_done, times.batch = times.engine or begun, ended, len(visual)
        self._seconds += 0.1 * ((ended - begun) / len(visual) - self._seconds)
        return outputs

    def finish(self, jobs: Sequence[J]) -> None:
        """Hand in jobs that have their result."""
        now = time.perf_counter()
        for job in jobs:
            self._hands.jobs.remove(job)
            job.ticket.times.finished = now
            if not job.ticket.cancelled:
                job.ticket.done()

    def _pop(self, count: int) -> list[J]:
        now = time.perf_counter()
        jobs: list[J] = []
        while self._queue and self._queue[0].ticket.rows <= count:
            job = self._queue.popleft()
            job.ticket.times.taken = now
            count -= job.ticket.rows
            jobs.append(job)
        return jobs

    def _give_back(self) -> None:
        backend, self._hands.backend = self._hands.backend, None
        if backend is not None:
            self._contexts.release(backend)

    def _stop_collecting(self) -> None:
        if self._collector == threading.get_ident():
            self._collector = None
            self._turn.notify()

    def _work(self) -> None:
        while not (self._closed and not self._queue):
            with self._failing_alone():
                self._run(self)

    @contextlib.contextmanager
    def _failing_alone(self) -> Iterator[None]:
        """Let the requests of this thread fail with what the block raises (no memory, a defect), and nothing else."""
        try:
            yield
        except BaseException as error:
            log.exception("%s: a thread of the server failed", self.name)
            with self._lock:
                self._stop_collecting()
            self._give_back()
            jobs = list(self._hands.jobs)
            for job in jobs:
                job.result = job.result or error
            self.finish(jobs)
