"""`ccnet evaluate`: score predicted events, or a bundle on feature files, against an annotation file.

Exit status: 0 when every video of the subset was scored, 1 when some failed (they count as videos in which nothing was
found), 2 when it could not be done at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

from ccnet.cli.logs import video_list
from ccnet.cli.options import (
    CLASSES_HELP,
    add_engine_arguments,
    add_json_output,
    engine_options_given,
    open_localizer,
    print_or_write,
)
from runtime.annotations import SUBSETS, read_annotations, read_class_list
from runtime.bundle import read_bundle
from runtime.corpus.run import open_run
from runtime.coverage import report_gaps
from runtime.errors import ConfigError, PredictionError, VideoFailed
from runtime.evaluation import Evaluation, evaluate, evaluate_localizer
from runtime.formats.registry import add_classes, holds_events, read_predictions

log = logging.getLogger(__name__)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="mAP of predicted events, or of a bundle, on an annotated subset",
        description="Print the mAP at each tIoU threshold and its average, as the paper does, and the share of events "
        "found by their duration. Exit status 1 when some videos failed; they count as videos in which nothing was "
        "found.",
    )
    parser.add_argument(
        "bundle",
        metavar="BUNDLE|EVENTS",
        help="bundle folder, events in any format that 'ccnet convert' reads and that has scores, or the folder of a "
        "complete corpus run",
    )
    parser.add_argument("--annotations", required=True, metavar="F", help="annotation file")
    parser.add_argument("--subset", default="test", choices=SUBSETS, help="default: test")
    parser.add_argument("--features", metavar="DIR", help="folder of feature files; needed with a bundle")
    parser.add_argument("--classes", metavar="C", help=CLASSES_HELP)
    parser.add_argument("--per-class", action="store_true", help="also print the AP of every class")
    add_json_output(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    source = Path(arguments.bundle)
    evaluation = _score_bundle(arguments) if source.is_dir() and not holds_events(source) else _score_events(arguments)
    text = evaluation.table()
    if arguments.per_class:
        text += f"\n\n{evaluation.per_class_table()}"
    print_or_write(arguments, {"source": str(source), **evaluation.to_json()}, text)
    if evaluation.failed:
        log.warning(
            "%d of %d videos failed and count as videos in which nothing was found:\n%s",
            len(evaluation.failed),
            evaluation.videos,
            video_list(evaluation.failed),
        )
    return 1 if evaluation.failed else 0


def _score_bundle(arguments: argparse.Namespace) -> Evaluation:
    bundle = read_bundle(arguments.bundle)
    if arguments.classes is not None:
        raise ConfigError(f"--classes: {arguments.bundle} is a bundle, which has its own class list")
    if arguments.features is None:
        raise ConfigError(f"--features is missing: {arguments.bundle} is a bundle, which needs videos to run on")
    annotations = read_annotations(arguments.annotations, labels=bundle.spec.labels)
    with open_localizer(arguments) as localizer:
        evaluation = evaluate_localizer(
            localizer,
            arguments.features,
            annotations,
            arguments.subset,
            batch_size=arguments.batch,
            workers=arguments.workers,
            quiet=arguments.quiet,
        )
    report_gaps(evaluation.gaps, evaluation.videos, localizer.spec.time_base)
    return evaluation


def _score_events(arguments: argparse.Namespace) -> Evaluation:
    given = (["--features"] if arguments.features is not None else []) + engine_options_given(arguments)
    if given:
        raise ConfigError(
            f"{' '.join(given)}: {arguments.bundle} is not a bundle folder; events are scored as they are"
        )
    labels = None if arguments.classes is None else read_class_list(arguments.classes)
    annotations = read_annotations(arguments.annotations, labels)
    try:
        predictions = read_predictions(arguments.bundle, annotations.labels)
    except PredictionError:
        # A part of an annotation file lacks classes that its events may well have.
        if labels is not None:
            raise
        labels = add_classes(arguments.bundle, annotations.labels, annotations.unnamed)
        if labels == annotations.labels:
            raise
        annotations = read_annotations(arguments.annotations, labels)
        predictions = read_predictions(arguments.bundle, labels)
    evaluation = evaluate(predictions, annotations, arguments.subset)
    run = open_run(arguments.bundle)
    scored = {video.video_id for video in annotations.subset(arguments.subset)}
    bad = {} if run is None else {v: VideoFailed(text) for v, text in run.summary().failed.items() if v in scored}
    return dataclasses.replace(evaluation, failed=bad)
