"""What overlapping is worth: `python -m benchmarks.throughput`.

A folder of feature files through a deployment engine: read, infer and post-process one after the other, against
`Localizer.stream`, where they overlap. The two run interleaved, folder by folder, and give the same events.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import Setting, parse
from benchmarks.engines import available_engines
from benchmarks.plots import bars
from benchmarks.results import Measurement, markdown_table, write_result
from runtime.features import read_video
from runtime.localizer import Localizer
from runtime.machine import machine_facts
from runtime.profiling.timing import measure_interleaved, ratio
from runtime.profiling.workload import sample_videos
from runtime.spec import ModelSpec

VIDEOS = 8
"""Files in the folder: enough for stages to overlap, few enough for several rounds."""


def run(setting: Setting) -> Path:
    """Measure, write `throughput.json`, `.md` and `.png`; returns the JSON's path."""
    machine = machine_facts()
    spec = setting.networks.spec
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        ids = _write_videos(folder, spec)
        opened, absent = available_engines(setting.networks.graph("fused"), spec)
        engine = "openvino-fp32" if "openvino-fp32" in opened else next(iter(opened))
        for backend in opened.values():
            stack.enter_context(backend)
        localizer = Localizer([opened[engine]], spec)
        calls: dict[str, Callable[[], Any]] = {"one after the other": partial(_sequential, localizer, folder, ids)}
        calls["stream"] = partial(_streamed, localizer, folder, ids)
        _check_same(calls)
        rules = replace(setting.rules, warmup_calls=1, calls=max(3, setting.rules.calls // 3))
        timings = measure_interleaved(calls, rules)
    rates = {name: VIDEOS / timing.median for name, timing in timings.items()}
    base = timings["one after the other"]
    rows = [(name, f"{rates[name]:.3f}", str(ratio(base, timing)), str(timing.n)) for name, timing in timings.items()]
    page = "\n\n".join(
        [
            "# Throughput over a folder",
            f"{VIDEOS} full-length videos from feature files to events, on {engine}; median over the rounds.",
            markdown_table(("way", "videos/s", "times as fast", "rounds"), rows),
        ]
    )
    path = write_result(
        setting.out,
        "throughput",
        measurements=[
            Measurement(name=name, value=rate, unit="videos/s", better="higher") for name, rate in rates.items()
        ],
        page=page,
        machine=machine,
        rules=rules.to_json(),
        engine=engine,
        not_available=absent,
        folder_ms={name: timing.summary() for name, timing in timings.items()},
    )
    bars(path.with_suffix(".png"), rates, title=f"{VIDEOS} videos, files to events, {engine}", unit="videos/s")
    return path


def _write_videos(folder: Path, spec: ModelSpec) -> list[str]:
    ids = []
    for i, video in enumerate(sample_videos(spec, VIDEOS)):
        ids.append(f"video_{i}")
        for suffixes, array in ((spec.layout.visual, video.visual), (spec.layout.audio, video.audio)):
            for suffix, part in zip(suffixes, np.array_split(array, len(suffixes), axis=1), strict=True):
                np.save(folder / f"{ids[-1]}{suffix}.npy", part)
    return ids


def _read(folder: Path, spec: ModelSpec, video_id: str) -> Any:
    return read_video(folder, video_id, spec.layout, spec.visual_dim, spec.audio_dim)


def _sequential(localizer: Localizer, folder: Path, ids: list[str]) -> list[Any]:
    return [localizer.batch([_read(folder, localizer.spec, video_id)])[0] for video_id in ids]


def _streamed(localizer: Localizer, folder: Path, ids: list[str]) -> list[Any]:
    items = [(video_id, partial(_read, folder, localizer.spec, video_id)) for video_id in ids]
    results = []
    for found in localizer.stream(items, batch_size=1):
        if found.error is not None:
            raise found.error
        results.append(found.detections)
    return results


def _check_same(calls: dict[str, Callable[[], Any]]) -> None:
    """A faster way to other events would not count. Batches may round differently, hence a tolerance."""
    expected, *others = [call() for call in calls.values()]
    for found in others:
        for a, b in zip(expected, found, strict=True):
            if a.scores.shape != b.scores.shape or not np.allclose(a.scores, b.scores, atol=1e-4):
                raise RuntimeError("stream and sequential loop gave different events")


def main(argv: list[str] | None = None) -> int:
    print(run(parse(__doc__, argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
