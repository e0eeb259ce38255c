"""What the builder of a TensorRT library is told: flags, targets, the profile of batch sizes, timings of kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.tensorrt import legacy
from export.tensorrt.options import CURRENT, EngineOptions
from runtime.backends.tensorrt.library import LibraryLog
from runtime.errors import ExportError

MOST_EFFORT, MOST_TIMINGS = 5, 8
"""At the highest builder level each kernel is timed so often: it is to be the fastest of some nearly equal ones."""


def configure(
    trt: Any, builder: Any, network: Any, log: LibraryLog, options: EngineOptions, targets: tuple[str, ...]
) -> Any:
    """Return the configuration of a build. Raises ExportError for what the graph or the library can't meet."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # also for the fp32 layers of a half graph: TF32 has the 10 bits of fp16 with the range of fp32
    if options.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    else:
        config.set_flag(trt.BuilderFlag.TF32)
    if legacy.is_legacy(trt):
        legacy.configure(trt, network, config, options.precision)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
        if options.optimization_level == MOST_EFFORT:
            config.avg_timing_iterations = MOST_TIMINGS
    if options.tiling != "none":
        config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, options.tiling.upper())
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.format == "tensorrt-rtx":
        # no allocation while running: the runtime captures the engine in CUDA graphs
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        # the library takes `current` only alone
        _set_targets(trt, config, (CURRENT,) if options.compute_capabilities == (CURRENT,) else targets)
    _add_profile(builder, network, config, log, options)
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


def _add_profile(builder: Any, network: Any, config: Any, log: LibraryLog, options: EngineOptions) -> None:
    profile, batches = builder.create_optimization_profile(), options.profile
    dynamic = 0
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        batch, *rest = tuple(tensor.shape)
        if batch >= 0 and batches != (batch, batch, batch):
            raise ExportError(
                f"input '{tensor.name}' has a fixed batch of {batch}, the profile asks for {batches}; export the "
                f"graph with a dynamic batch, or ask for ({batch}, {batch}, {batch})"
            )
        extents = [_extent(tensor, axis, size, options.extents) for axis, size in enumerate(rest, 1)]
        if any(extent < 0 for extent in (batch, *rest)):
            sizes = batches if batch < 0 else (batch,) * 3
            profile.set_shape(tensor.name, *[(size, *[e[i] for e in extents]) for i, size in enumerate(sizes)])
            dynamic += 1
    if dynamic:
        with log.collect() as messages:
            accepted = config.add_optimization_profile(profile)
        if accepted < 0:
            raise ExportError(
                f"the library refused the profile {batches} {options.extents or ''}:\n{messages.errors()}"
            )


def _extent(tensor: Any, axis: int, size: int, extents: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return (min, opt, max) of one extent of an input. Raises ExportError for a dynamic one that has no range."""
    if size >= 0:
        return (size,) * 3
    named = str(tensor.get_dimension_name(axis))
    factor, _, name = named.rpartition("*")
    if name not in extents:
        raise ExportError(
            f"input '{tensor.name}' has the shape {tuple(tensor.shape)}; of its axes only the first and those named "
            f"{', '.join(extents) or '(none)'} may be dynamic, got '{named}' at {axis}"
        )
    return tuple(int(factor or 1) * value for value in extents[name])


def open_timing_cache(config: Any, path: Path | None) -> Any:
    """Open the file's timings, or an empty cache when they are of another GPU or version. The caller keeps it alive."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache
