"""`ccnet predict`: find the events of videos with a bundle, without PyTorch: into one file, a pipe, or a run's folder.

What goes to a file or folder is a run that can be resumed (`runtime.corpus`): the same command does what is missing.

Exit status: 0 when every video was processed, 1 when some failed (the others are written), 2 when it could not be done
at all, 130 or 143 when it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from ccnet.cli.extract import add_extractor_arguments, extract, read_options, summary, video_options_given
from ccnet.cli.logs import video_list
from ccnet.cli.options import (
    add_engine_arguments,
    add_json_argument,
    check_windows,
    open_localizer,
    output_file,
    positive,
    print_result,
    quoted_path,
)
from runtime.bundle import Bundle, read_bundle
from runtime.corpus.plan import DONE, FAILED, PLAN, SHARDS, Format, Settings, make_plan, remove_run, settle_plan
from runtime.corpus.pools import ProcessPool, ThreadPool, visible_devices
from runtime.corpus.run import Part, Run, Summary
from runtime.corpus.sources import Entry, SourceOptions, find_entries, open_source
from runtime.corpus.store import is_url, join_location, local_path, open_store
from runtime.corpus.worker import EngineOptions, Job
from runtime.coverage import report_gaps
from runtime.detections import Detections, check_parquet, write_events, write_parquet
from runtime.errors import CCNetError, ConfigError, Interrupted, VideoFailed
from runtime.files import is_stream
from runtime.formats.registry import FORMATS
from runtime.machine import usable_cores
from runtime.progress import Progress
from runtime.schema import quote
from runtime.signals import StopRequest
from runtime.spec import ModelSpec

log = logging.getLogger(__name__)

_COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_CONVERTED = {format.suffix for format in FORMATS.values()} - {".jsonl", ".json", ".parquet"}
"""Endings of files that other formats have. A `.json` of JSON lines is read as such."""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "predict",
        help="find the events of videos from their feature files, or from the videos themselves",
        description="Finds the events of videos. Interrupted, or killed, it goes on where it was when the same command "
        "is run again. Exit status 1 when some videos failed; the others are written. docs/corpora.md explains runs "
        "over many videos and on several machines.",
    )
    parser.add_argument("bundle", help="bundle folder")
    parser.add_argument(
        "--features",
        metavar="DIR|MANIFEST",
        help="folder of feature files, or a .jsonl file that lists videos and where their files are; paths or URLs; "
        "with --videos: the folder that their features are kept in (default: OUT.features)",
    )
    parser.add_argument(
        "--videos", nargs="+", metavar="VIDEO", help="video files, folders of them, or .txt lists, instead of features"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=_output,
        metavar="OUT",
        help="one file (events.jsonl, events.parquet), - for stdout, or a folder for shards (any name without an "
        "extension); path or URL",
    )
    parser.add_argument("--annotations", metavar="F", help="take video ids and durations from this annotation file")
    parser.add_argument(
        "--subset", metavar="S", help="only this subset of the annotation file (train, validation, test)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument(
        "--on-error", choices=("skip", "stop"), default="skip", help="after a bad video: go on, or stop (default: skip)"
    )
    parser.add_argument("--format", choices=("jsonl", "parquet"), help="default: by the extension of OUT, else jsonl")
    parser.add_argument("--shard", type=_part, metavar="I/N", help="only every N-th shard from the I-th on, from 0")
    parser.add_argument("--shard-size", type=positive, metavar="N", help="videos per shard (default: by their number)")
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="worker processes, or actors on Ray, each with an engine"
    )
    parser.add_argument("--on", choices=("ray",), help="run the workers on a Ray cluster")
    add_json_argument(parser)
    add_engine_arguments(parser)
    add_extractor_arguments(parser, required=False)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    bundle = read_bundle(arguments.bundle)
    spec = bundle.spec
    check_windows(arguments)
    if arguments.annotations is None and arguments.subset is not None:
        raise ConfigError("--subset needs --annotations, which says what the subsets are")
    form: Format = arguments.format or ("parquet" if arguments.out.lower().endswith(".parquet") else "jsonl")
    if form == "parquet":
        check_parquet()
    found, bad = _extracted(arguments, spec)
    folder, entries = find_entries(arguments.features, spec, annotations=arguments.annotations, subset=arguments.subset)
    if found is not None:  # an annotation file's durations come first, then those of the pictures
        entries = [
            dataclasses.replace(entry, duration=entry.duration or found[entry.video_id])
            for entry in entries
            if entry.video_id in found
        ]
    if not is_url(arguments.out) and is_stream(arguments.out):
        return max(bad, _stream(arguments, spec, form, folder, entries))
    try:
        return max(bad, _resumable(arguments, bundle, form, folder, entries))
    except FileNotFoundError as error:
        if is_url(arguments.out) or not _was_finished(arguments.out, error):
            raise
        raise ConfigError(
            f"{arguments.out}: another process of the same command finished it meanwhile; the file is whole"
        ) from None


def _extracted(arguments: argparse.Namespace, spec: ModelSpec) -> tuple[dict[str, float] | None, int]:
    """Extract the features of `--videos` into the folder that `--features` names, or will name.

    Returns the seconds of the videos that have them, None where there are no videos; and 1 where some failed, else 0.
    """
    if arguments.videos is None:
        if arguments.features is None:
            raise ConfigError("nothing to predict on; expected --features DIR, or --videos VIDEO... --extractor E")
        if given := video_options_given(arguments):
            raise ConfigError(f"{' '.join(given)}: only with --videos; features are taken as they are")
        return None, 0
    if arguments.extractor is None:
        raise ConfigError("--videos needs --extractor E; 'ccnet import-extractor' makes one")
    if arguments.features is None:
        if is_url(arguments.out) or is_stream(arguments.out):
            raise ConfigError(
                f"--videos: name the folder of their features with --features; {arguments.out} is no file"
            )
        arguments.features = f"{os.path.realpath(arguments.out)}.features"
    from runtime.video.features import FeatureExtractor
    from runtime.video.files import check_fits, find_video_files, recorded_duration

    videos = find_video_files(arguments.videos)
    options = read_options(arguments)
    with FeatureExtractor.load(arguments.extractor, threads=arguments.threads, options=options) as extractor:
        check_fits(extractor.spec, spec)
        stop = arguments.on_error == "stop"
        outcome = extract(videos, arguments.features, extractor, stop=stop, quiet=arguments.quiet)
    log.info("%s", summary(arguments.features, outcome))
    good = [video.video_id for video in videos if video.video_id not in outcome.failed]
    if not good:
        raise VideoFailed("none of the videos could be used")
    return {name: recorded_duration(arguments.features, name) for name in good}, int(bool(outcome.failed))


def _part(text: str) -> Part:
    try:
        return Part.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _output(text: str) -> str:
    """Take the name of a file, a folder, a stream or a URL to write to; a bad one is refused before the work."""
    if is_url(text):
        return text
    path = local_path(text)
    if not path:
        raise argparse.ArgumentTypeError("got nothing, expected the name of a file or a folder")
    if _is_folder(path):
        output_file(os.path.join(path, PLAN))
        return path
    if path != "-" and not is_stream(path):
        _check_ending(path)
    return output_file(path)


def _check_ending(path: str) -> None:
    """Refuse a name that says of the file what it will not be, so that nothing could read it."""
    ending = os.path.splitext(path)[1].lower()
    if ending in _COMPRESSED:
        raise argparse.ArgumentTypeError(
            f"{quote(path)}: what is written is not compressed; give --out - and pipe it through {_COMPRESSED[ending]}"
        )
    if ending in _CONVERTED:
        raise argparse.ArgumentTypeError(
            f"{quote(path)}: JSON lines (.jsonl) and Parquet (.parquet) are written; 'ccnet convert' makes {ending}"
        )


def _is_folder(out: str) -> bool:
    """Return whether the output is a folder: there already, or by its name, which then has no extension."""
    name = out.rpartition("/")[2]
    if is_url(out):
        return "." not in name
    return os.path.isdir(out) or not name or ("." not in name and not os.path.exists(out))


def _was_finished(out: str, error: FileNotFoundError) -> bool:
    """Return whether a file of the run is missing because another process put the output together and tidied up."""
    folder = _run_folder(out)
    return str(error.filename).startswith(folder) and not os.path.exists(folder) and os.path.isfile(out)


def _run_folder(out: str) -> str:
    """Return where a run is kept: in the folder that it fills, or beside the file that it will become."""
    if _is_folder(out):
        return out
    return f"{out if is_url(out) else os.path.realpath(out)}.partial"


# Into a pipe, a device or standard output.


def _stream(arguments: argparse.Namespace, spec: ModelSpec, form: Format, folder: str, entries: list[Entry]) -> int:
    """Write the events as they come; nothing can be resumed."""
    for option in ("shard", "shard_size", "processes", "on", "json"):
        if getattr(arguments, option):
            raise ConfigError(f"--{option.replace('_', '-')}: {arguments.out} is a stream; name a file or a folder")
    write = write_parquet if form == "parquet" else write_events
    source = open_source(SourceOptions(folder=folder), spec)
    summary = Summary(videos=len(entries))
    ended: CCNetError | None = None

    def records() -> Iterator[tuple[str, float, Detections]]:
        """Yield the processed videos; what ends the run early goes to `ended`, so that those before it are written."""
        nonlocal ended
        try:
            for result in stream:
                _check(stop)
                if result.gaps is not None:
                    summary.gaps[result.video_id] = result.gaps
                if result.error is not None:
                    summary.failed[result.video_id] = str(result.error)
                    if arguments.on_error == "stop":
                        raise VideoFailed(f"stopped at video {result.video_id} (--on-error stop)")
                if result.detections is not None and result.duration is not None:
                    summary.events += len(result.detections)
                    yield result.video_id, result.duration, result.detections
                progress.advance()
        except CCNetError as error:
            ended = error

    with (
        open_localizer(arguments) as localizer,
        contextlib.closing(
            localizer.stream(map(source.item, entries), batch_size=arguments.batch, workers=arguments.workers)
        ) as stream,
        Progress("predict", total=len(entries), quiet=arguments.quiet) as progress,
        StopRequest() as stop,
    ):
        summary.written = write(arguments.out, records())
        engine = localizer.describe()
    summary.engine, summary.status = engine["engine"], engine["status"]
    _report(summary, spec)
    if ended is not None:
        log.warning("the events of %d of %d videos were written", summary.written, len(entries))
        raise ended
    print(f"{arguments.out}: {_counts(summary)}", file=sys.stderr)
    return 1 if summary.failed else 0


# Into a file or a folder.


def _resumable(arguments: argparse.Namespace, bundle: Bundle, form: Format, folder: str, entries: list[Entry]) -> int:
    """Begin or resume a run, and put it together when nothing is missing any more."""
    spec = bundle.spec
    one_file = not _is_folder(arguments.out)
    if one_file and arguments.shard is not None:
        raise ConfigError(f"--shard: the parts of a run share a folder; {arguments.out} is a file")
    store = open_store(_run_folder(arguments.out))
    settings = Settings(
        format=form,
        backend=arguments.backend,
        precision=arguments.precision,
        long_videos=arguments.long_videos,
        window_overlap=arguments.window_overlap,
    )
    planned, videos = make_plan(entries, bundle, settings, arguments.shard_size)
    try:
        plan, begun_before = settle_plan(store, planned, videos, any_shard_size=arguments.shard_size is None)
    except OSError:
        if one_file and store.size(PLAN) is None:
            remove_run(store)
        raise
    corpus = Run(store, plan, arguments.shard)
    if begun_before:
        log.info("%s: %d of %d videos are done", store.location, corpus.videos - corpus.videos_left, corpus.videos)
    try:
        try:
            _drive(arguments, corpus, folder)
        finally:
            store.tidy("", SHARDS, DONE)  # workers that died left what they were writing
    except (CCNetError, OSError) as error:
        summary = corpus.summary()
        _report(summary, spec)
        if one_file and not summary.shards:
            remove_run(store)
        else:
            hint = "run the same command again to go on"
            log.warning(
                "the events of %d of %d videos are in %s; %s", summary.written, plan.videos, store.location, hint
            )
        raise error
    summary = corpus.summary()
    _report(summary, spec)
    if one_file and not summary.gave_up:
        corpus.join(arguments.out)
        remove_run(store)
    elif corpus.complete:
        corpus.finish(folder)
    print_result(arguments, _record(arguments.out, summary, corpus), _text(arguments, summary, corpus))
    return 1 if summary.failed or summary.gave_up else 0


def _drive(arguments: argparse.Namespace, corpus: Run, folder: str) -> None:
    """Do what is left of a run, if anything is."""
    if not corpus.left:
        return
    before = corpus.videos - corpus.videos_left
    with (
        StopRequest() as stop,
        contextlib.closing(_pool(arguments, corpus, folder)) as pool,
        Progress("predict", total=corpus.videos, initial=before, quiet=arguments.quiet) as progress,
    ):
        corpus.drive(pool, advance=progress.advance, check=lambda: _check(stop))


def _pool(arguments: argparse.Namespace, corpus: Run, folder: str) -> Any:
    """Return the workers that the command line asks for."""
    processes = arguments.processes
    threads = arguments.threads
    if threads is None and processes is not None and arguments.on is None:
        threads = max(1, usable_cores() // processes)  # each engine would take all cores
    options = EngineOptions(
        backend=arguments.backend,
        precision=arguments.precision,
        on_mismatch=arguments.on_mismatch,
        threads=threads,
        long_videos=arguments.long_videos,
        window_overlap=arguments.window_overlap,
        batch=arguments.batch,
        workers=arguments.workers,
    )
    job = Job(
        bundle=os.path.abspath(arguments.bundle),
        source=SourceOptions(folder=folder),
        out=corpus.store.location,
        engine=options,
        stop_on_error=arguments.on_error == "stop",
    )
    if arguments.on == "ray":
        from runtime.corpus.ray_pool import RayPool

        return RayPool(job, processes)
    if processes is None:
        return ThreadPool(job)
    return ProcessPool(job, processes, visible_devices())


def _record(out: str, summary: Summary, corpus: Run) -> dict[str, Any]:
    return {
        "out": out,
        "part": [corpus.part.index, corpus.part.count],
        "videos": summary.written,
        "events": summary.events,
        "engine": summary.engine,
        "status": summary.status,
        "failed": dict(summary.failed),
        "shards_given_up": len(summary.gave_up),
        "complete": not summary.gave_up and (not _is_folder(out) or corpus.complete),
    }


def _text(arguments: argparse.Namespace, summary: Summary, corpus: Run) -> str:
    out, part, plan = arguments.out, corpus.part, corpus.plan
    whole = part.count == 1
    lines = [f"{out if whole else f'{out}, part {part.index}/{part.count}'}: {_counts(summary)}"]
    if summary.gave_up:
        lines.append(f"{len(summary.gave_up)} of {plan.shards} shards were given up; the same command tries them again")
    if not _is_folder(out):
        if not summary.gave_up:
            lines.append(f"next: ccnet evaluate {quoted_path(out)} {_truth(arguments)}")
    elif not corpus.complete:
        lines.append("other parts of the run are not done yet")
    else:
        if summary.failed or summary.gave_up:
            lines.append(f"bad videos: {join_location(out, FAILED)}")
        if plan.settings.format == "jsonl" and not is_url(out):
            lines.append(f"next: cat {quoted_path(os.path.join(out, SHARDS))}/*.jsonl > events.jsonl")
    return "\n".join(lines)


def _truth(arguments: argparse.Namespace) -> str:
    """Return the options that say what the events are scored against, as far as this command knows."""
    if arguments.annotations is None:
        return "--annotations F"
    subset = "" if arguments.subset is None else f" --subset {quoted_path(arguments.subset)}"
    return f"--annotations {quoted_path(arguments.annotations)}{subset}"


def _counts(summary: Summary) -> str:
    return f"{summary.written} videos, {summary.events} events, by {summary.engine} (parity check: {summary.status})"


def _report(summary: Summary, spec: ModelSpec) -> None:
    """Log what a person should know about single videos."""
    report_gaps(summary.gaps, summary.written + len(summary.failed), spec.time_base)
    if summary.failed:
        text = video_list(summary.failed, limit=len(summary.failed))
        log.warning("%d of %d videos failed:\n%s", len(summary.failed), summary.videos, text)


def _check(stop: StopRequest) -> None:
    if stop.requested:
        raise Interrupted("interrupted", stop.signal_number)
