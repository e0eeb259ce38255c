"""`ccnet export`: checkpoint -> bundle, every way to run it verified against the eager network."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccnet.cli.options import (
    add_json_argument,
    positive,
    print_result,
    quoted_path,
    replaced_folder,
)

if TYPE_CHECKING:
    from export.bundle import ExportResult
    from export.tensorrt.options import EngineOptions

log = logging.getLogger(__name__)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a deployable bundle and verify it against the eager network",
        description="Writes the network as ONNX (and as engines), runs every result against the eager network on "
        "stress inputs and on synthetic or real videos, and leaves a bundle only when all passed (exit status 3 "
        "otherwise).",
    )
    parser.add_argument("checkpoint", help="checkpoint folder")
    parser.add_argument(
        "--out",
        required=True,
        type=replaced_folder,
        metavar="BUNDLE",
        help="bundle folder; an earlier bundle is replaced",
    )
    add_format_arguments(parser, "fp32, tf32, fp16, bf16, int8, fp8; or auto: all but fp8")
    parser.add_argument(
        "--opset", type=int, default=20, metavar="N", help="ONNX opset, 17 to 23, 17 for TensorRT 8.6 (default: 20)"
    )
    parser.add_argument("--max-batch", type=int, default=32, metavar="N", help="largest batch (default: 32)")
    parser.add_argument(
        "--opt-batch", type=int, default=1, metavar="N", help="batch that TensorRT engines are tuned for (default: 1)"
    )
    parser.add_argument(
        "--graph",
        choices=["fused", "reference"],
        help="fused: in few operations made for engines; reference: as trained, fp32 only, for networks that have no "
        "fused one (default: fused where it is possible)",
    )
    add_video_arguments(parser)
    engine = add_engine_arguments(parser)
    engine.add_argument(
        "--copies",
        default="stream",
        choices=["stream", "graph", "steps"],
        help="how batches get to the GPU: whole rows before the CUDA graph, within it, or valid steps alone before it; "
        "'python -m benchmarks.gpu.report' measures which is fastest (default: stream)",
    )
    engine.add_argument(
        "--high-priority", action="store_true", help="run before other engines that share the GPU in one process"
    )
    add_json_argument(parser)


def add_format_arguments(parser: argparse.ArgumentParser, precisions: str) -> None:
    """Declare formats and precisions; shared with `ccnet import-extractor`."""
    parser.add_argument(
        "--format",
        nargs="+",
        default=["onnx"],
        choices=["onnx", "tensorrt", "tensorrt-rtx"],
        help="which engines to build beside the ONNX files, which are always written (default: onnx)",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["fp32"],
        metavar="P",
        help=f"{precisions} that this machine can run, those that pass the parity check are kept (default: fp32)",
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare how TensorRT engines are built; shared with `ccnet import-extractor`. Return the group."""
    engine = parser.add_argument_group("engines")
    engine.add_argument("--compute-capability", nargs="+", default=[], metavar="X.Y", help="RTX: GPUs to build for")
    engine.add_argument("--workspace-mib", type=positive, metavar="N", help="limit of scratch memory while building")
    engine.add_argument("--optimization-level", type=int, metavar="0..5", help="effort of the builder")
    engine.add_argument(
        "--tiling",
        default="none",
        choices=["none", "fast", "moderate", "full"],
        help="kernels that stay in the cache (default: none)",
    )
    engine.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="timings of earlier builds, kept beside the bundle"
    )
    engine.add_argument("--hardware-compatible", action="store_true", help="run on any Ampere or newer GPU")
    engine.add_argument("--version-compatible", action="store_true", help="run on newer TensorRT releases too")
    return engine


def add_video_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the comparison runs on; shared with `ccnet verify` and `ccnet reference`."""
    parser.add_argument("--features", metavar="DIR", help="compare on real videos from here instead of synthetic ones")
    parser.add_argument("--annotations", metavar="F", help="annotation JSON of those videos")
    parser.add_argument("--videos", type=positive, metavar="N", help="how many synthetic or real videos (default: 24)")
    parser.add_argument("--device", metavar="D", help="device of the eager network: cpu (default), cuda or cuda:N")


def eager_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_video_arguments` as arguments of `export.parity.reference.eager_reference`."""
    given = {"count": arguments.videos, "device": arguments.device}
    given |= {"features": arguments.features, "annotations": arguments.annotations}
    return {name: value for name, value in given.items() if value is not None}


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from ccnet.checkpoint import read_checkpoint
    from export.bundle import ExportOptions, make_bundle
    from export.bundle_writer import refuse_foreign
    from export.parity.reference import eager_reference

    options = ExportOptions(
        formats=tuple(arguments.format),
        precisions=tuple(arguments.precision),
        opset=arguments.opset,
        max_batch=arguments.max_batch,
        opt_batch=arguments.opt_batch,
        graph=arguments.graph,
        engine=engine_options(arguments, copies=arguments.copies, high_priority=arguments.high_priority),
    )
    checkpoint = read_checkpoint(arguments.checkpoint)
    refuse_foreign(Path(arguments.out))
    model = checkpoint.load_model()
    log.info("running the eager network")
    reference = eager_reference(checkpoint, model, **eager_arguments(arguments))
    result = make_bundle(checkpoint, model, reference, arguments.out, options)
    print_result(arguments, _record(arguments.out, result), _text(arguments.out, result))
    return 0


def engine_options(arguments: argparse.Namespace, **more: Any) -> EngineOptions:
    """Return the options of `add_engine_arguments`, and further ones."""
    from export.tensorrt.options import EngineOptions

    mib = arguments.workspace_mib
    return EngineOptions(
        compute_capabilities=tuple(arguments.compute_capability),
        workspace_bytes=None if mib is None else mib << 20,
        optimization_level=arguments.optimization_level,
        tiling=arguments.tiling,
        hardware_compatible=arguments.hardware_compatible,
        version_compatible=arguments.version_compatible,
        timing_cache=arguments.timing_cache,
        **more,
    )


def _record(out: str, result: ExportResult) -> dict[str, Any]:
    engines = [
        {
            "name": engine.name,
            "status": engine.status,
            "speed": engine.speed,
            "failing": _failing(result, engine.name),
        }
        for engine in result.engines
    ]
    return {"out": out, "engines": engines, "skipped": result.skipped}


def _text(out: str, result: ExportResult) -> str:
    lines = ["", out]
    for engine in result.engines:
        speed = f", {engine.speed['ms_per_video']:.1f} ms per video" if engine.speed else ""
        failing = _failing(result, engine.name)
        lines.append(f"  {engine.name}: {engine.status}{speed}{': ' if failing else ''}{', '.join(failing)}")
    lines += [f"  {name}: not run here: {reason.splitlines()[0]}" for name, reason in result.skipped.items()]
    out = quoted_path(out)
    lines += ["next:", f"  ccnet inspect {out}", f"  ccnet predict {out} --features DIR --out events.jsonl"]
    lines += [f"  ccnet evaluate {out} --annotations F --features DIR --subset test", f"  ccnet bench {out}"]
    if any(engine.name in result.skipped and engine.status == "unverified" for engine in result.engines):
        lines.append(
            f"  ccnet reference CHECKPOINT --out ref.npz, then on the GPU: ccnet verify {out} --reference ref.npz"
        )
    return "\n".join(lines)


def _failing(result: ExportResult, engine: str) -> list[str]:
    """Return the checks of the parity check that an engine did not pass."""
    report = result.reports.get(engine)
    return [check.name for check in report.checks if not check.passed] if report is not None else []
