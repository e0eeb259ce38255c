"""Workers as actors on a Ray cluster, one engine each."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.corpus.pools import take
from runtime.corpus.schedule import DEPTH, Died, Done, Event, Ready, Task
from runtime.corpus.worker import Job, ShardWorker, error_from_json, error_to_json
from runtime.errors import CCNetError, EngineError
from runtime.packages import import_package

_WAIT_SECONDS = 0.2
_CHECK_SECONDS = 2.0


class RayActor:
    """What runs in an actor's process: a `ShardWorker` in a thread, and methods that hand it shards.

    The actor takes as many calls at a time as a worker has shards, so that the next one's videos are under way while
    one is finished.
    """

    def __init__(self, job: str) -> None:
        self._job = Job.from_json(job)
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._engine: dict[str, Any] | None = None
        self._done: set[int] = set()
        self._error: dict[str, Any] | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def engine(self) -> dict[str, Any]:
        """Return what the worker runs, see `Localizer.describe`, as `ready`; or its `error` when it does not open."""
        with self._changed:
            self._changed.wait_for(lambda: self._engine is not None or self._error is not None)
            return {"ready": self._engine} if self._error is None else {"error": self._error}

    def process(self, shard: int, careful: bool) -> dict[str, Any]:
        """Process a shard; returns an `error` where that ended the worker."""
        self._tasks.put(Task(shard, careful))
        with self._changed:
            self._changed.wait_for(lambda: shard in self._done or self._error is not None)
            return {} if shard in self._done else {"error": self._error}

    def _work(self) -> None:
        try:
            worker = ShardWorker(self._job)
            with self._changed:
                self._engine = worker.engine
                self._changed.notify_all()
            worker.run(lambda wait: take(self._tasks, wait), on_video=lambda: None, on_shard=self._on_shard)
        except (CCNetError, OSError) as error:
            with self._changed:
                self._error = error_to_json(error)
                self._changed.notify_all()
        except BaseException:  # noqa: BLE001  nobody else would hear of it
            traceback.print_exc()  # a defect: to the log of the actor, which ends
            os._exit(1)

    def _on_shard(self, shard: int) -> None:
        with self._changed:
            self._done.add(shard)
            self._changed.notify_all()


class RayPool:
    """Actors of a cluster. Ray places them; one that dies, with its node or alone, is replaced by a new one."""

    restarts = True

    def __init__(self, job: Job, size: int | None) -> None:
        """Connect to the cluster that RAY_ADDRESS names (`auto`: the one of this machine), or start one here.

        `size`: actors; None: one for every GPU of the cluster, or for every core where it has none, which they share
        out. Raises MissingDependency without Ray, EngineError when the cluster can't be reached.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray = import_package("ray", "--on ray")
        try:
            address = os.environ.get("RAY_ADDRESS")
            self._one_node = not address
            with _own_folder():
                self._ray.init(
                    address=address or "local",  # said so: else Ray would wait for a cluster that it remembers
                    include_dashboard=None if address else False,
                    log_to_driver=False,
                    logging_level="warning",
                )
            resources = self._ray.cluster_resources()
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise EngineError(f"--on ray: no cluster ({error})") from None
        gpus, cores = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
        threads = job.engine.threads or (1 if gpus or size is None else max(1, cores // size))
        self.size = size or gpus or max(1, cores // threads)
        self._actor = self._ray.remote(
            num_cpus=0 if gpus else threads,
            num_gpus=min(1.0, gpus / self.size),
            max_concurrency=DEPTH + 1,
            max_restarts=0,
            max_task_retries=0,
        )(RayActor)
        engine = job.engine if gpus else dataclasses.replace(job.engine, threads=threads)
        self._job = dataclasses.replace(job, engine=engine).to_json()
        self._checked = time.monotonic()
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, tuple[int, int | None]] = {}  # reference -> worker, shard

    def start(self, worker: int) -> None:
        actor = self._actors[worker] = self._actor.remote(self._job)
        self._calls[actor.engine.remote()] = worker, None

    def give(self, worker: int, task: Task) -> None:
        self._calls[self._actors[worker].process.remote(*task)] = worker, task.shard

    def wait(self) -> list[Event]:
        if not self._calls:
            time.sleep(_WAIT_SECONDS)
            return []
        calls = list(self._calls)
        ready, _ = self._ray.wait(calls, num_returns=1, timeout=_WAIT_SECONDS)
        if ready:
            ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        else:
            self._check_cluster()
        # Of a worker that is found dead, further calls are forgotten on the way.
        return [self._event(call) for call in ready if call in self._calls]

    def _check_cluster(self) -> None:
        """Raise EngineError where the cluster that was started here has lost its only node."""
        if self._one_node and time.monotonic() - self._checked > _CHECK_SECONDS:
            self._checked = time.monotonic()
            if not any(node["Alive"] for node in self._ray.nodes()):
                raise EngineError("the node of the Ray cluster died; run the same command again")

    def _event(self, call: Any) -> Event:
        worker, shard = self._calls.pop(call)
        error: CCNetError | OSError | None = None
        try:
            result = self._ray.get(call)
            if "error" in result:
                error = error_from_json(result["error"])
                reason = str(error)
            elif shard is None:
                return Ready(worker, result["ready"])
            else:
                return Done(worker, shard)
        except self._ray.exceptions.RayError as found:
            reason = f"an actor died: {_first_line(found)}"
        self._forget(worker)
        return Died(worker, reason, error)

    def _forget(self, worker: int) -> None:
        self._ray.kill(self._actors.pop(worker))
        self._calls = {call: (of, shard) for call, (of, shard) in self._calls.items() if of != worker}

    def close(self) -> None:
        """End the actors and leave the cluster; one that was started here ends."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._ray.shutdown()


@contextlib.contextmanager
def _own_folder() -> Iterator[None]:
    """Be in the folder that holds this program: Ray puts the current one first on the module path of its workers."""
    before = os.getcwd()
    os.chdir(Path(__file__).resolve().parents[2])
    try:
        yield
    finally:
        os.chdir(before)


def _first_line(error: BaseException) -> str:
    lines: list[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
