"""The queue of shards: every shard is done once, what kills workers is tried a few times, alone, and given up."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

import pytest

from runtime.corpus.schedule import ATTEMPTS, CAREFUL, DEPTH, Died, Done, Event, Ready, ShardQueue, Task, drive
from runtime.errors import BundleError, CCNetError, EngineError, VideoFailed


def test_fewest_attempts_first_and_no_more_than_a_worker_needs() -> None:
    queue = ShardQueue(range(4), attempts={0: 1})
    assert [queue.take(0) for _ in range(3)] == [1, 2, None]
    assert queue.held(0) == [1, 2]
    assert len(queue.held(0)) == DEPTH
    assert queue.take(1) == 3
    assert queue.take(1) is None  # shard 0 took a worker down: it is tried alone
    queue.done(1, 3)
    assert queue.take(1) == 0
    assert not queue.finished
    for worker, shard in ((0, 1), (0, 2), (1, 0)):
        queue.done(worker, shard)
    assert queue.finished


def test_nothing_follows_a_shard_that_is_tried_again() -> None:
    queue = ShardQueue(range(2), attempts={0: 1, 1: 1})
    assert [queue.take(0), queue.take(0), queue.take(1)] == [0, None, 1]


def test_a_lost_shard_comes_back_until_it_is_given_up() -> None:
    queue = ShardQueue([7], most_attempts=3)
    for _ in range(2):
        assert queue.take(0) == 7
        assert queue.lost(0) == []
    assert queue.take(0) == 7
    assert queue.lost(0) == [7]
    assert queue.finished


def test_attempts_of_others_count() -> None:
    queue = ShardQueue([1, 2])
    assert queue.tried(1, ATTEMPTS - 1)
    assert not queue.tried(2, ATTEMPTS)


def test_a_postponed_shard_comes_back() -> None:
    queue = ShardQueue([5])
    assert queue.take(0) == 5
    queue.postpone(0, 5)
    assert not queue.waiting
    assert not queue.finished
    queue.put_back(5)
    assert queue.take(1) == 5


class FakePool:
    """Workers that finish the shards they were given in turn, and die of those in `deadly`."""

    restarts = True

    def __init__(
        self, size: int, deadly: Mapping[int, CCNetError | OSError | None], *, useless: CCNetError | None = None
    ) -> None:
        self.size, self.deadly, self.useless = size, deadly, useless
        self.unplaced: set[int] = set()  # workers for which there is no room
        self.starts: Counter[int] = Counter()
        self.finished: Counter[int] = Counter()
        self.careful: Counter[int] = Counter()
        self.shards: dict[int, deque[int]] = {}
        self.opening: deque[int] = deque()

    def start(self, worker: int) -> None:
        assert worker not in self.shards
        self.starts[worker] += 1
        self.opening.append(worker)

    def give(self, worker: int, task: Task) -> None:
        self.shards[worker].append(task.shard)
        if task.careful:
            self.careful[task.shard] += 1

    def wait(self) -> list[Event]:
        if self.opening:
            worker = self.opening.popleft()
            if self.useless:
                return [Died(worker, "useless", self.useless)]
            if worker in self.unplaced:
                return []
            self.shards[worker] = deque()
            return [Ready(worker, {})]
        worker = next(worker for worker in sorted(self.shards) if self.shards[worker])
        shard = self.shards[worker].popleft()
        if shard in self.deadly:
            del self.shards[worker]
            return [Died(worker, f"died of {shard}", self.deadly[shard])]
        self.finished[shard] += 1
        self.shards[worker] = self.shards.pop(worker)
        return [Done(worker, shard)]


def run(pool: FakePool, shards: int) -> dict[int, str]:
    queue, given_up = ShardQueue(range(shards)), {}

    def give_up(shard: int, reason: str) -> None:
        given_up[shard] = reason

    drive(queue, pool, take=queue.take, on_event=lambda _: None, give_up=give_up, tick=lambda: None)
    return given_up


def test_poison_costs_itself_alone() -> None:
    pool = FakePool(3, dict.fromkeys((0, 5, 6, 19)))
    assert run(pool, 40) == {shard: f"died of {shard}" for shard in (0, 5, 6, 19)}
    assert pool.finished == dict.fromkeys(set(range(40)) - {0, 5, 6, 19}, 1)
    assert pool.careful == dict.fromkeys((0, 5, 6, 19), ATTEMPTS - CAREFUL)


def test_no_more_workers_are_started_than_there_are_shards() -> None:
    pool = FakePool(8, {})
    run(pool, 3)
    assert sum(pool.starts.values()) <= 3


def test_a_worker_for_which_there_is_no_room_keeps_no_shard_waiting() -> None:
    pool = FakePool(3, {})
    pool.unplaced = {0, 2}
    run(pool, 9)
    assert pool.finished == dict.fromkeys(range(9), 1)


def test_a_mistake_ends_the_run_at_once() -> None:
    with pytest.raises(BundleError, match="missing"):
        run(FakePool(2, {}, useless=BundleError("missing")), 9)


@pytest.mark.parametrize("error", [VideoFailed("bad"), OSError(28, "No space left on device")])
def test_what_concerns_the_whole_run_ends_it(error: CCNetError | OSError) -> None:
    with pytest.raises(type(error)):
        run(FakePool(1, {3: error}), 9)


def test_an_error_after_others_worked_costs_its_shard() -> None:
    assert set(run(FakePool(2, {3: EngineError("out of memory")}), 9)) == {3}


def test_workers_that_only_die_end_the_run() -> None:
    with pytest.raises(EngineError, match="workers died 30 times without finishing a shard; last: died of"):
        run(FakePool(2, dict.fromkeys(range(500))), 500)


def test_a_pool_that_can_not_restart_raises() -> None:
    pool = FakePool(1, {1: EngineError("fell off the bus")})
    pool.restarts = False
    with pytest.raises(EngineError, match="fell off"):
        run(pool, 3)
