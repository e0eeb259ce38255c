"""A stream of videos through a pipeline on several threads, in order and in bounded memory.

Every thread takes batches of videos through all stages and shares the engines' execution contexts with the others:
while one waits for an engine, others read the next batches and post-process the ones before. The generator itself takes
videos from its source and hands out results, in the consumer's thread.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from runtime.backends.base import Backend, Float32, Int32
from runtime.machine import usable_cores
from runtime.pipeline import Item, Localized, Pipeline, Results, Task
from runtime.schema import require


def stream_videos(
    pipeline: Pipeline,
    backends: Sequence[Backend],
    videos: Iterable[Item],
    *,
    batch_size: int,
    workers: int | None = None,
) -> Results:
    """See `Localizer.stream`."""
    largest = min(backend.max_batch for backend in backends)
    require(1 <= batch_size <= largest, "batch_size", batch_size, f"1 to {largest}, what the engines take")
    workers = min(4, usable_cores()) if workers is None else workers
    require(workers >= 1, "workers", workers, "an integer >= 1")
    return _run(pipeline, backends, videos, batch_size, workers)


def _run(
    pipeline: Pipeline, backends: Sequence[Backend], videos: Iterable[Item], batch_size: int, workers: int
) -> Results:
    # A generator, so that threads and engine contexts exist only once somebody iterates, and end when they stop.
    stream = _Stream(pipeline, backends, videos, batch_size, workers)
    try:
        yield from stream.results()
    finally:
        stream.stop()


class _Stream:
    def __init__(
        self,
        pipeline: Pipeline,
        backends: Sequence[Backend],
        videos: Iterable[Item],
        batch_size: int,
        workers: int,
    ) -> None:
        self._pipeline = pipeline
        self._batch_size = batch_size
        self._source = iter(videos)
        self._source_error: BaseException | None = None

        self._allocate = getattr(backends[0], "allocate", None)
        self._contexts: queue.SimpleQueue[Backend] = queue.SimpleQueue()
        contexts = 0
        with contextlib.ExitStack() as stack:
            for backend in backends:
                self._contexts.put(backend)
                contexts += 1
                fork = getattr(backend, "fork", lambda: None)()  # a caller's own backend need not have it
                if fork is not None:  # a second execution context, so that copies overlap with the engine
                    stack.callback(fork.close)
                    self._contexts.put(fork)
                    contexts += 1
            self._forks = stack.pop_all()
        # As many threads as there are contexts may wait for an engine; that leaves `workers` to do something.
        threads = workers + contexts
        self._threads = [
            threading.Thread(target=self._work, name=f"ccnet-stream-{i}", daemon=True) for i in range(threads)
        ]
        self._most_under_way = 2 * threads * batch_size

        # All of this is guarded by the lock.
        self._lock = threading.Lock()
        self._more_tasks, self._more_results = threading.Condition(self._lock), threading.Condition(self._lock)
        self._order: deque[Task] = deque()  # all that was taken from the source and not handed out yet
        self._new: deque[Task] = deque()  # its tail: not taken by a thread yet
        self._running = 0  # tasks that threads have taken and not finished
        self._exhausted = self._stopped = False
        self._failure: BaseException | None = None  # of a thread, which is a defect here

    def results(self) -> Iterator[Localized]:
        while True:
            self._take_from_source()
            finished = self._wait_for_results()
            for task in finished:
                if not isinstance(task.result, Localized):
                    raise task.result or RuntimeError("a video without a result")
                yield task.result
            with self._lock:
                for _ in finished:
                    self._order.popleft()
            if not finished:
                if self._source_error is not None:
                    raise self._source_error
                return

    def _take_from_source(self) -> None:
        """Take videos from the source while there is room, a batch at a time so that threads find whole ones."""
        while not self._exhausted and (room := self._most_under_way - len(self._order)) > 0:
            tasks: list[Task] = []
            error: Exception | None = None
            exhausted = False
            try:
                while len(tasks) < min(room, self._batch_size):
                    video_id, source, *rest = next(self._source)
                    tasks.append(Task(video_id, source, float(rest[0]) if rest and rest[0] is not None else None))
            except StopIteration:
                exhausted = True
            except Exception as caught:  # noqa: BLE001  handed on once the videos before it are out
                exhausted, error = True, caught
            with self._lock:
                self._order.extend(tasks)
                self._new.extend(tasks)
                self._exhausted, self._source_error = exhausted, error
                self._more_tasks.notify(len(self._threads) if exhausted else 1)
            for thread in self._threads:
                if thread.ident is None:
                    thread.start()

    def _wait_for_results(self) -> list[Task]:
        """Wait for the next video, and return it with those after it that are finished; empty at the end."""
        with self._lock:
            while self._order and self._order[0].result is None and self._failure is None:
                self._more_results.wait()
            if self._failure is not None:
                raise self._failure
            return list(itertools.takewhile(lambda task: task.result is not None, self._order))

    def _work(self) -> None:
        try:
            workspace = self._pipeline.workspace(self._batch_size, self._allocate)
            self._pipeline.run(self._take, self._finish, self._infer, workspace)
        except BaseException as error:  # noqa: BLE001  raised to the consumer, which would wait for ever
            with self._lock:
                self._failure = error
                self._more_results.notify()

    def _take(self, count: int, wait: bool) -> Sequence[Task]:
        """See `runtime.pipeline.Take`. A batch is left to fill up as long as videos before it are under way."""
        with self._lock:
            while not self._stopped:
                ready = min(count, len(self._new))
                if ready and (ready == count or not wait or self._exhausted or self._running == 0):
                    self._running += ready
                    return [self._new.popleft() for _ in range(ready)]
                if not wait or (self._exhausted and not self._new):
                    break
                self._more_tasks.wait()
        return ()

    def _finish(self, tasks: Sequence[Task]) -> None:
        with self._lock:
            self._running -= len(tasks)
            if self._order and self._order[0].result is not None:
                self._more_results.notify()
            if self._running == 0:
                self._more_tasks.notify()

    def _infer(self, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        backend = self._contexts.get()
        try:
            if self._stopped:
                raise RuntimeError("the stream was closed")  # nobody sees it
            return backend.infer(visual, audio, lengths)
        finally:
            self._contexts.put(backend)

    def stop(self) -> None:
        """Let the threads finish the batch they are at, and close what the stream opened."""
        with self._lock:
            self._stopped = True
            self._more_tasks.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._forks.close()
