"""A worker: takes shards, runs their videos through one engine, and writes each shard whole, then its receipt."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from runtime import errors
from runtime.bundle import read_bundle
from runtime.corpus.plan import PLAN, Plan, done_file, pin_engine, pinned_engine, read_plan, suspect_file
from runtime.corpus.schedule import Task
from runtime.corpus.sources import SourceOptions, open_source
from runtime.corpus.store import open_store
from runtime.detections import Record, event_line, write_parquet_to
from runtime.errors import CCNetError, EngineError, VideoFailed, WorkerDied, printable
from runtime.localizer import Localizer
from runtime.pipeline import Item, Localized
from runtime.records import BadRecord, parse_json
from runtime.schema import section_from_json


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to open the bundle and run it, see `Localizer.load` and `Localizer.stream`."""

    backend: str = "auto"
    precision: str | None = None
    on_mismatch: str = "error"
    threads: int | None = None
    long_videos: str = "crop"
    window_overlap: float = 0.5
    batch: int | None = None
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker needs to know; as JSON it travels to other processes and machines."""

    bundle: str
    source: SourceOptions
    out: str
    """The run's folder, in which the plan lies."""
    engine: EngineOptions
    stop_on_error: bool = False
    """End at the first bad video."""

    def to_json(self) -> str:
        return orjson.dumps(dataclasses.asdict(self)).decode()

    @classmethod
    def from_json(cls, text: str) -> Job:
        return section_from_json(cls, orjson.loads(text), where="job")


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What became of a shard: content of its file in `done/`."""

    shard: int
    videos: int
    written: int
    """Videos whose events are written."""
    events: int
    size: int
    """Bytes of the shard's file."""
    sha256: str
    """Of the same."""
    failed: dict[str, dict[str, str]]
    """Error and message by id of a bad video; what no text can hold of an id is escaped."""
    gaps: dict[str, dict[str, Any]]
    """What is not covered of a video, see `runtime.coverage.Gaps`, by id."""
    engine: str
    status: str
    seconds: float
    host: str

    def to_json(self) -> bytes:
        return orjson.dumps(dataclasses.asdict(self), option=orjson.OPT_APPEND_NEWLINE)


Take = Callable[[bool], "Task | None"]
"""(wait): the next shard; None where no more will come, or without `wait` where there is none now."""

DEATHS = 2
"""After so many deaths of workers at a video, it is bad."""


@dataclass
class _Open:
    """A shard whose videos are on their way."""

    shard: int
    videos: int
    results: list[Localized]


class ShardWorker:
    """One engine, and the shards that go through it."""

    def __init__(self, job: Job) -> None:
        """Open the bundle, with the engine that the run has, or else the one that then becomes the run's.

        Raises what `Localizer.load` raises, ConfigError where this machine's engine is another one than the run's, and
        FileNotFoundError where the run is gone: another process may have finished it.
        """
        self._job = job
        self._store = open_store(job.out)
        plan = read_plan(self._store)
        if plan is None:
            raise FileNotFoundError(errno.ENOENT, "there is no plan; the folder was deleted", f"{job.out}/{PLAN}")
        self._plan: Plan = plan
        options = job.engine
        backend, precision = options.backend, options.precision
        pinned = pinned_engine(self._store)
        if pinned is not None and backend == "auto":
            backend, precision = pinned
        self._localizer = Localizer.load(
            job.bundle,
            backend,
            precision=precision,
            on_mismatch=options.on_mismatch,  # type: ignore[arg-type]
            threads=options.threads,
            long_videos=options.long_videos,  # type: ignore[arg-type]
            window_overlap=options.window_overlap,
        )
        try:
            self.engine = self._localizer.describe()
            """See `Localizer.describe`."""
            (chosen,) = (e for e in read_bundle(job.bundle).manifest.engines if e.name == self.engine["engine"])
            pin_engine(self._store, chosen.name, chosen.backend, chosen.precision)
        except BaseException:
            self._localizer.close()
            raise
        self._source = open_source(job.source, self._localizer.spec)

    def run(
        self,
        take: Take,
        *,
        on_video: Callable[[], None],
        on_shard: Callable[[int], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Process shards until there are none any more, or until `stopped`.

        Videos of the next shard are under way while those of one before are finished. `on_video` is called for every
        video, `on_shard` when a shard and its receipt are written. Raises VideoFailed for a job that stops at the
        first bad video, and what ends `Localizer.stream`.
        """
        while not stopped() and (task := take(True)) is not None:
            if task.careful:
                self._run_carefully(task.shard, on_video, on_shard, stopped)
            else:
                self._run_from(task.shard, take, on_video, on_shard, stopped)

    def _run_from(
        self,
        first: int,
        take: Take,
        on_video: Callable[[], None],
        on_shard: Callable[[int], None],
        stopped: Callable[[], bool],
    ) -> None:
        """Process a shard and those that can be had right behind it as one stream."""
        opened: deque[_Open] = deque()
        options = self._job.engine

        def items() -> Iterator[Item]:
            shard: int | None = first
            while shard is not None:
                entries = self._plan.entries(self._store, shard)
                opened.append(_Open(shard, len(entries), []))
                yield from map(self._source.item, entries)
                following = take(False)  # never a careful one, which is given alone
                shard = following.shard if following else None

        begun = time.monotonic()
        stream = self._localizer.stream(items(), batch_size=options.batch, workers=options.workers)
        with contextlib.closing(stream):
            for result in stream:
                if stopped():
                    return
                self._check(result)
                current = opened[0]
                current.results.append(result)
                on_video()
                if len(current.results) == current.videos:
                    now = time.monotonic()
                    self._write(current, now - begun)
                    on_shard(current.shard)
                    begun = now
                    opened.popleft()

    def _run_carefully(
        self, shard: int, on_video: Callable[[], None], on_shard: Callable[[int], None], stopped: Callable[[], bool]
    ) -> None:
        """Process a shard video by video, and note before each one that a death from now on is of this one.

        A video that workers died of `DEATHS` times is left out, as one that can't be processed.
        """
        begun = time.monotonic()
        entries = self._plan.entries(self._store, shard)
        current = _Open(shard, len(entries), [])
        deaths = self._deaths(shard)
        for entry in entries:
            if stopped():
                return
            if deaths.get(entry.video_id, 0) >= DEATHS:
                error = WorkerDied(f"{entry.video_id}: the process that worked on this video died, {DEATHS} times")
                result = Localized(entry.video_id, entry.duration, None, error)
            else:
                suspect = orjson.dumps({"at": entry.video_id, "deaths": deaths})
                self._store.write(suspect_file(shard), suspect)
                options = self._job.engine
                stream = self._localizer.stream(
                    [self._source.item(entry)], batch_size=options.batch, workers=options.workers
                )
                (result,) = stream
            self._check(result)
            current.results.append(result)
            on_video()
        self._write(current, time.monotonic() - begun)
        self._store.remove(suspect_file(shard))
        on_shard(shard)

    def _deaths(self, shard: int) -> dict[str, int]:
        """Return how often careful workers died at a video of a shard, by id, counting the last one."""
        try:
            record = parse_json(self._store.read(suspect_file(shard)))
            deaths, at = dict(record["deaths"]), str(record["at"])
        except (FileNotFoundError, BadRecord, KeyError, TypeError, ValueError):
            return {}
        deaths[at] = int(deaths.get(at, 0)) + 1
        return deaths

    def _check(self, result: Localized) -> None:
        if result.error is not None and self._job.stop_on_error:
            raise VideoFailed(f"stopped at video {result.video_id} (--on-error stop): {result.error}")

    def _write(self, finished: _Open, seconds: float) -> None:
        """Write the events of a shard, and then its receipt."""
        records: list[Record] = [
            (result.video_id, result.duration, result.detections)
            for result in finished.results
            if result.detections is not None and result.duration is not None
        ]
        if self._plan.settings.format == "parquet":
            stream = io.BytesIO()
            write_parquet_to(stream, records)
            data = stream.getvalue()
        else:
            data = b"".join(event_line(*record) for record in records)
        self._store.write(self._plan.shard_file(finished.shard), data)
        receipt = Receipt(
            shard=finished.shard,
            videos=finished.videos,
            written=len(records),
            events=sum(len(detections) for _, _, detections in records),
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            failed={
                printable(result.video_id): {"error": type(result.error).__name__, "message": str(result.error)}
                for result in finished.results
                if result.error is not None
            },
            gaps={r.video_id: dataclasses.asdict(r.gaps) for r in finished.results if r.gaps is not None},
            engine=self.engine["engine"],
            status=self.engine["status"],
            seconds=round(seconds, 3),
            host=os.uname().nodename,
        )
        self._store.write(done_file(finished.shard), receipt.to_json())

    def close(self) -> None:
        """Close the engine."""
        self._localizer.close()


def error_to_json(error: CCNetError | OSError) -> dict[str, Any]:
    """Return what `error_from_json` makes the error of again, in another process."""
    if isinstance(error, OSError):
        return {"errno": error.errno, "message": error.strerror or str(error), "filename": error.filename}
    return {"kind": type(error).__name__, "message": str(error), "exit_code": error.exit_code}


def error_from_json(data: Mapping[str, Any]) -> CCNetError | OSError:
    """Return an error of the same class and message, whatever else its class takes."""
    if "errno" in data:
        return OSError(data["errno"], data["message"], data["filename"])
    kind: type[CCNetError] = getattr(errors, data["kind"], EngineError)
    error = kind.__new__(kind)
    CCNetError.__init__(error, data["message"])
    error.exit_code = data["exit_code"]
    return error
