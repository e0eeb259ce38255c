"""What does each stage of feature extraction cost, and what does computing nothing twice save?

`python -m benchmarks.extraction --extractor E [--out DIR]`, or without `--extractor` for seeded weights of the real
sizes. Minutes; `--precision fp32 fp16` counts plans of half precision too, and takes twice as long.

Frames and sound are generated. The public program's schedule is counted with the same engines: for every step 24 pairs,
each with the encodings of both frames, where this one has 8 encodings and 8 flows. Plans of TensorRT for RTX are
counted where that library is; no GPU is used.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.extraction_cost import (
    H100,
    LAUNCH_SECONDS,
    MEAN_SECONDS,
    PUBLIC_ENCODINGS,
    SHARE,
    Stage,
    estimate,
    gigaflops,
    stages,
    to_json,
)
from benchmarks.results import RESULTS, Measurement, markdown_table, write_result
from benchmarks.roofline import MATRIX, peak_calls
from benchmarks.rtx_plan import check_version, read_plan
from export.tensorrt.build import build_engine
from export.tensorrt.options import EngineOptions
from runtime.backends.tensorrt.library import load_library
from runtime.errors import BackendUnavailable, MissingDependency
from runtime.machine import machine_facts
from runtime.packages import import_package
from runtime.profiling.timing import Rules, Timing, measure_interleaved
from runtime.video.container import ReadOptions, ReadReport
from runtime.video.extractor import GRAPHS, Extractor, GraphName, read_extractor
from runtime.video.features import FeatureExtractor
from runtime.video.frames import padded, read_frames
from runtime.video.logmel import BANDS, EXAMPLE, log_mel
from runtime.video.sound import RATE

FRAMES, HEIGHT, WIDTH = 120, 360, 480
PAIRS, STRIDE = 24, 8
"""Of a step, and between two."""
RULES = Rules(warmup_seconds=0, warmup_calls=1, seconds=0, calls=3)
TARGET = "8.9"
"""Compute capability that plans are made for."""
PRECISIONS = ("fp32", "fp16")
"""Of plans."""

log = logging.getLogger("benchmarks")

Plans = dict[str, dict[str, Any]]
"""`graph precision` -> facts of the plan."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.extraction", description=__doc__)
    parser.add_argument("--extractor", metavar="E", help="extractor folder (default: made of seeded weights)")
    parser.add_argument(
        "--precision", nargs="+", metavar="P", help="of the extractor that is made, for its plans (default: fp32)"
    )
    parser.add_argument("--backend", default="auto", help="of its engines")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the results go")
    options = parser.parse_args(argv)
    if options.extractor and options.precision:
        parser.error("--precision: an extractor has its precisions already; leave it out")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with contextlib.ExitStack() as stack:
        folder = options.extractor
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "extractor"
            make_seeded_extractor(folder, options.precision or ["fp32"])
        run(read_extractor(folder), options.backend, options.out)
    return 0


def make_seeded_extractor(folder: Path, precisions: Sequence[str]) -> None:
    """Make an extractor of the real sizes from random weights."""
    from export.engines import EngineRequest
    from export.extractors.bundle import make_extractor
    from export.extractors.seeded import seeded_networks, weight_hashes

    networks = seeded_networks(0, width=1.0, sound_width=1.0)
    # Steps of the flow that do not die down as a trained network's do make rounding grow over the iterations: a change
    # of 1e-6 in the encodings moved levels by 0.045 on average, and by 4e-5 with this.
    networks.raft.update_block.flow_head.conv2.weight.data.mul_(0.1)
    request = EngineRequest(precisions=tuple(precisions))
    make_extractor(networks, networks.spec(), weight_hashes(networks), folder, request)


def run(extractor: Extractor, backend: str, out: Path) -> Path:
    """Measure, count, estimate; write `extraction.json` and `.md`, and return the JSON's path."""
    machine = machine_facts()
    rate = frames_per_core_second()
    with FeatureExtractor.load(extractor.folder, backend, threads=1) as loaded:
        timings = stage_timings(loaded)
        engine = loaded.engines.chosen["flow"].name
    spec = extractor.spec
    cells = spec.side // 8, -(-spec.side * 4 // 3 // 8)
    found = stages(extractor, cells)
    plans = count_plans(extractor, cells)
    flops = 2 * MATRIX**3 / float(timings["matmul"].seconds.min())
    milliseconds = {name: 1e3 * timing.median for name, timing in timings.items()}
    step = 8 * (milliseconds["encode"] + milliseconds["flow"]) + milliseconds["i3d_rgb"] + milliseconds["i3d_flow"]
    pair = PUBLIC_ENCODINGS * milliseconds["encode"] + milliseconds["flow"]
    public = PAIRS * pair + milliseconds["i3d_rgb"] + milliseconds["i3d_flow"]
    pairs = PAIRS * pair / (STRIDE * (milliseconds["encode"] + milliseconds["flow"]))
    work = gigaflops(found, spec)
    page = "\n\n".join(
        [
            "# Extraction",
            f"Engine `{engine}`, one thread; side {spec.side}, {spec.iterations} iterations, encodings of "
            f"{spec.encoding_dim} channels, pictures of 4:3. Medians of {RULES.calls} calls, batch 1. The floor is "
            f"that of the operations at this machine's own rate: {flops / 1e9:.0f} GFLOP/s in a large matmul on "
            "one thread, the best of the same rounds; convolutions that need fewer operations than are counted get "
            "below it.",
            stage_table(found, milliseconds, flops),
            f"A step in all (8 encodings, 8 flows, both streams of I3D): {step:.0f} ms; in the public schedule "
            f"{public:.0f} ms. Log-mel of a second of sound: {milliseconds['log-mel']:.1f} ms.",
            f"The flow of each pair once and the encoding of each frame once: **{pairs:.2f} times** less time than the "
            f"public schedule with the same engines, {public / step:.2f} times with I3D. What the flow graph saves in "
            "itself (context convolved once, upsampling once) comes on top and is not in these numbers. "
            f"A second of video takes {work['ours'] / 1e3:.2f} TFLOP here, {work['public'] / 1e3:.2f} in the public "
            "schedule of the same graphs.",
            f"Decoding, colour and resizing, {WIDTH} x {HEIGHT} H.264: {rate:.0f} frames a second of one core.",
            *plan_section(plans, cells),
            *estimate_section(found, plans, rate),
        ]
    )
    measurements = [
        *(Measurement(name=f"{name} p50", value=milliseconds[name], unit="ms") for name in (*GRAPHS, "log-mel")),
        Measurement(name="decode and resize", value=rate, unit="frames/s", better="higher"),
        Measurement(name="public schedule / ours", value=public / step, unit="x", better="higher"),
        *(Measurement(name=f"{name} kernels", value=plan["kernels"], unit="") for name, plan in plans.items()),
    ]
    return write_result(
        out,
        "extraction",
        measurements=measurements,
        page=page,
        machine=machine,
        stages=to_json(found),
        plans=plans,
    )


def stage_table(found: Mapping[GraphName, Stage], milliseconds: Mapping[str, float], flops: float) -> str:
    """Set each graph's time beside its floor."""
    rows = []
    for graph, stage in found.items():
        least = 1e3 * stage.operations / flops
        numbers = (
            f"{stage.calls:g}",
            f"{stage.operations / 1e9:.1f}",
            f"{stage.operations * stage.calls / 1e9:.0f}",
            f"{milliseconds[graph]:.1f}",
            f"{least:.1f}",
            f"{least / milliseconds[graph]:.0%}",
        )
        rows.append([graph, *numbers])
    header = ["graph", "calls a second of video", "GFLOP a call", "GFLOP a second", "ms a call", "floor ms", "reached"]
    return markdown_table(header, rows)


def count_plans(extractor: Extractor, cells: tuple[int, int]) -> Plans:
    """Build a plan of every graph for one size of pictures, and count it; nothing where the library is absent."""
    try:
        check_version(load_library("tensorrt-rtx").__version__)
    except (BackendUnavailable, MissingDependency) as error:
        log.info("no plans are counted: %s", error)
        return {}
    files = {file.name: file for file in extractor.manifest.model_files}
    plans: Plans = {}
    extents: dict[str, tuple[int, ...]] = {
        name: (size,) * 3 for name, size in zip(("rows", "columns"), cells, strict=True)
    }
    with tempfile.TemporaryDirectory() as folder:
        for graph in GRAPHS:
            for precision in PRECISIONS:
                if (file := files.get(f"{graph}-onnx-{precision}")) is None:
                    continue
                log.info("building %s %s", graph, precision)
                options = EngineOptions(
                    format="tensorrt-rtx",
                    precision=precision,  # type: ignore[arg-type]
                    compute_capabilities=(TARGET,),
                    extents=extents,
                )
                info = build_engine(extractor.path(file), Path(folder) / "graph.engine", options)
                plan = dataclasses.asdict(read_plan(info.path, info.library_version))
                plans[f"{graph} {precision}"] = {**info.build, **plan}
    return plans


def plan_section(plans: Plans, cells: tuple[int, int]) -> list[str]:
    """Write what the plans hold."""
    if not plans:
        return []
    rows = [
        [
            name,
            str(plan["kernels"]),
            str(sum(plan["matrix_kernels"].values())),
            f"{plan['scratch_bytes'] / 1e6:.1f}",
            f"{plan['engine_bytes'] / 1e6:.1f}",
            f"{plan['seconds']:.1f}",
        ]
        for name, plan in plans.items()
    ]
    header = ["graph", "kernels", "convolutions and matmuls", "scratch MB", "engine MB", "build s"]
    return [
        "## Plans of TensorRT for RTX",
        f"Built without a GPU for compute capability {TARGET}, pictures of {8 * cells[0]} x {8 * cells[1]}, batch 1; "
        "counted in the plan that the engine embeds. None was run.",
        markdown_table(header, rows),
        "`docs/video.md` shares the kernels of the flow graph out.",
    ]


def estimate_section(found: Mapping[GraphName, Stage], plans: Plans, rate: float) -> list[str]:
    """Write what the counts say of an H100."""
    rows = []
    for precision, device in H100.items():
        result = estimate(found, device, {graph: _kernels(plans, graph, precision) for graph in GRAPHS})
        quick, slow = result.believed
        rows.append(
            [
                precision,
                f"{device.flops / 1e12:.0f}",
                f"{result.floor * 1e3:.1f}",
                f"{quick * 1e3:.1f} to {slow * 1e3:.1f}",
                f"{quick * MEAN_SECONDS:.2g} to {slow * MEAN_SECONDS:.2g}",
            ]
        )
    header = ["precision", "peak TFLOP/s", "floor, ms for a second of video", "estimate, ms", "mean video, s"]
    decoding = 25 * MEAN_SECONDS / rate
    cores = [math.ceil(decoding / MEAN_SECONDS / seconds) for seconds in reversed(result.believed)]
    return [
        "## Estimate for an H100, not a measurement",
        "Arithmetic on a data sheet: no kernel of these has run on such a GPU. The floor takes, of each graph, the "
        f"operations or the bytes of its convolutions at the peak rate ({H100['fp16'].bytes_per_second / 1e12:.2f} "
        f"TB/s), whichever is longer. The estimate takes {SHARE[0]:.0%} to {SHARE[1]:.0%} of these rates, and "
        f"{LAUNCH_SECONDS * 1e6:g} microseconds for each kernel of a batch; both are believed. Copies to and from "
        f"the GPU are not in it. Pictures of 4:3; the mean video of UnAV-100 has {MEAN_SECONDS:g} s.",
        markdown_table(header, rows),
        f"Its frames take {decoding:.1f} s of one core here to decode and resize at {WIDTH} x {HEIGHT}: {cores[0]} to "
        f"{cores[1]} such cores would keep up with the GPU in {precision}.",
    ]


def _kernels(plans: Plans, graph: str, precision: str) -> int:
    """Return the kernels of a plan of this precision, or of the fp32 one; 0 where none was made."""
    plan = plans.get(f"{graph} {precision}") or plans.get(f"{graph} fp32") or {"kernels": 0}
    return int(plan["kernels"])


def frames_per_core_second() -> float:
    """Return how many frames one core decodes, converts and resizes in a second of its time."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/video.mp4"
        _write_video(path)
        begin = time.process_time()
        count = sum(1 for _ in read_frames(path, 256, Fraction(25), ReadOptions(threads=1), ReadReport()))
        return count / (time.process_time() - begin)


def stage_timings(extractor: FeatureExtractor) -> dict[str, Timing]:
    """Time one call of each graph, the log-mel of a second of sound, and a large matmul, in turns."""
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
        "log-mel": partial(log_mel, draw.standard_normal(RATE)),
    }
    calls["matmul"] = peak_calls(["fp32"])["matmul fp32"]
    threads = import_package("torch", "this benchmark").get_num_threads()
    try:
        import_package("torch", "this benchmark").set_num_threads(1)
        return measure_interleaved(calls, RULES)
    finally:
        import_package("torch", "this benchmark").set_num_threads(threads)


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
