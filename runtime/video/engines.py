"""The engines of an extractor, one for each graph, chosen as a bundle's are."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.backends.graphs import GraphRunner
from runtime.backends.registry import REGISTRY, runs_on_gpu
from runtime.backends.select import open_engine
from runtime.bundle import Engine
from runtime.errors import BackendUnavailable
from runtime.video.extractor import GRAPHS, Extractor, GraphName


@dataclass(frozen=True)
class Engines:
    """A loaded engine for every graph."""

    runners: Mapping[GraphName, GraphRunner]
    chosen: Mapping[GraphName, Engine]

    @property
    def on_gpu(self) -> bool:
        """Whether the flow network, nine tenths of the work, runs on a GPU."""
        return runs_on_gpu(self.chosen["flow"].backend)

    def describe(self) -> dict[str, Any]:
        """Return each graph's engine, its status and library."""
        return {
            graph: {"engine": self.chosen[graph].name, "status": self.chosen[graph].status, **runner.describe()}
            for graph, runner in self.runners.items()
        }

    def close(self) -> None:
        """Close all of them."""
        with contextlib.ExitStack() as stack:
            for runner in self.runners.values():
                stack.callback(runner.close)


def open_engines(
    extractor: Extractor, backend: str = "auto", *, precision: str | None = None, threads: int | None = None
) -> Engines:
    """Check the files of an extractor and load an engine for each graph; raises as `select.open_engine`."""
    runners: dict[GraphName, GraphRunner] = {}
    chosen: dict[GraphName, Engine] = {}
    try:
        for graph in GRAPHS:
            opened = open_engine(
                extractor.of_graph(graph), backend, precision=precision, threads=threads, load=load_graph
            )
            runners[graph], chosen[graph] = opened.backend, opened.engine
    except BaseException:
        Engines(runners, chosen).close()
        raise
    return Engines(runners, chosen)


def load_graph(extractor: Extractor, engine: Engine, *, threads: int | None = None) -> GraphRunner:
    """Check the files of one engine and load it, verified or not; raises as `select.load_engine`."""
    model_file = extractor.model_file(engine.model_file)
    registration = REGISTRY[engine.backend]
    if registration.format != "onnx":
        raise BackendUnavailable(
            f"engine '{engine.name}': extractors run from ONNX files, not as {registration.format}"
        )
    module = registration.load()
    module.check_engine(engine.backend, model_file, engine.precision)
    graph = next(graph for graph in GRAPHS if engine.name.startswith(f"{graph}-"))
    tensors = extractor.spec.tensors(graph)
    with extractor.checked(model_file) as path:
        runner: GraphRunner = module.open_graph(engine.backend, path, model_file, tensors, engine.precision, threads)
    return runner
