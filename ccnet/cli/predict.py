"""`ccnet predict`: find the events of every video in a feature folder with a bundle, without PyTorch.

Exit status: 0 when every video was processed, 1 when some failed (the others are written), 2 when it could not be done
at all, 130 or 143 when it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ccnet.cli.logs import video_list
from ccnet.cli.options import add_engine_arguments, open_localizer, output_file
from runtime.annotations import read_annotations
from runtime.bundle import read_bundle
from runtime.coverage import Gaps, report_gaps
from runtime.detections import Detections, write_events, write_parquet
from runtime.errors import CCNetError, ConfigError, Interrupted, VideoFailed
from runtime.features import FeatureFiles, find_videos
from runtime.files import is_stream
from runtime.pipeline import Item
from runtime.progress import Progress
from runtime.signals import StopRequest
from runtime.spec import ModelSpec

log = logging.getLogger(__name__)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("predict", help="find the events of videos from their feature files")
    parser.add_argument("bundle", help="bundle folder")
    parser.add_argument("--features", required=True, metavar="DIR", help="folder of feature files")
    parser.add_argument(
        "--out", required=True, type=output_file, metavar="FILE", help="events.jsonl, a .parquet file, or - for stdout"
    )
    parser.add_argument("--annotations", metavar="F", help="take video ids and durations from this annotation file")
    parser.add_argument("--subset", help="only this subset of the annotation file (train, validation, test)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument(
        "--on-error", choices=("skip", "stop"), default="skip", help="after a bad video: go on, or stop (default: skip)"
    )
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    spec = read_bundle(arguments.bundle).spec
    videos = _videos(arguments, spec)
    write = write_parquet if arguments.out.endswith(".parquet") else write_events
    streamed = is_stream(arguments.out)  # a pipe or device has its lines as they come
    partial = arguments.out if streamed else Path(f"{os.path.realpath(arguments.out)}.partial")
    gaps: dict[str, Gaps] = {}
    failed: dict[str, CCNetError] = {}
    ended: CCNetError | None = None
    events = 0

    def records() -> Iterator[tuple[str, float, Detections]]:
        """Yield the processed videos; what ends the run early goes to `ended`, so that those before it are written."""
        nonlocal ended, events
        try:
            for result in stream:
                if stop.requested:
                    raise Interrupted("interrupted", stop.signal_number)
                if result.gaps is not None:
                    gaps[result.video_id] = result.gaps
                if result.error is not None:
                    failed[result.video_id] = result.error
                    if arguments.on_error == "stop":
                        raise VideoFailed(f"stopped at video {result.video_id} (--on-error stop)")
                if result.detections is not None and result.duration is not None:
                    events += len(result.detections)
                    yield result.video_id, result.duration, result.detections
                progress.advance()
        except CCNetError as error:
            ended = error

    with (
        open_localizer(arguments) as localizer,
        contextlib.closing(localizer.stream(videos, batch_size=arguments.batch, workers=arguments.workers)) as stream,
        Progress("predict", total=len(videos), quiet=arguments.quiet) as progress,
        StopRequest() as stop,
    ):
        done = write(partial, records())
        engine = localizer.describe()
    report_gaps(gaps, done + len(failed), spec.time_base)
    if failed:
        log.warning("%d of %d videos failed:\n%s", len(failed), len(videos), video_list(failed, limit=len(failed)))
    if ended is not None:
        if streamed:
            log.warning("the events of %d of %d videos were written", done, len(videos))
        elif done:
            log.warning("the events of %d of %d videos are in %s", done, len(videos), partial)
        else:
            partial.unlink()
        raise ended
    if not streamed:
        os.replace(partial, os.path.realpath(arguments.out))
    print(
        f"{arguments.out}: {done} videos, {events} events, by {engine['engine']} (parity check: {engine['status']})\n"
        f"next: ccnet evaluate {arguments.out} --annotations F --subset S",
        file=sys.stderr if streamed else sys.stdout,
    )
    return 1 if failed else 0


def _videos(arguments: argparse.Namespace, spec: ModelSpec) -> list[Item]:
    """Return (video id, source, duration in seconds) of the videos that were asked for."""
    folder = arguments.features
    if arguments.annotations is None:
        if arguments.subset is not None:
            raise ConfigError("--subset needs --annotations, which says what the subsets are")
        return [(video_id, FeatureFiles(folder, video_id)) for video_id in find_videos(folder, spec.layout)]
    annotations = read_annotations(arguments.annotations, labels=spec.labels)
    videos = annotations.subset(arguments.subset) if arguments.subset else annotations.videos.values()
    return [(video.video_id, FeatureFiles(folder, video.video_id), video.duration) for video in videos]
