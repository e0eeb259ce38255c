"""Which engines of a folder of model files are asked for, and building those that are: bundles and extractors alike."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

from export.bundle_writer import FolderDraft
from export.tensorrt.build import build_engine
from export.tensorrt.options import EngineOptions, EnginePrecision
from runtime.backends.registry import PRECISIONS, REGISTRY
from runtime.bundle import Engine, Format, ModelFile
from runtime.errors import BackendUnavailable, ConfigError, ExportError

AUTO = "auto"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """Formats and precisions that are asked for.

    Raises ConfigError, naming the option, for what does not go together.
    """

    formats: tuple[Format, ...] = ("onnx",)
    precisions: tuple[str, ...] = ("fp32",)
    """Of `PRECISIONS`, or `("auto",)`: every engine that this machine can run and that passes the parity check."""
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)
    """Of every TensorRT engine; its format, precision and profile are set for each."""

    def __post_init__(self) -> None:
        for precision in self.precisions:
            if precision not in (*PRECISIONS, AUTO):
                raise ConfigError(f"precision: got {precision!r}, expected {AUTO} or some of {', '.join(PRECISIONS)}")
        if self.automatic and len(self.precisions) > 1:
            raise ConfigError(f"precision: got {' '.join(self.precisions)}, expected {AUTO} alone")
        if self.engine.given and set(self.formats) == {"onnx"}:
            given = ", ".join(self.engine.given)
            raise ConfigError(f"{given}: for engines only; got format onnx, expected tensorrt or tensorrt-rtx with it")

    @property
    def automatic(self) -> bool:
        return AUTO in self.precisions


def plan_engines(
    request: EngineRequest, *, typed: bool = True, allowed: Collection[str] = PRECISIONS
) -> tuple[list[Engine], list[Engine], dict[str, str]]:
    """Return the engines to build and verify, the other ways to run the ONNX files, and what `auto` leaves out.

    A precision asked for by name is verified on the registry's last ONNX backend that has it, the most portable one.
    `typed`: whether there are graphs of half precision for `auto`. `allowed`: precisions that there are graphs for.
    """
    asked: dict[tuple[str, str], Engine] = {}
    others: list[Engine] = []
    skipped: dict[str, str] = {}
    for backend, registration in REGISTRY.items():
        if registration.format not in request.formats:
            continue
        onnx = registration.format == "onnx"
        for precision, graph in registration.precisions.items():
            if precision not in allowed:
                continue
            name = f"{backend}-{precision}"
            engine = Engine(
                name=name,
                backend=backend,
                precision=precision,
                model_file=f"onnx-{graph}" if onnx else name,
                status="unverified",
            )
            if request.automatic and precision == "fp8":
                continue  # for those who ask for it
            if request.automatic:
                reason = _unavailable(engine) if onnx else None
                full = not typed or onnx  # CPUs emulate half precision
                if reason is None and (not full or graph in ("fp32", "int8")):
                    asked[name, precision] = engine
                elif reason is not None:
                    skipped[name] = reason
            elif precision in request.precisions:
                key = ("onnx" if onnx else name, precision)
                others += [asked[key]] if key in asked else []
                asked[key] = engine
    return list(asked.values()), others, skipped


def add_engine(
    draft: FolderDraft[Any], engine: Engine, graph: ModelFile, request: EngineRequest, skipped: dict[str, str],
    *, batches: tuple[int, int, int], extents: dict[str, tuple[int, ...]] | None = None,
) -> None:  # fmt: skip
    """Build a TensorRT engine of an ONNX file of the draft into it; `auto` leaves out what can't be built.

    `batches`, `extents`: see `EngineOptions.profile` and `.extents`. Raises as `build_engine`.
    """
    log.info("building %s", engine.name)
    built = dataclasses.replace(
        request.engine,
        format=cast(Any, engine.backend),
        precision=cast(EnginePrecision, engine.precision),
        profile=batches,
        extents=extents or {},
    )
    try:
        info = build_engine(draft.folder / graph.files[0], draft.folder / f"{engine.name}.engine", built)
    except ExportError as error:
        if not request.automatic:
            raise
        log.info("  left out: %s", error)
        skipped[engine.name] = str(error)
        return
    draft.add_model_file(info.model_file(name=engine.model_file))


def _unavailable(engine: Engine) -> str | None:
    """Return why a backend can't run on this machine, or None."""
    try:
        REGISTRY[engine.backend].load().check_engine(engine.backend, None, engine.precision)
    except BackendUnavailable as error:
        return str(error)
    return None
