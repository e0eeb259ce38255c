"""`ccnet rebuild`: build engines of a bundle again for the machine that will run them."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from ccnet.cli.options import (
    add_json_argument,
    print_result,
    quoted_path,
)
from runtime.folders import check_output_folder

log = logging.getLogger(__name__)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "rebuild",
        help="build TensorRT engines of a bundle again for this GPU and library",
        description="Builds engines of a bundle or extractor again from its own ONNX files, without torch or the "
        "checkpoint. They are unverified until 'ccnet verify' has run.",
    )
    parser.add_argument("bundle", help="bundle or extractor folder; it changes only once an engine is built")
    parser.add_argument(
        "engines",
        nargs="*",
        metavar="ENGINE",
        help="as 'ccnet inspect' names them (default: all that were built for another GPU or library version)",
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from export.rebuild import engines_to_rebuild, read_folder, rebuild
    from runtime.video.extractor import is_extractor

    engines = engines_to_rebuild(read_folder(arguments.bundle), arguments.engines)
    if engines:
        check_output_folder(arguments.bundle, replaced=True)
    rebuilt: dict[str, Any] = {}
    for engine in engines:
        built = rebuild(arguments.bundle, engine)
        rebuilt[engine.name] = {
            "library": built.library,
            "library_version": built.library_version,
            "status": "unverified",
        }
        log.info("%s: built with %s %s, unverified", engine.name, built.library, built.library_version)
    text = (
        f"{arguments.bundle}: rebuilt {', '.join(rebuilt)}\n"
        f"next: ccnet verify {quoted_path(arguments.bundle)}"
        + ("" if is_extractor(arguments.bundle) else " --reference ref.npz")
        if rebuilt
        else f"{arguments.bundle}: no engine was built for another GPU or library version; name one to rebuild it"
    )
    print_result(arguments, {"bundle": arguments.bundle, "rebuilt": rebuilt}, text)
    return 0
