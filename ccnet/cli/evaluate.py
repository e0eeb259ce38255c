"""`ccnet evaluate`: the mAP table of predicted events, or of a bundle run over features, against an annotation file.

Exit status: 0 when every video of the subset was scored, 1 when some could not be used (they count as videos without
detections), 2 when it could not be done at all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ccnet.cli.predict import add_engine_arguments, engine_options_given, open_localizer
from runtime.annotations import SUBSETS, Annotations, read_annotations
from runtime.bundle import read_bundle
from runtime.corpus import Corpus
from runtime.detections import Detections, read_events
from runtime.errors import CCNetError, ConfigError, FeatureError
from runtime.evaluation import evaluate
from runtime.files import write_json
from runtime.progress import Progress

_SHOWN = 20


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("evaluate", help="mAP of predicted events, or of a bundle, on an annotated subset")
    parser.add_argument("bundle", metavar="BUNDLE|EVENTS", help="bundle folder, or an events.jsonl")
    parser.add_argument("--annotations", required=True, metavar="F", help="annotation file")
    parser.add_argument("--subset", default="test", choices=SUBSETS, help="default: test")
    parser.add_argument("--features", metavar="DIR", help="folder of feature files; needed with a bundle")
    parser.add_argument("--per-class", action="store_true", help="also print the AP of every class")
    parser.add_argument("--json", metavar="OUT", help="also write the numbers to this file")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    failed: list[tuple[str, CCNetError]] = []
    predictions: Mapping[str, Detections]
    if Path(arguments.bundle).is_dir():
        if arguments.features is None:
            raise ConfigError(f"--features is missing: {arguments.bundle} is a bundle, which needs videos to run on")
        annotations = read_annotations(arguments.annotations, labels=read_bundle(arguments.bundle).spec.labels)
        predictions, failed = _predict(arguments, annotations)
    else:
        given = (["--features"] if arguments.features is not None else []) + engine_options_given(arguments)
        if given:
            raise ConfigError(
                f"{' '.join(given)}: {arguments.bundle} is no bundle folder; events are scored as they are"
            )
        annotations = read_annotations(arguments.annotations)
        predictions = read_events(arguments.bundle, annotations.labels)
    evaluation = evaluate(predictions, annotations, arguments.subset)
    print(evaluation.table())
    if arguments.per_class:
        print(f"\n{evaluation.per_class_table()}")
    if arguments.json:
        unusable = {video_id: str(error) for video_id, error in failed}
        write_json(arguments.json, {"source": str(arguments.bundle), **evaluation.to_json(), "unusable": unusable})
    if failed:
        print(f"{len(failed)} video(s) could not be used and count as videos without detections:", file=sys.stderr)
        for video_id, error in failed[:_SHOWN]:
            print(f"  {video_id}: {error}", file=sys.stderr)
        if len(failed) > _SHOWN:
            print(f"  ... and {len(failed) - _SHOWN} more", file=sys.stderr)
    return 1 if failed else 0


def _predict(
    arguments: argparse.Namespace, annotations: Annotations
) -> tuple[dict[str, Detections], list[tuple[str, CCNetError]]]:
    """The bundle on every video of the subset -> detections by video, and the videos that could not be used."""
    videos = annotations.subset(arguments.subset)
    predictions: dict[str, Detections] = {}
    with (
        open_localizer(arguments) as localizer,
        Progress("evaluate", total=len(videos), quiet=arguments.quiet) as progress,
    ):
        corpus = Corpus(localizer, arguments.features, videos, batch_size=arguments.batch, workers=arguments.workers)
        for video_id, _, detections in corpus.records():
            predictions[video_id] = detections
            progress.advance()
    if not predictions:
        video_id, error = corpus.failed[0]
        raise FeatureError(f"none of the {len(videos)} videos could be used; the first, {video_id}: {error}")
    return predictions, corpus.failed
