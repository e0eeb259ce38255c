"""Bundle -> Triton model repository: the network, post-processing, and an ensemble over both.

    REPOSITORY/ccnet_network/      config.pbtxt   1/model.onnx (+ model.onnx.data) or 1/model.plan
    REPOSITORY/ccnet_events/       config.pbtxt   1/model.py, 1/spec.json
    REPOSITORY/ccnet/              config.pbtxt   1/

The ensemble takes padded features, valid steps and duration of each video, and gives its events.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.backends.registry import REGISTRY
from runtime.bundle import Bundle, Engine, Format, ModelFile
from runtime.errors import BackendUnavailable, BundleError, ConfigError
from runtime.files import write_json
from runtime.folders import atomic_folder
from runtime.schema import require, show
from runtime.spec import INPUT_TYPES, LENGTHS, ModelSpec
from runtime.triton.config import DataType, Kind, ServedModel, Step, TensorConfig
from runtime.triton.model import DURATION, SPEC_FILE

_TYPES: Mapping[type[np.generic], DataType] = {np.float32: "TYPE_FP32", np.int32: "TYPE_INT32"}
_BACKENDS: Mapping[Format, tuple[str, str]] = {
    "onnx": ("onnxruntime", "model.onnx"),
    "tensorrt": ("tensorrt", "model.plan"),
}
"""Format -> Triton's backend, and the name that it gives its file."""
MODEL_PY = '''"""Post-processing of ccnet; the package is installed in the container."""

from runtime.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
TENSORRT_VERSION, COMPUTE_CAPABILITIES = "tensorrt_version", "compute_capabilities"
"""Parameters of a plan's configuration: what built it, and for which GPUs."""


@dataclass(frozen=True, kw_only=True)
class RepositoryOptions:
    """What a repository is to be like."""

    name: str = "ccnet"
    format: Format = "onnx"
    precision: str = "fp32"
    kind: Kind | None = None
    """Where the network runs; None: a plan on GPUs, a graph on GPUs where there are any."""
    instances: int = 1
    """Of the network on each device, and of post-processing."""
    queue_delay_us: int = 2000
    """Longest wait of a request for others to share its batch, in microseconds."""

    def __post_init__(self) -> None:
        good = re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", self.name) is not None
        require(good, "name", self.name, "a letter, then letters, digits, - and _")
        require(self.instances >= 1, "instances", self.instances, "an integer >= 1")
        require(0 <= self.queue_delay_us <= 10_000_000, "queue delay", self.queue_delay_us, "0 to 10,000,000 us")
        if self.format not in _BACKENDS:
            raise ConfigError(
                f"format: got {show(self.format)}, expected {' or '.join(_BACKENDS)}: Triton has no other"
            )
        if self.format == "tensorrt" and self.kind == "KIND_CPU":
            raise ConfigError("a TensorRT plan runs on a GPU; use --format onnx on a CPU")


def find_engine(bundle: Bundle, options: RepositoryOptions) -> Engine:
    """Return the engine whose file goes into the repository, a verified one first.

    Raises BackendUnavailable when the bundle has none of this format and precision that may be run.
    """
    fitting = [
        engine
        for engine in bundle.manifest.engines
        if engine.backend in REGISTRY
        and REGISTRY[engine.backend].format == options.format
        and bundle.model_file(engine.model_file).precision == options.precision
        and engine.precision == options.precision
    ]
    usable = [engine for engine in fitting if engine.status != "failed"]
    if not usable:
        held = ", ".join(f"{m.format} {m.precision}" for m in bundle.manifest.model_files)
        why = "; what failed the parity check is not served" if fitting else ""
        raise BackendUnavailable(
            f"{bundle.folder}: no {options.format} file in {options.precision}; it has: {held or 'none'}{why}"
        )
    return min(usable, key=lambda engine: engine.status != "verified")


def write_repository(bundle: Bundle, out: str | Path, options: RepositoryOptions) -> tuple[ServedModel, ...]:
    """Write the three models into the folder `out`, whole or not at all; an earlier repository there is replaced.

    Raises BundleError when a file of the bundle is damaged or `out` holds something else, BackendUnavailable as
    `find_engine`.
    """
    out = Path(out)
    model_file = bundle.model_file(find_engine(bundle, options).model_file)
    bundle.verify(model_file)
    models = served_models(bundle.spec, model_file, options)
    _refuse_foreign_folder(out)
    with atomic_folder(out) as partial:
        for model in models:
            folder = partial / model.name
            (folder / "1").mkdir(parents=True)
            (folder / "config.pbtxt").write_text(model.text(), encoding="ascii")
        network, events, _ = models
        first, *others = model_file.files
        shutil.copyfile(bundle.folder / first, partial / network.name / "1" / network.file)
        for name in others:  # external weights, which the graph knows by their name
            shutil.copyfile(bundle.folder / name, partial / network.name / "1" / name)
        (partial / events.name / "1" / "model.py").write_text(MODEL_PY, encoding="ascii")
        write_json(partial / events.name / "1" / SPEC_FILE, bundle.spec.to_json())
    return models


def served_models(spec: ModelSpec, model_file: ModelFile, options: RepositoryOptions) -> tuple[ServedModel, ...]:
    """Return network, post-processing and ensemble."""
    batch = model_file.max_batch
    network_inputs = tuple(
        TensorConfig(
            name=name, data_type=_TYPES[INPUT_TYPES[name]], dims=shape[1:] or (1,), reshape=None if shape[1:] else ()
        )
        for name, shape in spec.input_shapes(1).items()
    )
    outputs = tuple(
        TensorConfig(name=name, data_type="TYPE_FP32", dims=shape[1:]) for name, shape in spec.output_shapes(1).items()
    )
    lengths = TensorConfig(name=LENGTHS, data_type="TYPE_INT32", dims=(1,))
    duration = TensorConfig(name=DURATION, data_type="TYPE_FP64", dims=(1,))
    most = spec.post.max_segments
    found = (
        TensorConfig(name="segments", data_type="TYPE_FP64", dims=(most, 2)),
        TensorConfig(name="scores", data_type="TYPE_FP32", dims=(most,)),
        TensorConfig(name="labels", data_type="TYPE_INT64", dims=(most,)),
        TensorConfig(name="count", data_type="TYPE_INT32", dims=(1,)),
    )
    backend, file = _BACKENDS[model_file.format]
    network = ServedModel(
        name=f"{options.name}_network",
        max_batch=batch,
        inputs=network_inputs,
        outputs=outputs,
        backend=backend,
        file=file,
        kind=options.kind or ("KIND_GPU" if model_file.format == "tensorrt" else "KIND_AUTO"),
        instances=options.instances,
        queue_delay_us=options.queue_delay_us,
        warm_up=tuple(sorted({1, batch})),
        parameters=_built_with(model_file),
    )
    events = ServedModel(
        name=f"{options.name}_events",
        max_batch=batch,
        inputs=(*outputs, lengths, duration),
        outputs=found,
        backend="python",
        file="model.py",
        kind="KIND_CPU",
        instances=options.instances,
        queue_delay_us=0,
    )
    same = {tensor.name: tensor.name for tensor in (*network_inputs, *outputs, duration, *found)}
    ensemble = ServedModel(
        name=options.name,
        max_batch=batch,
        inputs=(*(t for t in network_inputs if t.name != LENGTHS), lengths, duration),
        outputs=found,
        steps=tuple(
            Step(
                model=model.name,
                inputs={tensor.name: same[tensor.name] for tensor in model.inputs},
                outputs={tensor.name: same[tensor.name] for tensor in model.outputs},
            )
            for model in (network, events)
        ),
    )
    return network, events, ensemble


def _built_with(model_file: ModelFile) -> dict[str, str]:
    if model_file.format != "tensorrt":
        return {}
    return {
        TENSORRT_VERSION: model_file.library_version or "",
        COMPUTE_CAPABILITIES: ",".join(model_file.compute_capabilities),
    }


def _refuse_foreign_folder(out: Path) -> None:
    """Raise BundleError where `out` holds something that is not a model repository and that would be deleted."""
    if not out.exists():
        return
    strangers = [p.name for p in out.iterdir() if not (p / "config.pbtxt").is_file()] if out.is_dir() else [out.name]
    if strangers:
        raise BundleError(
            f"{out}: holds {show(strangers[0])}, which is no model of Triton, so it is not replaced; choose another "
            "folder"
        )
