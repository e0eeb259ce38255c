"""`ccnet rebuild`: build engines of a bundle again for the machine that will run them."""

from __future__ import annotations

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "rebuild",
        help="build TensorRT engines of a bundle again for this GPU and library",
        description="Builds engines again from the bundle's own ONNX files, without torch or the checkpoint. They are "
        "unverified until 'ccnet verify' has run.",
    )
    parser.add_argument("bundle", help="bundle folder; it changes only once an engine is built")
    parser.add_argument(
        "engines",
        nargs="*",
        metavar="ENGINE",
        help="as 'ccnet inspect' names them (default: all that were built for another GPU or library version)",
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from export.rebuild import engines_to_rebuild, rebuild
    from runtime.bundle import read_bundle

    engines = engines_to_rebuild(read_bundle(arguments.bundle), arguments.engines)
    if not engines:
        print(f"{arguments.bundle}: no engine was built for another GPU or library version; name one to rebuild it")
        return 0
    for engine in engines:
        built = rebuild(arguments.bundle, engine)
        print(f"{engine.name}: built with {built.library} {built.library_version}, unverified")
    print(f"next: ccnet verify {arguments.bundle} --reference ref.npz")
    return 0
