"""Metrics of a server, in the text format of Prometheus, and the latencies that its page shows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.packages import import_package
from runtime.serving.batcher import Times

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 120.0, 600.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_REMEMBERED = 1000
"""Requests that `latencies` is about."""


class Metrics:
    """Counts and times of one server, in a registry of its own."""

    def __init__(
        self, queues: Callable[[], dict[str, int]], active: Callable[[], int], connections: Callable[[], int]
    ) -> None:
        """`queues`: requests that wait, by model. Raises MissingDependency."""
        prometheus: Any = import_package("prometheus_client", "ccnet serve", distribution="prometheus-client")
        self._prometheus = prometheus
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)

        def named(kind: str, name: str, text: str, *labels: str, **options: Any) -> Any:
            return getattr(prometheus, kind)(f"ccnet_{name}", text, labels, registry=self.registry, **options)

        self._requests = named("Counter", "requests", "Requests by route and status", "route", "status")
        self._errors = named("Counter", "errors", "Requests that were not answered with a result, by kind", "kind")
        self._seconds = named("Histogram", "request_seconds", "From headers to answer", "route", buckets=_SECONDS)
        self._stages = named("Histogram", "stage_seconds", "Stages of an inference", "stage", buckets=_SECONDS)
        self._batches = named("Histogram", "batch_rows", "Rows of the engine call of a request", buckets=_ROWS)
        named("Gauge", "requests_in_progress", "Requests that are not answered yet").set_function(active)
        named("Gauge", "connections", "Open connections").set_function(connections)
        waiting = named("Gauge", "queue_length", "Requests that wait for a batch", "model")
        for model in queues():
            waiting.labels(model).set_function(lambda model=model: queues()[model])
        self._latest: deque[float] = deque(maxlen=_REMEMBERED)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def error(self, kind: str) -> None:
        """Count an error; `kind`: the name of its class, or what happened."""
        self._errors.labels(kind).inc()

    def inference(self, times: Times, seconds: float) -> None:
        """Count a finished inference that took so long from its headers."""
        self._latest.append(seconds)
        self._batches.observe(times.batch)
        for stage, begin, end in (
            ("queue", times.submitted, times.taken),
            ("prepare", times.taken, times.engine),
            ("engine", times.engine, times.engine_done),
            ("finish", times.engine_done, times.finished),
        ):
            self._stages.labels(stage).observe(max(0.0, end - begin))

    def latencies(self) -> dict[str, float | int]:
        """Return milliseconds of the latest inferences: median, 99th percentile, and how many they are of."""
        latest = np.array(self._latest or (0.0,)) * 1e3
        median, high = np.percentile(latest, (50, 99)).tolist()
        return {"requests": len(self._latest), "p50_ms": round(median, 2), "p99_ms": round(high, 2)}

    def text(self) -> bytes:
        """Return the metrics in the text format."""
        exposition: bytes = self._prometheus.generate_latest(self.registry)
        return exposition
