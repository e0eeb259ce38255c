"""`ccnet extract`: video files -> feature files named as UnAV-100 names them, by a verified extractor.

Exit status: 0 when every video is done, 1 when some could not be used (the others are written), 2 when it could not be
done at all, 130 or 143 when it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from ccnet.cli.logs import video_list
from ccnet.cli.options import add_json_argument, options_given, output_folder, positive, print_result, seconds
from runtime.backends.registry import BACKENDS
from runtime.errors import VideoFailed
from runtime.progress import Progress

if TYPE_CHECKING:
    from runtime.video.container import ReadOptions
    from runtime.video.features import FeatureExtractor
    from runtime.video.files import Outcome, VideoPath

log = logging.getLogger(__name__)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "extract",
        help="turn video files into features",
        description="Writes <id>_rgb.npy, <id>_flow.npy and <id>_vggish.npy of every video, and <id>.json, which says "
        "how they were made. Videos that are done are kept, so the same command goes on where it was interrupted. "
        "Exit status 1 when some could not be used; the others are written.",
    )
    parser.add_argument(
        "videos", nargs="+", metavar="VIDEO", help="files, folders, patterns in quotes, or .txt lists of paths"
    )
    add_extractor_arguments(parser, required=True)
    parser.add_argument("--out", required=True, type=output_folder, metavar="DIR", help="folder of the feature files")
    parser.add_argument("--check", metavar="DIR", help="compare with published features of the same videos in DIR")
    parser.add_argument(
        "--on-error", choices=("skip", "stop"), default="skip", help="after a bad video: go on, or stop (default: skip)"
    )
    parser.add_argument(
        "--backend", default="auto", choices=("auto", *BACKENDS), help="default: the first verified one"
    )
    parser.add_argument("--precision", metavar="P", help="only this precision (fp32)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of the engines")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_json_argument(parser)


def add_extractor_arguments(parser: argparse.ArgumentParser, *, required: bool, remote: bool = True) -> None:
    """Declare the extractor and how videos are read, URLs too where `remote`; `ccnet predict` and `serve` share it."""
    group = parser.add_argument_group("videos")
    group.add_argument("--extractor", required=required, metavar="E", help="extractor folder (ccnet import-extractor)")
    group.add_argument(
        "--missing-audio",
        choices=("error", "silence"),
        default="error",
        help="a video without sound: an error (default), or silence, which also follows sound that ends early",
    )
    group.add_argument(
        "--timestamps",
        choices=("file", "count"),
        default="file",
        help="times of frames: the file's (default), or frame number / average rate where those are wrong",
    )
    group.add_argument(
        "--max-duration", type=seconds, default=4 * 3600.0, metavar="S", help="refuse longer videos (default: 14400)"
    )
    group.add_argument("--decode-threads", type=positive, metavar="N", help="threads that decode (default: the cores)")
    if remote:
        group.add_argument("--remote", action="store_true", help="open http and https URLs too")


def video_options_given(arguments: argparse.Namespace) -> list[str]:
    """Return those of the options of `add_extractor_arguments` that are not at their defaults."""
    return options_given(arguments, partial(add_extractor_arguments, required=False))


def read_options(arguments: argparse.Namespace) -> ReadOptions:
    """Return the options of `add_extractor_arguments` for reading videos."""
    from runtime.video.container import ReadOptions

    return ReadOptions(
        missing_audio=arguments.missing_audio,
        timestamps=arguments.timestamps,
        remote=getattr(arguments, "remote", False),
        longest_seconds=arguments.max_duration,
        threads=arguments.decode_threads,
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from runtime.video.features import FeatureExtractor
    from runtime.video.files import find_video_files

    videos = find_video_files(arguments.videos)
    with FeatureExtractor.load(
        arguments.extractor,
        arguments.backend,
        precision=arguments.precision,
        threads=arguments.threads,
        options=read_options(arguments),
    ) as extractor:
        outcome = extract(videos, arguments.out, extractor, stop=arguments.on_error == "stop", quiet=arguments.quiet)
        layout = extractor.spec.layout
    text = summary(arguments.out, outcome)
    record: dict[str, Any] = {
        "out": arguments.out,
        "done": outcome.done,
        "kept": outcome.kept,
        "failed": {video_id: str(error) for video_id, error in outcome.failed.items()},
        "seconds": outcome.seconds,
        "video_seconds": outcome.video_seconds,
    }
    if arguments.check:
        from runtime.video.check import check_features, report

        good = [video.video_id for video in videos if video.video_id not in outcome.failed]
        checks = check_features(arguments.out, arguments.check, good, layout)
        text += f"\n{report(checks)}"
        record["checks"] = [dataclasses.asdict(check) for check in checks]
    print_result(arguments, record, text)
    return 1 if outcome.failed else 0


def extract(videos: list[VideoPath], out: str, extractor: FeatureExtractor, *, stop: bool, quiet: bool) -> Outcome:
    """Extract into a folder, telling on standard error what is to be done, how it goes, and what went wrong.

    Raises VideoFailed with `stop` at the first bad video.
    """
    from runtime.errors import VideoError
    from runtime.video.files import estimate, extract_videos, is_done

    left = [v for v in videos if not _done(is_done, v, out, extractor)]
    if left:
        if not extractor.engines.on_gpu:
            chosen = extractor.engines.chosen["flow"].name
            log.warning("no GPU engine is used: the flow network runs as '%s', which is slow", chosen)
        expected = estimate(left, extractor)
        log.info(
            "%d of %d videos to do, %.0f s long; about %s on this machine",
            *(len(left), len(videos), expected.video_seconds, _readable(expected.work_seconds)),
        )
    with Progress("extract", total=len(videos), initial=len(videos) - len(left), quiet=quiet) as progress:
        try:
            outcome = extract_videos(
                videos, out, extractor, stop_at_error=stop, each=lambda video: progress.advance(int(video in left))
            )
        except VideoError as error:
            raise VideoFailed(f"{error} (--on-error stop)") from None
    if outcome.warned:
        log.warning("%d videos extracted with warnings:\n%s", len(outcome.warned), video_list(outcome.warned))
    if outcome.failed:
        listed = video_list(outcome.failed, limit=len(outcome.failed))
        log.warning("%d of %d videos failed:\n%s", len(outcome.failed), len(videos), listed)
    return outcome


def summary(out: str, outcome: Outcome) -> str:
    """Return what was done, and the time of each stage, for a person to read."""
    lines = [f"{out}: {len(outcome.done)} videos extracted, {len(outcome.kept)} done before"]
    if outcome.done:
        total = outcome.seconds.get("total", 0.0)
        stages = ", ".join(f"{name} {value:.1f}" for name, value in outcome.seconds.items() if name != "total")
        per_second = total / outcome.video_seconds if outcome.video_seconds else 0.0
        lines.append(f"  {total:.1f} s, {per_second:.2f} s a second of video ({stages})")
    return "\n".join(lines)


def _done(is_done: Any, video: VideoPath, out: str, extractor: FeatureExtractor) -> bool:
    done: bool = is_done(video, out, extractor.extractor, extractor.options, extractor.engines.precisions)
    return done


def _readable(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
