"""How fast are suppression and metric beside plain NumPy, and what does the first call cost?

`python -m benchmarks.postprocessing [--out DIR]`

Candidates are generated: 2,500 and 9,000 a video, in 100 classes, with scores and lengths spread like recorded ones; so
are predictions and ground truth, as many as the test subset of UnAV-100 has.

Shapes:  N candidates, predictions or events
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.postprocessing_peers import plain_average_precision, plain_soft_nms
from benchmarks.results import RESULTS, Measurement, markdown_table, write_result
from ccnet.cli.logs import reporting
from runtime.average_precision import average_precision
from runtime.evaluation import TIOU
from runtime.machine import machine_facts
from runtime.profiling.timing import Ratio, Rules, Timing, measure, measure_interleaved, ratio
from runtime.suppression import suppress

log = logging.getLogger("benchmarks")

CLASSES = 100
SIZES = (2500, 9000)
"""Candidates per video."""
TEST_VIDEOS, TEST_EVENTS, PER_VIDEO = 2_167, 6_050, 100
"""Of the test subset, and predictions per video: 216,700 in all."""
FIRST_CALLS = 5
"""Fresh processes per first-call measurement."""

Array = npt.NDArray[Any]
Arrays = tuple[Array, ...]


@dataclass(frozen=True)
class Compared:
    """The times of one piece of work, ours and plain NumPy's."""

    alone: Timing
    """Ours, call after call: what a run over many recorded videos costs, with everything in the cache."""
    ours: Timing
    """Ours in rounds with the peer, whose arrays have emptied the cache: what a call between two inferences costs."""
    plain: Timing
    ratio: Ratio
    """Plain over ours, in rounds."""


_FIRST_CALL = """
import json, time
import numpy as np
from runtime.average_precision import average_precision
from runtime.suppression import suppress
ready = time.perf_counter()
suppress([[0, 1]], [0.5], [0])
suppressed = time.perf_counter()
average_precision([0], [[0, 1]], [0.5], [0], [0], [[0, 1]], [0], 1, [0.5])
scored = time.perf_counter()
print(json.dumps({"suppress": suppressed - ready, "average_precision": scored - suppressed}))
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.postprocessing", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--calls", type=int, default=100, help="measured calls per video-sized measurement")
    options = parser.parse_args(argv)
    with reporting():
        print(run(options.out, options.calls))
    return 0


def run(out: Path, calls: int) -> Path:
    """Measure, write `postprocessing.json` and `.md`; returns the JSON's path."""
    machine = machine_facts()
    rows: dict[str, Compared] = {}
    for size in SIZES:
        log.info("suppression of %d candidates", size)
        found = candidates(size, seed=size)
        rows[f"suppression, {size:,} candidates"] = against_peer(
            partial(suppress, *found),
            partial(plain_soft_nms, *found, sigma=0.4, min_score=0.001, max_segments=100),
            Rules(seconds=0, calls=calls),
        )
    log.info("metric")
    predicted, truth = metric_case()
    rows[f"metric, {len(predicted[0]):,} predictions"] = against_peer(
        lambda: average_precision(*predicted, *truth, CLASSES, TIOU),
        lambda: plain_average_precision(*predicted, *truth, CLASSES, np.array(TIOU)),
        Rules(warmup_seconds=0, warmup_calls=1, seconds=0, calls=5),
    )
    log.info("first calls")
    first = first_calls()
    medians = {name: row.alone.median * 1e3 for name, row in rows.items()}
    medians |= {f"{name}, in rounds": row.ours.median * 1e3 for name, row in rows.items()}
    medians |= {name: float(np.median(seconds)) * 1e3 for name, seconds in first.items()}
    return write_result(
        out,
        "postprocessing",
        measurements=[Measurement(name=f"{name} / p50", value=ms, unit="ms") for name, ms in medians.items()],
        page=page(rows, first),
        machine=machine,
        against_plain_numpy={
            name: {
                "alone_ms": row.alone.summary(),
                "ours_ms": row.ours.summary(),
                "plain_ms": row.plain.summary(),
                "plain_over_ours": row.ratio.to_json(),
            }
            for name, row in rows.items()
        },
        first_call_seconds=first,
    )


def against_peer(ours: Callable[[], Any], plain: Callable[[], Any], rules: Rules) -> Compared:
    """Time ours alone, then both in rounds. Refuses to time results that differ."""
    mine, other = ours(), plain()
    for a, b in zip(mine, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    alone = measure(ours, rules)
    timings = measure_interleaved({"ours": ours, "plain": plain}, rules)
    return Compared(alone, timings["ours"], timings["plain"], ratio(timings["plain"], timings["ours"]))


def candidates(count: int, seed: int) -> Arrays:
    """Generate segments [N, 2], scores [N] and labels [N] of one video on a grid of 224 steps."""
    generator = np.random.default_rng(seed)
    centre, length = generator.uniform(0, 224, count), generator.gamma(1.6, 17, count)
    segments = np.stack([centre - length / 2, centre + length / 2], axis=1).astype(np.float32)
    return segments, generator.beta(0.65, 6.4, count).astype(np.float32), generator.integers(0, CLASSES, count)


def metric_case() -> tuple[tuple[Array, Array, Array, Array], tuple[Array, Array, Array]]:
    """Generate predictions (video, segments, scores, labels) and ground truth (video, segments, labels).

    A third of the predictions lie near an event of their class, as a trained network's do.
    """
    generator = np.random.default_rng(0)
    gt_video = np.sort(generator.integers(0, TEST_VIDEOS, TEST_EVENTS))
    start, length = generator.uniform(0, 50, TEST_EVENTS), generator.gamma(1.5, 6, TEST_EVENTS) + 0.3
    gt_segments = np.stack([start, start + length], axis=1)
    gt_labels = generator.integers(0, CLASSES, TEST_EVENTS)
    count = TEST_VIDEOS * PER_VIDEO
    video, labels = np.repeat(np.arange(TEST_VIDEOS), PER_VIDEO), generator.integers(0, CLASSES, count)
    start, length = generator.uniform(0, 50, count), generator.gamma(1.5, 6, count) + 0.3
    segments = np.stack([start, start + length], axis=1)
    near, event = generator.choice(count, count // 3, replace=False), generator.integers(0, len(gt_video), count // 3)
    video[near], labels[near] = gt_video[event], gt_labels[event]
    segments[near] = np.sort(gt_segments[event] + generator.normal(0, 0.7, (len(near), 2)), axis=1)
    return (video, segments, generator.uniform(0, 1, count), labels), (gt_video, gt_segments, gt_labels)


def first_calls() -> dict[str, list[float]]:
    """Measure the seconds of the first call, each in a fresh process."""
    results: dict[str, list[float]] = {}
    for _ in range(FIRST_CALLS):
        done = subprocess.run([sys.executable, "-c", _FIRST_CALL], capture_output=True, text=True, check=True)
        for name, seconds in json.loads(done.stdout).items():
            results.setdefault(f"first {name} call", []).append(seconds)
    return results


def page(rows: Mapping[str, Compared], first: Mapping[str, list[float]]) -> str:
    """Write the Markdown page."""
    compared = [
        [
            name,
            *(f"{timing.median * 1e3:.3f}" for timing in (row.alone, row.ours)),
            f"{row.plain.median * 1e3:.1f}",
            str(row.ours.n),
            str(row.ratio),
        ]
        for name, row in rows.items()
    ]
    started = [[name, f"{np.median(values) * 1e3:.1f}", str(len(values))] for name, values in first.items()]
    return "\n\n".join(
        [
            "# Suppression and metric",
            "Medians. Plain NumPy is the same rules written down in the shortest way "
            "(`benchmarks/postprocessing_peers.py`); results were compared before timing. *Alone* is call after call, "
            "*in rounds* alternates with the peer, whose arrays leave nothing of ours in the cache.",
            markdown_table(("", "alone, ms", "in rounds, ms", "plain NumPy, ms", "n", "plain / ours"), compared),
            "The first call in a fresh process, which loads the compiled kernels.",
            markdown_table(("", "ms", "n"), started),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
