"""The torch side of `benchmarks.gpu.report`: one stage per process, run by the interpreter that has torch.

`python -m benchmarks.gpu.torch_stages STAGE SETTINGS.json RESULT.json`, like `benchmarks.gpu.stages`.

Shapes:  B batch   T steps (see `runtime.spec.ModelSpec`)
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.settings import Settings
from benchmarks.gpu.stages import check_and_time, main
from runtime.bundle import ModelFile
from runtime.errors import ExportError
from runtime.machine import library_versions
from runtime.profiling.timing import Rules, measure

MATRIX = 8192
CPU_MATRIX = 512
REPEATS = 10
OPSETS = {"bf16": 22, "fp8": 20}
"""The first in which every operator of the network may be bfloat16, and the first for fp8."""


def matmuls(settings: Settings) -> dict[str, Any]:
    """Measure operations per second of a large square matmul in each precision: the arithmetic roof."""
    import torch

    cpu = settings["device"] == "cpu"
    side = CPU_MATRIX if cpu else MATRIX
    found: dict[str, float] = {}
    rules = Rules(warmup_seconds=0, warmup_calls=1, seconds=0, calls=5)
    for name, dtype in (
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("tf32", torch.float32),
        ("fp32", torch.float32),
    ):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        a, b = (torch.randn(side, side, device=settings["device"]).to(dtype) for _ in range(2))
        found[name] = REPEATS * 2 * side**3 / measure(partial(_multiply, a, b), rules).median
    return {"side": side, "operations_per_second": found, "device": _device_name(settings["device"])}


def _multiply(a: Any, b: Any) -> None:
    """Run several matmuls, so that waiting for the GPU weighs nothing."""
    for _ in range(REPEATS):
        a @ b
    if a.is_cuda:
        import torch

        torch.cuda.synchronize()


def export(settings: Settings) -> dict[str, Any]:
    """Export a checkpoint as a bundle with a typed graph per precision, and record the eager outputs.

    The graphs are not verified here, on whatever CPU the GPU machine has; every engine is, against these outputs.
    """
    from ccnet.checkpoint import read_checkpoint
    from export.bundle import calibration_feeds
    from export.bundle_writer import new_bundle
    from export.fused.network import fused_network
    from export.graph.fp8 import quantize_fp8
    from export.graph.to_onnx import export_onnx
    from export.parity.reference import load_reference
    from export.parity.tolerances import torch_dtype

    checkpoint = read_checkpoint(settings["checkpoint"])
    model, spec, largest = checkpoint.load_model(), checkpoint.spec, max(settings["batches"])
    seconds: dict[str, float] = {}
    absent: dict[str, str] = {}
    _ccnet(["reference", settings["checkpoint"], "--out", settings["reference"], "--device", settings["device"]])
    feeds = calibration_feeds(load_reference(Path(settings["reference"])))
    with new_bundle(
        settings["bundle"],
        spec=spec,
        model=dataclasses.asdict(checkpoint.config.model),
        checkpoint_sha256=checkpoint.weights_sha256,
        versions=library_versions(),
    ) as draft:
        for precision in dict.fromkeys("fp32" if p == "tf32" else p for p in settings["precisions"]):
            opset = max(OPSETS.get(precision, 0), settings["opset"])
            network, path = fused_network(model, dtype=torch_dtype(precision)), draft.folder / f"{precision}.onnx"
            source = path.with_name("fp8-source.onnx") if precision == "fp8" else path
            info: Any = export_onnx(network, spec, source, opset=opset, max_batch=largest)
            seconds[precision] = info.seconds
            if precision == "fp8":
                try:
                    info = quantize_fp8(source, path, feeds)
                except ExportError as error:  # the network may be too small for it
                    absent[precision] = str(error)
                    continue
                finally:
                    for file in source.parent.glob(f"{source.name}*"):
                        file.unlink()
            graph = ModelFile(name=f"onnx-{precision}", format="onnx", files=info.files, precision=precision,
                             max_batch=largest, opset=opset)  # fmt: skip
            draft.add_model_file(graph)
        draft.bundle()
    return {"seconds": seconds, "absent": absent}


def _ccnet(arguments: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "ccnet", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(
            f"ccnet {' '.join(arguments)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}"
        )


def peer(settings: Settings) -> dict[str, Any]:
    """Verify and time PyTorch as `eager`, `compiled` or `fused` network, in one precision."""
    import torch

    from benchmarks.gpu.torch_peers import FusedBackend, TimedBackend
    from ccnet.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(settings["checkpoint"])
    model: Any = checkpoint.load_model()
    opened = TimedBackend
    if settings["form"] == "fused":
        from export.fused.network import fused_network

        model, opened = fused_network(model), FusedBackend
    elif settings["form"] == "compiled":
        model = torch.compile(model, mode="max-autotune" if settings["device"] == "cuda" else "default")
    with opened(
        model,
        checkpoint.spec,
        device=settings["device"],
        precision=settings["precision"],
        max_batch=max(settings["batches"]),
    ) as backend:
        return check_and_time(backend, settings)


def _device_name(device: str) -> str:
    import torch

    return str(torch.cuda.get_device_name()) if device == "cuda" else "cpu"


STAGES: dict[str, Callable[[Settings], dict[str, Any]]] = {s.__name__: s for s in (matmuls, export, peer)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], STAGES))
