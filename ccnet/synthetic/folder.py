"""A folder of synthetic features in the published layout, written video by video.

Memory does not grow with the set. Every file is whole or absent, and an interrupted folder is continued: a video whose
files are all there and whole is not made again.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ccnet.config import Config
from ccnet.synthetic.features import FeatureSynthesizer, SynthesisSettings
from runtime.annotations import Annotations, VideoAnnotation
from runtime.errors import CCNetError, ConfigError, FeatureError, Interrupted
from runtime.features import feature_header
from runtime.files import atomic_file, sha256_file, write_json
from runtime.progress import Progress
from runtime.records import BadRecord, read_json
from runtime.signals import STOP_SIGNALS, StopRequest

Dtype = Literal["float32", "float16"]
SETTINGS_FILE = "synthetic.json"
_HEADER_BYTES = 128


class SynthesisResult(NamedTuple):
    """What `synthesize_folder` left in the folder."""

    written: int
    """Videos made and written."""
    kept: int
    """Videos whose files were there already."""
    size: int
    """Bytes of all their files."""


def synthesize_folder(
    annotations: Annotations,
    videos: Sequence[VideoAnnotation],
    folder: str | os.PathLike[str],
    config: Config,
    settings: SynthesisSettings,
    *,
    dtype: Dtype = "float32",
    workers: int = 0,
    quiet: bool = False,
) -> SynthesisResult:
    """Write synthetic features of `videos`, which belong to `annotations`, into `folder`.

    The features of a video depend on the settings and its own annotation alone, not on `workers`, order or selection.

    Args:
        config: its feature widths, file suffixes, time base and number of classes are used.
        dtype: of the files; float16 halves them.
        workers: processes that make features; up to 1 makes them in this one.
        quiet: show no progress.

    Raises ConfigError when a feature width can't be split over the modality's files or the number of classes differs,
    FeatureError when the folder holds other features or the disk has no room for the set.
    """
    folder = Path(folder)
    if len(annotations.labels) != config.model.num_classes:
        raise ConfigError(
            f"model.num_classes: got {config.model.num_classes}, but {annotations.path} has {len(annotations.labels)} "
            f"classes; use --model.num_classes {len(annotations.labels)}"
        )
    job = _Job(folder, config, settings, np.dtype(dtype))
    size = sum(job.size(video) for video in videos)
    _claim(folder, annotations, config, settings, dtype)
    todo = [video for video in videos if not job.is_whole(video)]
    missing = sum(job.size(video) for video in todo)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise FeatureError(
            f"{folder}: {len(todo)} videos need {missing / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left; "
            "use --dtype float16, fewer videos (--subset, --limit) or another disk"
        )
    _run(job, todo, len(videos) - len(todo), workers, quiet)
    return SynthesisResult(len(todo), len(videos) - len(todo), size)


class _Job:
    """Writes one video at a time; copied into every worker."""

    def __init__(self, folder: Path, config: Config, settings: SynthesisSettings, dtype: np.dtype[Any]) -> None:
        self.folder, self.dtype = folder, dtype
        model, layout = config.model, config.layout
        self.files = [
            (suffix, width)
            for modality, suffixes, dim in (
                ("visual", layout.visual, model.visual_dim),
                ("audio", layout.audio, model.audio_dim),
            )
            for suffix, width in zip(suffixes, _split(modality, dim, len(suffixes)), strict=True)
        ]
        self.synthesizer = FeatureSynthesizer(
            num_classes=model.num_classes,
            visual_dim=model.visual_dim,
            audio_dim=model.audio_dim,
            time_base=config.time_base,
            settings=settings,
        )

    def size(self, video: VideoAnnotation) -> int:
        """Return the bytes that a video's files take."""
        steps = self.synthesizer.steps(video.duration)
        return sum(_HEADER_BYTES + steps * width * self.dtype.itemsize for _, width in self.files)

    def is_whole(self, video: VideoAnnotation) -> bool:
        """Return whether all files of a video are there, with the shape and dtype they must have."""
        steps = self.synthesizer.steps(video.duration)
        for suffix, width in self.files:
            try:
                found, dtype = feature_header(self.folder / f"{video.video_id}{suffix}.npy")
            except FeatureError:
                return False
            if found != (steps, width) or dtype != self.dtype:
                return False
        return True

    def __call__(self, video: VideoAnnotation) -> None:
        channels: npt.NDArray[Any] = np.concatenate(self.synthesizer.features(video), axis=1).astype(
            self.dtype, copy=False
        )
        edges = np.cumsum([width for _, width in self.files])[:-1]
        for (suffix, _), part in zip(self.files, np.split(channels, edges, axis=1), strict=True):
            with atomic_file(self.folder / f"{video.video_id}{suffix}.npy") as stream:
                np.save(stream, np.ascontiguousarray(part), allow_pickle=False)


def _split(modality: str, dim: int, files: int) -> list[int]:
    if dim % files:
        raise ConfigError(f"model.{modality}_dim: got {dim}, expected a multiple of {files}, the number of its files")
    return [dim // files] * files


def _claim(folder: Path, annotations: Annotations, config: Config, settings: SynthesisSettings, dtype: Dtype) -> None:
    """Record the settings in the folder, or check that it is continued with the same ones."""
    recorded = {
        "annotations_sha256": sha256_file(annotations.path),
        "settings": dataclasses.asdict(settings),
        "visual_dim": config.model.visual_dim,
        "audio_dim": config.model.audio_dim,
        "time_base": dataclasses.asdict(config.time_base),
        "layout": {"visual": list(config.layout.visual), "audio": list(config.layout.audio)},
        "dtype": dtype,
    }
    path = folder / SETTINGS_FILE
    if not path.exists():
        if folder.is_dir() and next(folder.glob("*.npy"), None):
            raise FeatureError(
                f"{folder}: holds .npy files but no {SETTINGS_FILE}, so they are not replaced; choose another folder"
            )
        write_json(path, recorded)
        return
    try:
        found = read_json(path)
    except BadRecord as error:
        raise FeatureError(f"{path}: {error}; delete the folder and start again") from None
    different = [key for key in recorded if not isinstance(found, dict) or found.get(key) != recorded[key]]
    if different:
        raise FeatureError(
            f"{folder}: its features were made with other settings ({', '.join(different)}); "
            "choose another folder, or delete this one first"
        )


def _run(job: _Job, videos: Sequence[VideoAnnotation], kept: int, workers: int, quiet: bool) -> None:
    with Progress("synthesize", total=kept + len(videos), initial=kept, quiet=quiet) as progress:
        if workers <= 1 or len(videos) <= 1:
            with StopRequest() as stop:
                for video in videos:
                    _check(stop)
                    job(video)
                    progress.advance()
            return
        with StopRequest() as stop, _make_pool(min(workers, len(videos)), job) as pool:
            for done in as_completed([pool.submit(_work, video) for video in videos]):
                if stop.requested:
                    pool.shutdown(cancel_futures=True)  # the videos under way are finished
                _check(stop)
                done.result()
                progress.advance()


def _check(stop: StopRequest) -> None:
    if stop.requested:
        raise Interrupted("interrupted; the same command continues the folder", stop.signal_number)


def _make_pool(workers: int, job: _Job) -> ProcessPoolExecutor:
    try:
        return ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(job,))
    except OSError as error:  # its locks are in /dev/shm, which may be full or closed
        raise CCNetError(
            f"{workers} processes can't share memory here ({error.strerror or error}: /dev/shm); use --workers 1"
        ) from None


_worker_job: _Job | None = None


def _start_worker(job: _Job) -> None:
    global _worker_job
    for number in STOP_SIGNALS:  # the parent's to handle; it ends the pool
        signal.signal(number, signal.SIG_IGN)
    _worker_job = job


def _work(video: VideoAnnotation) -> None:
    assert _worker_job is not None
    _worker_job(video)
