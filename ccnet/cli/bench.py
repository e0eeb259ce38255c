"""`ccnet bench`: the speed of every verified engine of a bundle on this machine, with its accuracy."""

from __future__ import annotations

import argparse
import logging
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccnet.cli.options import add_json_output, output_file, positive, print_or_write, seconds
from runtime.backends.registry import BACKENDS
from runtime.bundle import read_bundle
from runtime.errors import BackendUnavailable, CheckpointError, ConfigError
from runtime.machine import cpu_flags
from runtime.profiling.bench import Candidate, Plan, bench, engine_candidates
from runtime.profiling.report import bench_text
from runtime.profiling.timing import Rules

if TYPE_CHECKING:
    from ccnet.checkpoint import Checkpoint
    from ccnet.torch_backend import TorchPrecision
    from export.parity.inputs import ParityVideo
    from export.parity.reference import Outputs
    from runtime.backends.base import Backend, BaseBackend

log = logging.getLogger(__name__)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure latency, throughput, cold start and memory of a bundle's engines on this machine",
        description="Measure every engine of a bundle that runs here, by turns, at several batch sizes: latency, "
        "throughput, cold start and memory, and what reading and post-processing cost.",
    )
    parser.add_argument("bundle", help="bundle folder")
    parser.add_argument("--backend", nargs="+", default=[], choices=BACKENDS, help="only these (default: all)")
    parser.add_argument(
        "--batches",
        nargs="+",
        type=positive,
        default=[1, 2, 4, 8],
        metavar="N",
        help="batch sizes (default: 1 2 4 8)",
    )
    parser.add_argument(
        "--checkpoint", metavar="C", help="also measure eager PyTorch and torch.compile, from this checkpoint"
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=2.0,
        metavar="S",
        help="measured time per candidate and batch size, at least (default: 2)",
    )
    parser.add_argument(
        "--calls",
        type=positive,
        default=10,
        metavar="N",
        help="measured videos per candidate and batch size, at least (default: 10)",
    )
    parser.add_argument("--no-compile", action="store_true", help="with --checkpoint: leave torch.compile out")
    add_json_output(parser)
    parser.add_argument(
        "--plot", type=output_file, metavar="OUT.png", help="draw latency and throughput against batch size"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.no_compile and not arguments.checkpoint:
        raise ConfigError("--no-compile: torch.compile takes part only with --checkpoint")
    bundle = read_bundle(arguments.bundle)
    candidates = engine_candidates(bundle, arguments.backend)
    if not candidates:
        known = ", ".join(sorted({engine.backend for engine in bundle.manifest.engines})) or "none"
        raise BackendUnavailable(
            f"{bundle.folder}: no engine for {', '.join(arguments.backend) or 'any'}; it has: {known}"
        )
    if arguments.checkpoint:
        peers = _torch_candidates(arguments.checkpoint, bundle.manifest.checkpoint_sha256, not arguments.no_compile)
        candidates = [*peers, *candidates]
    rules = Rules(warmup_seconds=min(0.5, arguments.seconds), seconds=arguments.seconds, calls=arguments.calls)
    plan = Plan(rules=rules, batches=tuple(sorted(set(arguments.batches))))
    report = bench(bundle.spec, candidates, plan)
    report["bundle"] = {
        "checkpoint_sha256": bundle.manifest.checkpoint_sha256,
        "created": bundle.manifest.created,
        "versions": bundle.manifest.versions,
    }
    print_or_write(arguments, report, bench_text(report))
    if arguments.plot:
        from ccnet.plots import plot_bench

        plot_bench(report, arguments.plot)
        log.info("plot: %s", arguments.plot)
    return 0


def _torch_candidates(folder: str, expected_sha256: str, compiled: bool) -> list[Candidate]:
    """Return eager PyTorch in fp32, which everything is compared with, its other precisions, and compiled."""
    import torch

    from ccnet.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(folder)
    if checkpoint.weights_sha256 != expected_sha256:
        raise CheckpointError(
            f"{folder}: its weights are {checkpoint.weights_sha256[:16]}..., the bundle was exported from "
            f"{expected_sha256[:16]}...; give the checkpoint of this bundle"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precisions: list[TorchPrecision] = ["fp32"]
    if device == "cuda":
        precisions += ["tf32", "fp16", "bf16"]
    elif {"avx512_bf16", "amx_bf16"} & set(cpu_flags() or ()):
        precisions.append("bf16")
    candidates = [_torch_candidate(checkpoint, device, precision) for precision in precisions]
    if compiled:
        fastest: TorchPrecision = "tf32" if device == "cuda" else "fp32"
        candidates.append(_torch_candidate(checkpoint, device, fastest, compiled=True))
    return candidates


def _torch_candidate(
    checkpoint: Checkpoint, device: str, precision: TorchPrecision, *, compiled: bool = False
) -> Candidate:
    """Describe eager or compiled PyTorch; all but eager fp32, the reference, must pass the parity check here."""
    name = f"{'torch.compile' if compiled else 'eager'}-{precision}"
    reference = precision == "fp32" and not compiled
    return Candidate(
        name=name,
        open=partial(_open_torch, checkpoint, device, precision, compiled),
        status="reference" if reference else "unverified",
        verify=None if reference else partial(_verify_torch, checkpoint, device),
        files={"model.safetensors": checkpoint.weights_sha256},
        weight_bytes=checkpoint.weights_size,
    )


def _open_torch(checkpoint: Checkpoint, device: str, precision: TorchPrecision, compiled: bool) -> BaseBackend:
    import torch

    from ccnet.torch_backend import TorchBackend

    model: Any = checkpoint.load_model(device)
    if compiled:
        model = torch.compile(model, dynamic=False)
    return TorchBackend(model, checkpoint.spec, device=device, precision=precision)


def _verify_torch(checkpoint: Checkpoint, device: str, backend: Backend) -> tuple[str, dict[str, Any]]:
    """Run the export's parity check on a way to run PyTorch. Returns status and accuracy."""
    from export.parity.compare import compare

    videos, expected = _expected(checkpoint.folder, device)
    report = compare(backend, expected, videos)
    return ("verified" if report.passed else "failed"), report.summary()


@lru_cache(maxsize=1)
def _expected(folder: Path, device: str) -> tuple[list[ParityVideo], Outputs]:
    """Return a part of the export's inputs, enough to tell a wrong result, and what eager fp32 makes of them."""
    from ccnet.checkpoint import read_checkpoint
    from export.parity.inputs import stress_inputs, synthetic_inputs
    from export.parity.reference import record

    checkpoint = read_checkpoint(folder)
    videos = stress_inputs(checkpoint.spec)[::4] + synthetic_inputs(checkpoint.spec, count=8)
    with _open_torch(checkpoint, device, "fp32", compiled=False) as reference:
        return videos, record(reference, videos)
