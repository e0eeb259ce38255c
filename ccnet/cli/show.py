"""`ccnet show`: look at predictions: one HTML file with everything, or a picture of one video.

Exit status: 0, 1 when a bundle could not process some videos (they count as videos in which nothing was found), 2 when
it could not be done at all.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ccnet.cli.options import (
    add_engine_arguments,
    add_json_argument,
    engine_options_given,
    find_subset_events,
    output_file,
    positive,
    print_result,
)
from runtime.annotations import SUBSETS, Annotations, read_annotations
from runtime.bundle import Bundle, read_bundle
from runtime.coverage import video_list
from runtime.detections import Detections
from runtime.errors import CCNetError, ConfigError
from runtime.files import atomic_file, is_sidecar
from runtime.formats.registry import holds_events, read_predictions

if TYPE_CHECKING:
    from ccnet.plots import Gates

log = logging.getLogger(__name__)

SHOWN = 100
"""Videos whose timelines are in the page, unless `--videos` says otherwise."""
_MEDIA = (".mp4", ".webm", ".mkv", ".mov", ".m4v", ".avi", ".ogv", ".mp3", ".wav", ".ogg", ".flac")


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "show",
        help="look at predictions: tables, errors and timelines in one HTML file, or a picture of one video",
        description="Writes one HTML file that needs no network: evaluation, average precision and curves per class, "
        "what kinds of errors there are and what they cost, calibration, and timelines with the gates. Two bundles or "
        "events files are compared side by side. An --out that ends in .png or .svg is a picture of one video.",
    )
    parser.add_argument(
        "sources", nargs="+", metavar="BUNDLE|EVENTS", help="one or two: bundle folders, or events with scores"
    )
    parser.add_argument("--annotations", required=True, metavar="F", help="annotation file")
    parser.add_argument("--subset", default="test", choices=SUBSETS, help="default: test")
    parser.add_argument(
        "--features", nargs="+", metavar="DIR", help="folder of feature files, for bundles; one for all, or one each"
    )
    parser.add_argument("--out", required=True, type=output_file, metavar="FILE", help=".html, or .png or .svg")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what to call the sources")
    parser.add_argument("--title", help="of the page")
    parser.add_argument("--video", nargs="+", metavar="ID", help="these videos")
    parser.add_argument("--videos", type=positive, metavar="N", help=f"the N with most errors (default: {SHOWN})")
    parser.add_argument("--media", metavar="DIR", help="folder of the videos themselves, named after their ids")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_json_argument(parser)
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from ccnet.report.page import MODELS

    if len(arguments.sources) > MODELS:
        raise ConfigError(f"got {len(arguments.sources)} sources, expected one or two")
    if arguments.names and len(arguments.names) != len(arguments.sources):
        raise ConfigError(f"--names: got {len(arguments.names)} for {len(arguments.sources)} sources")
    picture = Path(arguments.out).suffix.lower() in (".png", ".svg")
    if picture and (len(arguments.sources) != 1 or len(arguments.video or ()) != 1):
        raise ConfigError(f"{arguments.out}: a picture shows one source and one video; name it with --video")
    unused = [f"--{name}" for name in ("names", "title", "videos", "media") if picture and getattr(arguments, name)]
    if unused:
        raise ConfigError(f"{' '.join(unused)}: only for a page; {arguments.out} is a picture")
    if arguments.video and arguments.videos:
        raise ConfigError("--video names the videos, --videos counts them; give one of the two")
    sources = [_Source(path, arguments, number) for number, path in enumerate(arguments.sources)]
    if not any(source.bundle for source in sources):
        given = (["--features"] if arguments.features else []) + engine_options_given(arguments)
        if given:
            raise ConfigError(f"{' '.join(given)}: there is no bundle; events are shown as they are")
    labels = next((source.bundle.spec.labels for source in sources if source.bundle), None)
    annotations = read_annotations(arguments.annotations, labels=labels)
    _check_videos(arguments.video or (), annotations, arguments)
    predictions = [source.predictions(annotations) for source in sources]
    if picture:
        _draw(arguments, annotations, sources[0], predictions[0])
    else:
        _write_page(arguments, annotations, sources, predictions)
    return 1 if any(source.failed for source in sources) else 0


class _Source:
    """A bundle or an events file of the command line."""

    def __init__(self, path: str, arguments: argparse.Namespace, number: int) -> None:
        self.path, self.arguments = path, arguments
        self.name = arguments.names[number] if arguments.names else Path(os.path.realpath(path)).stem
        self.bundle: Bundle | None = None
        self.failed: dict[str, CCNetError] = {}
        if not Path(path).is_dir() or holds_events(Path(path)):
            return
        self.bundle = read_bundle(path)
        if not arguments.features:
            raise ConfigError(f"--features is missing: {path} is a bundle, which needs videos to run on")
        if len(arguments.features) not in (1, len(arguments.sources)):
            raise ConfigError(f"--features: got {len(arguments.features)}, expected one folder, or one for each source")
        self.features = arguments.features[number if len(arguments.features) > 1 else 0]

    def predictions(self, annotations: Annotations) -> dict[str, Detections]:
        if self.bundle is None:
            return read_predictions(self.path, annotations.labels)
        made = find_subset_events(self.arguments, self.path, self.features, annotations)
        self.failed = dict(made.failed)
        if self.failed:
            log.warning("%s: %d videos failed:\n%s", self.path, len(self.failed), video_list(self.failed))
        return dict(made.predictions)

    def gates(self, videos: Sequence[str]) -> dict[str, Gates]:
        """Return the gates of those videos that have some."""
        from ccnet.report.gates import read_all

        if self.bundle is None:
            return {}
        return read_all(self.bundle, self.features, [video for video in videos if video not in self.failed])


def _check_videos(videos: Sequence[str], annotations: Annotations, arguments: argparse.Namespace) -> None:
    for video_id in videos:
        if video_id not in annotations.videos:
            raise ConfigError(f"--video: {arguments.annotations} does not have the video {video_id!r}")
        if (subset := annotations.videos[video_id].subset) != arguments.subset:
            raise ConfigError(f"--video: {video_id!r} is of subset {subset}; give --subset {subset}")


def _draw(
    arguments: argparse.Namespace, annotations: Annotations, source: _Source, predictions: dict[str, Detections]
) -> None:
    from ccnet.plots import draw_timeline

    (video_id,) = arguments.video
    if video_id not in predictions:
        raise ConfigError(f"{source.path}: has no predictions of the video {video_id!r}")
    gates = source.gates([video_id]).get(video_id)
    draw_timeline(arguments.out, truth=annotations.videos[video_id], predictions=predictions[video_id], gates=gates)
    print_result(arguments, {"out": arguments.out, "video": video_id}, f"{arguments.out}: {video_id}")


def _write_page(
    arguments: argparse.Namespace,
    annotations: Annotations,
    sources: Sequence[_Source],
    predictions: Sequence[dict[str, Detections]],
) -> None:
    from ccnet.report.analysis import analyse
    from ccnet.report.page import Model, choose_videos, render

    subset = arguments.subset
    analyses = [
        analyse(source.name, found, annotations, subset) for source, found in zip(sources, predictions, strict=True)
    ]
    shown = arguments.video or choose_videos(analyses, annotations, subset, arguments.videos or SHOWN)
    models = [
        Model(analysis, source.path, source.gates(shown)) for analysis, source in zip(analyses, sources, strict=True)
    ]
    title = (
        arguments.title or " and ".join(source.name for source in sources) + f" on {Path(arguments.annotations).name}"
    )
    media = _media(arguments.media, shown, arguments.out) if arguments.media else {}
    page = render(title, models, annotations, subset, shown=shown, media=media).encode()
    with atomic_file(arguments.out) as stream:
        stream.write(page)
    if arguments.out != "-":
        record = {"out": arguments.out, "bytes": len(page), "videos": len(shown), "media": len(media)}
        text = f"{arguments.out}: {len(page) / 1e6:.2f} MB, {len(shown)} videos; open it in a browser"
        print_result(arguments, record, text)


def _media(folder: str, shown: Sequence[str], out: str) -> dict[str, str]:
    """Return the address of each video file that is there, relative to the page."""
    if not Path(folder).is_dir():
        raise ConfigError(f"--media: {folder} is not a folder")
    names = {
        Path(entry.name).stem: entry.name
        for entry in os.scandir(folder)
        if Path(entry.name).suffix.lower() in _MEDIA and not is_sidecar(entry.name)
    }
    base = os.path.relpath(os.path.realpath(folder), os.path.dirname(os.path.realpath(out)))
    found = {video_id: quote(f"{base}/{names[video_id]}") for video_id in shown if video_id in names}
    if missing := len(shown) - len(found):
        log.warning("%s: has no file of %d of the %d videos", folder, missing, len(shown))
    return found
