"""`ccnet import-extractor`: the public weight files of I3D, RAFT and VGGish -> an extractor folder, verified."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from ccnet.cli.export import add_engine_arguments, add_format_arguments, engine_options
from ccnet.cli.options import (
    add_json_argument,
    positive,
    print_result,
    quoted_path,
    replaced_folder,
)

log = logging.getLogger(__name__)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "import-extractor",
        help="make an extractor, which turns videos into features, from public weight files",
        description="Reads the weight files of I3D (rgb and flow), RAFT and VGGish, writes their graphs as ONNX and as "
        "engines, compares every engine that this machine can run with the network in PyTorch, and leaves an extractor "
        "only when all passed (exit status 3 otherwise). Weight files are not part of this program; docs/video.md says "
        "which ones are meant.",
    )
    parser.add_argument("--i3d-rgb", required=True, metavar="F", help="i3d_rgb.pt, or piergiaj's rgb_imagenet.pt")
    parser.add_argument("--i3d-flow", required=True, metavar="F", help="i3d_flow.pt, or piergiaj's flow_imagenet.pt")
    parser.add_argument("--raft", required=True, metavar="F", help="raft-sintel.pth, or torchvision's raft_large")
    parser.add_argument("--vggish", required=True, metavar="F", help="vggish-10086976.pth")
    parser.add_argument(
        "--out",
        required=True,
        type=replaced_folder,
        metavar="E",
        help="extractor folder; an earlier extractor is replaced",
    )
    add_format_arguments(parser, "fp32, tf32, fp16, bf16; or auto: all")
    parser.add_argument(
        "--flow-iterations",
        type=positive,
        metavar="N",
        help="of RAFT, instead of 20: quicker, and other features than the published ones (docs/video.md)",
    )
    add_engine_arguments(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from export.bundle_writer import refuse_foreign
    from export.engines import EngineRequest
    from export.extractors.bundle import Networks, make_extractor
    from export.extractors.weights import load_i3d, load_raft, load_vggish
    from runtime.files import sha256_file
    from runtime.video.extractor import MANIFEST

    request = EngineRequest(
        formats=tuple(arguments.format), precisions=tuple(arguments.precision), engine=engine_options(arguments)
    )
    refuse_foreign(Path(arguments.out), MANIFEST)
    files = {name: getattr(arguments, name) for name in ("i3d_rgb", "i3d_flow", "raft", "vggish")}
    networks = Networks(
        rgb=load_i3d(files["i3d_rgb"], 3),
        flow=load_i3d(files["i3d_flow"], 2),
        raft=load_raft(files["raft"]),
        vggish=load_vggish(files["vggish"]),
    )
    weights = {name: sha256_file(path) for name, path in files.items()}
    sizes = {"iterations": arguments.flow_iterations} if arguments.flow_iterations else {}
    extractor, skipped = make_extractor(networks, networks.spec(**sizes), weights, arguments.out, request)
    engines = {engine.name: engine.status for engine in extractor.manifest.engines}
    for name, reason in skipped.items():
        log.info("  %s: not run here: %s", name, reason.splitlines()[0])
    lines = [arguments.out, *(f"  {name}: {status}" for name, status in engines.items())]
    if any(status == "unverified" and name in skipped for name, status in engines.items()):
        lines.append(f"on the machine that can run the others: ccnet verify {quoted_path(arguments.out)}")
    lines.append(f"next:\n  ccnet extract VIDEO... --extractor {quoted_path(arguments.out)} --out FEATURES")
    print_result(arguments, {"out": arguments.out, "engines": engines, "skipped": skipped}, "\n".join(lines))
    return 0
