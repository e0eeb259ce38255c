"""`ccnet compare`: methods side by side in the form of the paper's tables, with intervals and a paired test.

Exit status: 0 when every video was scored, 1 when some failed (they count as videos in which nothing was found), 2 when
it could not be done at all.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ccnet.cli.logs import video_list
from ccnet.cli.options import (
    add_engine_arguments,
    add_json_output,
    engine_options_given,
    find_subset_events,
    positive,
    print_or_write,
)
from ccnet.config import ModelConfig
from ccnet.report.comparison import Method, compare
from ccnet.report.published import CLASSES, TEST_VIDEOS, published_named, published_of
from runtime.annotations import SUBSETS, Annotations, read_annotations
from runtime.bundle import read_bundle
from runtime.errors import CCNetError, ConfigError
from runtime.evaluation import score_videos
from runtime.formats.registry import holds_events, read_predictions

log = logging.getLogger(__name__)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="the paper's tables from bundles and events files, with intervals and a paired test",
        description="Score methods on the same videos and print the paper's tables: 1 (methods), 2 to 4 (parts of the "
        "network that are off; bundles say what is), Fig. 3 (durations). Each score has a bootstrap interval over "
        "videos; each method is tested against the first one. A name that is a row of the paper's Table 1, such as "
        "DAVEL=events.jsonl, puts that row beside an events file.",
    )
    parser.add_argument(
        "methods",
        nargs="+",
        metavar="[NAME=]BUNDLE|EVENTS",
        help="bundle folders, and events in any format that 'ccnet convert' reads and that has scores",
    )
    parser.add_argument("--annotations", required=True, metavar="F", help="annotation file")
    parser.add_argument("--subset", default="test", choices=SUBSETS, help="default: test")
    parser.add_argument("--features", metavar="DIR", help="folder of feature files; needed with a bundle")
    parser.add_argument("--draws", type=positive, default=1000, metavar="N", help="of videos; default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")
    add_json_output(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    sources = [_split(text) for text in arguments.methods]
    names = [name for name, _ in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two methods are called {twice[0]!r}; name them: NAME={arguments.methods[-1]}")
    bundles = [path for _, path in sources if _is_bundle(path)]
    if not bundles and (given := (["--features"] if arguments.features else []) + engine_options_given(arguments)):
        raise ConfigError(f"{' '.join(given)}: no bundle is given; events are scored as they are")
    annotations = read_annotations(arguments.annotations, labels=_common_labels(bundles))
    failed: dict[str, CCNetError] = {}
    methods = [
        _bundle(name, path, arguments, annotations, failed)
        if path in bundles
        else _events(name, path, arguments, annotations)
        for name, path in sources
    ]
    videos = annotations.subset(arguments.subset)
    unav100 = arguments.subset == "test" and len(videos) == TEST_VIDEOS and len(annotations.labels) == CLASSES
    comparison = compare(
        methods, subset=arguments.subset, samples=arguments.draws, seed=arguments.seed, is_unav100=unav100
    )
    print_or_write(arguments, comparison.to_json(), comparison.text())
    if failed:
        log.warning(
            "%d videos failed and count as videos in which nothing was found:\n%s", len(failed), video_list(failed)
        )
    return 1 if failed else 0


def _is_bundle(path: Path) -> bool:
    return path.is_dir() and not holds_events(path)


def _common_labels(bundles: Sequence[Path]) -> tuple[str, ...] | None:
    """Return the class names of all bundles; None without any. Raises ConfigError where they differ."""
    labels = {path: read_bundle(path).spec.labels for path in bundles}
    first = next(iter(labels), None)
    for path, names in labels.items():
        if names != labels[bundles[0]]:
            raise ConfigError(f"{path} and {first} have different classes; methods are compared on the same ones")
    return labels[first] if first else None


def _split(text: str) -> tuple[str, Path]:
    """Return name and path of `NAME=PATH` or `PATH`; a file whose name has a = is that file."""
    name, equals, path = text.partition("=")
    if Path(text).exists() or not equals or not name:
        return Path(text).stem if Path(text).suffix else Path(os.path.realpath(text)).name, Path(text)
    return name, Path(path)


def _bundle(
    name: str, path: Path, arguments: argparse.Namespace, annotations: Annotations, failed: dict[str, CCNetError]
) -> Method:
    """Run a bundle on the subset; videos that fail go to `failed`."""
    if arguments.features is None:
        raise ConfigError(f"--features is missing: {path} is a bundle, which needs videos to run on")
    bundle = read_bundle(path)
    model = ModelConfig.from_json(bundle.manifest.model) if bundle.manifest.model else None
    found = find_subset_events(arguments, path, arguments.features, annotations)
    failed |= {f"{name}: {video_id}": error for video_id, error in found.failed.items()}
    scores = score_videos(found.predictions, annotations, arguments.subset)
    return Method(name, scores, model, published_of(model) if model else published_named(name))


def _events(name: str, path: Path, arguments: argparse.Namespace, annotations: Annotations) -> Method:
    predictions = read_predictions(path, annotations.labels)
    scores = score_videos(predictions, annotations, arguments.subset)
    return Method(name, scores, None, published_named(name))
