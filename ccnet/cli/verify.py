"""`ccnet verify`: verify the engines of a bundle on the machine that will run them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ccnet.cli.export import add_video_arguments, eager_arguments
from ccnet.cli.options import (
    add_json_argument,
    output_folder,
    print_result,
    print_text,
    quoted_path,
)
from runtime.errors import ConfigError
from runtime.folders import check_output_folder

if TYPE_CHECKING:
    from export.parity.reference import Reference
    from runtime.bundle import Bundle, Engine

log = logging.getLogger(__name__)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="run the comparison with the eager network that a bundle still lacks",
        description="Verifies the engines that were built but never run (or those that --backend and --precision name) "
        "and writes the verdicts into the bundle. With --reference no torch is needed. An extractor brings what its "
        "engines are compared with, and takes neither option. Exit status 3 when one fails.",
    )
    parser.add_argument("bundle", help="bundle or extractor folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--reference", metavar="FILE", help="what 'ccnet reference' recorded")
    source.add_argument("--checkpoint", metavar="C", help="checkpoint folder; needs torch")
    parser.add_argument("--backend", metavar="B", help="verify this backend, whether the bundle lists it or not")
    parser.add_argument("--precision", metavar="P", help="only engines of this precision")
    parser.add_argument(
        "--polygraphy",
        type=output_folder,
        metavar="DIR",
        help="ask a second tool instead: writes inputs.json and expected.json for 'polygraphy run' into DIR and judges "
        "its results.json when that is there; the bundle stays as it is",
    )
    add_video_arguments(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from export.parity.check import check_fits, engines_to_verify, verify
    from runtime.bundle import read_bundle
    from runtime.video.extractor import is_extractor

    if is_extractor(arguments.bundle):
        return _extractor(arguments)
    bundle = read_bundle(arguments.bundle)
    if arguments.polygraphy:
        if arguments.json:
            raise ConfigError("--json: what --polygraphy does is not a result to be parsed")
        if arguments.backend:
            raise ConfigError("--backend: --polygraphy asks a tool of its own; it says which backend that runs")
        return _polygraphy(arguments, bundle)
    if not (arguments.reference or arguments.checkpoint):
        raise ConfigError("--reference, --checkpoint: a bundle needs one of them; 'ccnet reference' makes one")
    engines = engines_to_verify(bundle, arguments.backend, arguments.precision)
    if not engines:
        return _report(arguments, engines, [], "ccnet bench")
    check_output_folder(bundle.folder, replaced=True)
    reference = _reference(arguments, bundle)
    check_fits(bundle, reference.spec, reference.checkpoint_sha256)
    named = bool(arguments.backend or arguments.precision)
    verified = verify(bundle.folder, engines, reference, all_must_run=named)
    return _report(arguments, engines, verified, "ccnet bench")


def _extractor(arguments: argparse.Namespace) -> int:
    """Verify an extractor against the outputs that it holds."""
    from export.extractors.check import verify_extractor
    from export.parity.check import engines_to_verify
    from runtime.video.extractor import read_extractor

    options = ("reference", "checkpoint", "polygraphy", "features", "annotations", "videos", "device")
    if given := [f"--{option}" for option in options if getattr(arguments, option) is not None]:
        raise ConfigError(f"{', '.join(given)}: an extractor brings what its engines are compared with")
    engines = engines_to_verify(read_extractor(arguments.bundle), arguments.backend, arguments.precision)
    named = bool(arguments.backend or arguments.precision)
    if engines:
        check_output_folder(arguments.bundle, replaced=True)
    verified = verify_extractor(arguments.bundle, engines, all_must_run=named) if engines else []
    return _report(arguments, engines, verified, "ccnet extract VIDEO... --out FEATURES --extractor")


def _report(arguments: argparse.Namespace, engines: Sequence[Engine], verified: Sequence[str], command: str) -> int:
    folder = str(arguments.bundle)
    if verified:
        text = f"{folder}: verified: {', '.join(verified)}\nnext: {command} {quoted_path(folder)}"
    elif engines:
        text = f"{folder}: nothing left that can be verified on this machine"
    else:
        text = f"{folder}: every engine is verified already; name one with --backend to verify it again here"
    print_result(arguments, {"bundle": folder, "verified": list(verified)}, text)
    return 0


def _reference(arguments: argparse.Namespace, bundle: Bundle) -> Reference:
    if arguments.reference is not None:
        options = ("features", "annotations", "videos", "device")
        if given := [f"--{option}" for option in options if getattr(arguments, option) is not None]:
            raise ConfigError(f"{', '.join(given)}: a reference file already holds its videos and the eager outputs")

        from export.parity.reference import load_reference

        return load_reference(arguments.reference)

    from ccnet.checkpoint import read_checkpoint
    from export.parity.reference import eager_reference

    checkpoint = read_checkpoint(arguments.checkpoint)
    log.info("running the eager network")
    return eager_reference(checkpoint, checkpoint.load_model(), **eager_arguments(arguments))


def _polygraphy(arguments: argparse.Namespace, bundle: Bundle) -> int:
    from pathlib import Path

    from export.parity.check import check_fits
    from export.parity.polygraphy_files import judge_results, write_inputs

    reference = _reference(arguments, bundle)
    check_fits(bundle, reference.spec, reference.checkpoint_sha256)
    folder = Path(arguments.polygraphy)
    if (folder / "results.json").exists():
        report = judge_results(folder, reference, arguments.precision or "fp32")
        print_text(report.text())
        report.require()
        return 0
    write_inputs(folder, reference)
    graph = next(a for a in bundle.manifest.model_files if a.format == "onnx")
    print(f"{folder}: inputs.json and expected.json written; next:")
    print(
        f"  polygraphy run {quoted_path(bundle.path(graph))} --onnxrt "
        f"--load-inputs {quoted_path(folder / 'inputs.json')} "
        f"--save-outputs {quoted_path(folder / 'results.json')}"
    )
    print("  (--trt instead of --onnxrt asks TensorRT; --load-outputs expected.json compares there)")
    print(f"  then this command again judges {folder / 'results.json'}")
    return 0
