"""Which of a bundle's engines to run: the one that was asked for, or the fastest verified one this machine can run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from runtime.backends.base import Backend
from runtime.bundle import Bundle, Engine, ModelFile
from runtime.errors import BackendUnavailable, EngineMismatch
from runtime.machine import machine_class

OnMismatch = Literal["error", "onnx"]

ONNX_BACKENDS = ("onnxruntime-cuda", "openvino", "onnxruntime")
TENSORRT_BACKENDS = ("tensorrt", "tensorrt-rtx")
BACKENDS = (*TENSORRT_BACKENDS, *ONNX_BACKENDS)
"""What a bundle can be run by, in the order in which `auto` prefers them where no speed was measured here."""

# Order of precisions within a backend where no speed was measured here. ONNX Runtime emulates half precision on a
# CPU, so it comes last there.
_GPU_PRECISIONS = ("fp16", "bf16", "int8", "tf32", "fp32")
_CPU_PRECISIONS = ("int8", "bf16", "fp32", "fp16", "tf32")
_EXACT_FIRST = ("fp32", "tf32", "fp16", "bf16", "int8")

# (backend, precision) that run a graph typed with another precision.
_RUNS_FP32_GRAPH = {("openvino", "bf16"), ("openvino", "fp16"), ("onnxruntime-cuda", "tf32")}


@dataclass(frozen=True)
class OpenedEngine:
    """A backend and how it was chosen."""

    backend: Backend
    engine: Engine
    skipped: tuple[str, ...] = field(default=())
    """Why each engine that would have been preferred could not be taken."""


def open_backend(
    bundle: Bundle,
    backend: str = "auto",
    *,
    precision: str | None = None,
    on_mismatch: OnMismatch = "error",
    threads: int | None = None,
) -> Backend:
    """Load one engine of a bundle; see `open_engine`, which also tells how it was chosen."""
    return open_engine(bundle, backend, precision=precision, on_mismatch=on_mismatch, threads=threads).backend


def open_engine(
    bundle: Bundle,
    backend: str = "auto",
    *,
    precision: str | None = None,
    on_mismatch: OnMismatch = "error",
    threads: int | None = None,
) -> OpenedEngine:
    """Verify and load one engine of a bundle.

    `backend`: one of `BACKENDS`, or `auto`: of the engines that passed the parity check, the fastest that can run here.
    Speeds count where they were measured on this class of machine; the others follow in the order of `BACKENDS`. A
    engine that was never verified is taken only when no verified one can run, with a RuntimeWarning. Asking for one of
    `ONNX_BACKENDS` by name runs any ONNX file of the bundle, with that warning where it is not among the engines.
    `threads`: CPU threads of one operator. `on_mismatch`: for an engine of another library version or GPU, raise
    EngineMismatch, or run the bundle's ONNX file instead (with a RuntimeWarning). `ccnet rebuild` builds it again.

    Raises BackendUnavailable (listing what the bundle has and why each could not be taken), MissingDependency,
    EngineMismatch, BundleError when a file was altered, EngineError when an engine does not load.
    """
    if on_mismatch not in get_args(OnMismatch):
        raise BackendUnavailable(f"on_mismatch: got {on_mismatch!r}, expected one of {', '.join(get_args(OnMismatch))}")
    opener = _Opener(bundle, threads, on_mismatch)
    engines = matching_engines(bundle, backend, precision=precision)
    if backend != "auto":
        return _warned(opener.open(engines[0]))
    skipped: list[str] = []
    for engine in engines:
        opened = opener.try_open(engine)
        if isinstance(opened, OpenedEngine):
            return _warned(OpenedEngine(opened.backend, opened.engine, (*skipped, *opened.skipped)))
        skipped.append(opened)
    reasons = "".join(f"\n  {line}" for line in skipped)
    raise BackendUnavailable(f"{bundle.folder}: none of its engines can run on this machine:{reasons}")


def open_named(bundle: Bundle, engine: Engine) -> Backend:
    """Verify and load one engine of a bundle, verified or not. Raises what `open_engine` raises."""
    return _Opener(bundle, None, "error").open(engine).backend


def matching_engines(bundle: Bundle, backend: str = "auto", *, precision: str | None = None) -> list[Engine]:
    """Engines of the bundle that fit what is asked for, best first (verified, then fastest or preferred).

    Raises BackendUnavailable, listing what the bundle has, when none fits.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise BackendUnavailable(f"backend: got {backend!r}, expected auto or one of {', '.join(BACKENDS)}")
    engines = [*bundle.manifest.engines]
    if backend in ONNX_BACKENDS:
        engines += _unlisted_engines(bundle, backend)
    fitting = [
        engine for engine in engines if backend in ("auto", engine.backend) and precision in (None, engine.precision)
    ]
    if not fitting:
        asked = " ".join(str(part) for part in (backend, precision) if part)
        names = [engine.name for engine in failed_engines(bundle, backend, precision=precision)]
        failed = f" (failed the parity check and are not run: {', '.join(names)})" if names else ""
        raise BackendUnavailable(f"{bundle.folder} has no engine for {asked}; it has: {_listing(bundle)}{failed}")
    return sorted(fitting, key=_rank)


def failed_engines(bundle: Bundle, backend: str = "auto", *, precision: str | None = None) -> list[Engine]:
    """Engines that failed the parity check and fit what is asked for. They can be verified again, but not run."""
    return [
        engine
        for engine in bundle.manifest.rejected
        if backend in ("auto", engine.backend) and precision in (None, engine.precision)
    ]


def _rank(engine: Engine) -> tuple[bool, bool, float, int, int]:
    """Sort key: verified first; of those the fastest here, then by preference; of the others the most exact first."""
    verified = engine.status == "verified"
    speed: Any = (
        engine.speed.get("ms_per_video") if engine.speed.get("machine") == machine_class(engine.backend) else None
    )
    measured = verified and isinstance(speed, int | float)
    order = _CPU_PRECISIONS if engine.backend in ("openvino", "onnxruntime") else _GPU_PRECISIONS
    order = order if verified else _EXACT_FIRST
    backend = BACKENDS.index(engine.backend) if engine.backend in BACKENDS else len(BACKENDS)
    precision = order.index(engine.precision) if engine.precision in order else len(order)
    return not verified, not measured, float(speed) if measured else 0.0, backend, precision


def _unlisted_engines(bundle: Bundle, backend: str) -> list[Engine]:
    """Unverified ways to run the bundle's ONNX files that its manifest does not list, neither as rejected.

    A precision that has a file of its own is run from that one.
    """
    listed = (*bundle.manifest.engines, *bundle.manifest.rejected)
    known = {(engine.backend, engine.precision) for engine in listed}
    graphs = [model_file for model_file in bundle.manifest.model_files if model_file.format == "onnx"]
    ways = [(model_file, model_file.precision) for model_file in graphs]
    fp32 = [model_file for model_file in graphs if model_file.precision == "fp32"]
    ways += [(a, p) for a in fp32 for name, p in sorted(_RUNS_FP32_GRAPH) if name == backend]
    engines = []
    for model_file, precision in ways:
        way = (backend, precision)
        if way not in known:
            known.add(way)
            name = f"{backend}-{precision}"
            engines.append(
                Engine(name=name, backend=backend, precision=precision, model_file=model_file.name, status="unverified")
            )
    return engines


class _Opener:
    """Opens engines of one bundle; a file that serves several engines is hashed once."""

    def __init__(self, bundle: Bundle, threads: int | None, on_mismatch: OnMismatch) -> None:
        self._bundle = bundle
        self._threads = threads
        self._on_mismatch = on_mismatch
        self._verified: set[str] = set()

    def open(self, engine: Engine) -> OpenedEngine:
        if engine.backend in TENSORRT_BACKENDS:
            return self._open_tensorrt(engine)
        return OpenedEngine(self._open_onnx(engine), engine)

    def try_open(self, engine: Engine) -> OpenedEngine | str:
        """The opened engine, or why it can't run here."""
        try:
            return self.open(engine)
        except EngineMismatch as error:
            # A GPU engine that does not fit deserves more than a line in a report: the CPU may be 100 times slower.
            warnings.warn(f"engine '{engine.name}' is skipped: {error}", RuntimeWarning, stacklevel=4)
            return f"{engine.name}: {error}"
        except BackendUnavailable as error:
            return f"{engine.name}: {error}"

    def _open_onnx(self, engine: Engine) -> Backend:
        model_file = self._bundle.model_file(engine.model_file)
        path, spec = self._bundle.path(model_file), self._bundle.spec
        if engine.backend == "openvino":
            from runtime.backends.openvino import OpenVinoBackend, check_available

            check_available(engine.precision)
            self._verify(model_file)
            return OpenVinoBackend.open(
                path, spec, precision=engine.precision, max_batch=model_file.max_batch, threads=self._threads
            )
        from runtime.backends.onnxruntime import Device, OnnxRuntimeBackend, load_library

        device: Device = "cuda" if engine.backend == "onnxruntime-cuda" else "cpu"
        load_library(device)
        self._verify(model_file)
        return OnnxRuntimeBackend.open(
            path,
            spec,
            device=device,
            precision=engine.precision,
            max_batch=model_file.max_batch,
            threads=self._threads,
        )

    def _open_tensorrt(self, engine: Engine) -> OpenedEngine:
        try:
            return self._open_engine(engine)
        except EngineMismatch as error:
            if self._on_mismatch == "onnx":
                return self._open_onnx_instead(engine, error)
            raise

    def _open_engine(self, engine: Engine) -> OpenedEngine:
        """Raises EngineMismatch before the plan is read, or from the library, which knows best what it can run."""
        from runtime.backends.tensorrt.backend import TensorRTBackend, check_engine

        model_file = self._bundle.model_file(engine.model_file)
        check_engine(model_file)
        self._verify(model_file)
        spec = self._bundle.spec
        return OpenedEngine(TensorRTBackend.open(self._bundle.path(model_file), model_file, spec), engine)

    def _open_onnx_instead(self, engine: Engine, mismatch: EngineMismatch) -> OpenedEngine:
        engines = [r for r in matching_engines(self._bundle) if r.backend in ONNX_BACKENDS]
        engines += _unlisted_engines(self._bundle, "onnxruntime") if not engines else []
        skipped = [f"{engine.name}: {mismatch}"]
        for other in engines:
            opened = self.try_open(other)
            if isinstance(opened, OpenedEngine):
                warnings.warn(f"{mismatch}; running '{other.name}' instead", RuntimeWarning, stacklevel=5)
                return OpenedEngine(opened.backend, other, tuple(skipped))
            skipped.append(opened)
        reasons = "".join(f"\n  {line}" for line in skipped)
        raise BackendUnavailable(f"{self._bundle.folder}: no ONNX file of it can run instead:{reasons}") from mismatch

    def _verify(self, model_file: ModelFile) -> None:
        if model_file.name not in self._verified:
            self._bundle.verify(model_file)
            self._verified.add(model_file.name)


def _warned(opened: OpenedEngine) -> OpenedEngine:
    if opened.engine.status != "verified":
        warnings.warn(
            f"engine '{opened.engine.name}' was never verified against the eager model; run 'ccnet verify BUNDLE' here",
            RuntimeWarning,
            stacklevel=4,
        )
    return opened


def _listing(bundle: Bundle) -> str:
    engines: Sequence[Engine] = bundle.manifest.engines
    found = [f"{r.backend} {r.precision} ({r.status})" for r in engines]
    return ", ".join(found) or "none"
