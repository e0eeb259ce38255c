"""How does time grow with the length of a video and with its candidates? `python -m benchmarks.growth`.

End to end for videos of up to T steps, which cost one call of the engine, and for longer ones, cropped to T or seen
through windows; and post-processing alone (decode, suppress) for outputs with a known number of candidates.

Shapes:  T steps of the engine   P points   C classes
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import Setting, main
from benchmarks.results import Measurement, markdown_table, write_result
from ccnet.plots import new_figure, save_figure
from runtime.backends.base import Backend
from runtime.localizer import Localizer
from runtime.machine import machine_facts
from runtime.postprocess import detect
from runtime.profiling.timing import Rules, Timing, measure, measure_interleaved
from runtime.profiling.workload import sample_videos
from runtime.spec import ModelSpec

CANDIDATES = (100, 500, 2_000, 5_000, 9_000)
LENGTHS = (0.1, 0.25, 0.5, 0.75, 1.0, 2.0)
"""Video lengths as shares of T."""


def run(setting: Setting) -> Path:
    """Measure, write `growth.json`, `.md` and `.png`; returns the JSON's path."""
    machine = machine_facts()
    spec, rules = setting.networks.spec, setting.rules
    with contextlib.ExitStack() as stack:
        opened, _ = setting.networks.open_engines("fused", stack)
        engine, backend = next(iter(opened.items()))
        by_length = time_lengths(backend, rules)
    short = replace(rules, seconds=min(rules.seconds, 0.5), warmup_seconds=min(rules.warmup_seconds, 0.1))
    by_candidates = {n: measure(call, short) for n, call in candidate_calls(spec).items()}
    named = {f"{steps} steps, {way}": timing for (way, steps), timing in by_length.items()}
    named |= {f"post-processing of {n} candidates": timing for n, timing in by_candidates.items()}
    path = write_result(
        setting.out,
        "growth",
        measurements=[Measurement(name=f"{n} p50", value=t.median * 1e3, unit="ms") for n, t in named.items()],
        page=page(engine, by_length, by_candidates),
        machine=machine,
        rules=rules.to_json(),
        engine=engine,
        timings_ms={name: timing.summary() for name, timing in named.items()},
    )
    draw(path.with_suffix(".png"), by_length, by_candidates)
    return path


def time_lengths(backend: Backend, rules: Rules) -> dict[tuple[str, int], Timing]:
    """Time videos of several lengths end to end, by way and steps; those beyond T cropped and in windows."""
    spec = backend.spec
    cropped = Localizer([backend], spec)
    windows = Localizer([backend], spec, long_videos="windows")
    rules = replace(rules, calls=max(3, rules.calls // 2), warmup_calls=1, seconds=rules.seconds / 2)
    found: dict[tuple[str, int], Timing] = {}
    for share in LENGTHS:
        steps = max(1, round(share * spec.length))
        videos = sample_videos(spec, 1, steps=steps)
        ways = {"cropped": cropped, "windows": windows} if steps > spec.length else {"whole": cropped}
        calls = {way: partial(localizer.batch, videos) for way, localizer in ways.items()}
        found |= {(way, steps): timing for way, timing in measure_interleaved(calls, rules).items()}
    return found


def candidate_calls(spec: ModelSpec) -> dict[int, Callable[[], Any]]:
    """Return calls that post-process outputs in which a known number of (point, class) pairs are candidates."""
    random = np.random.default_rng(0)
    shapes = spec.output_shapes(1)
    pairs = int(np.prod(shapes["logits"]))
    offsets = random.uniform(0.5, 3.0, shapes["offsets"][1:]).astype(np.float32)
    seconds = spec.time_base.covered_seconds(spec.length)
    calls: dict[int, Callable[[], Any]] = {}
    for count in CANDIDATES:
        if count <= pairs:
            logits = np.full(pairs, -20.0, np.float32)
            logits[random.choice(pairs, count, replace=False)] = random.normal(-2.0, 1.5, count)
            outputs = logits.reshape(shapes["logits"][1:]), offsets
            calls[count] = partial(detect, *outputs, valid_steps=spec.length, duration=seconds, spec=spec)
    return calls


def page(engine: str, by_length: Mapping[tuple[str, int], Timing], by_candidates: Mapping[int, Timing]) -> str:
    """Write the Markdown page."""
    header = ("p50 ms", "p90", "p99", "n")
    lengths = [_spread(f"{steps} steps, {way}", timing) for (way, steps), timing in by_length.items()]
    return "\n\n".join(
        [
            "# How time grows",
            f"## Length of the video\n\nEnd to end, fused network on {engine}.",
            markdown_table(("video", *header), lengths),
            "## Candidates\n\nPost-processing alone: decode and suppress.",
            markdown_table(("candidates", *header), [_spread(f"{n:,}", t) for n, t in by_candidates.items()]),
        ]
    )


def _spread(name: str, timing: Timing) -> list[str]:
    summary = timing.summary()
    digits = 3 if summary["p50"] < 10 else 1
    return [name, *(f"{summary[key]:.{digits}f}" for key in ("p50", "p90", "p99")), str(summary["n"])]


def draw(path: Path, by_length: Mapping[tuple[str, int], Timing], by_candidates: Mapping[int, Timing]) -> None:
    """Draw both curves side by side."""
    figure = new_figure(10.0, 4.0)
    lengths, candidates = figure.subplots(1, 2)
    for way in dict.fromkeys(way for way, _ in by_length):
        _curve(lengths, [(steps, t) for (other, steps), t in by_length.items() if other == way], label=way)
    lengths.set(title="length", xlabel="steps of the video", ylabel="end to end ms")
    lengths.legend(fontsize="small")
    _curve(candidates, list(by_candidates.items()))
    candidates.set(title="candidates", xlabel="candidates", ylabel="post-processing ms")
    for axes in (lengths, candidates):
        axes.set_ylim(bottom=0)
    save_figure(figure, path)


def _curve(axes: Any, points: Sequence[tuple[int, Timing]], **style: Any) -> None:
    axes.plot([x for x, _ in points], [timing.median * 1e3 for _, timing in points], "o-", **style)


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
