"""What is asked of an engine build: one record from the command line to the manifest, checked before any work."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from export.tensorrt import legacy
from runtime.backends.tensorrt.context import Copies
from runtime.backends.tensorrt.library import TensorRTFormat
from runtime.errors import ExportError

EnginePrecision = Literal["fp32", "tf32", "fp16", "bf16", "fp8"]
Tiling = Literal["none", "fast", "moderate", "full"]
CURRENT = "current"
FP8_CAPABILITY = (8, 9)
"""The first GPUs with fp8."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of one engine; an exporter of several sets `format`, `precision` and `profile` for each.

    Raises ExportError, naming the option, for a value out of range.
    """

    format: TensorRTFormat = "tensorrt"
    precision: EnginePrecision = "fp32"
    """Must be that of the graph's own types; `tf32` is an fp32 graph with TF32 matmuls allowed."""
    profile: tuple[int, ...] = (1, 1, 1)
    """Batch sizes (min, opt, max) for the dynamic first axis of the inputs."""
    extents: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """(min, opt, max) of every further dynamic extent, under its name in the graph; that of `8*rows` is `rows`."""
    compute_capabilities: tuple[str, ...] = ()
    """RTX only: for example ("8.9", "12.0"), or ("current",); () builds a portable engine."""
    workspace_bytes: int | None = None
    """Limit of scratch memory; None leaves the library's default, the whole device."""
    optimization_level: int | None = None
    """Full TensorRT only: 0 (quick build) to 5."""
    tiling: Tiling = "none"
    """Full TensorRT 10.9 and newer: how long to look for kernels that keep their data in the cache of the GPU."""
    hardware_compatible: bool = False
    """Full TensorRT only: run on any Ampere or newer GPU, slower."""
    version_compatible: bool = False
    """Full TensorRT only: run on newer releases too, with code of the library inside the engine."""
    copies: Copies = "stream"
    """How batches get to the GPU, see `Copies`. No matter of the build: recorded for whoever opens the engine."""
    high_priority: bool = False
    """Of its work on the GPU, before that of other engines of a process; recorded, as `copies`."""
    timing_cache: Path | None = None
    """Full TensorRT only: a file on this machine that makes later builds quicker; only ever a hint."""

    def __post_init__(self) -> None:
        checks = (
            ("format", self.format in get_args(TensorRTFormat), f"one of {get_args(TensorRTFormat)}"),
            ("precision", self.precision in get_args(EnginePrecision), f"one of {get_args(EnginePrecision)}"),
            ("profile", _ascending(self.profile), "batch sizes 1 <= min <= opt <= max"),
            ("extents", all(map(_ascending, self.extents.values())), "1 <= min <= opt <= max for each"),
            ("workspace_bytes", self.workspace_bytes is None or self.workspace_bytes > 0, "a number of bytes above 0"),
            ("copies", self.copies in get_args(Copies), f"one of {get_args(Copies)}"),
            ("tiling", self.tiling in get_args(Tiling), f"one of {get_args(Tiling)}"),
            ("optimization_level", self.optimization_level in (None, *range(6)), "0 to 5"),
        )
        for name, good, expected in checks:
            if not good:
                raise ExportError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    def to_json(self) -> dict[str, Any]:
        """Return the options for the manifest: all but the timing cache, which is a file of this machine."""
        values = dataclasses.asdict(self)
        del values["timing_cache"]
        return dict(json.loads(json.dumps(values)))

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the options that are not at their defaults."""
        defaults = type(self)()
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(defaults, f.name))

    @property
    def needs_gpu(self) -> bool:
        """Full TensorRT times kernels on the GPU it builds for; RTX asks for one only to learn what `current` is."""
        return self.format == "tensorrt" or CURRENT in self.compute_capabilities

    def check_supported(self, trt: Any, opset: int) -> None:
        """Raise ExportError for what this library version does not support, or would accept and ignore."""
        for what, instead in _unsupported_by_rtx(self) if self.format == "tensorrt-rtx" else _unsupported_by_full(self):
            raise ExportError(f"{trt.__name__} {trt.__version__} does not support {what}; {instead}")
        if self.tiling != "none" and not hasattr(trt, "TilingOptimizationLevel"):
            raise ExportError(
                f"{trt.__name__} {trt.__version__} does not support tiling optimization, which is new in 10.9; "
                "leave it out"
            )
        if self.precision == "fp8":
            self.check_fp8(trt, self.compute_capabilities)
        if legacy.is_legacy(trt):
            legacy.check_supported(trt, self.precision, opset)

    def check_fp8(self, trt: Any, capabilities: Iterable[str]) -> None:
        """Raise ExportError when GPUs of these compute capabilities have no fp8."""
        for capability in capabilities:
            if capability != CURRENT and _numbers(capability) < FP8_CAPABILITY:
                raise ExportError(
                    f"{trt.__name__} {trt.__version__} does not support fp8 on compute capability {capability}, which "
                    "begins with 8.9; use --precision fp16"
                )


def _ascending(sizes: tuple[int, ...]) -> bool:
    return len(sizes) == 3 and 1 <= sizes[0] <= sizes[1] <= sizes[2]


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split(".") if part.isdigit())


def _unsupported_by_rtx(options: EngineOptions) -> list[tuple[str, str]]:
    no_effect = "leave it out: it would have no effect"
    return [
        (what, instead)
        for asked, what, instead in (
            (options.timing_cache is not None, "a timing cache (it does not time kernels while building)", no_effect),
            (options.optimization_level is not None, "builder optimization levels", no_effect),
            (options.tiling != "none", "tiling optimization", no_effect),
            (options.hardware_compatible, "hardware compatibility", "name the compute capabilities to build for"),
            (options.version_compatible, "version compatibility", "an RTX engine is valid for one release only"),
        )
        if asked
    ]


def _unsupported_by_full(options: EngineOptions) -> list[tuple[str, str]]:
    if not options.compute_capabilities:
        return []
    what = f"a build for other GPUs (compute capabilities {', '.join(options.compute_capabilities)})"
    return [(what, "it builds for the GPU of this machine; leave the list out or use --format tensorrt-rtx")]
