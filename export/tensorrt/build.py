"""ONNX graph -> TensorRT engine, for full TensorRT (8.6, 10, 11) and TensorRT for RTX.

Full TensorRT builds on, and for, the GPU of this machine. RTX builds ahead of time without any GPU. Needs numpy and
the library, neither torch nor onnx. Read downward: `build_engine`, then its steps in order.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.graph.onnx_file import read_opset
from export.tensorrt.options import CURRENT, EnginePrecision, EngineRequest
from export.tensorrt.precision import (
    check_inspected,
    check_requested,
    inspected_precisions,
    logged_precisions,
    pin_float_islands,
    requested_precisions,
)
from runtime.backends.tensorrt import cuda
from runtime.backends.tensorrt.library import (
    LibraryLog,
    TensorRTFormat,
    library_logger,
    library_version,
    load_library,
)
from runtime.bundle import ModelFile
from runtime.errors import ExportError
from runtime.files import atomic_file, sha256_file

Progress = Callable[[str, int, int, float], None]
"""Called with the phase's name, steps done, steps in all, and seconds since the build began."""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """A built engine and the facts about it that go into the manifest."""

    path: Path
    format: TensorRTFormat
    precision: EnginePrecision
    library: str
    library_version: str
    gpu_name: str | None
    compute_capabilities: tuple[str, ...]
    """Empty for an RTX engine that is portable over the GPU families RTX supports."""
    profile: tuple[int, int, int]
    opset: int
    onnx_sha256: str
    build: dict[str, Any]

    def model_file(self, *, name: str, length: int) -> ModelFile:
        """The manifest entry of this engine; `length` is T of its graph."""
        return ModelFile(
            name=name,
            format=self.format,
            files=(self.path.name,),
            precision=self.precision,
            length=length,
            max_batch=self.profile[2],
            opset=self.opset,
            library=self.library,
            library_version=self.library_version,
            gpu_name=self.gpu_name,
            compute_capabilities=self.compute_capabilities,
            profile=self.profile,
            onnx_sha256=self.onnx_sha256,
            build=self.build,
        )


def build_engine(
    onnx_path: str | Path,
    out_path: str | Path,
    *,
    format: TensorRTFormat,
    precision: EnginePrecision,
    profile: tuple[int, int, int],
    compute_capabilities: tuple[str, ...] = (),
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
    max_aux_streams: int | None = None,
    timing_cache: str | Path | None = None,
    hardware_compatible: bool = False,
    version_compatible: bool = False,
    progress: Progress | None = None,
) -> EngineInfo:
    """Build the engine of an ONNX file and write it to `out_path`, whole or not at all.

    precision             must be that of the graph's own types; `tf32` is an fp32 graph with TF32 matmuls allowed
    profile               batch sizes (min, opt, max) for the dynamic first axis of the inputs
    compute_capabilities  RTX only: for example ("8.9", "12.0"), or ("current",); () builds a portable engine
    workspace_bytes       limit of scratch memory; None leaves the library's default, the whole device
    optimization_level    full TensorRT only: 0 (quick build) to 5
    max_aux_streams       extra streams an engine may use; 0 saves memory
    timing_cache          full TensorRT only: a file that makes later builds quicker; only ever a hint
    hardware_compatible   full TensorRT only: run on any Ampere or newer GPU, slower
    version_compatible    full TensorRT only: run on newer releases too, with code of the library inside the engine

    Raises ExportError for a request that the graph or the library can't meet, BackendUnavailable when the library or
    the GPU that it needs is missing.
    """
    request = EngineRequest(
        format=format,
        precision=precision,
        profile=profile,
        compute_capabilities=compute_capabilities,
        workspace_bytes=workspace_bytes,
        optimization_level=optimization_level,
        max_aux_streams=max_aux_streams,
        timing_cache=None if timing_cache is None else Path(timing_cache),
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
    )
    onnx_path, out_path = Path(onnx_path), Path(out_path)
    opset = read_opset(onnx_path)
    trt = load_library(format)
    request.check_supported(trt, opset)
    # before anything of TensorRT is made: without a driver some versions end the process
    device = cuda.probe() if request.needs_gpu else None
    if device and CURRENT in compute_capabilities and len(compute_capabilities) > 1:
        # the library takes `current` only alone, and no capability twice
        named = (device.compute_capability if c == CURRENT else c for c in compute_capabilities)
        compute_capabilities = tuple(dict.fromkeys(named))
        request = dataclasses.replace(request, compute_capabilities=compute_capabilities)
    targets = tuple(device.compute_capability if c == CURRENT and device else c for c in compute_capabilities)
    start = time.perf_counter()
    logger, log = library_logger(trt)
    with log.collect() as messages:
        builder = trt.Builder(logger)
        network = _parse(trt, builder, logger, log, onnx_path)
        requested = requested_precisions(network)
        check_requested(requested, precision, onnx_path)
        config = _configure(trt, builder, network, log, request)
        cache = _open_timing_cache(config, request.timing_cache)
        blob = _build(trt, builder, network, config, log, progress, start)
    seconds = time.perf_counter() - start
    facts = {
        "seconds": round(seconds, 2),
        "layers": network.num_layers,
        "engine_bytes": int(blob.nbytes),
        "requested_precisions": requested,
        **{name: value for name, value in dataclasses.asdict(request).items() if name in BUILD_SETTINGS},
        "warnings": messages.of("WARNING")[:50],
    }
    # checked before anything is written: an engine that is not what was asked for is never left behind
    if format == "tensorrt-rtx":
        facts["delivered_precisions"] = logged_precisions(messages.layers())
    else:
        facts |= _inspect(trt, logger, log, blob, request)
    check_inspected(facts["delivered_precisions"], precision)
    with atomic_file(out_path) as stream:
        stream.write(memoryview(blob))
    if cache is not None and request.timing_cache is not None:
        with atomic_file(request.timing_cache) as stream:
            stream.write(memoryview(config.get_timing_cache().serialize()))
    return EngineInfo(
        path=out_path,
        format=format,
        precision=precision,
        library=str(trt.__name__),
        library_version=str(trt.__version__),
        gpu_name=device.name if device and format == "tensorrt" else None,
        compute_capabilities=(device.compute_capability,) if device and format == "tensorrt" else targets,
        profile=profile,
        opset=opset,
        onnx_sha256=sha256_file(onnx_path),
        build=facts,
    )


BUILD_SETTINGS = (
    "workspace_bytes",
    "optimization_level",
    "max_aux_streams",
    "hardware_compatible",
    "version_compatible",
)
"""What of a request `build` of the manifest records, for an engine that is built again."""


def _parse(trt: Any, builder: Any, logger: Any, log: LibraryLog, onnx_path: Path) -> Any:
    """The network of an ONNX file, typed by the file."""
    kinds = trt.NetworkDefinitionCreationFlag
    # names, never numbers: the bits mean different things in 8.6, 10 and 11
    wanted = [getattr(kinds, name) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(kinds, name)]
    network = builder.create_network(sum(1 << int(flag) for flag in wanted))
    parser = trt.OnnxParser(network, logger)
    with log.collect() as messages:
        good = parser.parse_from_file(str(onnx_path))
    if not good:
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        told = "\n".join(f"  {line}" for line in errors) or "  (the parser named no node)"
        raise ExportError(f"{onnx_path}: {trt.__name__} {trt.__version__} can't read this graph:\n{told}\n"
                          f"the library's log:\n{messages.errors()}")  # fmt: skip
    return network


def _parser_error(error: Any) -> str:
    where = ""
    if hasattr(error, "node_name") and error.node_name():  # not in 8.6, whose description names the node's number
        where = f" ({error.node_operator()} '{error.node_name()}')"
    return f"node {error.node()}{where}: {error.desc()} [{getattr(error.code(), 'name', error.code())}]"


def _configure(trt: Any, builder: Any, network: Any, log: LibraryLog, request: EngineRequest) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.precision == "tf32":
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if request.precision == "fp16" and library_version(trt)[0] == 8:
        # types in the graph alone do not bring half kernels there
        config.set_flag(trt.BuilderFlag.FP16)
        pin_float_islands(trt, network, config)
    sources = getattr(trt, "TacticSource", None)
    if hasattr(sources, "CUBLAS"):  # an engine must not need cuBLAS or cuDNN where it runs
        outside = sum(1 << int(getattr(sources, name)) for name in ("CUBLAS", "CUBLAS_LT", "CUDNN"))
        config.set_tactic_sources(config.get_tactic_sources() & ~outside)
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    if request.max_aux_streams is not None:
        config.max_aux_streams = request.max_aux_streams
    if request.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if request.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if request.format == "tensorrt-rtx":
        # no allocation while running: the runtime records the engine in CUDA graphs
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        _set_targets(trt, config, request.compute_capabilities)
    _add_profile(builder, network, config, log, request.profile)
    return config


def _set_targets(trt: Any, config: Any, capabilities: tuple[str, ...]) -> None:
    if not capabilities:
        return
    known = {name: value for name, value in trt.ComputeCapability.__members__.items() if name != "NONE"}
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        name = "CURRENT" if capability == CURRENT else f"SM{capability.replace('.', '')}"
        if name not in known or not config.set_compute_capability(known[name], index):
            have = ", ".join(f"{n[2:-1]}.{n[-1]}" if n.startswith("SM") else CURRENT for n in known)
            raise ExportError(f"{trt.__name__} {trt.__version__} can't build for compute capability "
                              f"{capability}; it can for: {have}")  # fmt: skip


def _add_profile(builder: Any, network: Any, config: Any, log: LibraryLog, batches: tuple[int, int, int]) -> None:
    profile = builder.create_optimization_profile()
    dynamic = 0
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        batch, *rest = tuple(tensor.shape)
        if any(extent < 0 for extent in rest):
            raise ExportError(f"input '{tensor.name}' has shape {(batch, *rest)}; only its first axis may be dynamic")
        if batch >= 0 and batches != (batch, batch, batch):
            raise ExportError(
                f"input '{tensor.name}' has a fixed batch of {batch}, the profile asks for {batches}; export the "
                f"graph with a dynamic batch, or ask for ({batch}, {batch}, {batch})"
            )
        if batch < 0:
            profile.set_shape(tensor.name, *[(size, *rest) for size in batches])
            dynamic += 1
    if dynamic:
        with log.collect() as messages:
            accepted = config.add_optimization_profile(profile)
        if accepted < 0:
            raise ExportError(f"the library refused the profile {batches}:\n{messages.errors()}")


def _open_timing_cache(config: Any, path: Path | None) -> Any:
    """The file's timings, or an empty cache when they are of another GPU or version. Kept alive by the caller."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _build(
    trt: Any, builder: Any, network: Any, config: Any, log: LibraryLog, progress: Progress | None, start: float
) -> Any:
    monitor = None
    if hasattr(trt, "IProgressMonitor"):  # from 10
        monitor = config.progress_monitor = _progress_monitor(trt, progress, start)
    elif progress is not None:
        progress("Building engine", 0, 1, time.perf_counter() - start)
    with log.collect() as messages:
        blob = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.interruption is not None:
        raise monitor.interruption
    if blob is None:
        raise ExportError(f"{trt.__name__} {trt.__version__} built no engine:\n{messages.errors()}")
    if progress is not None and monitor is None:
        progress("Building engine", 1, 1, time.perf_counter() - start)
    return blob


def _progress_monitor(trt: Any, progress: Progress | None, start: float) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes progress on. Ctrl-C, or an error of the callback, ends the build and is raised after it."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interruption: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._steps.get(phase_name, 1))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, min(step + 1, self._steps.get(phase_name, 1)))
            return self.interruption is None

        def _tell(self, phase: str, done: int) -> None:
            try:
                if progress is not None and self.interruption is None:
                    progress(phase, done, self._steps.get(phase, 1), time.perf_counter() - start)
            except BaseException as error:  # noqa: BLE001 - must not unwind through the library's own frames
                self.interruption = error

    return Monitor()


def _inspect(trt: Any, logger: Any, log: LibraryLog, blob: Any, request: EngineRequest) -> dict[str, Any]:
    """Return what the inspector of the library says of the built engine: layers, scratch memory, types."""
    with log.collect() as messages:
        engine_runtime = trt.Runtime(logger)
        if request.version_compatible:
            engine_runtime.engine_host_code_allowed = True
        engine = engine_runtime.deserialize_cuda_engine(blob)
    if engine is None:
        raise ExportError(f"{trt.__name__} {trt.__version__} can't load the engine it built:\n{messages.errors()}")
    inspector = engine.create_engine_inspector()
    delivered = inspected_precisions(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    scratch = engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size
    return {"kernels": engine.num_layers, "scratch_bytes": int(scratch), "delivered_precisions": delivered}
