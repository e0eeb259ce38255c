"""`ccnet triton`: a model repository for NVIDIA Triton from a bundle, and a look at one before Triton loads it.

Exit status: 0 done, 1 the check found something, 2 it could not be done.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from ccnet.cli.options import add_json_argument, options_given, positive, print_result, quoted_path
from runtime.bundle import read_bundle
from runtime.errors import ConfigError
from runtime.folders import check_output_folder
from runtime.triton.check import BACKENDS, Container, check_repository, parse_version
from runtime.triton.repository import RepositoryOptions, find_engine, write_repository

log = logging.getLogger(__name__)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "triton",
        help="write a model repository for NVIDIA Triton, and check one",
        description="Write a Triton model repository: the network with dynamic batching, post-processing as a model of "
        "the Python backend, and an ensemble over both. --check finds what Triton would only say when it loads it; "
        "without BUNDLE, in a repository that is there.",
    )
    parser.add_argument("bundle", nargs="?", help="bundle folder; without it, --check looks at --out")
    parser.add_argument("--out", required=True, metavar="REPOSITORY", help="folder of the repository")
    _add_writing_arguments(parser)
    parser.add_argument("--check", action="store_true", help="check the repository")
    parser.add_argument("--onnxruntime", metavar="V", help="ONNX Runtime of the container, for the check")
    parser.add_argument("--tensorrt", metavar="V", help="TensorRT of the container, for the check, such as 10.9.0")
    parser.add_argument(
        "--backends", nargs="+", metavar="B", help=f"of the container, for the check (default: {' '.join(BACKENDS)})"
    )
    add_json_argument(parser)


def _add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("onnx", "tensorrt"), default="onnx", help="of the network (default: onnx)")
    parser.add_argument("--precision", default="fp32", metavar="P", help="of the network's file (default: fp32)")
    parser.add_argument(
        "--name", default="ccnet", help="of the ensemble, and the beginning of the others (default: ccnet)"
    )
    parser.add_argument("--device", choices=("gpu", "cpu"), help="of the network (default: a GPU where there is one)")
    parser.add_argument("--instances", type=positive, default=1, metavar="N", help="of each model (default: 1)")
    parser.add_argument(
        "--queue-delay", type=int, default=2000, metavar="US", help="longest wait for a batch, in us (default: 2000)"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.bundle is None and not arguments.check:
        raise ConfigError("BUNDLE is missing: give one to write, or --check to look at the repository --out")
    writing = options_given(arguments, _add_writing_arguments)
    if arguments.bundle is None and writing:
        raise ConfigError(f"{' '.join(writing)}: only where a repository is written; BUNDLE is missing")
    stated = [f"--{name}" for name in ("onnxruntime", "tensorrt", "backends") if getattr(arguments, name) is not None]
    if stated and not arguments.check:
        raise ConfigError(f"{', '.join(stated)}: said of the container, for --check")
    container = Container(
        onnxruntime=parse_version(arguments.onnxruntime) if arguments.onnxruntime else None,
        tensorrt=parse_version(arguments.tensorrt) if arguments.tensorrt else None,
        backends=tuple(arguments.backends or BACKENDS),
    )
    record: dict[str, Any] = {"repository": str(arguments.out)}
    lines: list[str] = []
    if arguments.bundle is not None:
        lines += _write(arguments, record)
    problems = check_repository(arguments.out, container) if arguments.check else []
    if arguments.check:
        record["problems"] = problems
        lines += [f"PROBLEM: {problem}" for problem in problems] or [
            f"{arguments.out}: nothing found that Triton refuses"
        ]
    print_result(arguments, record, "\n".join(lines))
    return 1 if problems else 0


def _write(arguments: argparse.Namespace, record: dict[str, Any]) -> list[str]:
    check_output_folder(arguments.out)
    bundle = read_bundle(arguments.bundle)
    kinds: dict[str | None, Any] = {"gpu": "KIND_GPU", "cpu": "KIND_CPU", None: None}
    options = RepositoryOptions(
        name=arguments.name,
        format=arguments.format,
        precision=arguments.precision,
        kind=kinds[arguments.device],
        instances=arguments.instances,
        queue_delay_us=arguments.queue_delay,
    )
    engine = find_engine(bundle, options)
    if engine.status != "verified":
        log.warning("%s was never verified against the eager network; 'ccnet verify' does it", engine.name)
    models = write_repository(bundle, Path(arguments.out), options)
    record |= {"models": [model.name for model in models], "file": engine.model_file, "status": engine.status}
    return [
        f"{arguments.out}: {', '.join(model.name for model in models)}, from {engine.model_file} ({engine.status})",
        f"next: ccnet triton --out {quoted_path(arguments.out)} --check --onnxruntime V --tensorrt V, "
        "with the container's versions",
    ]
