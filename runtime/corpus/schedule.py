"""Which shard is whose turn, and how often a shard is tried: the part of a run that does no work itself.

`drive` hands shards to the workers of a pool until all are done or given up. It knows neither processes nor files nor
the time, so a simulation runs the same code with a pool of its own.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from runtime.errors import CCNetError, EngineError, VideoFailed

ATTEMPTS = 10
"""How often a shard that takes its worker down is tried."""
CAREFUL = 2
"""After so many attempts a worker goes through a shard video by video, so that the one it dies of is known."""
DEPTH = 2
"""Shards a worker is given at once, so that it never waits for the next one."""


class Task(NamedTuple):
    """A shard for a worker."""

    shard: int
    careful: bool = False
    """To go through it video by video."""


@dataclass(frozen=True)
class Ready:
    """A worker has opened its engine, and can be given shards."""

    worker: int
    engine: Mapping[str, Any]
    """See `Localizer.describe`."""


@dataclass(frozen=True)
class Advanced:
    """A worker has processed so many more videos, of a shard that is not done yet."""

    worker: int
    videos: int


@dataclass(frozen=True)
class Done:
    """A worker has written a shard, and its receipt."""

    worker: int
    shard: int


@dataclass(frozen=True)
class Died:
    """A worker is gone, with what it was at."""

    worker: int
    reason: str
    error: CCNetError | OSError | None = None
    """What it raised, where that is known; OSError when it could not write."""


Event: TypeAlias = "Ready | Advanced | Done | Died"


class Pool(Protocol):
    """Workers, by number from 0."""

    size: int
    restarts: bool
    """Whether a worker that died can be started again."""

    def start(self, worker: int) -> None:
        """Start a worker, or start it again after it died."""

    def give(self, worker: int, task: Task) -> None:
        """Hand a shard to a worker, behind those that it has."""

    def wait(self) -> list[Event]:
        """Wait for events, up to some tenths of a second."""


class ShardQueue:
    """The shards that are left, those with the fewest attempts first.

    A shard that was at a worker which died is tried again alone: what its worker dies of next is that shard.
    """

    def __init__(
        self, shards: Iterable[int], *, attempts: Mapping[int, int] | None = None, most_attempts: int = ATTEMPTS
    ) -> None:
        """`attempts`: those that earlier processes made, of shards where they died."""
        self._attempts: dict[int, int] = defaultdict(int, attempts or {})
        self._most = most_attempts
        self._ready = [(self._attempts[shard], shard) for shard in shards]
        heapq.heapify(self._ready)
        self._held: dict[int, list[int]] = defaultdict(list)
        self._left = len(self._ready)

    @property
    def left(self) -> int:
        """How many shards are not done, dropped or given up."""
        return self._left

    @property
    def finished(self) -> bool:
        """Whether no shard is left."""
        return self._left == 0

    @property
    def waiting(self) -> bool:
        """Whether there is a shard that no worker has."""
        return bool(self._ready)

    def held(self, worker: int) -> list[int]:
        """Return the shards that a worker has, in the order in which it got them."""
        return list(self._held[worker])

    def take(self, worker: int) -> int | None:
        """Return the next shard for a worker; None where there is none for it now."""
        held = self._held[worker]
        alone = held and (self._attempts[held[0]] > 0 or (self._ready and self._ready[0][0] > 0))
        if not self._ready or len(held) >= DEPTH or alone:
            return None
        shard = heapq.heappop(self._ready)[1]
        held.append(shard)
        return shard

    def done(self, worker: int, shard: int) -> None:
        """Note that a worker is done with a shard, or that it need not be done."""
        self._held[worker].remove(shard)
        self._left -= 1

    def postpone(self, worker: int, shard: int) -> None:
        """Note that a worker can't have a shard now; `put_back` makes it available again."""
        self._held[worker].remove(shard)

    def put_back(self, shard: int) -> None:
        """Make a postponed shard available."""
        heapq.heappush(self._ready, (self._attempts[shard], shard))

    def task(self, shard: int) -> Task:
        """Return a shard as a worker is to be given it."""
        return Task(shard, careful=self._attempts[shard] >= CAREFUL)

    def tried(self, shard: int, attempts: int) -> bool:
        """Note the attempts that others made at a shard. Returns whether it may be tried again."""
        self._attempts[shard] = max(self._attempts[shard], attempts)
        return self._attempts[shard] < self._most

    def lost(self, worker: int) -> list[int]:
        """Take back what a worker had when it died. Returns those shards that are not to be tried again."""
        given_up = []
        for shard in self._held.pop(worker, []):
            self._attempts[shard] += 1
            if self._attempts[shard] < self._most:
                self.put_back(shard)
            else:
                given_up.append(shard)
                self._left -= 1
        return given_up


Take: TypeAlias = Callable[[int], "int | None"]
"""(worker): the next shard for it, taken from the queue; None where there is none for it now."""


def drive(
    queue: ShardQueue,
    pool: Pool,
    *,
    take: Take,
    on_event: Callable[[Event], None],
    give_up: Callable[[int, str], None],
    tick: Callable[[], None],
) -> None:
    """Run all shards of a queue. `take` may drop and postpone shards; `tick` is called between events.

    A worker that dies is started again, and what it had is tried again, up to the attempts of the queue; then
    `give_up(shard, reason)` is called. Raises what a worker raised where nothing ever worked, where workers can't be
    restarted, or where it is the run that can't go on: VideoFailed, OSError. Raises EngineError when workers keep dying
    without finishing a shard.
    """
    started: set[int] = set()
    idle: set[int] = set()

    def start_workers() -> None:
        """Start as many workers as there are shards for; one that can't be had yet must not keep a shard waiting."""
        for worker in range(pool.size):
            if len(started) >= queue.left:
                return
            if worker not in started:
                started.add(worker)
                pool.start(worker)

    def fill(worker: int) -> None:
        while (shard := take(worker)) is not None:
            pool.give(worker, queue.task(shard))
        if queue.held(worker):
            idle.discard(worker)
        else:
            idle.add(worker)

    ever_ready = False
    fruitless = 0
    most_fruitless = 10 * (pool.size + 1)
    start_workers()
    while not queue.finished:
        tick()
        for worker in sorted(idle) if queue.waiting else ():
            if queue.waiting:
                fill(worker)
        for event in pool.wait():
            on_event(event)
            if isinstance(event, Ready):
                ever_ready = True
                fill(event.worker)
            elif isinstance(event, Done):
                fruitless = 0
                queue.done(event.worker, event.shard)
                fill(event.worker)
            elif isinstance(event, Died):
                started.discard(event.worker)
                idle.discard(event.worker)
                fruitless += 1
                for shard in queue.lost(event.worker):
                    give_up(shard, event.reason)
                unusable = event.error is not None and not ever_ready  # the bundle, or the choice of an engine
                if not pool.restarts or unusable or isinstance(event.error, VideoFailed | OSError):
                    raise event.error or EngineError(event.reason)
                if fruitless >= most_fruitless:
                    raise EngineError(f"workers died {fruitless} times without finishing a shard; last: {event.reason}")
                start_workers()
