"""A folder of videos through a Localizer: good videos give events, bad ones are remembered and reported."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from runtime.annotations import VideoAnnotation
from runtime.detections import Detections
from runtime.errors import CCNetError
from runtime.features import find_videos, read_video
from runtime.localizer import Localizer
from runtime.pipeline import Item
from runtime.schema import require
from runtime.spec import ModelSpec

OnError = Literal["skip", "stop"]
Record: TypeAlias = tuple[str, float, Detections]
"""(video id, duration in seconds, detections): what `runtime.detections.write_events` takes."""


@dataclass(frozen=True)
class CorpusVideo:
    """One video to localize."""

    video_id: str
    duration: float | None = None
    """Seconds; None: what its features cover."""


class Corpus:
    """One walk over the videos of a feature folder. `records` does it; the other attributes tell how it went."""

    def __init__(
        self,
        localizer: Localizer,
        folder: str | Path,
        videos: Iterable[CorpusVideo | VideoAnnotation],
        *,
        on_error: OnError = "skip",
        batch_size: int | None = None,
        workers: int | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`on_error`: go on after a bad video, or stop at it. `stop` is asked after every video whether to end early.

        `batch_size` and `workers`: see `Localizer.stream`.
        """
        require(on_error in ("skip", "stop"), "on_error", on_error, "skip or stop")
        self._localizer = localizer
        self._items = corpus_items(folder, localizer.spec, videos)
        self._on_error = on_error
        self._batch_size = batch_size
        self._workers = workers
        self._stop = stop
        self.done = 0
        """Videos that gave events (possibly none) so far."""
        self.failed: list[tuple[str, CCNetError]] = []
        """(video id, what is wrong) of each bad video, in order."""
        self.notes: list[tuple[str, str]] = []
        """(video id, remark) of videos whose features are remarkable but were used."""
        self.complete = False
        """Whether the walk came to its end, over bad videos or not."""

    def records(self) -> Generator[Record, None, None]:
        """The good videos in order. Bad ones go to `failed`; an engine failure is raised."""
        stream = self._localizer.stream(self._items, batch_size=self._batch_size, workers=self._workers)
        try:
            for result in stream:
                if result.note is not None:
                    self.notes.append((result.video_id, result.note))
                if result.error is not None:
                    self.failed.append((result.video_id, result.error))
                    if self._on_error == "stop":
                        return
                if result.detections is not None and result.duration is not None:
                    self.done += 1
                    yield result.video_id, result.duration, result.detections
                if self._stop():
                    return
            self.complete = True
        finally:
            stream.close()


def corpus_items(
    folder: str | Path, spec: ModelSpec, videos: Iterable[CorpusVideo | VideoAnnotation]
) -> Generator[Item, None, None]:
    """The videos as items of `Localizer.stream`, each read from `folder` only when its turn comes."""
    read = partial(read_video, folder, layout=spec.layout, visual_dim=spec.visual_dim, audio_dim=spec.audio_dim)
    for video in videos:
        yield video.video_id, partial(read, video.video_id), video.duration


def folder_videos(folder: str | Path, spec: ModelSpec) -> Sequence[CorpusVideo]:
    """All videos of a feature folder, sorted by id. Raises FeatureError where there are none."""
    return [CorpusVideo(video_id) for video_id in find_videos(folder, spec.layout)]
