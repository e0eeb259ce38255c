"""The TensorRT side of `benchmarks.gpu.report`: one stage per process, without torch.

`python -m benchmarks.gpu.stages STAGE SETTINGS.json RESULT.json` runs one stage, so that a crash inside a library ends
that stage alone. Needs numpy and the library of the stage; Python 3.10 and newer.

Shapes:  B batch   T steps   P points of all levels   C classes
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.running import contexts, copies
from benchmarks.gpu.settings import (
    Absent,
    Settings,
    batches_of,
    bench_plan,
    engine_of,
    engine_path,
    graph_of,
    keep,
)
from export.parity.compare import compare
from export.parity.reference import load_reference
from export.tensorrt.build import EngineInfo, build_engine
from export.tensorrt.options import CURRENT, EngineOptions
from runtime.backends.base import Backend
from runtime.backends.tensorrt import cuda
from runtime.backends.tensorrt.backend import TensorRTBackend
from runtime.backends.tensorrt.context import RunOptions
from runtime.backends.tensorrt.legacy import is_legacy
from runtime.backends.tensorrt.library import load_library
from runtime.bundle import ModelFile
from runtime.errors import BackendUnavailable, CCNetError, EngineError, EngineMismatch, ExportError, MissingDependency
from runtime.files import write_json
from runtime.machine import machine_facts
from runtime.profiling.bench import Candidate, bench
from runtime.profiling.timing import Rules, Timing, measure
from runtime.spec import ModelSpec


@runtime_checkable
class OnDevice(Protocol):
    """A backend that can time what the device does alone."""

    def engine_milliseconds(
        self, batch: int, repeats: int = ..., *, warmup_seconds: float = ...
    ) -> npt.NDArray[np.float64]:
        """Return [repeats] times of the engine, its inputs and outputs on the device."""
        ...


COPY_BYTES = 1 << 30
SLOWEST = 10
TUNED_BATCH, SMALL_BATCH = 32, 8
MOST_REPEATS, FEWEST_REPEATS = 1000, 20
"""Of a time on the device: 99 of 100 can be told from a thousand, if they fit into the seconds of a measurement."""


def machine(settings: Settings) -> dict[str, Any]:
    """Return the facts of the machine: processor, libraries, GPU and its processes."""
    facts = machine_facts()
    if settings["device"] == "cuda":
        facts["cuda"] = dataclasses.asdict(cuda.probe())
        facts["gpu_memory"] = dict(zip(("free", "total"), cuda.memory_info(), strict=True))
    for format in ("tensorrt", "tensorrt-rtx"):
        try:
            facts["libraries"][format] = str(load_library(format).__version__)  # type: ignore[arg-type]
        except BackendUnavailable as error:  # noqa: PERF203 - two libraries
            facts.setdefault("absent", {})[format] = str(error)
    return facts


def copy(settings: Settings) -> dict[str, Any]:
    """Measure bytes per second of a large copy, read and write counted: the roof for reading weights."""
    if settings["device"] == "cpu":
        source = np.ones(COPY_BYTES >> 4, np.uint8)
        target = np.empty_like(source)
        timing = measure(lambda: np.copyto(target, source), Rules(seconds=0.2, calls=5))
        return {"bytes": source.nbytes, "bytes_per_second": 2 * source.nbytes / timing.median}
    cuda.call("cudaSetDevice", 0)
    kind = cuda.bindings().cudaMemcpyKind.cudaMemcpyDeviceToDevice
    with contextlib.ExitStack() as stack:
        stream = cuda.Stream()
        stack.callback(stream.close)
        first, second = cuda.DeviceBuffer(COPY_BYTES), cuda.DeviceBuffer(COPY_BYTES)
        stack.callback(first.close)
        stack.callback(second.close)

        def work() -> None:
            cuda.call("cudaMemcpyAsync", second.pointer, first.pointer, COPY_BYTES, kind, stream.handle)

        milliseconds = stream.milliseconds(work, 23)[3:]
    timing = Timing(milliseconds / 1e3)
    return {"bytes": COPY_BYTES, "bytes_per_second": 2 * COPY_BYTES / timing.median}


def build(settings: Settings) -> dict[str, Any]:
    """Build one engine for this GPU (RTX without one: portable) from the bundle's graph of that precision.

    Of kind `latency`: for batch 1 alone, with all the time that the builder wants; `throughput`: tuned for batch 32.
    TensorRT 8.6 may take minutes too long for that: it builds one for small batches first, which stays if so.
    """
    bundle, graph = graph_of(settings)
    format, precision = settings["format"], settings["precision"]
    largest = max(settings["batches"])
    path = engine_path(settings)
    full, latency = format == "tensorrt", settings["kind"] == "latency"
    options = EngineOptions(
        format=format,
        precision=precision,
        profile=(1, min(TUNED_BATCH, largest), largest),
        optimization_level=settings["optimization_level"] if full and latency else None,
        tiling="moderate" if full and latency and _has_tiling() else "none",
        timing_cache=path.parent / "timings.cache" if full else None,
    )
    first_profiles = [(1, SMALL_BATCH, SMALL_BATCH)] if full and largest > SMALL_BATCH and _builds_slowly() else []
    found: dict[str, Any] = {}
    for profile in (*first_profiles, options.profile):
        wanted = dataclasses.replace(options, profile=profile)
        try:
            info = build_here(bundle.path(graph), path, wanted, gpu=settings["device"] == "cuda")
        except ExportError as error:
            if not found:
                raise
            return found | {"not_built": str(error)}
        write_json(path.with_suffix(".json"), dataclasses.asdict(info.model_file(name=f"{format}-{precision}")))
        found = {"engine": info.build, "profile": info.profile, "opset": info.opset, "onnx_sha256": info.onnx_sha256}
        keep(settings, found)
    return found


def _builds_slowly() -> bool:
    return is_legacy(load_library("tensorrt"))


def _has_tiling() -> bool:
    return hasattr(load_library("tensorrt"), "TilingOptimizationLevel")


def build_here(graph: Path, out: Path, options: EngineOptions, *, gpu: bool = True) -> EngineInfo:
    """Build for this GPU. RTX names no target for some GPUs: there, and without a GPU, a portable engine is built.

    Whether a portable engine runs on a GPU is found out by running it.
    """
    if options.format == "tensorrt-rtx" and gpu:
        with contextlib.suppress(ExportError):
            return build_engine(graph, out, dataclasses.replace(options, compute_capabilities=(CURRENT,)))
    return build_engine(graph, out, options)


def status(settings: Settings) -> dict[str, Any]:
    """Compare a built engine with the recorded outputs of the eager network."""
    path, model_file, spec = engine_of(settings)
    batches = batches_of(settings, model_file.max_batch)
    return check_engine_file(path, model_file, spec, Path(settings["reference"]), batches)


def check_engine_file(
    path: Path, model_file: ModelFile, spec: ModelSpec, reference: Path, batches: Sequence[int] | None = None
) -> dict[str, Any]:
    """Compare an engine with a file of `ccnet reference`. Returns `passed` and the differences."""
    with TensorRTBackend.open(path, model_file, spec) as backend:
        return check_backend(backend, reference, batches)


def check_backend(backend: Backend, reference: Path, batches: Sequence[int] | None = None) -> dict[str, Any]:
    """Compare any backend with a file of `ccnet reference`, in these batch sizes. Returns `passed` and the differences.

    Every batch size that is timed has to be among them: another size may run other kernels.
    """
    recorded = load_reference(reference)
    return compare(backend, recorded.outputs, recorded.videos, batches=batches).to_json()


def speed(settings: Settings) -> dict[str, Any]:
    """Time a built engine at every batch size, on the device alone both with CUDA graphs and without."""
    path, model_file, spec = engine_of(settings)
    begin = time.perf_counter()
    with TensorRTBackend.open(path, model_file, spec) as backend:
        found = {"load_seconds": time.perf_counter() - begin, **time_backend(backend, settings, verified=True)}
    with TensorRTBackend.open(path, model_file, spec, running=RunOptions(cuda_graph=False)) as backend:
        for row in found["rows"]:
            row["device_ms_without_graph"] = _device_time(backend, row["batch"], settings["seconds"])
            keep(settings, found)
    return found


def layers(settings: Settings) -> dict[str, Any]:
    """Profile a built engine: its slowest layers at batch 1 and at the largest batch."""
    path, model_file, spec = engine_of(settings)
    found: dict[str, Any] = {}
    with TensorRTBackend.open(path, model_file, spec) as backend:
        batches = batches_of(settings, model_file.max_batch)
        for batch in sorted({min(batches), max(batches)}):
            times = backend.layer_milliseconds(batch)
            slowest = list(itertools.islice(times.items(), SLOWEST))
            total = sum(times.values())
            found[str(batch)] = {"total_ms": total, "layers": len(times), "slowest": slowest}
            keep(settings, found)
    return found


def onnxruntime(settings: Settings) -> dict[str, Any]:
    """Verify and time ONNX Runtime on the same graph: its CUDA provider, or the CPU where the stages run on one."""
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    bundle, graph = graph_of(settings)
    begin = time.perf_counter()
    with OnnxRuntimeBackend.open(
        bundle.path(graph),
        bundle.spec,
        device=settings["device"],
        precision=settings["precision"],
        max_batch=max(settings["batches"]),
        cuda_graph=settings["device"] == "cuda" and settings["cuda_graph"],
    ) as backend:
        return {"load_seconds": time.perf_counter() - begin, **check_and_time(backend, settings)}


def check_and_time(backend: Backend, settings: Settings) -> dict[str, Any]:
    """Run the parity check on a backend, where there is a reference, and time it unless it fails; close it."""
    if not settings.get("reference"):
        return time_backend(backend, settings, verified=True)
    status = check_backend(backend, Path(settings["reference"]), settings["batches"])
    return time_backend(backend, settings, verified=status["passed"], facts={"status": status})


def time_backend(
    backend: Backend, settings: Settings, *, verified: bool, facts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Time a backend as `ccnet bench` does, on the device alone too where it can tell, and close it.

    What was measured is written to the file `partial` of the settings after every batch size, with `facts`. Raises
    EngineError when a verified backend can't be measured.
    """
    plan = bench_plan(settings, backend.max_batch)
    device: dict[int, dict[str, float | int]] = {}
    if verified and isinstance(backend, OnDevice):
        device = {batch: _device_time(backend, batch, settings["seconds"]) for batch in plan.batches}

    def found(report: dict[str, Any]) -> dict[str, Any]:
        engine = report["candidates"][0]["engine"]
        graphs = (engine or {}).get("cuda_graphs", {})
        rows = [
            row | ({"device_ms": device[row["batch"]], "graph": graphs.get(row["batch"])} if device else {})
            for row in report["rows"]
        ]
        return (facts or {}) | {"describe": engine, "rows": rows}

    candidate = Candidate(name=backend.name, open=lambda: backend, status="verified" if verified else "failed")
    report = bench(backend.spec, [candidate], plan, after_batch=lambda report: keep(settings, found(report)))
    reason = report["candidates"][0]["not_measured"]
    if verified and reason:
        raise EngineError(f"{backend.name}: not measured: {reason}")
    return found(report)


def _device_time(backend: OnDevice, batch: int, seconds: float) -> dict[str, float | int]:
    warmup = min(0.3, seconds)
    once = float(backend.engine_milliseconds(batch, FEWEST_REPEATS, warmup_seconds=warmup).mean()) / 1e3
    repeats = int(np.clip(seconds / max(once, 1e-6), FEWEST_REPEATS, MOST_REPEATS))
    return Timing(backend.engine_milliseconds(batch, repeats, warmup_seconds=0) / 1e3).summary()


STAGES: dict[str, Callable[[Settings], dict[str, Any]]] = {
    stage.__name__: stage for stage in (machine, copy, build, status, speed, copies, contexts, layers, onnxruntime)
}


def main(argv: list[str], stages: dict[str, Callable[[Settings], dict[str, Any]]] | None = None) -> int:
    """Run one stage and write what it returns, or its error, as JSON."""
    name, settings_path, result_path = argv
    settings = json.loads(Path(settings_path).read_text(encoding="utf-8"))
    try:
        result = {"status": "done", "result": (stages or STAGES)[name](settings)}
    except CCNetError as error:
        # a library that is not installed, or that has no such precision, is a fact about it, not a failure
        # so is a GPU that RTX does not know: the engine was built here
        absent = isinstance(error, MissingDependency | Absent | EngineMismatch) or "does not support" in str(error)
        result = {"status": "absent" if absent else "failed", "error": f"{type(error).__name__}: {error}"}
    except ImportError as error:
        result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    write_json(result_path, result)
    return 0 if result["status"] == "done" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
