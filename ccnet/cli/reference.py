"""`ccnet reference`: record the eager network's outputs, to verify engines on machines without torch."""

from __future__ import annotations

import argparse
from typing import Any

from ccnet.cli.export import add_video_arguments, eager_arguments
from ccnet.cli.options import (
    add_json_argument,
    output_file,
    print_result,
    quoted_path,
)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "reference",
        help="record inputs and eager outputs for 'ccnet verify' on a machine without torch",
        description="Writes stress inputs, synthetic or real videos, and what the eager network makes of them into one "
        ".npz file without pickled objects.",
    )
    parser.add_argument("checkpoint", help="checkpoint folder")
    parser.add_argument("--out", required=True, type=output_file, metavar="FILE", help="the .npz file")
    add_video_arguments(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from pathlib import Path

    from ccnet.checkpoint import read_checkpoint
    from export.parity.reference import eager_reference, save_reference

    checkpoint = read_checkpoint(arguments.checkpoint)
    reference = eager_reference(checkpoint, checkpoint.load_model(), **eager_arguments(arguments))
    save_reference(arguments.out, reference)
    size = Path(arguments.out).stat().st_size
    print_result(
        arguments,
        {"out": arguments.out, "inputs": len(reference.videos), "bytes": size},
        f"{arguments.out}: {len(reference.videos)} inputs with their outputs, {size / 1e6:.1f} MB\n"
        f"next: ccnet verify BUNDLE --reference {quoted_path(arguments.out)}",
    )
    return 0
