"""The host path: from feature files or arrays to events around an engine that costs nothing, per stage and as a stream.

`python -m benchmarks.host_path [--out DIR] [--seconds S] [--videos N] [--preset tiny]`

Sizes are those of the `unav100` preset: 224 steps, 2048 + 128 wide, 100 classes. The engine returns the same outputs
for every video, with about 5,000 candidates. Floors of the same run stand beside the stages: reading a video's bytes
out of the page cache, copying them, and one NumPy pass over its logits.

Shapes: B batch   P points of all levels   C classes
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.results import RESULTS, Measurement, markdown_table, write_result
from runtime.batches import Batch
from runtime.decode import decode
from runtime.detections import event_line
from runtime.features import FeatureFiles, VideoFeatures
from runtime.localizer import Localizer
from runtime.machine import machine_facts, usable_cores
from runtime.pipeline import Item
from runtime.postprocess import PostProcessor, detect
from runtime.profiling.timing import Rules, Timing, measure_interleaved
from runtime.profiling.workload import sample_videos
from runtime.spec import ModelSpec
from runtime.suppression import suppress

WORKERS = (1, 2, 4)
BATCHES = (1, 16)
CENTRE = -7.9
"""Mean of the logits, which spread by 1: about 5,000 of 44,100 lie above the score threshold."""
FLUSH_BYTES = 128 << 20
"""More than the last-level cache holds of one core's data."""
BOX_CORES = 16

Array = npt.NDArray[Any]


class NullEngine:
    """An engine that costs nothing: the same outputs for every video."""

    name, precision = "null", "fp32"

    def __init__(self, spec: ModelSpec, max_batch: int) -> None:
        self.spec, self.max_batch = spec, max_batch
        generator = np.random.default_rng(0)
        shape = (spec.grid.num_points, spec.num_classes)
        logits = generator.normal(CENTRE, 1, shape).astype(np.float32)
        offsets = generator.gamma(2, 1, (*shape, 2)).astype(np.float32)
        self.logits, self.offsets = (np.repeat(a[None], max_batch, axis=0) for a in (logits, offsets))

    def infer(self, visual: Array, audio: Array, lengths: Array) -> tuple[Array, Array]:
        return self.logits[: len(visual)], self.offsets[: len(visual)]

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name}

    def close(self) -> None:
        pass

    def __enter__(self) -> NullEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Streamed:
    """A stream's rate, and the processor time that a video took of all threads together."""

    per_second: float
    cpu_ms: float


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_path", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="measured seconds per stream and per stage, at least"
    )
    parser.add_argument("--videos", type=int, default=32, help="different videos, in files and in memory")
    parser.add_argument("--preset", choices=("unav100", "tiny"), default="unav100", help="sizes; `tiny` is for tests")
    options = parser.parse_args(argv)
    spec = spec_of(options.preset)
    machine = machine_facts()
    rules = Rules(seconds=options.seconds, calls=20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos = sample_videos(spec, options.videos)
        write_features(folder, spec, videos)
        print("stages ...", flush=True)
        stages = time_stages(folder, spec, videos, rules)
        print("streams ...", flush=True)
        sources: dict[str, list[Any]] = {
            "files": [FeatureFiles(folder, f"v{i}") for i in range(len(videos))],
            "memory": [(video.visual, video.audio) for video in videos],
        }
        streams = {
            (kind, batch, workers): stream(spec, made, batch, workers, rules.seconds)
            for (kind, made), batch, workers in itertools.product(sources.items(), BATCHES, WORKERS)
        }
    lock_ms = interpreter_ms(rules.seconds)
    feature_bytes = sum(array.nbytes for array in videos[0])
    box = {kind: box_rate(streams[kind, BATCHES[-1], 1].cpu_ms, lock_ms) for kind in sources}
    path = write_result(
        options.out,
        "host_path",
        measurements=[
            *(Measurement(name=f"{name} / p50", value=t.median * 1e3, unit="ms") for name, t in stages.items()),
            *(
                Measurement(name=f"stream, {stream_name(*key)}", value=s.per_second, unit="videos/s", better="higher")
                for key, s in streams.items()
            ),
            *(
                Measurement(name=f"stream, {stream_name(*key)} / processor time", value=s.cpu_ms, unit="ms")
                for key, s in streams.items()
            ),
            Measurement(name="interpreter lock, per video of a batch", value=lock_ms, unit="ms"),
        ],
        page=page(stages, streams, lock_ms, box, feature_bytes),
        machine=machine,
        stages_ms={name: timing.summary() for name, timing in stages.items()},
        estimate_box={"cores": BOX_CORES, **{f"{kind}_videos_per_second": rate for kind, rate in box.items()}},
    )
    print(path)
    return 0


def spec_of(preset: str) -> ModelSpec:
    """Sizes of the `unav100` preset, or of a network for tests."""
    sizes = {"unav100": (224, 6, 2048, 128, 100), "tiny": (16, 2, 8, 4, 5)}[preset]
    length, levels, visual, audio, classes = sizes
    names = tuple(f"class {i:02d}" for i in range(classes))
    return ModelSpec(length=length, levels=levels, visual_dim=visual, audio_dim=audio, labels=names)


def write_features(folder: Path, spec: ModelSpec, videos: Sequence[VideoFeatures]) -> None:
    """Write the files of each video, `v0` and so on: visual features in two, as the extractors leave them."""
    half = spec.visual_dim // 2
    for i, (visual, audio) in enumerate(videos):
        for suffix, array in zip(
            ("_rgb", "_flow", "_vggish"), (visual[:, :half], visual[:, half:], audio), strict=True
        ):
            np.save(folder / f"v{i}{suffix}.npy", array)


def time_stages(folder: Path, spec: ModelSpec, videos: Sequence[VideoFeatures], rules: Rules) -> dict[str, Timing]:
    """One video through each stage in rounds; every round takes the next video."""
    engine = NullEngine(spec, 1)
    localizer = Localizer([engine], spec)
    logits, offsets = engine.logits[0], engine.offsets[0]
    post = spec.post
    candidates = decode(logits, offsets, spec.length, spec.grid, post)
    found = detect(logits, offsets, valid_steps=spec.length, duration=72.0, spec=spec)
    one, two = Batch(spec, 1), Batch(spec, 2)
    post_process, steps = PostProcessor(spec, None, 1), np.array([spec.length], np.int32)
    turn = itertools.count()

    def following(call: Callable[[int], Any]) -> Callable[[], Any]:
        return lambda: call(next(turn) % len(videos))

    def read(i: int) -> None:
        one.clear()
        one.read([FeatureFiles(folder, f"v{i}")], crop=True)

    def add(i: int) -> None:
        two.clear()
        two.add(videos[i], 0, spec.length, "v")

    def in_place(i: int) -> None:
        one.clear()
        one.add(videos[i], 0, spec.length, "v")

    def copy(i: int) -> None:
        for to, array in zip(target, videos[i], strict=True):
            np.copyto(to, array)

    def whole_call(i: int) -> None:
        localizer(videos[i].visual, videos[i].audio, 72.0)

    files = [[folder / f"v{i}{suffix}.npy" for suffix in ("_rgb", "_flow", "_vggish")] for i in range(len(videos))]
    room = np.empty(sum(path.stat().st_size for path in files[0]), np.uint8)
    target = np.empty_like(videos[0].visual), np.empty_like(videos[0].audio)
    flush = np.ones(FLUSH_BYTES // 8)
    stages: dict[str, Callable[[], Any]] = {
        "floor: read the bytes of three files": following(lambda i: read_bytes(files[i], room)),
        "floor: copy the bytes": following(copy),
        "floor: one NumPy pass over the logits": lambda: np.count_nonzero(logits > CENTRE),
        "read three files into a batch": following(read),
        "copy arrays into a batch": following(add),
        "check arrays in place": following(in_place),
        f"decode, {len(candidates[1]):,} candidates": partial(decode, logits, offsets, spec.length, spec.grid, post),
        "suppress": partial(suppress, *candidates),
        "detect (decode, suppress, seconds)": partial(
            detect, logits, offsets, valid_steps=spec.length, duration=72.0, spec=spec
        ),
        f"{len(found)} events to JSON text": partial(event_line, "video", 72.0, found),
        "whole call, arrays in memory": following(whole_call),
    }
    cold: dict[str, Callable[[], Any]] = {
        "(empty the cache)": flush.sum,
        "whole call, arrays in memory, cold cache": following(whole_call),
        "(empty the cache again)": flush.sum,
        "detect, cold cache": partial(post_process, engine.logits, engine.offsets, steps, [72.0]),
    }
    often = Rules(seconds=0, calls=max(20, int(100 * rules.seconds)))
    timings = measure_interleaved(stages, often) | measure_interleaved(cold, often)
    return {name: timing for name, timing in timings.items() if not name.startswith("(")}


def read_bytes(paths: Sequence[Path], room: Array) -> None:
    """Read whole files, one after the other, into memory that is there already."""
    start = 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            start += file.readinto(room[start:].data)


def stream(spec: ModelSpec, sources: Sequence[Any], batch: int, workers: int, seconds: float) -> Streamed:
    """Rate of a stream over the sources, again and again, after a first round of them."""
    localizer = Localizer([NullEngine(spec, batch)], spec)

    def items() -> Iterator[Item]:
        for i in itertools.count():
            yield f"v{i}", sources[i % len(sources)], 72.0

    with contextlib.closing(localizer.stream(items(), batch_size=batch, workers=workers)) as results:
        for _ in itertools.islice(results, len(sources)):
            pass
        count, begin, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - begin < seconds:
            result = next(results)
            if result.error is not None:
                raise result.error
            count += 1
        elapsed, used = time.perf_counter() - begin, time.process_time() - cpu
    return Streamed(count / elapsed, 1e3 * used / count)


def interpreter_ms(seconds: float) -> float:
    """Processor time a video of a stream whose videos hold next to nothing: what is left is the interpreter's work.

    A little of it, such as opening the files, needs no interpreter lock; so it is an upper bound of what does.
    """
    spec = ModelSpec(length=1, levels=1, visual_dim=2, audio_dim=1, labels=("one",))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_features(folder, spec, sample_videos(spec, BATCHES[-1]))
        sources = [FeatureFiles(folder, f"v{i}") for i in range(BATCHES[-1])]
        return stream(spec, sources, BATCHES[-1], 1, seconds).cpu_ms


def box_rate(cpu_ms: float, lock_ms: float) -> float:
    """Videos per second that the cores of a GPU box could prepare and finish: an estimate from this machine.

    The cores share the work but for what holds the interpreter lock. Shared memory bandwidth is not in it.
    """
    return min(BOX_CORES * 1e3 / cpu_ms, 1e3 / lock_ms)


def stream_name(kind: str, batch: int, workers: int) -> str:
    return f"{kind}, batch {batch}, {workers} worker{'s' if workers > 1 else ''}"


def page(
    stages: Mapping[str, Timing],
    streams: Mapping[tuple[str, int, int], Streamed],
    lock_ms: float,
    box: Mapping[str, float],
    feature_bytes: int,
) -> str:
    """The Markdown page."""
    staged = [[name, f"{t.median * 1e3:.3f}", str(t.n)] for name, t in stages.items()]
    kinds = list(dict.fromkeys((kind, batch) for kind, batch, _ in streams))
    streamed = [
        [
            f"{kind}, batch {batch}",
            *(f"{streams[kind, batch, workers].per_second:,.0f}" for workers in WORKERS),
            f"{streams[kind, batch, WORKERS[0]].cpu_ms:.2f}",
        ]
        for kind, batch in kinds
    ]
    rates = " and ".join(f"{rate:,.0f} videos/s from {kind}" for kind, rate in box.items())
    return "\n\n".join(
        [
            "# Host path",
            "Everything around the engine, with an engine that costs nothing. One video per call, every call another "
            "one; medians, in rounds. A floor is what the machine itself takes for the bytes.",
            markdown_table(("", "ms", "n"), staged),
            f"`Localizer.stream` on {usable_cores()} cores, videos/s; beside the workers one thread waits for the "
            "engine. Processor time is that of all threads, a video, with one worker.",
            markdown_table(("", *(f"{n} worker{'s' if n > 1 else ''}" for n in WORKERS), "processor ms"), streamed),
            f"Of that, at most {lock_ms:.3f} ms a video of a batch hold the interpreter lock (a stream whose videos "
            "hold next to nothing).",
            f"**Estimate**, not a measurement: a box of {BOX_CORES} such cores could feed {rates}, the smaller of "
            f"{BOX_CORES} / processor time and 1 / lock time. Memory bandwidth, which its cores share, is not in it: "
            f"features alone would be {box['files'] * feature_bytes / 1e9:.0f} GB/s read and as much written.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
