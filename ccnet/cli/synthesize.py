"""`ccnet synthesize`: write synthetic features for the videos of an annotation file, where real ones can't be had."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from ccnet.cli.options import add_json_argument, output_folder, positive, print_result
from ccnet.config import PRESETS, parse_overrides, preset, with_overrides

TAKES_OVERRIDES = True


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "synthesize",
        help="write synthetic features for the videos of an annotation file",
        description="Write synthetic features for the videos of an annotation file, in the published file layout. "
        "Each class gets a visual and an audio signature; stretches of a class that is only seen or only heard are not "
        "events. The same command continues an interrupted folder.",
        epilog="Feature widths, file suffixes and time base come from the preset; change them with e.g. "
        "--model.visual_dim 64. All 10,790 videos of UnAV-100 take 12 GB as float32 and 6 GB as float16.",
    )
    parser.add_argument("--annotations", required=True, metavar="FILE", help="annotation JSON in the UnAV-100 layout")
    parser.add_argument("--out", required=True, type=output_folder, metavar="DIR", help="folder for the .npy files")
    parser.add_argument("--preset", default="unav100", choices=sorted(PRESETS), help="default: %(default)s")
    parser.add_argument("--subset", nargs="+", metavar="NAME", help="train, validation, test; default: all videos")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N of these videos")
    parser.add_argument(
        "--difficulty",
        type=float,
        default=0.5,
        metavar="X",
        help="0 (clean, no distractors) to 1 (weak signatures, four distractors per event, blurred boundaries); "
        "default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"), help="default: %(default)s")
    parser.add_argument(
        "--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes; default: all cores"
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from ccnet.synthetic.features import SynthesisSettings
    from ccnet.synthetic.folder import synthesize_folder
    from runtime.annotations import read_annotations

    config = with_overrides(preset(arguments.preset), parse_overrides(overrides))
    annotations = read_annotations(arguments.annotations)
    videos = list(annotations.videos.values())
    if arguments.subset:
        videos = [video for name in arguments.subset for video in annotations.subset(name)]
    videos = videos[: arguments.limit]

    begun = time.perf_counter()
    result = synthesize_folder(
        annotations,
        videos,
        arguments.out,
        config,
        SynthesisSettings.of_difficulty(arguments.difficulty, arguments.seed),
        dtype=arguments.dtype,
        workers=arguments.workers,
    )
    seconds = time.perf_counter() - begun
    print_result(
        arguments,
        {
            "out": arguments.out,
            "written": result.written,
            "kept": result.kept,
            "bytes": result.size,
            "seconds": round(seconds, 3),
        },
        f"{arguments.out}: {result.written} videos written in {seconds:.1f} s, {result.kept} were there already; "
        f"{result.size / 1e9:.2f} GB in all",
    )
    return 0
