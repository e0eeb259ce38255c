"""Optional packages: the one table of which pip extra brings which, and the error when one is missing."""

from __future__ import annotations

import importlib
from typing import Any

from runtime.errors import BackendUnavailable, MissingDependency

EXTRAS = {
    "torch": "train",
    "safetensors": "train",
    "tensorboard": "train",
    "matplotlib": "show",
    "tqdm": "train",
    "pyyaml": "train",
    "tomli": "train",
    "onnx": "export",
    "onnxscript": "export",
    "polygraphy": "export",
    "onnxruntime": "cpu",
    "onnxruntime-gpu": "gpu",
    "openvino": "openvino",
    "tensorrt": "gpu",
    "tensorrt-rtx": "rtx",
    "cuda-python": "gpu",
    "pyarrow": "parquet",
    "starlette": "serve",
    "uvicorn": "serve",
    "python-multipart": "serve",
    "prometheus-client": "serve",
    "httptools": "serve",
    "ray": "ray",
    "tritonclient": "triton",
    "fsspec": "remote",
    "av": "video",
    "pillow": "video",
    "argcomplete": "completion",
}
"""Distribution -> extra."""

_DISTRIBUTIONS = {"tensorrt_rtx": "tensorrt-rtx", "cuda": "cuda-python", "torch.utils.tensorboard": "tensorboard"}


def import_package(module: str, purpose: str, *, distribution: str | None = None) -> Any:
    """Import an optional package. Raises MissingDependency naming the extra to install when it is not there.

    Raises BackendUnavailable when it is there and does not load, as in a half-finished installation.

    `purpose` begins the message: "Training", "The OpenVINO backend". `distribution`: where it can't be told from the
    module, as for the two of ONNX Runtime.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == module
        if absent:
            raise missing(distribution or module, purpose) from error
        raise BackendUnavailable(f"{purpose}: {module} is installed but does not load: {error}") from error


def missing(distribution: str, purpose: str) -> MissingDependency:
    """Return the error for a package that is not installed."""
    return MissingDependency(distribution, EXTRAS[distribution], purpose)


def distribution_of(module: str | None) -> str | None:
    """Return the distribution of `EXTRAS` that brings a module, or None."""
    root = (module or "").partition(".")[0]
    distribution = _DISTRIBUTIONS.get(module or "", _DISTRIBUTIONS.get(root, root))
    return distribution if distribution in EXTRAS else None
