"""Localizer: from the features of a video to its events in seconds.

Shapes:  n steps of one video   Cv, Ca visual / audio feature width   T steps of an engine
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from runtime.backends.base import Backend
from runtime.backends.registry import runs_on_gpu
from runtime.backends.select import OnMismatch, OpenedEngine, open_engine
from runtime.bundle import read_bundle
from runtime.detections import Detections
from runtime.errors import ConfigError, EngineError
from runtime.pipeline import Item, Localized, LongVideos, Pipeline, Results, Task, Video, Workspace
from runtime.schema import require
from runtime.spec import ModelSpec, PostProcessing
from runtime.stream import stream_videos

log = logging.getLogger(__name__)


class Localizer:
    """Features in, events out.

    A video longer than the engine's T steps is cropped to its first T (`long_videos="crop"`, as in the paper) or seen
    through overlapping windows (`"windows"`). Use it from one thread at a time, or one Localizer per thread.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        spec: ModelSpec,
        *,
        post: PostProcessing | None = None,
        long_videos: LongVideos = "crop",
        window_overlap: float = 0.5,
    ) -> None:
        """Take over one or more engines of the same network, which `stream` runs side by side; `close` closes them.

        `spec`: the bundle's. `post` replaces `spec.post`. `window_overlap`: share of a window that the next one covers
        too. Raises ConfigError when there is no backend, or one is of another network.
        """
        require(long_videos in ("crop", "windows"), "long_videos", long_videos, "crop or windows")
        require(0 <= window_overlap < 1, "window_overlap", window_overlap, "a number in [0, 1)")
        self.backends = list(backends)
        self.spec = spec
        self.post = post or spec.post
        self.long_videos = long_videos
        self.window_overlap = window_overlap
        self._pipeline = Pipeline(spec, self.post, long_videos, window_overlap)
        self._process = os.getpid()
        self._workspace: Workspace | None = None  # kept for the next call
        self._opened: OpenedEngine | None = None
        require(len(self.backends) > 0, "backends", [], "at least one")
        for backend in self.backends:
            if backend.spec.input_shapes(1) != spec.input_shapes(1) or backend.spec.labels != spec.labels:
                raise ConfigError(f"backend '{backend.name}': made for another network than the spec given with it")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        backend: str = "auto",
        *,
        precision: str | None = None,
        on_mismatch: OnMismatch = "error",
        threads: int | None = None,
        post: PostProcessing | None = None,
        long_videos: LongVideos = "crop",
        window_overlap: float = 0.5,
    ) -> Localizer:
        """Load a bundle: check the files of one engine and open it.

        The choices are explained at `runtime.backends.select.open_engine`, which also lists the errors.
        """
        bundle = read_bundle(folder)
        opened = open_engine(bundle, backend, precision=precision, on_mismatch=on_mismatch, threads=threads)
        localizer = cls(
            [opened.backend], bundle.spec, post=post, long_videos=long_videos, window_overlap=window_overlap
        )
        localizer._opened = opened
        return localizer

    def __call__(self, visual: Any, audio: Any, duration: float | None = None) -> Detections:
        """Localize the events of one video: visual [n, Cv], audio [n, Ca] float arrays -> events, best first.

        `duration`: seconds; None takes what the features cover. Raises FeatureError for arrays that don't fit,
        EngineError when the engine fails or its output is not finite.
        """
        return self.batch([(visual, audio, duration)])[0]

    def batch(self, videos: Sequence[Video]) -> list[Detections]:
        """Localize the events of several videos, in their order, in batches as large as the engine takes.

        What is not covered of a video (see `runtime.coverage`) is logged as a warning; `stream` returns it instead.
        Raises as `__call__`, for the first video that fails.
        """
        self._check_process()
        backend = self.backends[0]
        tasks = [Task(f"video {i}", video) for i, video in enumerate(videos)]
        left = deque(tasks)
        size = backend.max_batch if self.long_videos == "windows" else min(backend.max_batch, max(1, len(tasks)))
        if self._workspace is None or self._workspace.batch.size != size:
            self._workspace = self._pipeline.workspace(size, getattr(backend, "allocate", None))
        self._pipeline.run(
            lambda count, _: [left.popleft() for _ in range(min(count, len(left)))],
            _raise_errors,
            backend.infer,
            self._workspace,
        )
        results = [task.result for task in tasks if isinstance(task.result, Localized)]
        for result in results:
            if result.gaps is not None:
                log.warning("%s: %s", result.video_id, result.gaps)
        return [result.detections for result in results if result.detections is not None]

    def stream(self, videos: Iterable[Item], *, batch_size: int | None = None, workers: int | None = None) -> Results:
        """Localize a stream of videos, in their order, while reading, inference and post-processing overlap.

        An item is `(video id, source)` or `(video id, source, duration)`. The source is a `Video`, a function without
        arguments that returns one (it is called in a worker thread: this is how reading overlaps), or a CCNetError
        that stands for a video that can't be had. A video with an error of its own, such as a FeatureError or output
        that is not finite, comes out as a `Localized` with that error; anything else ends the stream.

        `batch_size`: windows per engine call; None: what the engine takes on a GPU, 1 on a CPU. `workers`: threads that
        read and post-process, beside those that wait for an engine. Results lag behind the input by some batches.
        Closing the generator stops all threads.
        """
        self._check_process()
        size = self._batch_size() if batch_size is None else batch_size
        return stream_videos(self._pipeline, self.backends, videos, batch_size=size, workers=workers)

    def describe(self) -> dict[str, Any]:
        """Describe the engines, and for a loaded bundle which one was chosen, its status, and why others were not."""
        facts: dict[str, Any] = {"engines": [backend.describe() for backend in self.backends]}
        if self._opened is not None:
            engine = self._opened.engine
            facts |= {"engine": engine.name, "status": engine.status, "skipped": list(self._opened.skipped)}
        return facts

    def close(self) -> None:
        """Close the engines. Safe to call twice."""
        self._workspace = None  # which may be in memory of an engine
        for backend in self.backends:
            backend.close()

    def __enter__(self) -> Localizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_process(self) -> None:
        """Raise EngineError in a forked process: an engine's threads and GPU context stay in the one that loaded it."""
        if os.getpid() != self._process:
            raise EngineError(
                f"the Localizer was made in process {self._process} and is used in {os.getpid()}, a fork of it: "
                "load one in each process, or start processes by 'spawn'"
            )

    def _batch_size(self) -> int:
        backend = self.backends[0]
        return backend.max_batch if runs_on_gpu(backend.name) else 1


def _raise_errors(tasks: Sequence[Task]) -> None:
    for task in tasks:
        error = task.result.error if isinstance(task.result, Localized) else task.result
        if error is not None:
            raise error
