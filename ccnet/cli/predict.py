"""`ccnet predict`: the events of every video in a feature folder, by a bundle, without PyTorch.

Exit status: 0 when every video gave events, 1 when some could not be used (the good ones are written) or the run was
ended early, 2 when it could not be done at all.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, get_args

from ccnet.cli.options import positive
from runtime.annotations import VideoAnnotation, read_annotations
from runtime.backends.select import BACKENDS, OnMismatch
from runtime.bundle import read_bundle
from runtime.corpus import Corpus, CorpusVideo, OnError, Record, folder_videos
from runtime.detections import write_events, write_parquet
from runtime.errors import CCNetError, ConfigError
from runtime.localizer import Localizer, LongVideos
from runtime.progress import Progress
from runtime.signals import StopRequest
from runtime.spec import ModelSpec

_SHOWN = 20


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("predict", help="find the events of videos from their feature files")
    parser.add_argument("bundle", help="bundle folder")
    parser.add_argument("--features", required=True, metavar="DIR", help="folder of feature files")
    parser.add_argument("--out", required=True, metavar="FILE", help="events.jsonl, or a .parquet file")
    parser.add_argument("--annotations", metavar="F", help="take video ids and durations from this annotation file")
    parser.add_argument("--subset", help="only this subset of the annotation file (train, validation, test)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument(
        "--on-error",
        choices=get_args(OnError),
        default="skip",
        help="after a bad video: go on, or stop (default: skip)",
    )
    add_engine_arguments(parser)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose and drive the engine; see `open_localizer`."""
    parser.add_argument("--backend", default="auto", choices=("auto", *BACKENDS), help="default: the fastest verified")
    parser.add_argument("--precision", help="only this precision (fp32, tf32, bf16, fp16, int8)")
    parser.add_argument("--length", type=positive, metavar="T", help="only the engine of this many steps")
    parser.add_argument("--batch", type=positive, metavar="N", help="videos per engine call")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of the engine")
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="threads that read, and as many that post-process"
    )
    parser.add_argument(
        "--long-videos",
        choices=get_args(LongVideos),
        default="crop",
        help="videos longer than T: keep the first T steps (the paper), or overlapping windows (default: crop)",
    )
    parser.add_argument(
        "--window-overlap", type=float, default=0.5, metavar="SHARE", help="of neighbouring windows (default: 0.5)"
    )
    parser.add_argument(
        "--on-mismatch",
        choices=get_args(OnMismatch),
        default="error",
        help="an engine made for another library version or GPU: fail, run the ONNX file, or build it again here",
    )


def engine_options_given(arguments: argparse.Namespace) -> list[str]:
    """Those of the options of `add_engine_arguments` that are not at their defaults."""
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(arguments, name) != value]


def open_localizer(arguments: argparse.Namespace) -> Localizer:
    """The bundle of the command line, loaded as its engine options say."""
    return Localizer.load(
        arguments.bundle,
        arguments.backend,
        precision=arguments.precision,
        length=arguments.length,
        on_mismatch=arguments.on_mismatch,
        threads=arguments.threads,
        long_videos=arguments.long_videos,
        window_overlap=arguments.window_overlap,
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    videos = _videos(arguments, read_bundle(arguments.bundle).spec)
    write = write_parquet if arguments.out.endswith(".parquet") else write_events
    partial = Path(f"{arguments.out}.partial")
    with open_localizer(arguments) as localizer, StopRequest() as stop:
        corpus = Corpus(
            localizer,
            arguments.features,
            videos,
            on_error=arguments.on_error,
            batch_size=arguments.batch,
            workers=arguments.workers,
            stop=lambda: bool(stop),
        )
        records = _Records(corpus, Progress("predict", total=len(videos), quiet=arguments.quiet))
        write(partial, records.walk())
        engine = localizer.describe()
    finished = corpus.complete and records.failure is None
    if finished:
        os.replace(partial, arguments.out)
    _report(corpus, len(videos))
    if not finished:
        why = "interrupted" if stop else "stopped at a bad video (--on-error stop)"
        why = "ended by an error" if records.failure is not None else why
        kept = f"{corpus.done} of {len(videos)} video(s) are kept in {partial}" if corpus.done else "nothing is kept"
        print(f"{why}; {kept}", file=sys.stderr)
        if not corpus.done:
            partial.unlink()
        if records.failure is not None:
            raise records.failure
        return 1
    print(
        f"{arguments.out}: {corpus.done} video(s), {records.events} event(s), by {engine['engine']} "
        f"(parity check: {engine['status']})\nnext: ccnet evaluate {arguments.out} --annotations F --subset S"
    )
    return 1 if corpus.failed else 0


class _Records:
    """The records of a corpus, counted; an engine failure ends them but is kept, so that the good ones get written."""

    def __init__(self, corpus: Corpus, progress: Progress) -> None:
        self._corpus, self._progress = corpus, progress
        self.events = 0
        self.failure: CCNetError | None = None

    def walk(self) -> Generator[Record, None, None]:
        with self._progress as progress:
            try:
                for record in self._corpus.records():
                    self.events += len(record[2])
                    yield record
                    progress.advance()
            except CCNetError as error:
                self.failure = error


def _videos(arguments: argparse.Namespace, spec: ModelSpec) -> Sequence[CorpusVideo | VideoAnnotation]:
    if arguments.annotations is None:
        if arguments.subset is not None:
            raise ConfigError("--subset needs --annotations, which says what the subsets are")
        return folder_videos(arguments.features, spec)
    annotations = read_annotations(arguments.annotations, labels=spec.labels)
    if arguments.subset is None:
        return list(annotations.videos.values())
    return annotations.subset(arguments.subset)


def _report(corpus: Corpus, total: int) -> None:
    """Remarkable and bad videos, on standard error."""
    failed = [(video_id, str(error)) for video_id, error in corpus.failed]
    for title, rows in (("used, but remarkable", corpus.notes), ("could not be used", failed)):
        if rows:
            print(f"{len(rows)} of {total} video(s) {title}:", file=sys.stderr)
            for video_id, text in rows if rows is failed else rows[:_SHOWN]:
                print(f"  {video_id}: {text}", file=sys.stderr)
            if rows is not failed and len(rows) > _SHOWN:
                print(f"  ... and {len(rows) - _SHOWN} more", file=sys.stderr)
