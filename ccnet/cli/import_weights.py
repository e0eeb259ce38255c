"""`ccnet import-weights`: turn the authors' released weights into a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

TAKES_OVERRIDES = True


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "import-weights",
        help="turn a released .pth.tar into a checkpoint",
        description="Load a released checkpoint strictly (every unknown, missing or misshapen name is listed) and "
        "write it as a checkpoint. Settings that differ from the preset: --section.field value.",
    )
    parser.add_argument("file", type=Path, help="the released .pth.tar, or a saved state dict")
    parser.add_argument("--preset", required=True, help="unav100, unav100_onepeace or demo")
    parser.add_argument("--out", required=True, type=Path, help="checkpoint folder to write")
    parser.add_argument("--annotations", type=Path, help="annotation file that gives the class names")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from ccnet.config import parse_overrides, preset, with_overrides

    config = with_overrides(preset(arguments.preset), parse_overrides(overrides))
    labels = _labels(arguments.annotations, config.model.num_classes)
    config.spec(labels)  # raises where their number differs, before anything is loaded

    from ccnet.checkpoint import save_checkpoint
    from ccnet.network.model import CCNet
    from ccnet.network.released import load_released, read_released

    parameters = read_released(arguments.file)
    model = CCNet(config.model).eval()
    load_released(model, parameters, source=str(arguments.file))
    save_checkpoint(arguments.out, model, config=config, labels=labels)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.out}: {len(parameters)} tensors, {count / 1e6:.1f} M parameters, {len(labels)} classes")
    print(f"next: ccnet export {arguments.out} --out BUNDLE")
    return 0


def _labels(annotations: Path | None, classes: int) -> tuple[str, ...]:
    if annotations is None:
        return tuple(f"class_{index}" for index in range(classes))
    from runtime.annotations import read_annotations

    return read_annotations(annotations).labels
