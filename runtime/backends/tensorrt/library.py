"""The TensorRT library behind both formats: import, its one logger per process, and its data types.

`tensorrt` is full TensorRT (8.6, 10, 11), `tensorrt-rtx` is TensorRT for RTX. The two are separate libraries with
almost the same Python API, so everything above this file takes the module as a value, `trt`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import logging
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np

from runtime.errors import BackendUnavailable, EngineError
from runtime.packages import missing

TensorRTFormat = Literal["tensorrt", "tensorrt-rtx"]

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_NUMPY_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BOOL": np.bool_,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
}

_LAYERS = "Layers:"
"""Begins the message in which the builder of TensorRT for RTX lists the layers of a new engine, at VERBOSE."""

_log = logging.getLogger("runtime.tensorrt")
_loggers: dict[Any, tuple[Any, LibraryLog]] = {}
_loggers_lock = threading.Lock()


def load_library(format: TensorRTFormat) -> Any:
    """Import `tensorrt` or `tensorrt_rtx`.

    Raises MissingDependency when the package is not installed, BackendUnavailable when it is there but its shared
    libraries do not load, which is the usual state of a half-finished installation.
    """
    if format not in get_args(TensorRTFormat):
        raise BackendUnavailable(f"format: got {format!r}, expected one of {', '.join(_MODULES)}")
    module = _MODULES[format]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module:
            raise BackendUnavailable(f"{module} is installed but incomplete: {error}") from error
        raise missing(format, f"The {format} engine") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailable(
            f"{module} is installed but does not load: {error}. The CUDA libraries that it names must be on the "
            "loader's path (LD_LIBRARY_PATH); 'ccnet doctor' lists what is there"
        ) from error


def library_version(trt: Any) -> tuple[int, ...]:
    """Return (major, minor, ...) of the loaded library."""
    return tuple(int(part) for part in str(trt.__version__).split(".") if part.isdigit())


def check_driver(trt: Any, driver: str) -> None:
    """Raise BackendUnavailable when the library is built for a newer CUDA than the driver serves.

    `driver`: as in `cuda.Device`. The CUDA bindings can't tell: they bring a CUDA runtime of their own.
    """
    package, version = str(trt.__name__), str(trt.__version__)
    majors = [major for major in (11, 12, 13, 14) if _installed(f"{package}_cu{major}") == version]
    served = int(driver.partition(".")[0] or 0)
    if majors and served < min(majors):
        raise BackendUnavailable(
            f"{package} {version} is built for CUDA {min(majors)}, the driver serves CUDA {driver}: update the driver, "
            f"or install {package}_cu{served} in place of {package}_cu{min(majors)}"
        )


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def start(trt: Any, kind: Literal["Builder", "Runtime"]) -> Any:
    """Return a new `trt.Builder` or `trt.Runtime`.

    Raises BackendUnavailable when the library can't start CUDA. From 10 on it says so in its log alone and returns an
    object that ends the process when it is used, or freed: such an object is kept for good.
    """
    logger, log = library_logger(trt)
    made, failed = None, ""
    with log.collect() as messages:
        try:
            made = getattr(trt, kind)(logger)
        except TypeError as error:  # 8.6: "factory function returned nullptr"
            failed = f"  {error}\n"
    if failed or messages.of("INTERNAL_ERROR", "ERROR"):
        if made is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
        raise BackendUnavailable(f"{trt.__name__} {trt.__version__} does not start here:\n{failed}{messages.errors()}")
    return made


def numpy_type(data_type: Any) -> np.dtype[Any]:
    """Return the numpy type of a binding.

    Not `trt.nptype`: that of 8.6 names `np.bool`, which numpy 1.24 to 1.26 do not have.
    """
    if data_type.name not in _NUMPY_TYPES:
        raise EngineError(f"the engine has a binding of type {data_type.name}, which numpy can't hold; keep graph "
                          "inputs and outputs in float32, float16, bool or integers")  # fmt: skip
    return np.dtype(_NUMPY_TYPES[data_type.name])


class LibraryLog:
    """The newest log messages of a TensorRT library, from any thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._messages: deque[tuple[int, str, str]] = deque(maxlen=4000)
        self._count = 0
        self._lock = threading.Lock()

    def add(self, severity: str, text: str) -> None:
        """Keep a message and pass it on to `logging`, at DEBUG."""
        with self._lock:
            self._count += 1
            self._messages.append((self._count, severity, text))
        _log.debug("%s %s: %s", self.name, severity, text)

    @contextlib.contextmanager
    def collect(self) -> Iterator[Messages]:
        """Collect the messages that arrive while the block runs."""
        with self._lock:
            start = self._count
        messages = Messages()
        try:
            yield messages
        finally:
            with self._lock:
                messages.extend((severity, text) for number, severity, text in self._messages if number > start)


class Messages(list[tuple[str, str]]):
    """(severity, text) pairs, filled when the block of `LibraryLog.collect` ends."""

    def of(self, *severities: str) -> list[str]:
        """Return the distinct texts of these severities, in order."""
        return list(dict.fromkeys(text.strip() for severity, text in self if severity in severities))

    def layers(self) -> str:
        """Return the builder's listing of the engine's layers, empty where it gave none."""
        return next((text for _, text in self if text.startswith(_LAYERS)), "")

    def errors(self) -> str:
        """Return the library's own error text, one line each; its warnings where it gave no error."""
        lines = self.of("INTERNAL_ERROR", "ERROR") or self.of("WARNING")
        return "\n".join(f"  {line}" for line in lines[:20]) or "  (the library logged nothing)"


def library_logger(trt: Any) -> tuple[Any, LibraryLog]:
    """Return the logger to hand to `trt` and the log that it fills: one per library and process, never freed.

    Inside the library the logger is a singleton; a second one would be ignored.
    """
    with _loggers_lock:
        if trt not in _loggers:
            log = LibraryLog(str(trt.__name__))

            class Logger(trt.ILogger):  # type: ignore[misc]
                def __init__(self) -> None:
                    trt.ILogger.__init__(self)

                def log(self, severity: Any, msg: str) -> None:
                    if severity.name != "VERBOSE" or msg.startswith(_LAYERS):
                        log.add(severity.name, msg)

            _loggers[trt] = (Logger(), log)
        return _loggers[trt]
