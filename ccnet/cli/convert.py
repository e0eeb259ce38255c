"""`ccnet convert`: events from and to the files of other tools."""

from __future__ import annotations

import argparse
import csv
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ccnet.cli.options import add_json_argument, print_result
from runtime.annotations import SUBSETS, read_annotations
from runtime.errors import ConfigError, PredictionError
from runtime.files import check_output_file
from runtime.folders import check_output_folder
from runtime.formats.events import Event, Video, clipped, parse_number
from runtime.formats.registry import FORMATS, format_of, goes_to_file, losses, output_format, read_videos, write_videos
from runtime.formats.text import read_text
from runtime.records import BadRecord, check_duration
from runtime.schema import show

log = logging.getLogger(__name__)


def register(subparsers: Any) -> None:
    names = "\n".join(f"  {f.name:<12} {f.suffix:<9} {f.title}" for f in FORMATS.values())
    parser = subparsers.add_parser(
        "convert",
        help="events from and to the files of other tools",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Converts events and annotations between formats. Formats of one video a file are read from and\n"
        "written to folders, too. What a format can't hold is said.",
        epilog=f"formats:\n{names}",
    )
    parser.add_argument("source", metavar="FILE|DIR", help="file, or folder of files of one video each")
    parser.add_argument("--out", required=True, metavar="FILE|DIR", help="what to write; - for standard output")
    parser.add_argument("--from", dest="source_format", choices=FORMATS, help="default: by suffix and content")
    parser.add_argument("--to", dest="target_format", choices=FORMATS, help="default: by the suffix of --out")
    parser.add_argument(
        "--annotations", metavar="F", help="annotation file that knows durations, label ids and subsets"
    )
    parser.add_argument("--durations", metavar="CSV", help="file with the columns video_id and duration (seconds)")
    parser.add_argument("--subset", choices=SUBSETS, help="only this subset; or the subset of videos that have none")
    parser.add_argument("--min-score", type=score, metavar="X", help="leave out events with lower scores")
    parser.add_argument("--score", type=score, metavar="X", help="the score of events that have none")
    add_json_argument(parser)


def score(text: str) -> float:
    """Parse a number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number in [0, 1]")
    return value


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    target = output_format(arguments.out, arguments.target_format)
    if goes_to_file(arguments.out, target):
        check_output_file(arguments.out)
    else:
        check_output_folder(arguments.out)
    videos = read_videos(arguments.source, format_of(arguments.source, arguments.source_format))
    if arguments.annotations is not None:
        videos = _with_annotations(videos, arguments.annotations)
    if arguments.durations is not None:
        known = read_durations(arguments.durations)
        videos = [replace(video, duration=known.get(video.video_id, video.duration)) for video in videos]
    if arguments.subset:
        videos = [replace(v, subset=v.subset or arguments.subset) for v in videos]
        videos = [video for video in videos if video.subset == arguments.subset]
        if not videos:
            raise PredictionError(f"{arguments.source}: has no video of subset {arguments.subset}")
    videos = _scored(videos, arguments.min_score, arguments.score)
    videos = _inside(videos)
    lost = losses(target, videos)
    for text in lost:
        log.warning("%s: %s", target.title, text)
    files = write_videos(arguments.out, videos, target)
    if arguments.out != "-":
        count = sum(len(video.events) for video in videos)
        where = f"{len(files)} files" if len(files) > 1 else target.title
        record = {"files": [str(file) for file in files], "videos": len(videos), "events": count, "lost": lost}
        print_result(arguments, record, f"{arguments.out}: {where}, {len(videos)} videos, {count} events")
    return 0


def _with_annotations(videos: Sequence[Video], path: str) -> list[Video]:
    """Add the durations, subsets and label ids of an annotation file."""
    annotations = read_annotations(path)
    ids = {name: i for i, name in enumerate(annotations.labels)}
    known = []
    for video in videos:
        if (annotated := annotations.videos.get(video.video_id)) is None:
            raise PredictionError(f"{path}: does not have the video {show(video.video_id)}")
        for event in video.events:
            if event.label not in ids:
                raise PredictionError(
                    f"video {show(video.video_id)}: {path} does not have the class {show(event.label)}"
                )
        events = [event._replace(label_id=ids[event.label]) for event in video.events]
        known.append(Video(video.video_id, events, annotated.duration, annotated.subset))
    return known


def read_durations(path: str) -> dict[str, float]:
    """Read a CSV file with the columns video_id and duration. Raises ConfigError naming the line."""
    lines = csv.DictReader(read_text_of(path).splitlines(), strict=True)
    durations: dict[str, float] = {}
    try:
        if not {"video_id", "duration"} <= {*(lines.fieldnames or ())}:
            raise BadRecord(f"got columns {show(lines.fieldnames)}, expected video_id and duration")
        for row in lines:
            durations[row["video_id"]] = check_duration(parse_number(row["duration"] or "", "duration"))
    except (BadRecord, csv.Error) as error:
        raise ConfigError(f"{path}, line {max(lines.line_num, 1)}: {error}") from None
    return durations


def read_text_of(path: str) -> str:
    """Return a text file. Raises ConfigError."""
    try:
        return read_text(Path(path))
    except BadRecord as error:
        raise ConfigError(f"{path}: {error}") from None


def _scored(videos: Sequence[Video], least: float | None, given: float | None) -> list[Video]:
    """Give events without a score the one that is given, and leave out those with a lower one than `least`."""

    def events(video: Video) -> list[Event]:
        scored = [e if e.score is not None or given is None else e._replace(score=given) for e in video.events]
        return [e for e in scored if least is None or e.score is None or e.score >= least]

    return [replace(video, events=events(video)) for video in videos]


def _inside(videos: Sequence[Video]) -> list[Video]:
    """Cut events to their videos, where the durations are known, and say so."""
    inside, cut, out = [], 0, 0
    for video in videos:
        if video.duration is not None:
            video, changed, gone = clipped(video)
            cut, out = cut + changed, out + gone
        inside.append(video)
    if cut:
        log.warning("%d events reached beyond their videos and were cut", cut)
    if out:
        log.warning("%d events have no length inside their videos and were left out", out)
    return inside
