"""What does each stage of feature extraction cost, and what does computing nothing twice save?

`python -m benchmarks.extraction --extractor E [--out DIR]`

Frames and sound are generated. The public program's schedule is counted with the same engines: for every step 24 pairs,
each with two encodings and a flow, where this one has 8 encodings and 8 flows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import RESULTS, Measurement, markdown_table, write_result
from runtime.machine import machine_facts
from runtime.packages import import_package
from runtime.profiling.timing import Rules, measure_interleaved
from runtime.video.container import ReadOptions, ReadReport
from runtime.video.features import FeatureExtractor
from runtime.video.frames import padded, read_frames
from runtime.video.logmel import BANDS, EXAMPLE, log_mel
from runtime.video.sound import RATE

FRAMES, HEIGHT, WIDTH = 120, 360, 480
PAIRS, STRIDE = 24, 8
"""Of a step, and between two."""
RULES = Rules(warmup_seconds=0, warmup_calls=1, seconds=0, calls=3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.extraction", description=__doc__)
    parser.add_argument("--extractor", required=True, metavar="E", help="extractor folder")
    parser.add_argument("--backend", default="auto", help="of its engines")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the results go")
    options = parser.parse_args(argv)
    machine = machine_facts()
    rate = frames_per_core_second()
    with FeatureExtractor.load(options.extractor, options.backend, threads=1) as extractor:
        stages = stage_milliseconds(extractor)
        engine, spec = extractor.engines.chosen["flow"].name, extractor.spec
    encode, flow = stages["encode"], stages["flow"]
    step = 8 * (encode + flow) + stages["i3d_rgb"] + stages["i3d_flow"]
    public = PAIRS * (2 * encode + flow) + stages["i3d_rgb"] + stages["i3d_flow"]
    pairs = PAIRS * (2 * encode + flow) / (STRIDE * (encode + flow))
    rows = [[name, f"{value:.1f}"] for name, value in stages.items()]
    rows += [["a step in all", f"{step:.0f}"], ["a step in the public schedule", f"{public:.0f}"]]
    page = "\n".join(
        [
            "# Extraction\n",
            f"Engine `{engine}`, one thread; side {spec.side}, {spec.iterations} iterations, encodings of "
            f"{spec.encoding_dim} channels, pictures of 4:3. Medians of {RULES.calls} calls, batch 1.\n",
            markdown_table(["stage", "ms a call"], rows),
            f"\nThe flow of each pair once and the encoding of each frame once: **{pairs:.2f} times** less than the "
            f"public schedule with the same engines, {public / step:.2f} times with I3D. What the flow graph saves "
            "in itself (context convolved once, upsampling once) comes on top and is not in these numbers.\n",
            f"Decoding, colour and resizing, {WIDTH} x {HEIGHT} H.264: {rate:.0f} frames a second of one core.",
        ]
    )
    measurements = [Measurement(name=f"{name} p50", value=value, unit="ms") for name, value in stages.items()]
    measurements += [
        Measurement(name="decode and resize", value=rate, unit="frames/s", better="higher"),
        Measurement(name="public schedule / ours", value=public / step, unit="x", better="higher"),
    ]
    write_result(options.out, "extraction", measurements=measurements, page=page, machine=machine)
    return 0


def frames_per_core_second() -> float:
    """Return how many frames one core decodes, converts and resizes in a second of its time."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/video.mp4"
        _write_video(path)
        begin = time.process_time()
        count = sum(1 for _ in read_frames(path, 256, Fraction(25), ReadOptions(threads=1), ReadReport()))
        return count / (time.process_time() - begin)


def stage_milliseconds(extractor: FeatureExtractor) -> dict[str, float]:
    """Return the median time of one call of each graph, and of the log-mel of a second of sound."""
    spec, runners, draw = extractor.spec, extractor.engines.runners, np.random.default_rng(0)
    picture = draw.integers(0, 256, (spec.side, spec.side * 4 // 3, 3), np.uint8)
    frame = padded(picture)[None]
    features, context = runners["encode"].run(frame)
    following, _ = runners["encode"].run(np.roll(frame, 2, axis=3))
    stacks = {c: draw.uniform(0, 255, (1, spec.window, c, spec.crop, spec.crop)).astype(np.float32) for c in (3, 2)}
    calls: dict[str, Any] = {
        "encode": partial(runners["encode"].run, frame),
        "flow": partial(runners["flow"].run, features, following, context),
        "i3d_rgb": partial(runners["i3d_rgb"].run, stacks[3]),
        "i3d_flow": partial(runners["i3d_flow"].run, stacks[2]),
        "vggish": partial(runners["vggish"].run, draw.standard_normal((1, EXAMPLE, BANDS)).astype(np.float32)),
        "log-mel of a second": partial(log_mel, draw.standard_normal(RATE)),
    }
    timings = measure_interleaved(calls, RULES)
    return {name: 1e3 * timing.median for name, timing in timings.items()}


def _write_video(path: str) -> None:
    """Write moving smooth texture: noise would be hard to decode, a still picture easy."""
    av = import_package("av", "this benchmark")
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (HEIGHT // 8 + 2 * FRAMES // 8 + 2, WIDTH // 8, 3), np.uint8)
    texture = coarse.repeat(8, 0).repeat(8, 1)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(FRAMES):
            picture = np.ascontiguousarray(texture[2 * index : 2 * index + HEIGHT])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    raise SystemExit(main())
