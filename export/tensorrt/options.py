"""What is asked of an engine build, checked before any work: ranges, and what this library version can do at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from runtime.backends.tensorrt.library import TensorRTFormat, library_version
from runtime.errors import ExportError

EnginePrecision = Literal["fp32", "tf32", "fp16", "bf16"]
CURRENT = "current"
MAX_OPSET_TENSORRT_8 = 17


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """Arguments of `export.tensorrt.build.build_engine`, which documents them."""

    format: TensorRTFormat
    precision: EnginePrecision
    profile: tuple[int, int, int]
    compute_capabilities: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    max_aux_streams: int | None = None
    timing_cache: Path | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False

    def __post_init__(self) -> None:
        low, best, high = self.profile
        checks = (
            ("format", self.format in get_args(TensorRTFormat), f"one of {get_args(TensorRTFormat)}"),
            ("precision", self.precision in get_args(EnginePrecision), f"one of {get_args(EnginePrecision)}"),
            ("profile", 1 <= low <= best <= high, "batch sizes 1 <= min <= opt <= max"),
            ("workspace_bytes", self.workspace_bytes is None or self.workspace_bytes > 0, "a number of bytes above 0"),
            ("optimization_level", self.optimization_level in (None, *range(6)), "0 to 5"),
            ("max_aux_streams", (self.max_aux_streams or 0) >= 0, "an integer >= 0"),
        )
        for name, good, expected in checks:
            if not good:
                raise ExportError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @property
    def needs_gpu(self) -> bool:
        """Full TensorRT times kernels on the GPU it builds for; RTX asks for one only to learn what `current` is."""
        return self.format == "tensorrt" or CURRENT in self.compute_capabilities

    def check_supported(self, trt: Any, opset: int) -> None:
        """Raises ExportError for what this library version does not support, or would accept and ignore."""
        library = f"{trt.__name__} {trt.__version__}"
        unsupported = _unsupported_by_rtx(self) if self.format == "tensorrt-rtx" else _unsupported_by_full(self, trt)
        for what, instead in unsupported:
            raise ExportError(f"{library} does not support {what}; {instead}")
        if library_version(trt)[0] == 8 and opset > MAX_OPSET_TENSORRT_8:
            raise ExportError(
                f"{library} reads ONNX up to opset {MAX_OPSET_TENSORRT_8} and computes later reductions wrongly "
                f"without an error; this graph has opset {opset}: export it with --opset {MAX_OPSET_TENSORRT_8}"
            )


def _unsupported_by_rtx(request: EngineRequest) -> list[tuple[str, str]]:
    no_effect = "leave it out: it would have no effect"
    return [
        (what, instead)
        for asked, what, instead in (
            (request.timing_cache is not None, "a timing cache (it does not time kernels while building)", no_effect),
            (request.optimization_level is not None, "builder optimization levels", no_effect),
            (request.hardware_compatible, "hardware compatibility", "name the compute capabilities to build for"),
            (request.version_compatible, "version compatibility", "an RTX engine is valid for one release only"),
        )
        if asked
    ]


def _unsupported_by_full(request: EngineRequest, trt: Any) -> list[tuple[str, str]]:
    bf16 = hasattr(trt.DataType, "BF16")
    flags, levels = trt.BuilderFlag, getattr(trt, "HardwareCompatibilityLevel", None)
    return [
        (what, instead)
        for asked, what, instead in (
            (request.precision == "bf16" and not bf16, "bfloat16", "use --precision fp16 or TensorRT 10 or newer"),
            (
                bool(request.compute_capabilities),
                f"a build for other GPUs (compute capabilities {', '.join(request.compute_capabilities)})",
                "it builds for the GPU of this machine; leave the list out or use --format tensorrt-rtx",
            ),
            (
                request.hardware_compatible and not hasattr(levels, "AMPERE_PLUS"),
                "hardware compatibility",
                "use TensorRT 8.6 or newer",
            ),
            (
                request.version_compatible and not hasattr(flags, "VERSION_COMPATIBLE"),
                "version compatibility",
                "use TensorRT 8.6 or newer",
            ),
        )
        if asked
    ]
