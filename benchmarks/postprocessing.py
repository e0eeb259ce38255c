"""Suppression and metric: time per video and per test split, beside plain NumPy, and the cost of the first call.

`python -m benchmarks.postprocessing [--annotations F] [--cases F.npz] [--out DIR]`

Candidates are generated: 2,500 and 9,000 a video, in 100 classes, with scores and lengths spread like those of the
recorded cases that `--cases` takes instead (arrays `<name>/in_segments`, `in_scores`, `in_labels`). `--annotations`
takes the ground truth of the test subset from a real file; without it one of the same size is generated.
"""

from __future__ import annotations

import argparse
import json
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
from runtime.annotations import read_annotations
from runtime.average_precision import average_precision
from runtime.evaluation import TIOU
from runtime.machine import machine_facts
from runtime.postprocess import detect
from runtime.profiling.timing import Ratio, Rules, Timing, measure, measure_interleaved, ratio
from runtime.spec import ModelSpec, PostProcessing
from runtime.suppression import suppress

CLASSES = 100
SIZES = (2500, 9000)
"""Candidates per video."""
PER_VIDEO = 100
"""Predictions per test video in the metric benchmark: 2,167 videos make 216,700."""
FIRST_CALLS = 5
"""Fresh processes per first-call measurement."""

Array = npt.NDArray[Any]
Arrays = tuple[Array, ...]


@dataclass(frozen=True)
class Compared:
    """One piece of work, ours and plain NumPy's."""

    alone: Timing
    """Ours, call after call: what a run over many recorded videos costs, with everything in the cache."""
    ours: Timing
    """Ours in rounds with the peer, whose arrays have emptied the cache: what a call between two inferences costs."""
    plain: Timing
    ratio: Ratio
    """Plain over ours, in rounds."""


_FIRST_CALL = """
import json, time
begin = time.perf_counter()
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
    parser.add_argument("--annotations", type=Path, help="annotation file for the metric (default: generated)")
    parser.add_argument("--cases", type=Path, help=".npz of recorded candidates (default: generated)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--calls", type=int, default=100, help="measured calls per video-sized measurement")
    options = parser.parse_args(argv)
    machine = machine_facts()
    rows: dict[str, Compared] = {}
    for name, candidates in suppression_cases(options.cases).items():
        print(f"suppression, {name} ...", flush=True)
        rows[f"suppression, {name}"] = against_peer(
            partial(suppress, *candidates),
            partial(plain_soft_nms, *candidates, sigma=0.4, min_score=0.001, max_segments=100),
            Rules(seconds=0, calls=options.calls),
        )
    print("metric ...", flush=True)
    pred, gt = metric_case(options.annotations)
    rows[f"metric, {len(pred[0]):,} predictions"] = against_peer(
        lambda: average_precision(*pred, *gt, CLASSES, TIOU),
        lambda: plain_average_precision(*pred, *gt, CLASSES, np.array(TIOU)),
        Rules(warmup_seconds=0, warmup_calls=1, seconds=0, calls=5),
    )
    whole = whole_walk(Rules(seconds=0, calls=options.calls))
    print("first calls ...", flush=True)
    first = first_calls()
    path = write_result(
        options.out,
        "postprocessing",
        measurements=[
            *(Measurement(name=f"{name} / p50", value=r.alone.median * 1e3, unit="ms") for name, r in rows.items()),
            *(
                Measurement(name=f"{name}, in rounds / p50", value=r.ours.median * 1e3, unit="ms")
                for name, r in rows.items()
            ),
            *(Measurement(name=f"{name} / p50", value=t.median * 1e3, unit="ms") for name, t in whole.items()),
            *(Measurement(name=f"{name} / p50", value=float(np.median(v)), unit="s") for name, v in first.items()),
        ],
        page=page(rows, whole, first),
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
        whole_walk_ms={name: timing.summary() for name, timing in whole.items()},
        first_call_seconds=first,
        ground_truth="from a file" if options.annotations else "generated",
        candidates="recorded" if options.cases else "generated",
    )
    print(path)
    return 0


def against_peer(ours: Callable[[], Any], plain: Callable[[], Any], rules: Rules) -> Compared:
    """Ours alone, then both in rounds. Refuses to time results that differ."""
    mine, other = ours(), plain()
    for a, b in zip(mine, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    alone = measure(ours, rules)
    timings = measure_interleaved({"ours": ours, "plain": plain}, rules)
    return Compared(alone, timings["ours"], timings["plain"], ratio(timings["plain"], timings["ours"]))


def suppression_cases(recorded: Path | None) -> dict[str, Arrays]:
    """Candidates by name: segments [N, 2], scores [N], labels [N]."""
    if recorded is None:
        return {f"{size:,} candidates": candidates(size, seed=size) for size in SIZES}
    with np.load(recorded, allow_pickle=False) as data:
        names = sorted(name.removesuffix("/in_scores") for name in data.files if name.endswith("/in_scores"))
        cases = {name: tuple(data[f"{name}/in_{part}"] for part in ("segments", "scores", "labels")) for name in names}
    return {f"case {name}, {len(c[1]):,} candidates": c for name, c in cases.items() if len(c[1]) in SIZES}


def candidates(count: int, seed: int) -> Arrays:
    """Candidates of one video on a grid of 224 steps."""
    generator = np.random.default_rng(seed)
    centre, length = generator.uniform(0, 224, count), generator.gamma(1.6, 17, count)
    segments = np.stack([centre - length / 2, centre + length / 2], axis=1).astype(np.float32)
    return segments, generator.beta(0.65, 6.4, count).astype(np.float32), generator.integers(0, CLASSES, count)


def metric_case(annotations: Path | None) -> tuple[tuple[Array, Array, Array, Array], tuple[Array, Array, Array]]:
    """(video, segments, scores, labels) of `PER_VIDEO` predictions a video, and (video, segments, labels) of the truth.

    A third of the predictions lie near an event of their class, as a trained network's do.
    """
    generator = np.random.default_rng(0)
    if annotations is not None:
        subset = read_annotations(annotations).subset("test")
        videos = len(subset)
        gt_video = np.repeat(np.arange(videos), [len(v.labels) for v in subset])
        gt_segments = np.concatenate([v.segments for v in subset])
        gt_labels = np.concatenate([v.labels for v in subset])
    else:
        videos, events = 2167, 6050
        gt_video = np.sort(generator.integers(0, videos, events))
        start, length = generator.uniform(0, 50, events), generator.gamma(1.5, 6, events) + 0.3
        gt_segments = np.stack([start, start + length], axis=1)
        gt_labels = generator.integers(0, CLASSES, events)
    count = videos * PER_VIDEO
    video, labels = np.repeat(np.arange(videos), PER_VIDEO), generator.integers(0, CLASSES, count)
    start, length = generator.uniform(0, 50, count), generator.gamma(1.5, 6, count) + 0.3
    segments = np.stack([start, start + length], axis=1)
    near, event = generator.choice(count, count // 3, replace=False), generator.integers(0, len(gt_video), count // 3)
    video[near], labels[near] = gt_video[event], gt_labels[event]
    segments[near] = np.sort(gt_segments[event] + generator.normal(0, 0.7, (len(near), 2)), axis=1)
    return (video, segments, generator.uniform(0, 1, count), labels), (gt_video, gt_segments, gt_labels)


def whole_walk(rules: Rules) -> dict[str, Timing]:
    """From engine outputs to events: decoding, suppression, seconds. Full-size outputs, two densities."""
    spec = ModelSpec(
        length=224, levels=6, visual_dim=2048, audio_dim=128, labels=tuple(f"class {i}" for i in range(CLASSES))
    )
    generator = np.random.default_rng(0)
    shape = (spec.grid.num_points, CLASSES)
    offsets = generator.gamma(2, 1, (*shape, 2)).astype(np.float32)
    runs: dict[str, Callable[[], Any]] = {}
    for centre in (-8.5, -4.0):
        logits = generator.normal(centre, 1, shape).astype(np.float32)
        count = len(detect_candidates(logits, offsets, spec))
        runs[f"outputs to events, {count:,} candidates"] = partial(
            detect, logits, offsets, valid_steps=224, duration=72.0, spec=spec
        )
    return measure_interleaved(runs, rules)


def detect_candidates(logits: Any, offsets: Any, spec: ModelSpec) -> npt.NDArray[np.float32]:
    from runtime.decode import decode

    return decode(logits, offsets, spec.length, spec.grid, PostProcessing())[1]


def first_calls() -> dict[str, list[float]]:
    """Seconds of the first call in a fresh process."""
    results: dict[str, list[float]] = {}
    for _ in range(FIRST_CALLS):
        done = subprocess.run([sys.executable, "-c", _FIRST_CALL], capture_output=True, text=True, check=True)
        for name, seconds in json.loads(done.stdout).items():
            results.setdefault(f"first {name} call", []).append(seconds)
    return results


def page(rows: Mapping[str, Compared], whole: Mapping[str, Timing], first: Mapping[str, list[float]]) -> str:
    """The Markdown page."""
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
    walked = [[name, f"{timing.median * 1e3:.3f}", str(timing.n)] for name, timing in whole.items()]
    started = [[name, f"{np.median(values) * 1e3:.1f}", str(len(values))] for name, values in first.items()]
    return "\n\n".join(
        [
            "# Post-processing and metric",
            "Medians. Plain NumPy is the same rules written down in the shortest way "
            "(`benchmarks/postprocessing_peers.py`); results were compared before timing. *Alone* is call after call, "
            "*in rounds* alternates with the peer, whose arrays leave nothing of ours in the cache.",
            markdown_table(("", "alone, ms", "in rounds, ms", "plain NumPy, ms", "n", "plain / ours"), compared),
            "From engine outputs to events in seconds (decoding, suppression, time base), per video:",
            markdown_table(("", "ms", "n"), walked),
            "The first call in a fresh process, which loads the compiled kernels.",
            markdown_table(("", "ms", "n"), started),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
