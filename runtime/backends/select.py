"""Which engine of a bundle to run: the one that was asked for, or the fastest verified one this machine can run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from runtime.backends.base import BaseBackend
from runtime.backends.registry import BACKENDS, PRECISIONS, REGISTRY, runs_on_gpu
from runtime.bundle import Bundle, Engine, ModelFolder
from runtime.errors import BackendUnavailable, BundleError, EngineError, EngineMismatch
from runtime.machine import measured_here

OnMismatch = Literal["error", "onnx"]
Load = Callable[..., Any]
"""(folder, engine, threads=...) -> loaded engine."""


@dataclass(frozen=True)
class OpenedEngine:
    """A loaded engine and how it was chosen."""

    backend: Any
    """A `BaseBackend`, or what `load` gave."""
    engine: Engine
    skipped: tuple[str, ...] = field(default=())
    """Why each engine that would have been preferred could not be taken."""


def open_engine(
    bundle: ModelFolder[Any],
    backend: str = "auto",
    *,
    precision: str | None = None,
    on_mismatch: OnMismatch = "error",
    threads: int | None = None,
    load: Load | None = None,
) -> OpenedEngine:
    """Check the files of one engine of a bundle and load it.

    `backend`: one of `BACKENDS`, or `auto`: of the verified engines, the fastest that can run here. Speeds count where
    they were measured on this class of machine; the others follow in the order of the registry. An unverified engine
    is taken only when no verified one can run or it was asked for by name, with a RuntimeWarning; one that failed the
    parity check is never run. `on_mismatch`, for an engine built for another library version or GPU: raise
    EngineMismatch, or run one of the bundle's ONNX files instead, with a RuntimeWarning. `threads`: CPU threads of one
    operator. `load`: what loads an engine that is no bundle's; `load_engine` without.

    Raises BackendUnavailable (listing what the bundle has and why each could not be taken), MissingDependency,
    EngineMismatch, BundleError when a file was altered, EngineError when an engine does not load.
    """
    if on_mismatch not in get_args(OnMismatch):
        raise BackendUnavailable(f"on_mismatch: got {on_mismatch!r}, expected one of {', '.join(get_args(OnMismatch))}")
    engines = matching_engines(bundle, backend, precision=precision)
    loading: Load = load or load_engine
    if backend == "auto":
        return _open_first(bundle, engines, threads, loading, why_none="none of its engines can run on this machine")
    try:
        return _warn_unverified(OpenedEngine(loading(bundle, engines[0], threads=threads), engines[0]))
    except EngineMismatch as mismatch:
        if on_mismatch == "error":
            raise
        instead = [e for e in matching_engines(bundle) if REGISTRY[e.backend].format == "onnx"]
        skipped = (f"{engines[0].name}: {mismatch}",)
        opened = _open_first(bundle, instead, threads, loading, skipped, why_none="no ONNX file of it can run instead")
        warnings.warn(f"{mismatch}; running '{opened.engine.name}' instead", RuntimeWarning, stacklevel=3)
        return opened


def load_engine(bundle: Bundle, engine: Engine, *, threads: int | None = None) -> BaseBackend:
    """Check the files of this engine and load it, verified or not. Raises as `open_engine`."""
    model_file = bundle.model_file(engine.model_file)
    module = REGISTRY[engine.backend].load()
    module.check_engine(engine.backend, model_file, engine.precision)  # before a file of gigabytes is hashed
    backend: BaseBackend | None = None
    try:
        with bundle.checked(model_file) as path:
            backend = module.open_engine(engine.backend, path, model_file, bundle.spec, engine.precision, threads)
    except BundleError:
        if backend is not None:  # of bytes that were changed after their check
            backend.close()
        raise
    assert backend is not None
    return backend


def matching_engines(
    bundle: ModelFolder[Any], backend: str = "auto", *, precision: str | None = None, failed: bool = False
) -> list[Engine]:
    """Return the engines of a bundle that fit what is asked for, best first (verified, then fastest or preferred).

    `failed`: include those that failed the parity check, last; they can be verified again, but are not run. Raises
    BackendUnavailable, listing what the bundle has, when none fits.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise BackendUnavailable(f"backend: got {backend!r}, expected auto or one of {', '.join(BACKENDS)}")
    fitting = [
        engine
        for engine in bundle.manifest.engines
        if backend in ("auto", engine.backend)
        and engine.backend in REGISTRY  # a later version may know more of them
        and precision in (None, engine.precision)
    ]
    found = [engine for engine in fitting if failed or engine.status != "failed"]
    if not found:
        asked = " ".join(part for part in (backend, precision) if part)
        held = ", ".join(f"{e.backend} {e.precision} ({e.status})" for e in bundle.manifest.engines) or "none"
        hint = "; what failed the parity check is not run" if fitting else ""
        raise BackendUnavailable(f"{bundle.folder} has no engine for {asked}; it has: {held}{hint}")
    return sorted(found, key=_rank)


def _open_first(
    bundle: ModelFolder[Any],
    engines: Sequence[Engine],
    threads: int | None,
    load: Load,
    skipped: tuple[str, ...] = (),
    *,
    why_none: str,
) -> OpenedEngine:
    """Open the first engine that can run here. Raises BackendUnavailable with the reason of each when none can."""
    for engine in engines:
        opened = _try_open(bundle, engine, threads, load)
        if not isinstance(opened, str):
            return _warn_unverified(OpenedEngine(opened, engine, skipped))
        skipped = (*skipped, f"{engine.name}: {opened}")
    raise BackendUnavailable(f"{bundle.folder}: {why_none}:" + "".join(f"\n  {line}" for line in skipped))


def _try_open(bundle: ModelFolder[Any], engine: Engine, threads: int | None, load: Load) -> Any:
    """Return the loaded engine, or why it can't run here."""
    try:
        return load(bundle, engine, threads=threads)
    except (EngineMismatch, EngineError) as error:
        # This deserves more than a line in a report: the next engine may be 100 times slower.
        warnings.warn(f"engine '{engine.name}' is skipped: {error}", RuntimeWarning, stacklevel=5)
        return str(error)
    except BackendUnavailable as error:
        return str(error)


def _rank(engine: Engine) -> tuple[int, bool, float, int, int]:
    """Sort key: verified first; of those the fastest here, then by preference; of the others the most exact first."""
    verified = engine.status == "verified"
    order = list(REGISTRY[engine.backend].precisions if verified else PRECISIONS)
    here = measured_here(engine.speed, gpu=runs_on_gpu(engine.backend))
    speed: Any = engine.speed.get("ms_per_video") if here else None
    measured = verified and isinstance(speed, int | float)
    precision = order.index(engine.precision) if engine.precision in order else len(order)
    status = ("verified", "unverified", "failed").index(engine.status)
    return status, not measured, float(speed) if measured else 0.0, BACKENDS.index(engine.backend), precision


def _warn_unverified(opened: OpenedEngine) -> OpenedEngine:
    if opened.engine.status != "verified":
        warnings.warn(
            f"engine '{opened.engine.name}' was never verified against the eager model; run 'ccnet verify BUNDLE' here",
            RuntimeWarning,
            stacklevel=4,
        )
    return opened
