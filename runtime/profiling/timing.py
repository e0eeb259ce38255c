"""How anything in this project is timed: one set of rules for every benchmark.

- Warm-up lasts until both a time and a number of calls are reached, and so does the measurement.
- The clock is `time.perf_counter_ns`. Every sample is kept: no outlier is removed, no best of several runs is taken.
- Candidates that are compared run interleaved (A B C A B C ...), so that whatever else the machine does hits all of
  them; their ratio is taken round by round and given with a bootstrap confidence interval.
- Throughput is counted on a stream in which reading, inference and post-processing overlap; it is never 1 / latency.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Rules:
    """When to stop. Both limits of a pair must be reached, so a slow call runs at least `calls` times."""

    warmup_seconds: float = 0.5
    warmup_calls: int = 3
    seconds: float = 2.0
    """Measured time per candidate."""
    calls: int = 10
    """Measured calls per candidate, at least."""

    def __post_init__(self) -> None:
        if self.calls < 1 or self.warmup_calls < 0 or self.seconds < 0 or self.warmup_seconds < 0:
            raise ValueError(f"timing rules: got {self}, expected calls >= 1 and nothing negative")

    def to_json(self) -> dict[str, float]:
        return dict(vars(self))


@dataclass(frozen=True)
class Timing:
    """All measured samples of one candidate, in the order of measurement."""

    seconds: npt.NDArray[np.float64]
    """[n] seconds of each call."""

    @property
    def n(self) -> int:
        return len(self.seconds)

    @property
    def median(self) -> float:
        """The median in seconds."""
        return float(np.median(self.seconds))

    def summary(self) -> dict[str, float | int]:
        """Return p50, p90, p95, p99 (interpolated linearly), mean, min and max in milliseconds, and n."""
        ms = self.seconds * 1e3
        p50, p90, p95, p99 = (float(v) for v in np.percentile(ms, (50, 90, 95, 99)))
        spread = {"mean": float(ms.mean()), "min": float(ms.min()), "max": float(ms.max())}
        return {"p50": p50, "p90": p90, "p95": p95, "p99": p99, **spread, "n": self.n}


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The time of A in times of B: median over the rounds, with a confidence interval."""

    median: float
    low: float
    high: float
    confidence: float
    n: int
    """Rounds, that is pairs of neighbouring samples."""

    def to_json(self) -> dict[str, float | int]:
        return dict(vars(self))

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Results per second in the steady state of a stream."""

    per_second: float
    results: int
    """Results counted."""
    seconds: float
    """Time over which they were counted."""


def measure(call: Callable[[], Any], rules: Rules | None = None) -> Timing:
    """Time `call` alone, by the rules."""
    return measure_interleaved({"": call}, rules)[""]


def measure_interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    rules: Rules | None = None,
    *,
    after_round: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Time several candidates in rounds; sample i of all of them belongs to round i.

    Every candidate is warmed up first. Rounds go on until every candidate has been measured for `rules.seconds` and
    `rules.calls`. `after_round` is called with the number of rounds done, outside the measured time.
    """
    rules = rules or Rules()
    if not candidates:
        raise ValueError("nothing to measure: no candidates")
    for call in candidates.values():
        _warm_up(call, rules)
    samples: dict[str, list[int]] = {name: [] for name in candidates}
    totals = dict.fromkeys(candidates, 0)
    rounds = 0
    while rounds < rules.calls or min(totals.values()) < rules.seconds * 1e9:
        for name, call in candidates.items():
            begin = time.perf_counter_ns()
            call()
            elapsed = time.perf_counter_ns() - begin
            samples[name].append(elapsed)
            totals[name] += elapsed
        rounds += 1
        if after_round is not None:
            after_round(rounds)
    return {name: Timing(np.asarray(values, np.float64) / 1e9) for name, values in samples.items()}


def _warm_up(call: Callable[[], Any], rules: Rules) -> None:
    begin = time.perf_counter_ns()
    calls = 0
    while calls < rules.warmup_calls or time.perf_counter_ns() - begin < rules.warmup_seconds * 1e9:
        call()
        calls += 1


def ratio(a: Timing, b: Timing, *, confidence: float = 0.95) -> Ratio:
    """Return how many times as long `a` takes as `b`, from samples measured in the same rounds.

    The median of the pairwise ratios, with the percentile bootstrap interval of that median (fixed seed, so the same
    samples give the same interval). Raises ValueError when the two do not come from the same rounds.
    """
    if a.n != b.n or a.n == 0:
        raise ValueError(f"ratio: got {a.n} and {b.n} samples; expected two candidates of one interleaved measurement")
    pairs = a.seconds / b.seconds
    picks = np.random.default_rng(0).integers(0, a.n, size=(_RESAMPLES, a.n))
    medians = np.median(pairs[picks], axis=1)
    tail = (1 - confidence) / 2
    low, high = (float(v) for v in np.quantile(medians, (tail, 1 - tail)))
    return Ratio(median=float(np.median(pairs)), low=low, high=high, confidence=confidence, n=a.n)


def steady_rate(results: Iterator[Any], rules: Rules | None = None) -> Rate:
    """Count the results per second of a stream whose stages overlap.

    The first results fill the pipeline and are not counted (`warmup_seconds`, `warmup_calls`, at least one); counting
    starts when the last of them is there, so the rate is taken between two results. The stream must be long enough,
    best endless. Raises ValueError when it ends before the rules are met.
    """
    rules = rules or Rules()
    begin = time.perf_counter_ns()
    for _ in range(max(rules.warmup_calls, 1)):
        _next(results)
    while time.perf_counter_ns() - begin < rules.warmup_seconds * 1e9:
        _next(results)
    begin = now = time.perf_counter_ns()
    count = 0
    while count < rules.calls or now - begin < rules.seconds * 1e9:
        _next(results)
        count += 1
        now = time.perf_counter_ns()
    elapsed = (now - begin) / 1e9
    return Rate(per_second=count / elapsed, results=count, seconds=elapsed)


def _next(results: Iterator[Any]) -> None:
    try:
        next(results)
    except StopIteration:
        raise ValueError("steady_rate: the stream ended before enough results were counted") from None
