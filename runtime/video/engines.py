"""The engines of an extractor, one for each graph, chosen as a bundle's are."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.backends.graphs import GraphRunner
from runtime.backends.registry import PRECISIONS, REGISTRY, runs_on_gpu
from runtime.backends.select import open_engine
from runtime.bundle import Engine
from runtime.video.extractor import GRAPHS, Extractor, GraphName, graph_of


@dataclass(frozen=True)
class Engines:
    """A loaded engine for every graph."""

    runners: Mapping[GraphName, GraphRunner]
    chosen: Mapping[GraphName, Engine]

    @property
    def on_gpu(self) -> bool:
        """Whether the flow network, nine tenths of the work, runs on a GPU."""
        return runs_on_gpu(self.chosen["flow"].backend)

    @property
    def precisions(self) -> dict[GraphName, str]:
        """The precision of each graph's engine."""
        return {graph: engine.precision for graph, engine in self.chosen.items()}

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
    """Check the files of an extractor and load an engine for each graph; raises as `select.open_engine`.

    Without `precision`, of the most exact one that each graph has: features of another one are for who asks for them.
    """
    runners: dict[GraphName, GraphRunner] = {}
    chosen: dict[GraphName, Engine] = {}
    try:
        for graph in GRAPHS:
            wanted = precision or _most_exact(extractor.engines(graph), backend)
            opened = open_engine(extractor.of_graph(graph), backend, precision=wanted, threads=threads, load=load_graph)
            runners[graph], chosen[graph] = opened.backend, opened.engine
    except BaseException:
        Engines(runners, chosen).close()
        raise
    return Engines(runners, chosen)


def _most_exact(engines: Sequence[Engine], backend: str) -> str | None:
    """Return the most exact precision among a graph's engines of a backend, or of all with `auto`; None without any."""
    held = {e.precision for e in engines if backend in ("auto", e.backend) and e.status != "failed"}
    return next((precision for precision in PRECISIONS if precision in held), None)


def load_graph(extractor: Extractor, engine: Engine, *, threads: int | None = None) -> GraphRunner:
    """Check the files of one engine and load it, verified or not; raises as `select.load_engine`."""
    model_file = extractor.model_file(engine.model_file)
    registration = REGISTRY[engine.backend]
    module = registration.load()
    module.check_engine(engine.backend, model_file, engine.precision)
    tensors = extractor.spec.tensors(graph_of(engine.name))
    with extractor.checked(model_file) as path:
        runner: GraphRunner = module.open_graph(engine.backend, path, model_file, tensors, engine.precision, threads)
    return runner
