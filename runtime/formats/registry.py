"""The table of formats that events are read from and written to, and what each can hold.

A format of one video a file has folders of such files beside single ones; a file is then called after its video. The
folder of a corpus run is read as its shards, once it is complete.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.bundle import MANIFEST
from runtime.corpus.plan import PLAN
from runtime.corpus.run import open_run
from runtime.detections import Detections, read_events
from runtime.errors import ConfigError, PredictionError
from runtime.files import atomic_file, is_sidecar, is_stream, open_input
from runtime.formats import activitynet, audacity, elan, labelstudio, own, subtitles, tables
from runtime.formats.events import SCORE_DIGITS, Video, check_videos, to_records
from runtime.formats.text import at, read_text
from runtime.records import LARGEST_FILE, BadRecord, parse_json, read_bytes, read_json
from runtime.schema import show

Fact = Literal["scores", "durations", "label ids", "subsets", "videos without events"]
_ROUNDED_SCORES = f"scores are rounded to {SCORE_DIGITS} decimals"
_OF_OTHER_FOLDERS = (".onnx", ".engine", ".plan", ".npy")
_MILLISECONDS = "times are rounded to milliseconds"


@dataclass(frozen=True)
class Format:
    """A format of files with events."""

    name: str
    """As the command line names it."""
    title: str
    suffix: str
    """Of its files, lower case, with the dot."""
    carries: frozenset[Fact]
    """What it holds besides video, segment and label."""
    read: Callable[[Path], list[Video]]
    """Raises BadRecord, or CCNetError of its own."""
    write: Callable[[Path, Sequence[Video]], None]
    """Raises BadRecord for what the format can't hold and does not leave out, such as an event without a score."""
    one_video: bool = False
    """Whether a file holds one video."""
    rounds: tuple[str, ...] = ()
    """What it rounds."""


def _of_text(
    name: str,
    title: str,
    suffix: str,
    encode: Callable[[Video], str],
    decode: Callable[[str, str], Video],
    rounds: tuple[str, ...],
) -> Format:
    """Return a format of one text file a video, whose scores stand in the text."""

    def read(path: Path) -> list[Video]:
        return [decode(read_text(path), video_id_of(path, suffix))]

    write = functools.partial(_write_one, encode)
    return Format(name, title, suffix, frozenset({"scores", "videos without events"}), read, write, True, rounds)


def _write_one(encode: Callable[[Video], str], path: Path, videos: Sequence[Video]) -> None:
    (video,) = videos
    content = encode(video).encode()
    with atomic_file(path) as stream:
        stream.write(content)


def _read_elan(path: Path) -> list[Video]:
    return [elan.decode(read_bytes(path), video_id_of(path, ".eaf"))]


def video_id_of(path: Path, suffix: str) -> str:
    """Return the id of the video that a file is called after."""
    return path.name[: -len(suffix)] if path.name.lower().endswith(suffix) else path.name


_ALL: frozenset[Fact] = frozenset({"scores", "durations", "label ids", "videos without events"})
FORMATS = {
    format.name: format
    for format in (
        Format("events", "events as JSON lines", ".jsonl", _ALL, own.read_jsonl, own.write_jsonl),
        Format(
            "annotations",
            "annotation JSON (UnAV-100; read also: ActivityNet, THUMOS)",
            ".json",
            frozenset({"durations", "label ids", "subsets", "videos without events"}),
            own.read_annotation_file,
            own.write_annotation_file,
        ),
        Format(
            "activitynet",
            "ActivityNet result JSON",
            ".json",
            frozenset({"scores", "videos without events"}),
            activitynet.read,
            activitynet.write,
        ),
        Format(
            "labelstudio",
            "Label Studio tasks",
            ".json",
            frozenset({"scores", "durations", "videos without events"}),
            labelstudio.read,
            labelstudio.write,
        ),
        Format(
            "csv",
            "CSV, a row an event",
            ".csv",
            frozenset({"scores", "durations", "label ids"}),
            tables.read_csv,
            tables.write_csv,
        ),
        Format(
            "parquet",
            "Parquet, a row an event",
            ".parquet",
            frozenset({"scores", "durations", "label ids"}),
            tables.read_parquet,
            tables.write_parquet,
        ),
        _of_text(
            "webvtt",
            "WebVTT subtitles",
            ".vtt",
            subtitles.encode_webvtt,
            subtitles.decode_webvtt,
            (_ROUNDED_SCORES, _MILLISECONDS),
        ),
        _of_text(
            "srt",
            "SubRip subtitles",
            ".srt",
            subtitles.encode_srt,
            subtitles.decode_srt,
            (_ROUNDED_SCORES, _MILLISECONDS),
        ),
        _of_text(
            "audacity",
            "Audacity labels",
            ".txt",
            audacity.encode,
            audacity.decode,
            (_ROUNDED_SCORES, "times are rounded to microseconds"),
        ),
        Format(
            "elan",
            "ELAN document",
            ".eaf",
            frozenset({"scores", "durations", "videos without events"}),
            _read_elan,
            functools.partial(_write_one, elan.encode),
            True,
            (_MILLISECONDS,),
        ),
    )
}
"""By name."""


def format_of(path: str | Path, name: str | None = None) -> Format:
    """Return the format of a file or folder to read: the one that is named, or else by suffix and content.

    A file of another suffix is taken for events as JSON lines. Raises PredictionError for JSON and folders of no known
    format, and for a file that is not there.
    """
    if name is not None:
        return FORMATS[name]
    path = Path(path)
    if path.is_dir():
        run = open_run(path)
        return _format_of_folder(path) if run is None else _of_suffix(f".{run.plan.settings.format}")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _format_of_json(path)
    return _of_suffix(suffix)


def _of_suffix(suffix: str) -> Format:
    return next((format for format in FORMATS.values() if format.suffix == suffix), FORMATS["events"])


def output_format(path: str, name: str | None = None) -> Format:
    """Return the format of a file or folder to write. Raises ConfigError where its name does not tell."""
    if name is not None:
        return FORMATS[name]
    suffix = Path(path).suffix.lower()
    fitting = [format for format in FORMATS.values() if format.suffix == suffix]
    if len(fitting) != 1:
        names = [format.name for format in fitting or FORMATS.values()]
        raise ConfigError(f"{path}: which format? Name one of {', '.join(names)} with --to")
    return fitting[0]


def _format_of_json(path: Path) -> Format:
    try:
        content = read_json(path, any_number=True)
    except FileNotFoundError:
        raise PredictionError(f"{path}: no such file") from None
    except BadRecord as error:
        if _begins_with_events(path):
            return FORMATS["events"]
        raise PredictionError(f"{path}: {error}") from None
    if isinstance(content, list):
        return FORMATS["labelstudio"]
    for key, name in (("results", "activitynet"), ("database", "annotations")):
        if isinstance(content, dict) and key in content:
            return FORMATS[name]
    if _is_video(content):
        return FORMATS["events"]  # of one video, so that its one line is JSON
    raise PredictionError(
        f'{path}: of no known format; expected ActivityNet results ("results"), annotations ("database") or a list of '
        "Label Studio tasks"
    )


def _begins_with_events(path: Path) -> bool:
    """Return whether a file's first line is a video, as in JSON lines that are called `.json`."""
    try:
        with open_input(path) as stream:
            return _is_video(parse_json(stream.readline(LARGEST_FILE), any_number=True))
    except (OSError, BadRecord):
        return False


def _is_video(content: object) -> bool:
    return isinstance(content, dict) and {"video_id", "events"} <= content.keys()


def _format_of_folder(folder: Path) -> Format:
    found = _formats_in(folder)
    if len(found) != 1:
        got = ", ".join(found) or "none"
        expected = ", ".join(f"*{format.suffix}" for format in FORMATS.values() if format.one_video)
        raise PredictionError(f"{folder}: got files of {got}, expected those of one format ({expected})")
    return FORMATS[found[0]]


def _formats_in(folder: Path) -> list[str]:
    suffixes = {Path(name).suffix.lower() for name in os.listdir(folder) if not is_sidecar(name)}
    return [format.name for format in FORMATS.values() if format.one_video and format.suffix in suffixes]


def holds_events(folder: Path) -> bool:
    """Return whether a folder is one of files with events, or a corpus run: no bundle or part of one, no features."""
    if (folder / PLAN).is_file():
        return True
    if (folder / MANIFEST).exists() or not _formats_in(folder):
        return False
    return not any(Path(name).suffix.lower() in _OF_OTHER_FOLDERS for name in os.listdir(folder))


def read_videos(path: str | Path, format: Format) -> list[Video]:
    """Read a file, or a folder of a format of one video a file. Raises PredictionError naming file and place."""
    path = Path(path)
    videos: list[Video] = []
    for file in _files_of(path, format):
        with _refusing(file, format):
            videos += format.read(file)
    with _refusing(path, format):
        return check_videos(videos)


def _is_of(name: str, format: Format) -> bool:
    return name.lower().endswith(format.suffix) and not is_sidecar(name)


def _files_of(path: Path, format: Format) -> list[Path]:
    """Return the files that a path stands for: itself, those of a folder, or the shards of a run."""
    if (run := open_run(path)) is not None:
        return list(map(Path, run.shard_files()))
    if not (path.is_dir() and format.one_video):
        return [path]
    files = sorted(path / name for name in os.listdir(path) if _is_of(name, format))
    if not files:
        raise PredictionError(f"{path}: has no *{format.suffix} file")
    return files


@contextlib.contextmanager
def _refusing(path: Path, format: Format) -> Iterator[None]:
    """Raise what is wrong with a file as a PredictionError that names it."""
    try:
        yield
    except BadRecord as error:
        raise PredictionError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise PredictionError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise PredictionError(f"{path}: got a folder, expected a {format.suffix} file") from None


def write_videos(path: str | Path, videos: Sequence[Video], format: Format) -> list[Path]:
    """Write videos to one file, or to a folder of a file each. Returns the files.

    A format of one video a file makes a file where `path` has its suffix and there is one video, and else a folder, in
    which files of other names stay. Raises PredictionError naming the video for what the format can't hold; then
    nothing, or in a folder only whole files, were written.
    """
    path = Path(path)
    try:
        if goes_to_file(path, format):
            return _write_file(path, videos, format)
        files = [path / f"{video.video_id}{format.suffix}" for video in videos]
        for file, video in zip(files, videos, strict=True):
            with at(f"video {show(video.video_id)}"):
                format.write(file, [video])
        return files
    except BadRecord as error:
        raise PredictionError(f"{path}: {error}") from None


def goes_to_file(path: str | Path, format: Format) -> bool:
    """Return whether events that are written to `path` go to one file there, not to a folder of a file a video."""
    path = Path(path)
    return not format.one_video or is_stream(path) or (path.suffix.lower() == format.suffix and not path.is_dir())


def _write_file(path: Path, videos: Sequence[Video], format: Format) -> list[Path]:
    if format.one_video and len(videos) != 1:
        raise BadRecord(f"a {format.suffix} file holds one video, got {len(videos)}; give the name of a folder")
    format.write(path, videos)
    return [path]


def losses(format: Format, videos: Sequence[Video]) -> list[str]:
    """Return what of these videos the format does not hold, in words."""
    events = [event for video in videos for event in video.events]
    scored = any(event.score is not None for event in events)
    present: dict[Fact, bool] = {
        "scores": scored,
        "durations": any(video.duration is not None for video in videos),
        "label ids": any(event.label_id is not None for event in events),
        "subsets": not scored and any(video.subset is not None for video in videos),
        "videos without events": not all(video.events for video in videos),
    }
    lost = [f"{fact} are left out" for fact, there in present.items() if there and fact not in format.carries]
    return lost + [text for text in format.rounds if scored or not text.startswith("scores")]


def read_predictions(path: str | Path, labels: Sequence[str], name: str | None = None) -> dict[str, Detections]:
    """Read events with scores, in any format that carries them, by video id. Every label must be one of `labels`.

    Raises PredictionError naming file and place.
    """
    format = format_of(path, name)
    if format.name == "events":
        parts = [read_events(file, labels) for file in _files_of(Path(path), format)]
        return {video_id: found for part in parts for video_id, found in part.items()}
    if "scores" not in format.carries:
        raise PredictionError(f"{path}: holds {format.title}, which has no scores; expected predicted events")
    try:
        return {video_id: found for video_id, _, found in to_records(read_videos(path, format), labels)}
    except BadRecord as error:
        raise PredictionError(f"{path}: {error}") from None


def add_classes(path: str | Path, labels: Sequence[str], unnamed: Collection[int]) -> tuple[str, ...]:
    """Return a class list with the names that a file of events adds to it.

    `unnamed`: ids whose name in `labels` is none, so that the file's counts. A name without an id goes to the end.
    """
    names = {i: label for i, label in enumerate(labels) if i not in unnamed}
    events = [event for video in read_videos(path, format_of(path)) for event in video.events]
    for event in events:
        if event.label_id is not None:
            names.setdefault(event.label_id, event.label)
    for label in dict.fromkeys(event.label for event in events):
        if label not in set(names.values()):
            names[max(names, default=-1) + 1] = label
    return tuple(names.get(i, f"class {i}") for i in range(max(names, default=-1) + 1))
