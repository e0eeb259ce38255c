"""`ccnet import-weights`: turn released weights of CCNet, or of DAVEL, the baseline, into a checkpoint."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ccnet.cli.options import (
    add_json_argument,
    print_result,
    quoted_path,
    replaced_folder,
)
from ccnet.config import PRESETS, ModelConfig, parse_overrides, preset, with_overrides
from runtime.errors import CheckpointError, ConfigError

TAKES_OVERRIDES = True


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "import-weights",
        help="turn a released .pth.tar of CCNet or DAVEL into a checkpoint",
        description="Load a released checkpoint of CCNet or of DAVEL strictly and write it as a checkpoint. A file "
        "that is not for the preset is answered with the preset that it is for. Settings that differ from the preset: "
        "--section.field value.",
    )
    parser.add_argument("file", type=Path, help="the released .pth.tar, or a saved state dict")
    parser.add_argument("--preset", required=True, metavar="P", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--out", required=True, type=replaced_folder, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument("--annotations", type=Path, metavar="F", help="annotation file that gives the class names")
    add_json_argument(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    settings = parse_overrides(overrides)
    config = with_overrides(preset(arguments.preset), settings)
    labels = _labels(arguments.annotations, config.model.num_classes)
    config.spec(labels)  # raises where their number differs, before anything is loaded

    from ccnet.checkpoint import save_checkpoint
    from ccnet.network.model import CCNet
    from ccnet.network.released import explain_misfit, load_released, read_released, release_of

    parameters = read_released(arguments.file)
    if misfit := explain_misfit(parameters, arguments.preset, _with_settings(settings)):
        raise CheckpointError(f"{arguments.file}: {misfit}")
    model = CCNet(config.model).eval()
    load_released(model, parameters, source=str(arguments.file))
    save_checkpoint(Path(arguments.out), model, config=config, labels=labels)
    count = sum(parameter.numel() for parameter in model.parameters())
    release = release_of(parameters)
    print_result(
        arguments,
        {
            "out": str(arguments.out),
            "release": release,
            "tensors": len(parameters),
            "parameters": count,
            "classes": len(labels),
        },
        f"{arguments.out}: {release}'s release, {len(parameters)} tensors, {count / 1e6:.1f} M parameters, "
        f"{len(labels)} classes\nnext: ccnet export {quoted_path(arguments.out)} --out BUNDLE",
    )
    return 0


def _with_settings(settings: Mapping[str, str]) -> dict[str, ModelConfig]:
    """Return the network of every preset with these settings applied, but for presets that they do not fit."""
    models = {}
    for name, config in PRESETS.items():
        with contextlib.suppress(ConfigError):
            models[name] = with_overrides(config, settings).model
    return models


def _labels(annotations: Path | None, classes: int) -> tuple[str, ...]:
    if annotations is None:
        return tuple(f"class_{index}" for index in range(classes))
    from runtime.annotations import read_annotations

    return read_annotations(annotations).labels
