"""How time grows, and where it goes: `python -m benchmarks.growth`.

With the batch (engine only); with the length of the video (end to end, on the full engine, on the shortest that fits,
and through windows beyond T); with the number of candidates (post-processing); and per stage of the walk for one video
from its files: read, pack, engine, decode, suppress.

Shapes:  n steps of one video   T steps of an engine   P points   C classes
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.arguments import Setting, parse
from benchmarks.engines import available_engines
from benchmarks.plots import curves
from benchmarks.results import Measurement, markdown_table, write_result
from runtime.batches import pack
from runtime.decode import decode
from runtime.features import read_video
from runtime.localizer import Localizer
from runtime.machine import machine_facts
from runtime.postprocess import to_events
from runtime.profiling.timing import Rules, Timing, measure, measure_interleaved
from runtime.profiling.workload import sample_videos
from runtime.spec import ModelSpec

if TYPE_CHECKING:
    from runtime.backends.base import BaseBackend

BATCHES = (1, 2, 4, 8)
CANDIDATES = (100, 500, 2_000, 5_000, 9_000)
LENGTHS = (0.1, 0.25, 0.5, 0.75, 1.0, 2.0)
"""Video lengths as shares of T."""


def run(setting: Setting) -> Path:
    """Measure, write `growth.json`, `.md` and `.png`; returns the JSON's path."""
    machine = machine_facts()
    spec = setting.networks.spec
    with contextlib.ExitStack() as stack:
        opened, absent = available_engines(setting.networks.graph("fused"), spec)
        full = {name: stack.enter_context(backend) for name, backend in opened.items()}
        fastest = _fastest(full, spec)
        by_batch = _by_batch(full, setting.rules)
        stages, candidates = _stages(full[fastest], setting.rules)
        by_length = _by_length(full[fastest], setting.rules)
    by_candidates = {n: measure(call, _short(setting.rules)) for n, call in _post_calls(spec).items()}
    path = write_result(
        setting.out,
        "growth",
        measurements=[
            *_p50({f"batch {b}, {name}": t for (name, b), t in by_batch.items()}),
            *_p50({f"{steps} steps, {way}": t for (way, steps), t in by_length.items()}),
            *_p50({f"post-processing of {n} candidates": t for n, t in by_candidates.items()}),
            *_p50({f"stage {name}": t for name, t in stages.items()}),
        ],
        page=_page(fastest, by_batch, by_length, by_candidates, stages, candidates, absent),
        machine=machine,
        rules=setting.rules.to_json(),
        engine=fastest,
        not_available=absent,
        timings_ms={
            "batch": {f"{name}, {b}": t.summary() for (name, b), t in by_batch.items()},
            "length": {f"{way}, {n}": t.summary() for (way, n), t in by_length.items()},
            "candidates": {str(n): t.summary() for n, t in by_candidates.items()},
            "stages": {name: t.summary() for name, t in stages.items()},
        },
    )
    curves(
        path.with_suffix(".png"),
        {
            "batch": ("videos in a batch", "engine ms per video", _lines(by_batch, per_item=True)),
            "length": ("steps of the video", "end to end ms", _lines(by_length)),
            "candidates": (
                "candidates", "post-processing ms", {"": [(n, t.median * 1e3) for n, t in by_candidates.items()]},
            ),
        },
    )  # fmt: skip
    return path


def _short(rules: Rules) -> Rules:
    """For calls of well under a millisecond: many of them, but not for seconds."""
    return replace(rules, seconds=min(rules.seconds, 0.5), warmup_seconds=min(rules.warmup_seconds, 0.1))


def _fastest(backends: Mapping[str, BaseBackend], spec: ModelSpec) -> str:
    inputs = pack(sample_videos(spec, 1), spec)
    rules = Rules(warmup_seconds=0, warmup_calls=1, seconds=0, calls=2)
    timings = measure_interleaved({name: _infer(b, inputs) for name, b in backends.items()}, rules)
    return min(timings, key=lambda name: timings[name].median)


def _infer(backend: BaseBackend, inputs: Any) -> Callable[[], Any]:
    return lambda: backend.infer(*inputs)


def _by_batch(backends: Mapping[str, BaseBackend], rules: Rules) -> dict[tuple[str, int], Timing]:
    """Engine only, for every engine and batch size, the engines interleaved."""
    found: dict[tuple[str, int], Timing] = {}
    for batch in BATCHES:
        spec = next(iter(backends.values())).spec
        inputs = pack(sample_videos(spec, batch), spec)
        scaled = replace(rules, calls=max(3, rules.calls // batch), warmup_calls=1)
        timings = measure_interleaved({name: _infer(b, inputs) for name, b in backends.items()}, scaled)
        found |= {(name, batch): timing for name, timing in timings.items()}
    return found


def _by_length(backend: BaseBackend, rules: Rules) -> dict[tuple[str, int], Timing]:
    """Time videos of several lengths end to end; those beyond T cropped and in windows."""
    spec = backend.spec
    cropped = Localizer([backend], spec)
    windows = Localizer([backend], spec, long_videos="windows")
    found: dict[tuple[str, int], Timing] = {}
    for share in LENGTHS:
        steps = max(1, round(share * spec.length))
        (video,) = sample_videos(spec, 1, steps=steps)
        ways = {"whole": cropped}
        if steps > spec.length:
            ways = {"cropped": cropped, "windows": windows}
        calls = {name: _localize(localizer, video) for name, localizer in ways.items()}
        scaled = replace(rules, calls=max(3, rules.calls // 2), warmup_calls=1, seconds=rules.seconds / 2)
        found |= {(name, steps): timing for name, timing in measure_interleaved(calls, scaled).items()}
    return found


def _localize(localizer: Localizer, video: Any) -> Callable[[], Any]:
    return lambda: localizer.batch([video])


def _post_calls(spec: ModelSpec) -> dict[int, Callable[[], Any]]:
    """Decode and suppress outputs in which a known number of (point, class) pairs are candidates."""
    random = np.random.default_rng(0)
    shapes = spec.output_shapes(1)
    pairs = int(np.prod(shapes["logits"]))
    offsets = random.uniform(0.5, 3.0, shapes["offsets"][1:]).astype(np.float32)
    calls = {}
    for count in CANDIDATES:
        if count > pairs:
            continue
        logits = np.full(pairs, -20.0, np.float32)
        logits[random.choice(pairs, count, replace=False)] = random.normal(-2.0, 1.5, count)
        calls[count] = _post(logits.reshape(shapes["logits"][1:]), offsets, spec)
    return calls


def _post(logits: Any, offsets: Any, spec: ModelSpec) -> Callable[[], Any]:
    return lambda: _suppress(decode(logits, offsets, spec.length, spec.grid, spec.post), spec)


def _suppress(found: Any, spec: ModelSpec) -> Any:
    duration = spec.time_base.covered_seconds(spec.length)
    return to_events(*found, duration=duration, spec=spec, post=spec.post)


def _stages(backend: BaseBackend, rules: Rules) -> tuple[dict[str, Timing], int]:
    """Each stage of one full-length video from files, and the number of candidates its outputs hold."""
    spec = backend.spec
    (video,) = sample_videos(spec, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for suffixes, array in ((spec.layout.visual, video.visual), (spec.layout.audio, video.audio)):
            for suffix, part in zip(suffixes, np.array_split(array, len(suffixes), axis=1), strict=True):
                np.save(folder / f"video{suffix}.npy", part)
        packed = pack([video], spec)
        logits, offsets = (output[0] for output in backend.infer(*packed))
        found = decode(logits, offsets, spec.length, spec.grid, spec.post)
        calls: dict[str, Callable[[], Any]] = {
            "read": lambda: read_video(folder, "video", spec.layout, spec.visual_dim, spec.audio_dim),
            "pack": lambda: pack([video], spec),
            "engine": _infer(backend, packed),
            "decode": lambda: decode(logits, offsets, spec.length, spec.grid, spec.post),
            "suppress": lambda: _suppress(found, spec),
        }
        return measure_interleaved(calls, replace(rules, seconds=0.0)), len(found[1])


def _p50(timings: Mapping[str, Timing]) -> list[Measurement]:
    return [Measurement(name=f"{name} p50", value=t.summary()["p50"], unit="ms") for name, t in timings.items()]


def _lines(
    timings: Mapping[tuple[str, int], Timing], *, per_item: bool = False
) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for (name, x), timing in timings.items():
        lines.setdefault(name, []).append((x, timing.median * 1e3 / (x if per_item else 1)))
    return lines


def _page(
    fastest: str,
    by_batch: Mapping[tuple[str, int], Timing],
    by_length: Mapping[tuple[str, int], Timing],
    by_candidates: Mapping[int, Timing],
    stages: Mapping[str, Timing],
    candidates: int,
    absent: Mapping[str, str],
) -> str:
    """The Markdown page."""
    outside = sum(t.median for name, t in stages.items() if name not in ("engine", "read")) * 1e3
    parts = [
        "# How time grows, and where it goes",
        "Fused network; p50 unless said otherwise.",
        f"## Stages\n\nOne full-length video from its feature files on {fastest}; {candidates} candidates. "
        f"Outside the engine and without reading: {outside:.2f} ms.",
        markdown_table(("stage", "p50 ms", "p90", "p99", "n"), [_spread(n, t) for n, t in stages.items()]),
        "## Batch\n\nEngine only. OpenVINO runs a batch video after video.",
        markdown_table(
            ("engine, batch", "p50 ms per call", "p90", "p99", "n", "ms per video"),
            [[*_spread(f"{n}, {b}", t), f"{t.median * 1e3 / b:.1f}"] for (n, b), t in by_batch.items()],
        ),
        f"## Length of the video\n\nEnd to end on {fastest}.",
        markdown_table(
            ("engine, steps", "p50 ms", "p90", "p99", "n"), [_spread(f"{w}, {n}", t) for (w, n), t in by_length.items()]
        ),
        "## Candidates\n\nDecode and suppress alone.",
        markdown_table(
            ("candidates", "p50 ms", "p90", "p99", "n"), [_spread(f"{n:,}", t) for n, t in by_candidates.items()]
        ),
    ]
    if absent:
        parts.append("Not available here:\n\n" + "\n".join(f"- {name}: {why}" for name, why in absent.items()))
    return "\n\n".join(parts)


def _spread(name: str, timing: Timing) -> list[str]:
    s = timing.summary()
    digits = 3 if s["p50"] < 10 else 1
    return [name, *(f"{s[key]:.{digits}f}" for key in ("p50", "p90", "p99")), str(s["n"])]


def main(argv: list[str] | None = None) -> int:
    print(run(parse(__doc__, argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
