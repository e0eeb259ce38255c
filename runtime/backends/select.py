"""Which of a bundle's rungs to run: the one that was asked for, or the fastest proven one this machine can run."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from runtime.backends.base import Backend
from runtime.bundle import Artifact, Bundle, Rung, entry_name, read_bundle
from runtime.errors import BackendUnavailable, EngineMismatch
from runtime.machine import machine_class

OnMismatch = Literal["error", "onnx", "rebuild"]

ONNX_BACKENDS = ("onnxruntime-cuda", "openvino", "onnxruntime")
TENSORRT_BACKENDS = ("tensorrt", "tensorrt-rtx")
BACKENDS = (*TENSORRT_BACKENDS, *ONNX_BACKENDS)
"""What a bundle can be run by, in the order in which `auto` prefers them where no speed was measured here."""

# Order of precisions within a backend where no speed was measured here. ONNX Runtime emulates half precision on a
# CPU, so it comes last there.
_GPU_PRECISIONS = ("fp16", "bf16", "int8", "tf32", "fp32")
_CPU_PRECISIONS = ("int8", "bf16", "fp32", "fp16", "tf32")
_EXACT_FIRST = ("fp32", "tf32", "fp16", "bf16", "int8")

_REBUILD = (sys.executable, "-m", "export.rebuild")

# (backend, precision) that run a graph typed with another precision.
_RUNS_FP32_GRAPH = {("openvino", "bf16"), ("openvino", "fp16"), ("onnxruntime-cuda", "tf32")}


@dataclass(frozen=True)
class Opened:
    """A backend and how it was chosen."""

    backend: Backend
    rung: Rung
    skipped: tuple[str, ...] = field(default=())
    """Why each rung that would have been preferred could not be taken."""


def open_backend(
    bundle: Bundle,
    backend: str = "auto",
    *,
    precision: str | None = None,
    length: int | None = None,
    on_mismatch: OnMismatch = "error",
    threads: int | None = None,
) -> Backend:
    """Load one engine of a bundle; see `open_rung`, which also tells how it was chosen."""
    return open_rung(
        bundle, backend, precision=precision, length=length, on_mismatch=on_mismatch, threads=threads
    ).backend


def open_rung(
    bundle: Bundle,
    backend: str = "auto",
    *,
    precision: str | None = None,
    length: int | None = None,
    on_mismatch: OnMismatch = "error",
    threads: int | None = None,
) -> Opened:
    """Verify and load one engine of a bundle.

    `backend`: one of `BACKENDS`, or `auto`: of the rungs that passed the parity gate, the fastest that can run here.
    Speeds count where they were measured on this class of machine; the others follow in the order of `BACKENDS`. A
    rung that was never proven is taken only when no proven one can run, with a RuntimeWarning. Asking for one of
    `ONNX_BACKENDS` by name runs any ONNX file of the bundle, with that warning where it is not among the rungs.
    `length`: T of the engine, default the bundle's own. `threads`: CPU threads of one operator. `on_mismatch`: for
    an engine of another library version or GPU: raise EngineMismatch, run the bundle's ONNX file instead (with a
    RuntimeWarning), or build the engine again here (the bundle is updated).

    Raises BackendUnavailable (listing what the bundle has and why each could not be taken), MissingDependency,
    EngineMismatch, BundleError when a file was altered, EngineError when an engine does not load.
    """
    if on_mismatch not in get_args(OnMismatch):
        raise BackendUnavailable(f"on_mismatch: got {on_mismatch!r}, expected one of {', '.join(get_args(OnMismatch))}")
    opener = _Opener(bundle, threads, on_mismatch)
    rungs = matching_rungs(bundle, backend, precision=precision, length=length)
    if backend != "auto":
        return _warned(opener.open(rungs[0]))
    skipped: list[str] = []
    for rung in rungs:
        opened = opener.attempt(rung)
        if isinstance(opened, Opened):
            return _warned(Opened(opened.backend, opened.rung, (*skipped, *opened.skipped)))
        skipped.append(opened)
    reasons = "".join(f"\n  {line}" for line in skipped)
    raise BackendUnavailable(f"{bundle.folder}: none of its rungs can run on this machine:{reasons}")


def open_named(bundle: Bundle, rung: Rung) -> Backend:
    """Verify and load one rung of a bundle, proven or not. Raises what `open_rung` raises."""
    return _Opener(bundle, None, "error").open(rung).backend


def matching_rungs(
    bundle: Bundle, backend: str = "auto", *, precision: str | None = None, length: int | None = None
) -> list[Rung]:
    """Rungs of the bundle that fit what is asked for, best first (proven, then fastest or preferred).

    Raises BackendUnavailable, listing what the bundle has, when none fits.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise BackendUnavailable(f"backend: got {backend!r}, expected auto or one of {', '.join(BACKENDS)}")
    length = bundle.spec.length if length is None else length
    rungs = [*bundle.manifest.rungs]
    if backend in ONNX_BACKENDS:
        rungs += _unlisted_rungs(bundle, backend)
    fitting = [
        rung
        for rung in rungs
        if backend in ("auto", rung.backend)
        and precision in (None, rung.precision)
        and bundle.artifact(rung.artifact).length == length
    ]
    if not fitting:
        asked = " ".join(str(part) for part in (backend, precision, f"T={length}") if part)
        names = [rung.name for rung in rejected_rungs(bundle, backend, precision=precision)]
        failed = f" (failed the parity gate and are not run: {', '.join(names)})" if names else ""
        raise BackendUnavailable(f"{bundle.folder} has no rung for {asked}; it has: {_listing(bundle)}{failed}")
    return sorted(fitting, key=_rank)


def rejected_rungs(bundle: Bundle, backend: str = "auto", *, precision: str | None = None) -> list[Rung]:
    """Rungs of any T that failed the parity gate and fit what is asked for. They can be proven again, but not run."""
    return [
        rung
        for rung in bundle.manifest.rejected
        if backend in ("auto", rung.backend) and precision in (None, rung.precision)
    ]


def rung_lengths(bundle: Bundle, rung: Rung) -> list[int]:
    """The T for which the bundle can be run by the same backend in the same precision, shortest first."""
    return sorted(
        {
            bundle.artifact(other.artifact).length
            for other in bundle.manifest.rungs
            if (other.backend, other.precision) == (rung.backend, rung.precision)
        }
    )


def _rank(rung: Rung) -> tuple[bool, bool, float, int, int]:
    """Sort key: proven first; of those the fastest here, then by preference; of the others the most exact first."""
    proven = rung.gate == "passed"
    speed: Any = rung.speed.get("ms_per_video") if rung.speed.get("machine") == machine_class(rung.backend) else None
    measured = proven and isinstance(speed, int | float)
    order = _CPU_PRECISIONS if rung.backend in ("openvino", "onnxruntime") else _GPU_PRECISIONS
    order = order if proven else _EXACT_FIRST
    backend = BACKENDS.index(rung.backend) if rung.backend in BACKENDS else len(BACKENDS)
    precision = order.index(rung.precision) if rung.precision in order else len(order)
    return not proven, not measured, float(speed) if measured else 0.0, backend, precision


def _unlisted_rungs(bundle: Bundle, backend: str) -> list[Rung]:
    """Unproven ways to run the bundle's ONNX files that its manifest does not list, neither as rejected.

    A precision that has a file of its own is run from that one.
    """
    listed = (*bundle.manifest.rungs, *bundle.manifest.rejected)
    known = {(rung.backend, rung.precision, bundle.artifact(rung.artifact).length) for rung in listed}
    graphs = [artifact for artifact in bundle.manifest.artifacts if artifact.flavour == "onnx"]
    ways = [(artifact, artifact.precision) for artifact in graphs]
    fp32 = [artifact for artifact in graphs if artifact.precision == "fp32"]
    ways += [(a, p) for a in fp32 for name, p in sorted(_RUNS_FP32_GRAPH) if name == backend]
    rungs = []
    for artifact, precision in ways:
        way = (backend, precision, artifact.length)
        if way not in known:
            known.add(way)
            name = entry_name(*way, bundle.spec)
            rungs.append(Rung(name=name, backend=backend, precision=precision, artifact=artifact.name, gate="not-run"))
    return rungs


class _Opener:
    """Opens rungs of one bundle; a file that serves several rungs is hashed once."""

    def __init__(self, bundle: Bundle, threads: int | None, on_mismatch: OnMismatch) -> None:
        self._bundle = bundle
        self._threads = threads
        self._on_mismatch = on_mismatch
        self._verified: set[str] = set()

    def open(self, rung: Rung) -> Opened:
        if rung.backend in TENSORRT_BACKENDS:
            return self._open_tensorrt(rung)
        return Opened(self._open_onnx(rung), rung)

    def attempt(self, rung: Rung) -> Opened | str:
        """The opened rung, or why it can't run here."""
        try:
            return self.open(rung)
        except EngineMismatch as error:
            # A GPU engine that does not fit deserves more than a line in a report: the CPU may be 100 times slower.
            warnings.warn(f"rung '{rung.name}' is skipped: {error}", RuntimeWarning, stacklevel=4)
            return f"{rung.name}: {error}"
        except BackendUnavailable as error:
            return f"{rung.name}: {error}"

    def _open_onnx(self, rung: Rung) -> Backend:
        artifact = self._bundle.artifact(rung.artifact)
        path, spec = self._bundle.path(artifact), self._bundle.spec.with_length(artifact.length)
        if rung.backend == "openvino":
            from runtime.backends.openvino import OpenVinoBackend, check_available

            check_available(rung.precision)
            self._verify(artifact)
            return OpenVinoBackend.open(
                path, spec, precision=rung.precision, max_batch=artifact.max_batch, threads=self._threads
            )
        from runtime.backends.onnxruntime import Device, OnnxRuntimeBackend, load_library

        device: Device = "cuda" if rung.backend == "onnxruntime-cuda" else "cpu"
        load_library(device)
        self._verify(artifact)
        return OnnxRuntimeBackend.open(
            path,
            spec,
            device=device,
            precision=rung.precision,
            max_batch=artifact.max_batch,
            threads=self._threads,
        )

    def _open_tensorrt(self, rung: Rung) -> Opened:
        try:
            return self._open_engine(rung)
        except EngineMismatch as error:
            if self._on_mismatch == "onnx":
                return self._open_onnx_instead(rung, error)
            if self._on_mismatch == "error":
                raise
        self._bundle = rebuild_engine(self._bundle, self._bundle.artifact(rung.artifact))
        self._verified.clear()
        return self._open_engine(next(r for r in self._bundle.manifest.rungs if r.name == rung.name))

    def _open_engine(self, rung: Rung) -> Opened:
        """Raises EngineMismatch before the plan is read, or from the library, which knows best what it can run."""
        from runtime.backends.tensorrt.backend import TensorRTBackend, check_engine

        artifact = self._bundle.artifact(rung.artifact)
        check_engine(artifact)
        self._verify(artifact)
        spec = self._bundle.spec.with_length(artifact.length)
        return Opened(TensorRTBackend.open(self._bundle.path(artifact), artifact, spec), rung)

    def _open_onnx_instead(self, rung: Rung, mismatch: EngineMismatch) -> Opened:
        length = self._bundle.artifact(rung.artifact).length
        rungs = [r for r in matching_rungs(self._bundle, length=length) if r.backend in ONNX_BACKENDS]
        rungs += _unlisted_rungs(self._bundle, "onnxruntime") if not rungs else []
        skipped = [f"{rung.name}: {mismatch}"]
        for other in rungs:
            opened = self.attempt(other)
            if isinstance(opened, Opened):
                warnings.warn(f"{mismatch}; running '{other.name}' instead", RuntimeWarning, stacklevel=5)
                return Opened(opened.backend, other, tuple(skipped))
            skipped.append(opened)
        reasons = "".join(f"\n  {line}" for line in skipped)
        raise BackendUnavailable(f"{self._bundle.folder}: no ONNX file of it can run instead:{reasons}") from mismatch

    def _verify(self, artifact: Artifact) -> None:
        if artifact.name not in self._verified:
            self._bundle.verify(artifact)
            self._verified.add(artifact.name)


def rebuild_engine(bundle: Bundle, artifact: Artifact) -> Bundle:
    """Build an engine of the bundle again for this machine, from the bundle's ONNX file, and read the bundle anew.

    Runs `export.rebuild` in a process of its own, because the runtime must not import the exporter. Raises
    BackendUnavailable with that command's output when it fails.
    """
    command = [*_REBUILD, str(bundle.folder), artifact.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shown = (done.stderr or done.stdout).strip()
        raise BackendUnavailable(f"building '{artifact.name}' again failed ({' '.join(command[1:])}):\n{shown}")
    return read_bundle(bundle.folder)


def _warned(opened: Opened) -> Opened:
    if opened.rung.gate != "passed":
        warnings.warn(
            f"rung '{opened.rung.name}' was never proven against the eager model; run 'ccnet verify BUNDLE' here",
            RuntimeWarning,
            stacklevel=4,
        )
    return opened


def _listing(bundle: Bundle) -> str:
    rungs: Sequence[Rung] = bundle.manifest.rungs
    found = [f"{r.backend} {r.precision} T={bundle.artifact(r.artifact).length} ({r.gate})" for r in rungs]
    return ", ".join(found) or "none"
