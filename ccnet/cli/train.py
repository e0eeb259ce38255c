"""`ccnet train`: train a network from features and annotations; a run can be resumed at any step."""

from __future__ import annotations

import argparse
from typing import Any

from ccnet.cli.options import (
    add_config_arguments,
    add_json_argument,
    output_folder,
    print_result,
    quoted_path,
    read_config,
)

TAKES_OVERRIDES = True


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a network from features and annotations",
        usage="ccnet train [--config FILE] --preset P --annotations F --features DIR --out DIR [--classes C] "
        "[--resume] [--quiet] [--json] [--section.field value ...]",
        description="Train on the subset 'train', validate on 'validation'. OUT gets best/ and last/ checkpoints, "
        "metrics.csv, steps.csv and TensorBoard events. What --config gives need not be repeated. Ctrl-C leaves a "
        "state that --resume continues exactly.",
        epilog="Any setting of the preset can be changed as --section.field value, for example --train.epochs 20 "
        "--train.precision bf16 --model.cmi off, or in a file; 'ccnet presets' explains each. A resumed run needs the "
        "same preset and settings (only train.device and train.workers may differ).",
    )
    add_config_arguments(parser)
    parser.add_argument("--out", type=output_folder, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR")
    parser.add_argument("--quiet", action="store_true", help="print only the result")
    add_json_argument(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config = read_config(arguments, overrides)

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
        f"next: ccnet export {quoted_path(result.best)} --out BUNDLE",
    )
    return 0
