"""`ccnet train`: train a network from features and annotations; a run can be resumed at any step."""

from __future__ import annotations

import argparse
from typing import Any

from ccnet.cli.options import CLASSES_HELP, add_json_argument, print_result
from ccnet.config import PRESETS, parse_overrides, preset, with_overrides

TAKES_OVERRIDES = True


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a network from features and annotations",
        usage="ccnet train --preset P --annotations F --features DIR --out DIR [--resume] [--section.field value ...]",
        description="Train on the subset 'train', validate on 'validation'. OUT gets best/ and last/ checkpoints, "
        "metrics.csv, steps.csv and TensorBoard events. Ctrl-C leaves a state that --resume continues exactly.",
        epilog="Any setting of the preset can be changed as --section.field value, for example --train.epochs 20 "
        "--train.precision bf16 --model.cmi off. A resumed run needs the same preset and settings "
        "(only train.device and train.workers may differ).",
    )
    parser.add_argument("--preset", required=True, help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--annotations", required=True, metavar="F", help="annotation JSON")
    parser.add_argument("--classes", metavar="C", help=CLASSES_HELP)
    parser.add_argument("--features", required=True, metavar="DIR", help="folder of .npy feature files")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR")
    parser.add_argument("--quiet", action="store_true", help="print only the result")
    add_json_argument(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config = with_overrides(preset(arguments.preset), parse_overrides(overrides))

    from ccnet.training.loop import train
    from runtime.annotations import read_class_list

    result = train(
        config,
        arguments.annotations,
        arguments.features,
        arguments.out,
        resume=arguments.resume,
        quiet=arguments.quiet,
        classes=None if arguments.classes is None else read_class_list(arguments.classes),
    )
    print_result(
        arguments,
        {"best": str(result.best), "best_epoch": result.best_epoch, "best_map": result.best_map},
        f"best validation mAP {result.best_map:.4f} (epoch {result.best_epoch}): {result.best}\n"
        f"next: ccnet export {result.best} --out BUNDLE",
    )
    return 0
