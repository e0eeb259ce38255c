"""Features of many video files in a folder: `<id>_rgb.npy`, `<id>_flow.npy`, `<id>_vggish.npy`, and a record of each.

The record `<id>.json` is written last, so that a video that has one is done. It says what the features were made of; a
video whose file or extractor has changed since is done again.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from runtime.detections import Detections
from runtime.errors import CCNetError, ConfigError, Interrupted, VideoError
from runtime.features import read_video
from runtime.files import atomic_file, is_sidecar, sha256_file, write_json
from runtime.localizer import Localizer
from runtime.machine import library_versions
from runtime.records import BadRecord, check_duration, check_video_id, get_values, read_json
from runtime.schema import quote, show
from runtime.signals import StopRequest
from runtime.spec import ModelSpec
from runtime.video.container import (
    ReadOptions,
    ReadReport,
    is_remote,
    open_container,
    picture_stream,
    stated_seconds,
)
from runtime.video.extractor import Extractor, ExtractorSpec, GraphName
from runtime.video.features import FeatureExtractor, Features
from runtime.video.frames import read_frames

log = logging.getLogger(__name__)

ENDINGS = frozenset(
    [
        *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".flv", ".wmv"),
        *(".asf", ".ogv", ".3gp", ".mxf"),
    ]
)
"""Of the files of a folder that are taken for videos; a file that is named is opened whatever it is called."""
RECORD_SCHEMA = 1
_MEASURED_FRAMES = 50
"""Frames that are decoded to tell how long it takes."""
_LONGEST_PATH = 4096
"""Bytes, of what a system opens."""


@dataclass(frozen=True)
class VideoPath:
    """A video file and the name that its features get."""

    video_id: str
    path: str


@dataclass
class Outcome:
    """What became of a run."""

    done: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    """Done by an earlier run."""
    failed: dict[str, CCNetError] = field(default_factory=dict)
    warned: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each stage, over all videos of this run."""
    video_seconds: float = 0.0


def find_video_files(names: Sequence[str | Path]) -> list[VideoPath]:
    """Return the videos that are named: files, folders (not their subfolders), patterns, `.txt` lists of paths, URLs.

    Raises VideoError where there is none, a folder or list can't be read, or two would get the same features' name.
    """
    paths: list[str] = []
    for name in (os.fspath(name) for name in names):
        if not is_remote(name) and os.path.isdir(name):
            paths += _files_of(name)
        elif name.lower().endswith(".txt"):
            paths += _listed(name)
        elif not is_remote(name) and glob.has_magic(name) and not os.path.lexists(name):
            paths += sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        else:
            paths.append(name)
    videos: dict[str, VideoPath] = {}
    for path in paths:
        stem = os.path.splitext(os.path.basename(path.partition("?")[0] if is_remote(path) else path))[0]
        try:
            video_id = check_video_id(stem)
        except BadRecord as error:
            raise VideoError(f"{quote(path)}: {error}") from None
        other = videos.setdefault(video_id, VideoPath(video_id, path)).path
        if other != path:
            both = f"{quote(other, 150)} and {quote(path, 150)}"
            raise VideoError(f"{both} would both be called '{quote(video_id, 60)}'; rename one of them")
    if not videos:
        raise VideoError(f"{', '.join(map(str, names))}: no video files")
    return list(videos.values())


def extract_videos(
    videos: Sequence[VideoPath],
    out: str | Path,
    extractor: FeatureExtractor,
    *,
    stop_at_error: bool = False,
    each: Callable[[VideoPath], None] = lambda video: None,
) -> Outcome:
    """Write the features of all videos into the folder `out`; those that are done already are kept.

    `each` is called after a video. A video that can't be used is in `Outcome.failed`. Raises VideoError for the first
    such video with `stop_at_error`, Interrupted after Ctrl-C or SIGTERM (between two videos; a second Ctrl-C at once),
    EngineError, and OSError when the folder can't be written to.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    outcome = Outcome()
    with StopRequest() as stop:
        for index, video in enumerate(videos):
            if stop.requested:
                text = f"interrupted; {index} of {len(videos)} videos are dealt with, the same command does the others"
                raise Interrupted(text, stop.signal_number)
            if is_done(video, out, extractor.extractor, extractor.options, extractor.engines.precisions):
                outcome.kept.append(video.video_id)
            else:
                _extract(video, out, extractor, outcome, stop_at_error=stop_at_error)
            each(video)
    return outcome


def _extract(
    video: VideoPath, out: Path, extractor: FeatureExtractor, outcome: Outcome, *, stop_at_error: bool
) -> None:
    try:
        features = extractor(video.path)
    except VideoError as error:
        if stop_at_error:
            raise
        outcome.failed[video.video_id] = error
        return
    write_features(video, features, out, extractor)
    outcome.done.append(video.video_id)
    outcome.video_seconds += features.duration
    for stage, seconds in features.facts["seconds"].items():
        outcome.seconds[stage] = outcome.seconds.get(stage, 0.0) + seconds
    if features.warnings:
        outcome.warned[video.video_id] = "; ".join(features.warnings)


def write_features(video: VideoPath, features: Features, out: Path, extractor: FeatureExtractor) -> None:
    """Write the three files of a video, and then its record."""
    _record_path(out, video.video_id).unlink(missing_ok=True)  # from here on the video is not done
    layout = extractor.spec.layout
    suffixes = (*layout.visual, *layout.audio)
    names = [f"{video.video_id}{suffix}.npy" for suffix in suffixes]
    for name, array in zip(names, (features.rgb, features.flow, features.sound), strict=True):
        with atomic_file(out / name) as stream:
            np.save(stream, np.ascontiguousarray(array, np.float32), allow_pickle=False)
    record = {
        "schema": RECORD_SCHEMA,
        "video": {"id": video.video_id, "path": video.path, **_fingerprint(video.path)},
        "files": {name: sha256_file(out / name) for name in names},
        **features.facts,
        "warnings": list(features.warnings),
        "extractor": extractor.extractor.identity(),
        "engines": extractor.describe(),
        "precisions": extractor.engines.precisions,
        "options": _choices(extractor.options),
        "versions": library_versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(_record_path(out, video.video_id), record)


def is_done(
    video: VideoPath, out: str | Path, extractor: Extractor, options: ReadOptions, precisions: Mapping[GraphName, str]
) -> bool:
    """Return whether `out` holds this video's features, of this file as it is, by this extractor and these choices.

    `precisions`: of the engine of each graph. Which library runs it does not matter.
    """
    out = Path(out)
    try:
        record = read_json(_record_path(out, video.video_id))
        layout = extractor.spec.layout
        names = [f"{video.video_id}{suffix}.npy" for suffix in (*layout.visual, *layout.audio)]
        check_duration(record["duration"])
        same = (
            record["files"].keys() == {*names}
            and record["schema"] == RECORD_SCHEMA
            and {key: record["video"][key] for key in ("size", "modified")} == _fingerprint(video.path)
            and record["extractor"] == extractor.identity()
            and record["options"] == _choices(options)
            and record["precisions"] == precisions
        )
        return same and all((out / name).is_file() for name in names)
    except (BadRecord, OSError, KeyError, TypeError, AttributeError):
        return False


def localize_video(
    localizer: Localizer, extractor: FeatureExtractor, path: str | Path, *, cache: str | Path | None = None
) -> Detections:
    """Find the events of a video file. `cache`: a folder where its features are kept, and taken from the next time.

    Raises VideoError for a file that can't be used, ConfigError when the network takes other features.
    """
    check_fits(extractor.spec, localizer.spec)
    if cache is None:
        features = extractor(path)
        return localizer(features.visual, features.sound, features.duration)
    (video,) = find_video_files([path])
    outcome = extract_videos([video], cache, extractor, stop_at_error=True)
    log.debug("%s: %s", path, "from the cache" if outcome.kept else "extracted")
    found = read_video(
        cache, video.video_id, localizer.spec.layout, localizer.spec.visual_dim, localizer.spec.audio_dim
    )
    return localizer(found.visual, found.audio, recorded_duration(cache, video.video_id))


def check_fits(extractor: ExtractorSpec, network: ModelSpec) -> None:
    """Raise ConfigError unless a network takes the features that an extractor makes."""
    made = extractor.rgb_dim + extractor.flow_dim, extractor.audio_dim, extractor.layout, extractor.time_base
    taken = network.visual_dim, network.audio_dim, network.layout, network.time_base
    for name, got, expected in zip(
        ("visual width", "audio width", "file names", "time base"), made, taken, strict=True
    ):
        if got != expected:
            raise ConfigError(f"the extractor's {name}: got {got}, the network was trained on {expected}")


def recorded_duration(out: str | Path, video_id: str) -> float:
    """Return how many seconds the picture of a video lasts whose features are in `out`.

    Raises VideoError where their record is missing or damaged.
    """
    path = _record_path(Path(out), video_id)
    try:
        (duration,) = get_values(read_json(path), ("duration",))
        return check_duration(duration)
    except (BadRecord, OSError) as error:
        raise VideoError(f"{path}: {error}; delete it and extract the video again") from None


@dataclass(frozen=True)
class Estimate:
    """What is to be done, and how long it may take."""

    videos: int
    video_seconds: float
    """Of those whose files say how long they last."""
    work_seconds: float


def estimate(videos: Iterable[VideoPath], extractor: FeatureExtractor) -> Estimate:
    """Measure decoding and the engines on the first readable video, and read the lengths that the files state."""
    count, total, frame_seconds = 0, 0.0, 0.0
    for video in videos:
        count += 1
        try:
            with open_container(video.path, extractor.options) as container:
                stream = picture_stream(container, video.path)
                total += float(stated_seconds(stream, container) or 0)
            frame_seconds = frame_seconds or _frame_seconds(video.path, extractor)
        except CCNetError:  # said when it is its turn
            continue
    return Estimate(count, total, total * extractor.spec.time_base.fps * frame_seconds)


def _frame_seconds(path: str, extractor: FeatureExtractor) -> float:
    """Return the seconds that a frame of a video takes: decoding beside the networks on a GPU, else after them."""
    spec = extractor.spec
    begin = time.perf_counter()
    with contextlib.closing(
        read_frames(path, spec.side, Fraction(spec.time_base.fps), extractor.options, ReadReport())
    ) as frames:
        pictures = list(itertools.islice(frames, _MEASURED_FRAMES))
    decoding = (time.perf_counter() - begin) / len(pictures)
    work = extractor.seconds_of_work(*pictures[0].shape[:2])
    networks = work["pair"] + work["step"] / spec.time_base.stride_frames
    return max(decoding, networks) if extractor.engines.on_gpu else decoding + networks


def _files_of(folder: str) -> list[str]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError as error:
        raise VideoError(f"{folder}: can't be read ({error.strerror})") from None
    return [
        os.path.join(folder, name)
        for name in names
        if os.path.splitext(name)[1].lower() in ENDINGS and not is_sidecar(name)
    ]


def _listed(name: str) -> list[str]:
    """Return the paths in a list, one a line; relative ones are meant from the list's own folder."""
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise VideoError(f"{name}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    paths = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if too_long := next((path for path in paths if len(os.fsencode(path)) > _LONGEST_PATH), None):
        raise VideoError(f"{name}: got a path of {len(too_long)} characters, {show(too_long)}")
    folder = os.path.dirname(name)
    return [path if is_remote(path) else os.path.join(folder, path) for path in paths]


def _record_path(out: Path, video_id: str) -> Path:
    return out / f"{video_id}.json"


def _fingerprint(path: str) -> dict[str, Any]:
    """Return what tells whether a file is still the same."""
    if is_remote(path):
        return {"size": None, "modified": None}
    status = os.stat(path)
    return {"size": status.st_size, "modified": status.st_mtime_ns}


def _choices(options: ReadOptions) -> dict[str, Any]:
    """Return the options that decide about features."""
    return {"missing_audio": options.missing_audio, "timestamps": options.timestamps}
