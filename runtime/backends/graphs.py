"""Loaded graphs of any named tensors: what the extractors' networks are run through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.base import Float32
from runtime.errors import BundleError, EngineError
from runtime.spec import GraphTensors

Run = Callable[[Mapping[str, Float32]], Mapping[str, Float32]]


class GraphRunner:
    """A loaded graph. One `run` at a time."""

    def __init__(
        self,
        name: str,
        precision: str,
        tensors: GraphTensors,
        run: Run,
        facts: Mapping[str, Any],
        close: Callable[[], None] | None = None,
    ) -> None:
        """Use `open_graph` of a backend's module. `name`: the backend's."""
        self.name, self.precision, self.tensors = name, precision, tensors
        self._run: Run | None = run
        self._facts, self._close = facts, close

    def run(self, *inputs: Float32) -> tuple[Float32, ...]:
        """Run the graph on float32 arrays, in the order of `tensors.inputs`; return those of `tensors.outputs`.

        Raises EngineError when the engine fails or is closed, or an array has another shape than the graph takes.
        """
        if self._run is None:
            raise EngineError(f"{self.name}: the graph is closed")
        named = dict(zip(self.tensors.inputs, inputs, strict=True))
        for name, shape in self.tensors.inputs.items():
            found = named[name].shape
            fixed = [(i, extent) for i, extent in enumerate(shape) if isinstance(extent, int)]
            if len(found) != len(shape) or any(found[i] != extent for i, extent in fixed):
                raise EngineError(f"{self.name}: '{name}' is {list(found)}, the graph takes {list(shape)}")
        try:
            outputs = self._run({name: np.ascontiguousarray(array, np.float32) for name, array in named.items()})
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"{self.name}: {error}") from error
        return tuple(outputs[name].astype(np.float32, copy=False) for name in self.tensors.outputs)

    def describe(self) -> dict[str, Any]:
        """Return backend, precision, library and version."""
        return {"backend": self.name, "precision": self.precision, **self._facts}

    def close(self) -> None:
        """Release the graph. Safe to call twice."""
        if self._run is not None:
            self._run = None
            if self._close is not None:
                self._close()


def check_names(path: Path, inputs: Sequence[str], outputs: Sequence[str], tensors: GraphTensors) -> None:
    """Raise BundleError when a file's inputs and outputs are not those that the manifest implies."""
    for kind, found, expected in (("inputs", inputs, tensors.inputs), ("outputs", outputs, tensors.outputs)):
        if set(found) != set(expected):
            raise BundleError(f"{path}: its {kind} are {sorted(found)}, expected {sorted(expected)}")
