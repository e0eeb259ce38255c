"""A run over a corpus: begun or resumed, driven to its end, and put together.

Every process that is started with the same command works on the same run. It finds out from the run's folder what is
left, claims a shard at a time, and what it wrote stays when it or the machine dies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.corpus.claims import Claims, FileClaims, NoClaims
from runtime.corpus.plan import CLAIMS, DONE, FAILED, SHARDS, Plan, done_file, read_plan
from runtime.corpus.schedule import ATTEMPTS, Advanced, Died, Done, Event, Pool, ShardQueue, drive
from runtime.corpus.store import LocalStore, Store, join_location, whole_file
from runtime.corpus.worker import Receipt
from runtime.coverage import Gaps
from runtime.detections import join_parquet
from runtime.errors import ConfigError, PredictionError, printable
from runtime.records import BadRecord, parse_json
from runtime.schema import require, section_from_json, show

log = logging.getLogger(__name__)

_GAVE_UP = ".gave-up.json"
_POLL_SECONDS = 2.0
"""Between two looks at shards that others are at."""


@dataclass(frozen=True)
class Part:
    """One of `count` parts of a run, index from 0: every count-th shard."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parse `i/n`. Raises ConfigError for anything else."""
        index, slash, count = text.partition("/")
        good = slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)
        require(bool(good), "--shard", text, "i/n with 0 <= i < n, for example 0/4")
        return cls(int(index), int(count))

    def shards(self, plan: Plan) -> range:
        return range(self.index, plan.shards, self.count)


@dataclass
class Summary:
    """What became of the shards that were asked for, in this run of the command and earlier ones."""

    videos: int = 0
    """Videos of all shards that were asked for."""
    written: int = 0
    """Videos whose events are written."""
    events: int = 0
    shards: int = 0
    """Shards that are done."""
    engine: str = "no engine"
    status: str = "not run"
    failed: dict[str, str] = field(default_factory=dict)
    """What is wrong, by the id of the bad video."""
    gaps: dict[str, Gaps] = field(default_factory=dict)
    """What is not covered of a video, where that is something."""
    gave_up: dict[int, str] = field(default_factory=dict)
    """Why, by shard that was not to be done."""


class Run:
    """The shards of one process' part of a run, and what is known of them."""

    def __init__(self, store: Store, plan: Plan, part: Part | None = None) -> None:
        self.store, self.plan = store, plan
        self.part = part or Part()
        self._shards = self.part.shards(plan)
        done = self._done()
        self.left = [shard for shard in self._shards if shard not in done]
        """Shards that were not done when this process looked."""
        self.videos = sum(map(plan.videos_of, self._shards))
        self.videos_left = sum(map(plan.videos_of, self.left))

    def drive(self, pool: Pool, *, advance: Callable[[int], None], check: Callable[[], None]) -> None:
        """Do what is left. `advance` is told how many more videos were processed; what `check` raises ends the run.

        Raises what a worker raised that can't be restarted, and OSError when the run's folder can't be written.
        """
        local = isinstance(self.store, LocalStore)
        claims: Claims = FileClaims(Path(self.store.location) / CLAIMS) if local else NoClaims()
        names = set(self.store.names(DONE))
        for shard in self.left:
            if f"{shard:06d}{_GAVE_UP}" in names:  # by an earlier command; this one tries again
                self.store.remove(_gave_up_file(shard))
        try:
            _Drive(self, pool, claims, advance, check).run()
        finally:
            claims.close()

    def summary(self) -> Summary:
        """Read what became of this part."""
        summary = Summary(videos=self.videos)
        for shard in self._shards:
            receipt = self._receipt(shard)
            if receipt is None:
                reason = self._gave_up(shard)
                if reason is not None:
                    summary.gave_up[shard] = reason
                continue
            summary.shards += 1
            summary.written += receipt.written
            summary.events += receipt.events
            summary.engine, summary.status = receipt.engine, receipt.status
            summary.failed |= {video_id: error["message"] for video_id, error in receipt.failed.items()}
            summary.gaps |= {
                video_id: section_from_json(Gaps, gaps, where="gaps") for video_id, gaps in receipt.gaps.items()
            }
        return summary

    @property
    def complete(self) -> bool:
        """Whether all shards of all parts are done, or were given up."""
        names = set(self.store.names(DONE))
        return all(
            f"{shard:06d}.json" in names or f"{shard:06d}{_GAVE_UP}" in names for shard in range(self.plan.shards)
        )

    def finish(self, features: str) -> None:
        """Write the list of bad videos of a run that is complete, and remove what only a run under way needs.

        `features`: the folder that the run's videos are relative to.
        """
        lines = []
        for shard in range(self.plan.shards):
            bad = self._bad_videos(shard)
            for entry in self.plan.entries(self.store, shard) if bad else ():
                found = bad.get(printable(entry.video_id))
                if found is not None:
                    folder = features if entry.features is None else join_location(features, entry.features)
                    placed = dataclasses.replace(entry, features=folder)
                    lines.append(placed.to_line(shard=shard, **found))
        self.store.write(FAILED, b"".join(lines))
        self.store.remove(CLAIMS)

    def _bad_videos(self, shard: int) -> dict[str, dict[str, str]]:
        """Return error and message by video id, of a shard that is done or was given up."""
        receipt = self._receipt(shard)
        if receipt is not None:
            return receipt.failed
        message = f"its shard was given up: {self._gave_up(shard)}"
        return {
            printable(e.video_id): {"error": "GaveUp", "message": message} for e in self.plan.entries(self.store, shard)
        }

    def join(self, out: str) -> None:
        """Write the events of all shards, in order, as one file at a path or URL. Every shard must be done.

        Raises PredictionError for a shard that is not what was written; it is then no longer done.
        """
        with whole_file(out) as stream:
            if self.plan.settings.format == "parquet":
                join_parquet(stream, self._contents())
            else:
                for content in self._contents():
                    stream.write(content)

    def shard_files(self) -> list[str]:
        """Return the paths or URLs of all shards, in order.

        Raises PredictionError for a run that is not complete, with what is missing, or that was altered.
        """
        where = self.store.location
        if self.left:
            missing = sum(map(self.plan.videos_of, self.left))
            first = ", ".join(f"{shard:06d}" for shard in self.left[:3]) + (", ..." if len(self.left) > 3 else "")
            raise PredictionError(
                f"{where}: a run that is not complete: {len(self.left)} of {self.plan.shards} shards ({first}) with "
                f"{missing} of {self.plan.videos} videos are missing; the command that began it goes on with it"
            )
        names = [self.plan.shard_file(shard) for shard in range(self.plan.shards)]
        for shard, name in enumerate(names):
            receipt = self._receipt(shard)
            if receipt is None or hashlib.sha256(self.store.read(name)).hexdigest() != receipt.sha256:
                raise PredictionError(f"{where}/{name}: altered since it was written; delete it and repeat the command")
        return [join_location(where, name) for name in names]

    def _contents(self) -> Iterator[bytes]:
        for shard in range(self.plan.shards):
            receipt = self._receipt(shard)
            name = self.plan.shard_file(shard)
            data = self.store.read(name) if receipt is not None else b""
            if receipt is None or hashlib.sha256(data).hexdigest() != receipt.sha256:
                self.store.remove(done_file(shard))
                raise PredictionError(
                    f"{self.store.location}/{name}: altered since it was written; run the command again"
                )
            yield data

    def _done(self) -> set[int]:
        receipts, shards = set(self.store.names(DONE)), set(self.store.names(SHARDS))
        return {
            shard
            for shard in range(self.plan.shards)
            if f"{shard:06d}.json" in receipts and self.plan.shard_file(shard).rpartition("/")[2] in shards
        }

    def is_done(self, shard: int) -> bool:
        """Return whether somebody has done a shard by now."""
        return (
            self.store.size(done_file(shard)) is not None and self.store.size(self.plan.shard_file(shard)) is not None
        )

    def give_up(self, shard: int, reason: str) -> None:
        """Note that a shard is not to be tried again by this command."""
        data = json.dumps({"shard": shard, "attempts": ATTEMPTS, "reason": reason})
        self.store.write(_gave_up_file(shard), data.encode() + b"\n")

    def _gave_up(self, shard: int) -> str | None:
        data = self._read(_gave_up_file(shard))
        return None if data is None else str(data.get("reason"))

    def _receipt(self, shard: int) -> Receipt | None:
        data = self._read(done_file(shard))
        where = f"{self.store.location}/{done_file(shard)}"
        return None if data is None else section_from_json(Receipt, data, where=where)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            data = parse_json(self.store.read(name))
            if not isinstance(data, dict):
                raise BadRecord(f"got {show(data)}, expected an object")
        except FileNotFoundError:
            return None
        except BadRecord as error:
            raise ConfigError(f"{self.store.location}/{name}: {error}; delete this file and run again") from None
        return data


def _gave_up_file(shard: int) -> str:
    return f"{DONE}/{shard:06d}{_GAVE_UP}"


def open_run(folder: str | os.PathLike[str]) -> Run | None:
    """Return the run that a local folder holds; None where it is no run's. Raises ConfigError for a damaged plan."""
    store = LocalStore(folder)
    plan = read_plan(store) if store.folder.is_dir() else None
    return None if plan is None else Run(store, plan)


class _Drive:
    """A run while it is driven: between the queue, the claims, and the pool."""

    def __init__(
        self, run: Run, pool: Pool, claims: Claims, advance: Callable[[int], None], check: Callable[[], None]
    ) -> None:
        self._run, self._pool, self._claims = run, pool, claims
        self._advance, self._check = advance, check
        self._queue = ShardQueue(run.left, attempts=claims.attempts())
        self._elsewhere: list[int] = []  # shards that others have
        self._next_look = 0.0
        self._told = False
        self._ahead: dict[int, int] = defaultdict(int)  # videos by worker that were counted before their shard is done

    def run(self) -> None:
        drive(
            self._queue,
            self._pool,
            take=self._take,
            on_event=self._on_event,
            give_up=self._give_up,
            tick=self._tick,
        )

    def _take(self, worker: int) -> int | None:
        while (shard := self._queue.take(worker)) is not None:
            attempts = self._claims.acquire(shard)
            if attempts is None:
                self._queue.postpone(worker, shard)
                self._elsewhere.append(shard)
            elif self._run.is_done(shard):
                self._claims.release(shard)
                self._queue.done(worker, shard)
                self._advance(self._run.plan.videos_of(shard))
            elif not self._queue.tried(shard, attempts):
                self._queue.done(worker, shard)
                self._give_up(shard, f"the {attempts} processes that tried it died")
            else:
                return shard
        return None

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Advanced):
            self._ahead[event.worker] += event.videos
            self._advance(event.videos)
        elif isinstance(event, Done):
            self._claims.release(event.shard)
            videos = self._run.plan.videos_of(event.shard)
            counted = min(videos, self._ahead[event.worker])
            self._ahead[event.worker] -= counted
            if videos > counted:
                self._advance(videos - counted)
        elif isinstance(event, Died):
            self._advance(-self._ahead.pop(event.worker, 0))
            if self._pool.restarts:
                held = ", ".join(map(str, self._queue.held(event.worker))) or "none"
                log.warning("%s (at shards: %s)", event.reason, held)

    def _give_up(self, shard: int, reason: str) -> None:
        self._run.give_up(shard, reason)
        self._claims.release(shard)
        log.warning("shard %d is given up after %d attempts: %s", shard, ATTEMPTS, reason)

    def _tick(self) -> None:
        self._check()
        if not self._elsewhere or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _POLL_SECONDS
        if not self._told and not self._queue.waiting:
            log.info("other processes are at %d shards; waiting for those", len(self._elsewhere))
            self._told = True
        for shard in self._elsewhere:
            self._queue.put_back(shard)
        self._elsewhere.clear()
