"""The timing rules, on a clock that only moves when a candidate says so: nothing here depends on real time."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from runtime import machine
from runtime.profiling.timing import Ratio, Rules, Timing, measure, measure_interleaved, ratio, steady_rate


class Clock:
    """Stands in for `time.perf_counter_ns`."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def takes(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter_ns", clock)
    return clock


def candidate(clock: Clock, name: str, seconds: Iterator[float], log: list[str]) -> Callable[[], None]:
    def call() -> None:
        log.append(name)
        clock.takes(next(seconds))

    return call


def test_warm_up_and_measurement_reach_both_time_and_count(clock: Clock) -> None:
    log: list[str] = []
    call = candidate(clock, "a", itertools.repeat(0.1), log)
    by_time = measure(call, Rules(warmup_seconds=1.0, warmup_calls=2, seconds=2.0, calls=5))
    assert by_time.n == 20
    assert len(log) == 10 + 20

    log.clear()
    by_count = measure(call, Rules(warmup_seconds=0.0, warmup_calls=4, seconds=0.1, calls=7))
    assert by_count.n == 7
    assert len(log) == 4 + 7


def test_candidates_run_in_rounds_after_their_warm_up(clock: Clock) -> None:
    log: list[str] = []
    calls = {name: candidate(clock, name, itertools.repeat(0.01), log) for name in "abc"}
    timings = measure_interleaved(calls, Rules(warmup_seconds=0, warmup_calls=1, seconds=0, calls=3))
    assert "".join(log) == "abc" + "abcabcabc"
    assert [t.n for t in timings.values()] == [3, 3, 3]


def test_the_fast_candidate_decides_how_long_rounds_go_on(clock: Clock) -> None:
    calls = {
        "slow": candidate(clock, "slow", itertools.repeat(1.0), []),
        "fast": candidate(clock, "fast", itertools.repeat(0.125), []),
    }
    timings = measure_interleaved(calls, Rules(warmup_seconds=0, warmup_calls=0, seconds=1.0, calls=1))
    assert timings["fast"].n == timings["slow"].n == 8


def test_every_sample_is_kept(clock: Clock) -> None:
    seconds = [0.001] * 98 + [5.0, 0.0005]
    timed = measure(
        candidate(clock, "a", iter(seconds), []), Rules(warmup_seconds=0, warmup_calls=0, seconds=0, calls=100)
    )
    assert timed.seconds.tolist() == seconds
    summary = timed.summary()
    assert summary["max"] == 5000.0
    assert summary["min"] == 0.5
    assert summary["n"] == 100
    assert summary["mean"] == pytest.approx(np.mean(seconds) * 1e3)


def test_summary_percentiles_in_milliseconds() -> None:
    summary = Timing(np.arange(101) / 1e3).summary()
    assert [summary[k] for k in ("p50", "p90", "p95", "p99")] == pytest.approx([50, 90, 95, 99])


def test_ratio_is_taken_round_by_round(clock: Clock) -> None:
    # The machine gets ten times slower half way: means and medians of the two would mix the phases, pairs do not.
    load = [1.0] * 10 + [10.0] * 11
    a = Timing(np.array([0.3 * f for f in load]))
    b = Timing(np.array([0.1 * f for f in load]))
    got = ratio(a, b)
    assert got.median == pytest.approx(3.0)
    assert (got.low, got.high) == pytest.approx((3.0, 3.0))
    assert got.n == 21


def test_interval_covers_the_noise_and_is_reproducible() -> None:
    random = np.random.default_rng(3)
    a = Timing(2.0 * random.lognormal(sigma=0.2, size=60))
    b = Timing(random.lognormal(sigma=0.2, size=60))
    got = ratio(a, b)
    assert got == ratio(a, b)
    assert got.low < got.median < got.high
    assert got.low < 2.0 < got.high
    wide = ratio(Timing(a.seconds[:12]), Timing(b.seconds[:12]))
    assert wide.high - wide.low > got.high - got.low


def test_ratio_refuses_samples_of_different_runs() -> None:
    with pytest.raises(ValueError, match="one interleaved measurement"):
        ratio(Timing(np.ones(3)), Timing(np.ones(4)))


def test_ratio_text() -> None:
    assert str(Ratio(median=2.0, low=1.9, high=2.104, confidence=0.95, n=9)) == "2.00x [1.90, 2.10]"


def test_steady_rate_leaves_out_the_fill_of_the_pipeline(clock: Clock) -> None:
    def stream() -> Iterator[int]:
        clock.takes(100.0)  # nothing comes out until the pipeline is full
        for i in itertools.count():
            yield i
            clock.takes(0.25)

    rate = steady_rate(stream(), Rules(warmup_seconds=0.0, warmup_calls=3, seconds=10.0, calls=5))
    assert rate.per_second == pytest.approx(4.0)
    assert rate.results == 40


def test_steady_rate_of_a_stream_that_ends_too_soon(clock: Clock) -> None:
    with pytest.raises(ValueError, match="ended before"):
        steady_rate(iter(range(5)), Rules(warmup_seconds=0, warmup_calls=1, seconds=0, calls=9))


@pytest.mark.parametrize("bad", [{"calls": 0}, {"warmup_calls": -1}, {"seconds": -1.0}])
def test_rules_refuse_nonsense(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="timing rules"):
        Rules(**bad)  # type: ignore[arg-type]


def test_machine_facts_are_json_and_null_where_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi to be found
    facts = machine.machine_facts()
    assert facts["gpus"] is None
    assert facts["gpu_processes"] is None
    assert facts["cores"] >= 1
    assert facts["libraries"]["numpy"] == np.__version__


def test_nvidia_smi_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    class Done:
        stdout = "NVIDIA X, 9.0, 580.1, 100 MiB, 1980 MHz, 1980 MHz, 2619 MHz, 700.00 W, 30, Disabled\n"

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: Done())
    rows = machine.gpus()
    assert rows is not None
    assert rows[0]["name"] == "NVIDIA X"
    assert rows[0]["clocks.sm"] == "1980 MHz"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_peak_memory_of_a_fresh_process_is_its_own() -> None:
    ballast = np.ones(40_000_000)  # 320 MB here must not show up in the child's peak
    code = "from runtime.machine import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (machine.peak_rss_bytes() or 0) > ballast.nbytes
    assert 5e6 < int(done.stdout) < 150e6
