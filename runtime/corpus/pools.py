"""Pools of workers on this machine: one thread of this process, or processes.

A worker process reads its job and then tasks from standard input, one a line, and writes events as JSON lines. It ends
when its input does, so it never outlives the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import orjson

from runtime.corpus.schedule import Advanced, Died, Done, Event, Ready, Task
from runtime.corpus.worker import Job, ShardWorker, error_from_json, error_to_json
from runtime.errors import CCNetError
from runtime.machine import gpus

_WORKER = """
import os, sys
sys.path[0] = sys.argv.pop(1)  # in place of the current folder
from runtime.corpus.pools import main
status = main()
sys.stderr.flush()
os._exit(status)  # a thread still reads standard input
"""
_WAIT_SECONDS = 0.2
_REPORT_SECONDS = 0.2
_END_SECONDS = 5.0


class ThreadPool:
    """One worker, in a thread of this process. What ends it ends the run: there is nothing to start again."""

    size, restarts = 1, False

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="ccnet-corpus", daemon=True)

    def start(self, worker: int) -> None:
        self._thread.start()

    def give(self, worker: int, task: Task) -> None:
        self._tasks.put(task)

    def wait(self) -> list[Event]:
        found: list[Event] = []
        for event in _drain(self._events):
            if isinstance(event, BaseException):
                raise event
            found.append(event)
        return found

    def close(self) -> None:
        """Let the worker finish the batch it is at, and close its engine."""
        self._stopped = True
        self._tasks.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        try:
            with contextlib.closing(ShardWorker(self._job)) as worker:
                self._events.put(Ready(0, worker.engine))
                worker.run(
                    lambda wait: take(self._tasks, wait),
                    on_video=lambda: self._events.put(Advanced(0, 1)),
                    on_shard=lambda shard: self._events.put(Done(0, shard)),
                    stopped=lambda: self._stopped,
                )
        except CCNetError as error:
            self._events.put(Died(0, str(error), error))
        except BaseException as error:  # noqa: BLE001  a defect, or a full disk: raised in the caller's thread
            self._events.put(error)


class ProcessPool:
    """Worker processes, each with an engine of its own."""

    restarts = True

    def __init__(self, job: Job, size: int, devices: list[str] | None = None) -> None:
        """`devices`: GPUs as CUDA_VISIBLE_DEVICES names them, which the workers share out; None: left alone."""
        self.size = size
        self._job, self._devices = job, devices
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._closed = False

    def start(self, worker: int) -> None:
        environment = dict(os.environ)
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[worker % len(self._devices)]
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the process that drives the run
        )
        self._forget(worker)
        self._processes[worker] = process
        self._send(worker, self._job.to_json())
        threading.Thread(
            target=self._listen, args=(worker, process), name=f"ccnet-worker-{worker}", daemon=True
        ).start()

    def give(self, worker: int, task: Task) -> None:
        self._send(worker, json.dumps(task))

    def wait(self) -> list[Event]:
        return list(_drain(self._events))

    def close(self) -> None:
        """End the workers, whatever they are at."""
        self._closed = True
        for worker in self._processes:
            self._forget(worker)
        deadline = time.monotonic() + _END_SECONDS
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()

    def _forget(self, worker: int) -> None:
        """Close the pipe of a worker that died, or that is to end."""
        if worker in self._processes:
            with contextlib.suppress(OSError):
                _pipe(self._processes[worker].stdin).close()

    def _send(self, worker: int, line: str) -> None:
        stream = _pipe(self._processes[worker].stdin)
        with contextlib.suppress(OSError):  # of a worker that died; its listener says so
            stream.write(line.encode() + b"\n")
            stream.flush()

    def _listen(self, worker: int, process: subprocess.Popen[bytes]) -> None:
        """Turn what a worker writes into events, and its end into the last one."""
        error: CCNetError | OSError | None = None
        with _pipe(process.stdout) as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # it was killed while it wrote
                message = orjson.loads(line)
                if "error" in message:
                    error = error_from_json(message["error"])
                else:
                    self._events.put(_event(worker, message))
        status = process.wait()
        reason = str(error) if error is not None else f"a worker process {_ended(status)}"
        if not self._closed:
            self._events.put(Died(worker, reason, error))


def visible_devices() -> list[str] | None:
    """Return the GPUs for worker processes to share out, as CUDA_VISIBLE_DEVICES names them; None for less than two."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(len(gpus() or ()))] if chosen is None else [n for n in chosen.split(",") if n]
    return names if len(names) > 1 else None


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise RuntimeError("a worker process without a pipe")
    return stream


def _drain(events: queue.SimpleQueue[Any]) -> list[Any]:
    """Return the events that are there, having waited some tenths of a second for the first one."""
    found = []
    with contextlib.suppress(queue.Empty):
        found.append(events.get(timeout=_WAIT_SECONDS))
        while True:
            found.append(events.get_nowait())
    return found


def take(tasks: queue.SimpleQueue[Task | None], wait: bool) -> Task | None:
    """Return the next task of a worker; None where there is none now, or with `wait` where no more will come."""
    try:
        return tasks.get(block=wait)
    except queue.Empty:
        return None


def _event(worker: int, message: Mapping[str, Any]) -> Event:
    if "ready" in message:
        return Ready(worker, message["ready"])
    if "advanced" in message:
        return Advanced(worker, message["advanced"])
    return Done(worker, message["done"])


def _ended(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def main() -> int:
    """Be a worker process."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no event
    lines = sys.stdin.buffer
    first = lines.readline()
    if not first:  # who started it is gone already
        return 0
    job = Job.from_json(first.decode())
    tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
    lock = threading.Lock()

    def send(message: Mapping[str, Any]) -> None:
        with lock:
            try:
                output.write(orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE))
                output.flush()
            except BrokenPipeError:
                os._exit(0)  # as below

    def listen() -> None:
        for line in lines:
            tasks.put(Task(*json.loads(line)))
        os._exit(0)  # nobody waits for this shard any more, and who resumes the run begins it anew

    threading.Thread(target=listen, daemon=True).start()
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr, flush=True)
    reporter = _Reporter(send)
    try:
        with contextlib.closing(ShardWorker(job)) as worker:
            send({"ready": worker.engine})
            worker.run(
                lambda wait: take(tasks, wait),
                on_video=reporter.video,
                on_shard=reporter.shard,
            )
    except (CCNetError, OSError) as error:
        send({"error": error_to_json(error)})
        return 1
    return 0


class _Reporter:
    """Sends what a worker has done, the videos of some tenths of a second at once."""

    def __init__(self, send: Callable[[Mapping[str, Any]], None]) -> None:
        self._send = send
        self._videos = 0
        self._sent = time.monotonic()

    def video(self) -> None:
        self._videos += 1
        if time.monotonic() - self._sent >= _REPORT_SECONDS:
            self._flush()

    def shard(self, shard: int) -> None:
        self._flush()
        self._send({"done": shard})

    def _flush(self) -> None:
        if self._videos:
            self._send({"advanced": self._videos})
        self._videos, self._sent = 0, time.monotonic()
