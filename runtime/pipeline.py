"""A stream of videos through the engines: reading, packing, inference and post-processing overlap.

Three groups of threads do the work: readers, one thread per engine context, and finishers that pack batches and turn
outputs into events. The generator itself only hands tasks from one to the next and keeps the number of tasks in
flight bounded, so that memory does not grow with the stream and a slow consumer slows the readers.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from runtime.backends.base import Backend, Float32, Int32
from runtime.detections import Detections
from runtime.errors import CCNetError
from runtime.features import VideoFeatures, pack
from runtime.machine import usable_cores
from runtime.schema import require

if TYPE_CHECKING:
    from runtime.localizer import Job, Localizer, Video

Source: TypeAlias = "Video | Callable[[], Video] | CCNetError"
Item: TypeAlias = "tuple[str, Source] | tuple[str, Source, float | None]"


@dataclass(frozen=True)
class Localized:
    """What became of one video of a stream: detections, or the error that it has of its own."""

    video_id: str
    duration: float | None
    """Seconds; None where the video could not be read and no duration was given."""
    detections: Detections | None
    error: CCNetError | None = None
    note: str | None = None
    """What a person should know about the features, see `VideoFeatures.note`."""


Results: TypeAlias = Generator[Localized, None, None]
"""What a stream gives; its `close` stops the threads."""


@dataclass(eq=False)
class _Video:
    """A video under way."""

    video_id: str
    duration: float | None
    read: Future[Job]
    done: Future[Localized] = field(default_factory=Future)
    job: Job | None = None
    outputs: list[tuple[Float32, Float32] | None] = field(default_factory=list)
    missing: int = 0
    """Windows whose output is not there yet."""


@dataclass(eq=False)
class _Batch:
    """Windows that go through an engine together."""

    owners: list[tuple[_Video, int]]
    """(video, index of the window) of each row."""
    packed: Future[tuple[Float32, Float32, Int32]]


def stream_videos(
    localizer: Localizer, videos: Iterable[Item], *, batch_size: int, workers: int | None = None
) -> Results:
    """See `Localizer.stream`."""
    largest = min(backend.max_batch for backend in localizer.backends)
    require(1 <= batch_size <= largest, "batch_size", batch_size, f"1 to {largest}, what the engines take")
    workers = min(4, usable_cores()) if workers is None else workers
    require(workers >= 1, "workers", workers, "an integer >= 1")
    return _run(localizer, videos, batch_size, workers)


def _run(localizer: Localizer, videos: Iterable[Item], batch_size: int, workers: int) -> Results:
    # A generator, so that threads and engine contexts exist only once somebody iterates, and end when they stop.
    stream = _Stream(localizer, videos, batch_size, workers)
    try:
        yield from stream.results()
    finally:
        stream.stop()


class _Stream:
    def __init__(self, localizer: Localizer, videos: Iterable[Item], batch_size: int, workers: int) -> None:
        self._localizer = localizer
        self._source = iter(videos)
        self._source_error: BaseException | None = None
        self._exhausted = False
        self._batch_size = batch_size
        self._read_ahead = 2 * batch_size + workers
        self._order: deque[_Video] = deque()  # everything not yet handed out, in the order of the stream
        self._unadmitted: deque[_Video] = deque()  # its tail: being read
        self._group: list[tuple[_Video, int, VideoFeatures]] = []
        self._in_flight: set[Future[None]] = set()
        self._lock = threading.Lock()
        self._contexts = [context for backend in localizer.backends for context in _contexts(backend)]
        self._most_in_flight = len(self._contexts) + 1
        self._readers = ThreadPoolExecutor(workers, "ccnet-read")
        self._engines = ThreadPoolExecutor(len(self._contexts), "ccnet-engine")
        self._finishers = ThreadPoolExecutor(workers, "ccnet-finish")
        self._free: queue.SimpleQueue[Backend] = queue.SimpleQueue()
        for backend in self._contexts:
            self._free.put(backend)

    def results(self) -> Iterator[Localized]:
        while True:
            self._start_reading()
            if self._order and self._order[0].done.done():
                yield self._order.popleft().done.result()
            elif self._unadmitted and self._may_admit():
                self._admit(self._unadmitted.popleft())
            elif self._order:
                self._flush(self._order[0])
                yield self._order.popleft().done.result()
            elif self._source_error is not None:
                raise self._source_error
            else:
                return

    def _start_reading(self) -> None:
        while not self._exhausted and len(self._unadmitted) < self._read_ahead:
            try:
                video_id, source, *rest = next(self._source)
            except StopIteration:
                self._exhausted = True
                return
            except Exception as error:  # noqa: BLE001  handed on once the videos before it are out
                self._exhausted, self._source_error = True, error
                return
            duration = rest[0] if rest else None
            video = _Video(video_id, duration, self._readers.submit(self._read, video_id, source, duration))
            self._order.append(video)
            self._unadmitted.append(video)

    def _read(self, video_id: str, source: Source, duration: float | None) -> Job:
        if isinstance(source, CCNetError):
            raise source
        video = source() if callable(source) else source
        return self._localizer.prepare(video, name=video_id, duration=duration)

    def _may_admit(self) -> bool:
        """Whether another video may join the batches: keeps packed batches and waiting videos bounded."""
        self._in_flight = {future for future in self._in_flight if not future.done()}
        held_back = len(self._order) - len(self._unadmitted)
        return len(self._in_flight) < self._most_in_flight and len(self._group) + held_back < 8 * self._batch_size + 8

    def _admit(self, video: _Video) -> None:
        """Wait until a video is read and put its windows into batches."""
        try:
            job = video.job = video.read.result()
        except CCNetError as error:
            video.done.set_result(Localized(video.video_id, video.duration, None, error))
            return
        except Exception as error:  # noqa: BLE001  raised where this video's turn comes, after the good ones before it
            video.done.set_exception(error)
            return
        pieces = job.pieces()
        video.outputs, video.missing = [None] * len(pieces), len(pieces)
        for index, piece in enumerate(pieces):
            self._group.append((video, index, piece))
            if len(self._group) == self._batch_size:
                self._submit()

    def _flush(self, awaited: _Video) -> None:
        """Send an incomplete batch: at the end of the stream, or when the awaited video is held up in it."""
        if self._group and (not self._unadmitted or any(video is awaited for video, _, _ in self._group)):
            self._submit()

    def _submit(self) -> None:
        group, self._group = self._group, []
        packed = self._finishers.submit(pack, [piece for _, _, piece in group], self._localizer.spec)
        batch = _Batch([(video, index) for video, index, _ in group], packed)
        self._in_flight.add(self._engines.submit(self._infer, batch))

    def _infer(self, batch: _Batch) -> None:
        backend = self._free.get()
        try:
            logits, offsets = backend.infer(*batch.packed.result())
        except Exception as error:  # noqa: BLE001  it belongs to the consumer of these videos
            self._fail(batch, error)
            return
        finally:
            self._free.put(backend)
        for row, (video, index) in enumerate(batch.owners):
            video.outputs[index] = (logits[row], offsets[row])
            with self._lock:
                video.missing -= 1
                complete = video.missing == 0
            if complete:
                self._finishers.submit(self._finish, video)

    def _fail(self, batch: _Batch, error: BaseException) -> None:
        for video in dict.fromkeys(video for video, _ in batch.owners):
            with self._lock:
                if not video.done.done():
                    video.done.set_exception(error)

    def _finish(self, video: _Video) -> None:
        job: Any = video.job
        note = job.features.note
        try:
            detections = self._localizer.finish(job, [output for output in video.outputs if output is not None])
            result = Localized(video.video_id, job.duration, detections, None, note)
        except CCNetError as error:
            result = Localized(video.video_id, job.duration, None, error, note)
        except Exception as error:  # noqa: BLE001  as in _infer
            video.done.set_exception(error)
            return
        video.job = None  # the features are not needed any more, the result may wait long
        video.done.set_result(result)

    def stop(self) -> None:
        for pool in (self._readers, self._engines, self._finishers):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._readers, self._engines, self._finishers):
            pool.shutdown(wait=True)
        for backend in self._contexts:
            if backend not in self._localizer.backends:
                backend.close()


def _contexts(backend: Backend) -> list[Backend]:
    """Return the backend, and a second context on the same engine where it offers one, so that copies overlap."""
    fork = getattr(backend, "fork", lambda: None)()  # a caller's own backend need not have it
    return [backend] if fork is None else [backend, fork]
