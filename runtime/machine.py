"""Facts about this machine that a measurement must be read with, and memory in use.

What can't be found out (no GPU, no such file on this system) is None, never a guess.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import BackendUnavailable, EngineError, MissingDependency

_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
)
"""Instruction sets that decide which precision is fast."""

_LIBRARIES = (
    "ccnet",
    "numpy",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-rtx",
    "cuda-python",
)

_GPU_FIELDS = (
    "name",
    "compute_cap",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
    "mig.mode.current",
)


def machine_facts() -> dict[str, Any]:
    """Return processor, memory, system, library versions, load and GPUs of this machine, as JSON."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "cpu_flags": cpu_flags(),
        "memory_gib": memory_gib(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "libraries": library_versions(),
        "load_average": load_average(),
        "threads_env": {k: v for k, v in sorted(os.environ.items()) if k.endswith("_NUM_THREADS")},
        "gpus": gpus(),
        "gpu_processes": gpu_processes(),
    }


def machine_class(*, gpu: bool) -> str | None:
    """Return one line for the class of machines on which a speed can be compared; None where the GPU is not known.

    The GPU for engines that run on one, else processor, cores and instruction sets. It stands beside every speed in a
    bundle (`Engine.speed["machine"]`).
    """
    if gpu:
        return _gpu_name()
    return f"{cpu_model()}, {usable_cores()} cores, {' '.join(cpu_flags() or ['unknown instruction sets'])}"


def measured_here(speed: Mapping[str, Any], *, gpu: bool) -> bool:
    """Return whether a speed in a bundle is of this class of machine; where that is not known, it is not."""
    here = machine_class(gpu=gpu)
    return here is not None and speed.get("machine") == here


def _gpu_name() -> str | None:
    """Return the name of the GPU that engines run on.

    CUDA heeds CUDA_VISIBLE_DEVICES, numbers mixed GPUs in its own order and tells a MIG slice from a whole card;
    nvidia-smi does none of that and is asked only where the CUDA bindings are not installed: what CUDA_VISIBLE_DEVICES
    names first is looked up in its order.
    """
    from runtime.backends.tensorrt import cuda

    try:
        return cuda.probe().name
    except MissingDependency:
        return _name_of(os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip())
    except (BackendUnavailable, EngineError):
        return None


def _name_of(device: str) -> str | None:
    """Return the name of a GPU by its number or UUID, as CUDA_VISIBLE_DEVICES has them; None where it is not found."""
    if device.isdecimal():
        found = gpus() or []
        return found[int(device)]["name"] if int(device) < len(found) else None
    rows = _nvidia_smi("--query-gpu=uuid,name") or []
    names = [name for uuid, name, *_ in rows if device.startswith("GPU-") and uuid.startswith(device)]
    return names[0] if len(names) == 1 else None


def cpu_model() -> str | None:
    """Name of the processor as the system gives it."""
    return _cpuinfo().get("model name") or platform.processor() or None


def cpu_flags() -> list[str] | None:
    """Return those instruction sets of this processor that decide which precision is fast; None where unknown."""
    flags = _cpuinfo().get("flags")
    return None if flags is None else [name for name in _FLAGS if name in flags.split()]


def usable_cores() -> int:
    """Return how many cores this process may run on (affinity, not the number in the machine)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """Return the physical memory in GiB."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None


def load_average() -> list[float] | None:
    """Load of the last 1, 5 and 15 minutes: above the number of cores, timings are of a busy machine."""
    with contextlib.suppress(OSError, AttributeError):
        return [round(value, 2) for value in os.getloadavg()]
    return None


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that take part, by distribution name."""
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def gpus() -> list[dict[str, str]] | None:
    """Name, driver, memory and clocks of each GPU; None where nvidia-smi is absent or fails."""
    rows = _nvidia_smi(f"--query-gpu={','.join(_GPU_FIELDS)}")
    return None if rows is None else [dict(zip(_GPU_FIELDS, row, strict=False)) for row in rows]


def gpu_processes() -> list[dict[str, str]] | None:
    """Compute processes on the GPUs (this one included); None where nvidia-smi is absent or fails."""
    fields = ("pid", "process_name", "used_memory")
    rows = _nvidia_smi(f"--query-compute-apps={','.join(fields)}")
    return None if rows is None else [dict(zip(fields, row, strict=False)) for row in rows]


def peak_rss_bytes() -> int | None:
    """Return the largest resident set of this process so far, in bytes; None where the system does not tell.

    On Linux from VmHWM, because `ru_maxrss` of a freshly started process begins at its parent's peak.
    """
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def rss_bytes() -> int | None:
    """Return the resident set of this process now, in bytes; None where the system does not tell."""
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; empty on systems without it."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if not line.strip():
                break
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    return fields


def _nvidia_smi(query: str) -> list[list[str]] | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
