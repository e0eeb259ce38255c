"""What a run goes over: the list of its videos, and where each one's features come from.

A manifest has one line a video, in UTF-8:

    {"video_id": str, "features": folder, "duration": seconds}

Only `video_id` must be there. `features` is relative to the manifest's own folder, which is the default; a URL or an
absolute path stays as it is. Without `duration` a video lasts as long as its features cover. The list of failed videos
that a run leaves is a manifest too: its further keys `shard`, `error` and `message` say what happened.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import orjson

from runtime.annotations import read_annotations
from runtime.corpus.store import Store, join_location, local_path, open_store
from runtime.errors import ConfigError, FeatureError
from runtime.features import FeatureFiles, VideoFeatures, find_videos, read_video, videos_of_files
from runtime.pipeline import Item
from runtime.records import BadRecord, check_duration, check_video_id, parse_json
from runtime.schema import quote, show
from runtime.spec import FeatureLayout, ModelSpec

_KEYS = ("video_id", "features", "duration")
_REPORT_KEYS = ("shard", "error", "message")


@dataclass(frozen=True, slots=True)
class Entry:
    """A video of a run: one line of a manifest."""

    video_id: str
    duration: float | None = None
    """Seconds; None: what its features cover."""
    features: str | None = None
    """Folder of its feature files, relative to that of the manifest, which None stands for."""

    def to_line(self, **further: object) -> bytes:
        """Return the line of a manifest, with the line break; `further` keys come behind."""
        values = {"video_id": self.video_id, "features": self.features, "duration": self.duration}
        kept = {key: value for key, value in values.items() if value is not None}
        try:
            return orjson.dumps({**kept, **further}, option=orjson.OPT_APPEND_NEWLINE)
        except TypeError:  # half of a surrogate pair, as in the name of a file that is not UTF-8: reading it will fail
            return json.dumps({**kept, **further}).encode() + b"\n"


class Source(Protocol):
    """Where the videos of a run come from; made in every process that works on it."""

    def item(self, entry: Entry) -> Item:
        """Return what `Localizer.stream` takes for a video. Nothing is read yet."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a process needs to open a source; travels as JSON. Another kind of source is one more entry here."""

    folder: str
    """What the run's videos are relative to: absolute path, or URL."""
    kind: Literal["features"] = "features"


def open_source(options: SourceOptions, spec: ModelSpec) -> Source:
    """Return where the videos of a run come from."""
    return FeatureSource(options.folder, spec)


@dataclass(frozen=True)
class FeatureSource:
    """Feature files in a folder, or in folders below it, by path or URL."""

    folder: str
    spec: ModelSpec

    def item(self, entry: Entry) -> Item:
        folder = self.folder if entry.features is None else join_location(self.folder, entry.features)
        path = local_path(folder)
        if path is not None:  # read straight into the rows of a batch
            return entry.video_id, FeatureFiles(path, entry.video_id), entry.duration
        return entry.video_id, _RemoteVideo(folder, entry.video_id, self.spec), entry.duration


@dataclass(frozen=True)
class _RemoteVideo:
    """Fetches and reads one video's files when its turn comes, in a thread of the stream."""

    folder: str
    video_id: str
    spec: ModelSpec

    def __call__(self) -> VideoFeatures:
        spec = self.spec
        with tempfile.TemporaryDirectory(prefix="ccnet-") as name:
            try:
                check_video_id(self.video_id)
                store = open_store(self.folder)
                for suffix in (*spec.layout.visual, *spec.layout.audio):
                    _fetch(store, f"{self.video_id}{suffix}.npy", Path(name))
                return read_video(name, self.video_id, spec.layout, spec.visual_dim, spec.audio_dim)
            except BadRecord as error:
                raise FeatureError(str(error)) from None
            except FeatureError as error:
                raise FeatureError(str(error).replace(name, self.folder.rstrip("/"))) from None
            except OSError as error:
                raise FeatureError(f"{self.folder}: {self.video_id}: can't be read ({error})") from None


def _fetch(store: Store, name: str, folder: Path) -> None:
    try:
        data = store.read(name)
    except FileNotFoundError:
        return  # the reader says which files must be there
    (folder / name).write_bytes(data)


def find_entries(
    features: str, spec: ModelSpec, *, annotations: str | None = None, subset: str | None = None
) -> tuple[str, list[Entry]]:
    """Return the folder of features and the videos of a run, which `features`, a folder or a manifest, stands for.

    With `annotations`, ids and durations are those of that annotation file, of a `subset` of it where one is named.
    Raises CCNetError where there is nothing to run on, or the options don't go together.
    """
    path = local_path(features)
    if features.endswith(".jsonl") if path is None else os.path.isfile(path):
        if annotations is not None:
            raise ConfigError(f"--annotations: {features} is a manifest, which has its own ids and durations")
        return read_manifest(features)
    folder = os.path.abspath(path) if path is not None else features
    if annotations is None:
        ids = find_videos(folder, spec.layout) if path is not None else _find_remote_videos(folder, spec.layout)
        return folder, [Entry(video_id) for video_id in ids]
    known = read_annotations(annotations, labels=spec.labels)
    videos = known.subset(subset) if subset else known.videos.values()
    return folder, [Entry(video.video_id, video.duration) for video in videos]


def _find_remote_videos(folder: str, layout: FeatureLayout) -> list[str]:
    try:
        names = open_store(folder).names()
    except OSError as error:
        raise FeatureError(f"{folder}: can't be listed ({error})") from None
    if not names:
        raise FeatureError(f"{folder}: no such feature folder")
    return videos_of_files(names, layout, where=folder)


def read_manifest(location: str) -> tuple[str, list[Entry]]:
    """Return the folder of a manifest and the videos in it, in order.

    Raises FeatureError naming the line: not JSON, an unknown key, a value that is not what it should be, a video twice.
    """
    path = local_path(location)
    location = os.path.abspath(path) if path is not None else location
    folder, _, name = location.rpartition("/")
    try:
        data = open_store(folder or "/").read(name)
    except OSError as error:
        raise FeatureError(f"{location}: can't be read ({error.strerror or error})") from None
    entries = []
    seen: set[str] = set()
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = _parse_line(line)
            if entry.video_id in seen:
                raise BadRecord(f"video {show(entry.video_id)} occurs a second time")
        except BadRecord as error:
            raise FeatureError(f"{location}, line {number}: {error}") from None
        seen.add(entry.video_id)
        entries.append(entry)
    if not entries:
        raise FeatureError(f"{location}: lists no videos")
    return folder or "/", entries


def _parse_line(line: bytes) -> Entry:
    record = parse_json(line)
    if not isinstance(record, dict) or "video_id" not in record:
        raise BadRecord(f"got {show(record)}, expected an object with video_id")
    unknown = sorted(set(record) - {*_KEYS, *_REPORT_KEYS})
    if unknown:
        raise BadRecord(f"unknown key {show(unknown[0])}; known keys: {', '.join(_KEYS)}")
    duration, features = record.get("duration"), record.get("features")
    if features is not None and (not isinstance(features, str) or not features or "\0" in features):
        raise BadRecord(f"features: got {show(features)}, expected the name of a folder")
    return Entry(check_video_id(record["video_id"]), None if duration is None else check_duration(duration), features)


def parse_entries(lines: bytes) -> list[Entry]:
    """Return the entries of lines that `Entry.to_line` made. Raises ConfigError for other ones."""
    try:
        return [Entry(**_parse_known(line)) for line in lines.splitlines()]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"a damaged list of videos ({quote(error)}); delete the run's folder and run again") from None


def _parse_known(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except ValueError:  # as in `Entry.to_line`
        return json.loads(line)
