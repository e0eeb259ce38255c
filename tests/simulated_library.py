"""TensorRT 8.6 and CUDA as the simulation has them, with a builder, for processes that a test starts.

`shim(folder)` writes what makes every Python process with that folder on its path import them. Whatever the graph, the
builder builds the engine of `tensorrt_simulation`; for batches above `SLOW_BATCH` it takes longer than anybody waits.
"""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import tensorrt_simulation as simulation

VERSION = "8.6.1"
SLOW_BATCH = 8


def shim(folder: Path) -> Path:
    """Write the folder and return it."""
    folder.mkdir()
    here = str(Path(__file__).parent)
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {here!r})\nimport simulated_library\nsimulated_library.install()\n"
    )
    return folder


def install() -> None:
    """Put the library and the CUDA bindings where they are imported from."""
    sim = simulation.Simulation()
    runtime = simulation.bindings(sim)
    packages = {name: types.ModuleType(name) for name in ("cuda", "cuda.bindings")}
    packages["cuda.bindings"].__dict__["runtime"] = runtime
    sys.modules.update(packages | {"cuda.bindings.runtime": runtime, "tensorrt": library(sim)})


def library(sim: simulation.Simulation) -> Any:
    """Return what stands for `tensorrt`."""
    module = simulation.tensorrt_module(sim)
    module.__version__ = VERSION
    flags = ("FP16", "TF32", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")
    module.BuilderFlag = SimpleNamespace(**{name: name for name in flags})
    module.NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0)
    module.ProfilingVerbosity = SimpleNamespace(DETAILED=2)
    module.LayerInformationFormat = SimpleNamespace(JSON=1)
    module.TacticSource = SimpleNamespace(CUBLAS=0, CUBLAS_LT=1, CUDNN=2)
    module.Builder, module.OnnxParser = Builder, MagicMock()
    inspector = MagicMock()
    inspector.get_engine_information.return_value = "{}"
    extra: dict[str, Any] = {
        "num_layers": 3,
        "create_engine_inspector": lambda self: inspector,
        "create_execution_context_without_device_memory": lambda self: self.create_execution_context("user"),
    }
    for name, value in extra.items():
        setattr(simulation.Engine, name, value)
    return module


class Builder(MagicMock):
    """A builder whose networks have the inputs of `ENGINE_SPEC` and one layer."""

    def __init__(self, logger: Any, **_: Any) -> None:
        super().__init__()
        shapes = simulation.ENGINE_SPEC.input_shapes(1)
        tensors = [SimpleNamespace(name=name, shape=(-1, *shape[1:])) for name, shape in shapes.items()]
        output = MagicMock(dtype=simulation.DataType["FLOAT"])
        layer = MagicMock(get_output=lambda index: output)
        network = MagicMock(num_layers=1, num_inputs=3, get_layer=lambda i: layer, get_input=tensors.__getitem__)
        self.create_network.return_value = network
        config = self.create_builder_config.return_value
        config.get_tactic_sources.return_value = 0
        config.add_optimization_profile.return_value = 0
        config.get_timing_cache.return_value.serialize.return_value = b"timings"
        self.create_optimization_profile.return_value.set_shape = self._set_shape
        self.build_serialized_network = self._build

    def _get_child_mock(self, **kwargs: Any) -> MagicMock:
        return MagicMock(**kwargs)

    def _set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.largest = shapes[-1][0]

    def _build(self, network: Any, config: Any) -> memoryview:
        if self.largest > SLOW_BATCH:
            time.sleep(600)
        return memoryview(simulation.engine_bytes())
