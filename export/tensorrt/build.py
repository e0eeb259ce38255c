"""ONNX graph -> TensorRT engine, for full TensorRT (8.6, 10, 11) and TensorRT for RTX.

Full TensorRT builds on, and for, the GPU of this machine. RTX builds ahead of time without any GPU. Needs numpy and
the library, neither torch nor onnx. Read downward: `build_engine`, then its steps in order.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.graph.onnx_file import graph_bytes, read_opset
from export.tensorrt import legacy
from export.tensorrt.configuration import configure, open_timing_cache
from export.tensorrt.options import CURRENT, EngineOptions
from export.tensorrt.precision import (
    check_inspected,
    check_requested,
    check_size,
    inspected_precisions,
    logged_precisions,
    requested_precisions,
)
from runtime.backends.tensorrt import cuda
from runtime.backends.tensorrt.legacy import scratch_bytes
from runtime.backends.tensorrt.library import (
    LibraryLog,
    check_driver,
    library_logger,
    library_version,
    load_library,
    start,
)
from runtime.bundle import ModelFile
from runtime.errors import ExportError, Interrupted
from runtime.files import atomic_file, sha256_file
from runtime.signals import StopRequest


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """A built engine and the facts about it that go into the manifest."""

    path: Path
    options: EngineOptions
    """As asked for, with the compute capability of this GPU in place of `current`."""
    profile: tuple[int, ...]
    """Batch sizes (min, opt, max) that it was built for: other ones than asked for where `build` tells a `fallback`."""
    library: str
    library_version: str
    gpu_name: str | None
    """GPU it was built on; None for RTX."""
    compute_capabilities: tuple[str, ...]
    """What it was built for; empty for an RTX engine that is portable over the GPU families RTX supports."""
    opset: int
    onnx_sha256: str
    build: dict[str, Any]

    def model_file(self, *, name: str) -> ModelFile:
        """Return the manifest entry of this engine."""
        options = self.options
        return ModelFile(
            name=name,
            format=options.format,
            files=(self.path.name,),
            precision=options.precision,
            max_batch=self.profile[2],
            opset=self.opset,
            library=self.library,
            library_version=self.library_version,
            gpu_name=self.gpu_name,
            compute_capabilities=self.compute_capabilities,
            profile=self.profile,
            onnx_sha256=self.onnx_sha256,
            options=options.to_json(),
            build=self.build,
        )


def build_engine(onnx_path: str | Path, out_path: str | Path, options: EngineOptions) -> EngineInfo:
    """Build the engine of an ONNX file and write it to `out_path`, whole or not at all.

    Raises ExportError for options that the graph or the library can't meet, BackendUnavailable when the library or the
    GPU that it needs is missing or CUDA does not start, Interrupted after Ctrl-C or SIGTERM.
    """
    onnx_path, out_path = Path(onnx_path), Path(out_path)
    opset = read_opset(onnx_path)
    trt = load_library(options.format)
    options.check_supported(trt, opset)
    # before anything of TensorRT is made: without a driver some versions end the process
    device = cuda.probe() if options.needs_gpu else None
    if device is not None:
        check_driver(trt, device.driver)
    if options.version_compatible:
        require_lean(trt)
    targets = _targets(options, device)
    if options.precision == "fp8" and device is not None:
        options.check_fp8(trt, (device.compute_capability,))
    begin = time.perf_counter()
    logger, library_log = library_logger(trt)
    with library_log.collect() as messages:
        builder = start(trt, "Builder")
        network = _parse(trt, builder, logger, library_log, onnx_path)
        requested = requested_precisions(network)
        check_requested(requested, options.precision, onnx_path)
        built = _build(trt, builder, network, library_log, options, targets, onnx_path)
    facts = {
        "seconds": round(time.perf_counter() - begin, 2),
        "layers": network.num_layers,
        "engine_bytes": int(built.blob.nbytes),
        "requested_precisions": requested,
        "warnings": messages.of("WARNING")[:50],
        **built.facts,
    }
    with atomic_file(out_path) as stream:
        stream.write(memoryview(built.blob))
    if options.timing_cache is not None:
        with atomic_file(options.timing_cache) as stream:
            stream.write(memoryview(built.config.get_timing_cache().serialize()))
    full = device if options.format == "tensorrt" else None
    return EngineInfo(
        path=out_path,
        options=dataclasses.replace(options, compute_capabilities=targets),
        profile=built.profile,
        library=str(trt.__name__),
        library_version=str(trt.__version__),
        gpu_name=full.name if full else None,
        compute_capabilities=(full.compute_capability,) if full else targets,
        opset=opset,
        onnx_sha256=sha256_file(onnx_path),
        build=facts,
    )


def require_lean(trt: Any) -> None:
    """Load the lean runtime, which a version compatible engine carries.

    The pip package of TensorRT has none, the one of the lean runtime has. Raises ExportError where neither the loader
    nor that package has it.
    """
    name = f"libnvinfer_lean.so.{library_version(trt)[0]}"
    package = importlib.util.find_spec("tensorrt_lean_libs")
    folders = [Path(place) for place in (package.submodule_search_locations or [])] if package else []
    for place in (name, *(str(folder / name) for folder in folders)):
        with contextlib.suppress(OSError):
            ctypes.CDLL(place, mode=ctypes.RTLD_GLOBAL)
            return
    raise ExportError(
        f"version compatibility: {trt.__name__} {trt.__version__} needs {name}, which is not on the loader's path, and "
        f"not in the pip package of TensorRT; pip install 'tensorrt_lean=={trt.__version__}', or build without it"
    )


def _targets(options: EngineOptions, device: cuda.Device | None) -> tuple[str, ...]:
    """Return the compute capabilities, none twice, with that of this GPU in place of `current`."""
    named = (device.compute_capability if c == CURRENT and device else c for c in options.compute_capabilities)
    return tuple(dict.fromkeys(named))


def _parse(trt: Any, builder: Any, logger: Any, log: LibraryLog, onnx_path: Path) -> Any:
    """Return the network of an ONNX file, typed by the file."""
    if legacy.is_legacy(trt):
        flags = legacy.network_flags(trt)
    else:  # by name, where the release has it: the bits mean different things in 10 and 11
        strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        flags = 0 if strongly_typed is None else 1 << int(strongly_typed)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    with log.collect() as messages:
        good = parser.parse_from_file(str(onnx_path))
    if not good:
        describe = legacy.parser_error if legacy.is_legacy(trt) else _parser_error
        errors = [describe(parser.get_error(i)) for i in range(parser.num_errors)]
        listed = "\n".join(f"  {line}" for line in errors) or "  (the parser named no node)"
        raise ExportError(f"{onnx_path}: {trt.__name__} {trt.__version__} can't read this graph:\n{listed}\n"
                          f"the library's log:\n{messages.errors()}")  # fmt: skip
    return network


def _parser_error(error: Any) -> str:
    where = f" ({error.node_operator()} '{error.node_name()}')" if error.node_name() else ""
    return f"node {error.node()}{where}: {error.desc()} [{getattr(error.code(), 'name', error.code())}]"


@dataclass(frozen=True)
class _Built:
    profile: tuple[int, ...]
    blob: Any
    config: Any
    cache: Any
    """Timings, which the configuration refers to and does not keep."""
    facts: dict[str, Any]


def _build(
    trt: Any,
    builder: Any,
    network: Any,
    log: LibraryLog,
    options: EngineOptions,
    targets: tuple[str, ...],
    onnx_path: Path,
) -> _Built:
    """Build the engine.

    Of TensorRT 8.6 there is more than one way; what the others gave is told. Raises ExportError when none gives an
    engine that is what was asked for: such a one is never left behind.
    """
    old = legacy.is_legacy(trt)
    attempts = legacy.attempts(options.precision, options.profile) if old else [legacy.Attempt(options.profile)]
    refused: dict[str, str] = {}
    blob: Any = None
    for attempt in attempts:
        if blob is not None and attempt.bound:
            continue  # it was built, of another precision: for fewer videos it would be of that too
        try:
            config = configure(
                trt, builder, network, log, dataclasses.replace(options, profile=attempt.profile), targets
            )
            if not attempt.bound:
                legacy.prefer_precisions(trt, config)
            cache = open_timing_cache(config, options.timing_cache)
            with log.collect() as messages, _interruptible(trt, config):
                blob = builder.build_serialized_network(network, config)
            if blob is None:
                raise ExportError(f"{trt.__name__} {trt.__version__} built no engine:\n{messages.errors()}")
            found = _checked(trt, log, blob, messages.layers(), options, onnx_path)
        except ExportError as error:
            refused[str(attempt)] = str(error)
            continue
        if refused:
            logging.getLogger(__name__).warning(
                "%s: built %s; it could not be built %s", trt.__name__, attempt, ", or ".join(refused)
            )
            found |= {"fallback": str(attempt), "refused": refused}
        return _Built(attempt.profile, blob, config, cache, found)
    raise ExportError("\n".join(dict.fromkeys(refused.values())))


def _checked(
    trt: Any, log: LibraryLog, blob: Any, listing: str, options: EngineOptions, onnx_path: Path
) -> dict[str, Any]:
    """Return what the library tells of an engine. Raises ExportError for one of another precision than asked for."""
    if options.format == "tensorrt-rtx":
        found: dict[str, Any] = {"delivered_precisions": logged_precisions(listing)}
    else:
        found = _inspect(trt, log, blob, options)
    check_inspected(found["delivered_precisions"], options.precision)
    check_size(int(blob.nbytes), graph_bytes(onnx_path), options.precision)
    return found


@contextlib.contextmanager
def _interruptible(trt: Any, config: Any) -> Iterator[None]:
    """Let Ctrl-C or SIGTERM end the build at its next step; Python alone would handle them when it is done."""
    if legacy.is_legacy(trt):  # it has no progress monitor
        yield
        return
    with StopRequest() as stop:
        config.progress_monitor = _monitor(trt, stop)
        yield
    if stop.requested:
        raise Interrupted("interrupted while the engine was built; it was not written", stop.signal_number)


def _monitor(trt: Any, stop: StopRequest) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Asks at every step whether to stop: an exception must not unwind through the library's own frames."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            pass

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not stop.requested

    return Monitor()


def _inspect(trt: Any, log: LibraryLog, blob: Any, options: EngineOptions) -> dict[str, Any]:
    """Return what the inspector of the library says of the built engine: layers, scratch memory, types."""
    with log.collect() as messages:
        engine_runtime = start(trt, "Runtime")
        if options.version_compatible:
            engine_runtime.engine_host_code_allowed = True
        engine = engine_runtime.deserialize_cuda_engine(blob)
    if engine is None:
        raise ExportError(f"{trt.__name__} {trt.__version__} can't load the engine it built:\n{messages.errors()}")
    inspector = engine.create_engine_inspector()
    delivered = inspected_precisions(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return {"kernels": engine.num_layers, "scratch_bytes": scratch_bytes(engine), "delivered_precisions": delivered}
