"""Extraction of features from uploaded videos: a stated number at a time, in processes, before a bounded queue."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from runtime.errors import CCNetError, EngineError, RequestError, VideoError
from runtime.features import VideoFeatures
from runtime.packages import import_package
from runtime.serving.extraction_worker import LARGEST_MESSAGE
from runtime.serving.options import ExtractorOptions
from runtime.spec import ModelSpec
from runtime.video.extractor import read_extractor
from runtime.video.files import check_fits

log = logging.getLogger(__name__)

_WORKER = """
import sys
sys.path[0] = sys.argv.pop(1)  # in place of the current folder
from runtime.serving.extraction_worker import main
main(int(sys.argv[1]))
"""
_FULL_RETRY_SECONDS = 60
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class Extracted:
    """Features of an uploaded video, as views of a file without a name."""

    features: VideoFeatures
    duration: float
    """Seconds of the picture."""
    warnings: list[str]


@dataclass(eq=False)
class Extraction:
    """A video on its way to features."""

    source: IO[bytes]
    changed: Callable[[], None] = lambda: None
    """Called from another thread when there is progress, or the result."""
    progress: dict[str, Any] = field(default_factory=lambda: {"stage": "waiting"})
    result: Extracted | BaseException | None = None
    process: _Process | None = None
    """That has it now."""


class _Process:
    """One process that extracts, and the socket to it."""

    def __init__(self, options: ExtractorOptions) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _WORKER, str(Path(__file__).parents[2]), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the server
            )
        job = {
            "folder": str(Path(options.folder).resolve()),
            "threads": options.threads,
            "options": dataclasses.asdict(options.read),
        }
        self.send(orjson.dumps(job))
        self.engine = ""

    def answers(self) -> bool:
        """Ask a process that has nothing to do whether it is there."""
        self._link.settimeout(_ANSWER_SECONDS)
        try:
            self.send(b"{}")
            return self.receive() is not None
        finally:
            self._link.settimeout(None)

    def ready(self) -> None:
        """Wait until the engines are loaded. Raises EngineError where they can't be."""
        message = self.receive()
        if message is None or "error" in message:
            self.end()
            raise EngineError(f"the extractor does not start: {self.death() if message is None else message['error']}")
        self.engine = message["engine"]

    def send(self, message: bytes, descriptors: tuple[int, ...] = ()) -> None:
        with contextlib.suppress(OSError):  # of one that died; `receive` says so
            socket.send_fds(self._link, [message], descriptors)

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None when the process has ended."""
        try:
            data = self._link.recv(LARGEST_MESSAGE)
        except OSError:
            return None
        return orjson.loads(data) if data else None

    def kill(self) -> None:
        self._child.kill()

    def death(self) -> str:
        return f"its process died (status {self._child.wait()})"

    def end(self) -> None:
        self._child.kill()
        self._child.wait()
        self._link.close()


class Extractions:
    """The processes that extract, the threads that mind them, and the queue before them."""

    def __init__(self, options: ExtractorOptions, spec: ModelSpec) -> None:
        """Start the processes and wait for them.

        Raises MissingDependency for the extra `video`, BundleError for what is no extractor, ConfigError where the
        network takes other features, EngineError where its engines do not load.
        """
        for package, name in (("av", "av"), ("PIL", "pillow")):
            import_package(package, "ccnet serve --extractor", distribution=name)
        check_fits(read_extractor(options.folder).spec, spec)
        self._options, self._spec = options, spec
        self._changed = threading.Condition()
        self._queue: deque[Extraction] = deque()
        self._jobs: set[Extraction] = set()  # not finished
        self._held = 0
        self._closed = False
        processes = [_Process(options) for _ in range(options.processes)]
        try:
            for process in processes:
                process.ready()
        except BaseException:
            for process in processes:
                process.end()
            raise
        self.engine = processes[0].engine
        """Of the flow network, nine tenths of the work."""
        self._threads = [
            threading.Thread(target=self._work, args=(process,), name=f"ccnet-extraction-{i}", daemon=True)
            for i, process in enumerate(processes)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Videos that are uploaded and wait."""
        return len(self._queue)

    def ahead(self, job: Extraction) -> int:
        """Return how many videos wait in front of one that waits."""
        with self._changed:
            return self._queue.index(job) if job in self._queue else 0

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place from before the upload to the answer. Raises RequestError (503) where there is none."""
        most = self._options.processes + self._options.queue
        with self._changed:
            if self._held >= most:
                raise RequestError(
                    f"{self._held} videos are uploaded or worked at already; try again later",
                    status=503,
                    retry_after=_FULL_RETRY_SECONDS,
                )
            self._held += 1
        try:
            yield
        finally:
            with self._changed:
                self._held -= 1

    def submit(self, job: Extraction) -> None:
        with self._changed:
            if self._closed:
                raise _shutting_down()
            self._queue.append(job)
            self._jobs.add(job)
            self._changed.notify()

    def cancel(self, job: Extraction, reason: BaseException | None = None) -> None:
        """Stop a video, wherever it is; one that is worked at takes its process with it, and a new one is started."""
        with self._changed:
            if job not in self._jobs:
                return
            job.result = job.result or reason or RequestError("cancelled", status=499)
            if job in self._queue:
                self._queue.remove(job)
                self._jobs.discard(job)
            elif job.process is not None:
                job.process.kill()
        job.changed()

    def stop(self) -> None:
        """Give up what is under way: it is answered with 503."""
        with self._changed:
            self._closed = True
            jobs = list(self._jobs)
            self._changed.notify_all()
        for job in jobs:
            self.cancel(job, _shutting_down())

    def close(self) -> None:
        """End the processes and the threads."""
        self.stop()
        for thread in self._threads:
            thread.join(_ANSWER_SECONDS)  # one whose engines are being loaded; its process ends with this one

    def _work(self, process: _Process) -> None:
        try:
            while (job := self._next()) is not None:
                try:
                    if not process.answers():  # it was killed from outside, or did not start again
                        process = self._restart(process)
                    found: Extracted | BaseException = self._extract(process, job)
                except BaseException as error:  # noqa: BLE001  it is for whoever waits
                    found = error
                with self._changed:
                    job.process = None
                    job.result = job.result or found
                    self._jobs.discard(job)
                job.changed()
                if isinstance(job.result, BaseException) and not self._closed and not process.answers():
                    with contextlib.suppress(CCNetError):  # the next video hears of it
                        process = self._restart(process)
        finally:
            process.end()

    def _restart(self, process: _Process) -> _Process:
        process.end()
        new = _Process(self._options)
        new.ready()
        return new

    def _next(self) -> Extraction | None:
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            return None if self._closed else self._queue.popleft()

    def _extract(self, process: _Process, job: Extraction) -> Extracted:
        with tempfile.TemporaryFile(prefix="ccnet-") as target:
            with self._changed:
                if job.result is not None:  # cancelled just now
                    raise RequestError("cancelled", status=499)
                job.process = process
            process.send(b"{}", (job.source.fileno(), target.fileno()))
            while (message := process.receive()) is not None:
                if "stage" in message:
                    job.progress = message
                    job.changed()
                elif "failed" in message:
                    kind = VideoError if message["failed"] == "VideoError" else EngineError
                    raise kind(message["message"])
                else:
                    return self._read(target, message)
        process.kill()
        raise EngineError(f"the features can't be extracted: {process.death()}; the next video gets a new one")

    def _read(self, target: IO[bytes], message: dict[str, Any]) -> Extracted:
        steps, widths = message["steps"], (self._spec.visual_dim, self._spec.audio_dim)
        flat = np.memmap(target, np.float32, "r", shape=(steps * sum(widths),))
        visual = flat[: steps * widths[0]].reshape(steps, widths[0])
        sound = flat[steps * widths[0] :].reshape(steps, widths[1])
        return Extracted(VideoFeatures(visual, sound), message["duration"], message["warnings"])


def _shutting_down() -> RequestError:
    return RequestError("the server is shutting down", status=503, retry_after=5)
