"""From a video file to features, in a stream: of what is held, only the features grow with the video.

A frame is encoded once, the flow of a pair computed once, and of both only what a step needs. Results are those of the
public program, which computes every pair three times.

Shapes: n visual steps   m sound steps   S side of the crop
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import VideoError
from runtime.video.ahead import Ahead
from runtime.video.container import ReadOptions, ReadReport
from runtime.video.engines import Engines, open_engines
from runtime.video.extractor import BATCHES, Extractor, ExtractorSpec, read_extractor
from runtime.video.frames import UInt8, centre_crop, padded, read_frames
from runtime.video.logmel import stream_examples
from runtime.video.sound import RATE, read_sound

Float32 = npt.NDArray[np.float32]

_DECODED_STEPS = 2
"""Steps whose frames are decoded while the networks are busy with those before."""


@dataclass(frozen=True)
class Features:
    """Features of one video, all of the same length, and what was found on the way."""

    rgb: Float32
    """[n, 1024]"""
    flow: Float32
    """[n, 1024]"""
    sound: Float32
    """[n, 128]"""
    duration: float
    """Seconds of the picture."""
    facts: dict[str, Any]
    """Counts, codecs, seconds of each stage: the record that lies beside the files."""
    warnings: tuple[str, ...] = ()

    @property
    def visual(self) -> Float32:
        """rgb and flow side by side, as the network takes them."""
        return np.concatenate([self.rgb, self.flow], 1)


class Timer:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin

    def timed(self, stage: str, items: Iterable[Any]) -> Iterator[Any]:
        """Yield items; the time that getting them takes counts for the stage."""
        iterator = iter(items)
        while True:
            with self(stage):
                item = next(iterator, None)
            if item is None:
                return
            yield item


class FeatureExtractor:
    """Video files in, features out. Use it from one thread at a time."""

    def __init__(self, extractor: Extractor, engines: Engines, options: ReadOptions | None = None) -> None:
        """Take over the engines; `close` closes them."""
        self.extractor, self.engines = extractor, engines
        self.options = options or ReadOptions()
        self.spec = extractor.spec

    @classmethod
    def load(
        cls,
        folder: str | Path,
        backend: str = "auto",
        *,
        precision: str | None = None,
        threads: int | None = None,
        options: ReadOptions | None = None,
    ) -> FeatureExtractor:
        """Load an extractor: check its files and open an engine for each graph, as `Localizer.load` does."""
        extractor = read_extractor(folder)
        return cls(extractor, open_engines(extractor, backend, precision=precision, threads=threads), options)

    def __call__(self, path: str | Path, *, each: Callable[[int], None] = lambda frames: None) -> Features:
        """Extract the features of one video file. `each` is told after every frame how many there were.

        Raises VideoError for a file that can't be used, EngineError when an engine fails.
        """
        timer, picture, sound = Timer(), ReadReport(), ReadReport()
        begin = time.perf_counter()
        rgb, flow, frames = self._picture(str(path), picture, timer, each)
        seconds = frames / self.spec.time_base.fps
        if not len(rgb):
            needed = self.spec.window + 1
            raise VideoError(
                f"{path}: lasts {seconds:.2f} s ({frames} frames at {self.spec.time_base.fps:g} a second); a step "
                f"needs {needed} frames, {needed / self.spec.time_base.fps:.2f} s"
            )
        heard = self._sound(str(path), seconds, sound, timer)
        if not len(heard):
            raise VideoError(f"{path}: its sound lasts {sound.facts['seconds']:.2f} s; a step needs 0.975 s")
        steps = min(len(rgb), len(heard))
        warnings = [*picture.warnings, *sound.warnings]
        if abs(len(rgb) - len(heard)) > 1:
            warnings.append(
                f"the picture gives {len(rgb)} steps, the sound {len(heard)}; both are cut to {steps}"
                + ("; '--missing-audio silence' keeps the picture's end" if len(heard) < len(rgb) else "")
            )
        stages = {name: round(value, 3) for name, value in timer.seconds.items()}
        facts = {
            "steps": steps,
            "visual_steps": len(rgb),
            "audio_steps": len(heard),
            "duration": round(seconds, 3),
            "picture": picture.facts,
            "sound": sound.facts,
            "seconds": {**stages, "total": round(time.perf_counter() - begin, 3)},
        }
        return Features(rgb[:steps], flow[:steps], heard[:steps], seconds, facts, tuple(warnings))

    def describe(self) -> dict[str, Any]:
        """Describe the engine of each graph."""
        return self.engines.describe()

    def seconds_of_work(self, height: int, width: int) -> dict[str, float]:
        """Measure what one frame and one step of pictures of a size cost, in seconds: `pair`, `step`."""
        spec, runners = self.spec, self.engines.runners
        frame = padded(np.zeros((height, width, 3), np.uint8))[None]
        work: dict[str, float] = {}
        for name in ("first", "pair"):  # the first run compiles
            begin = time.perf_counter()
            features, context = runners["encode"].run(frame)
            runners["flow"].run(features, features, context)
            work[name] = time.perf_counter() - begin
        stacks = {c: np.zeros((1, spec.window, c, spec.crop, spec.crop), np.float32) for c in (3, 2)}
        for name in ("first", "step"):
            begin = time.perf_counter()
            runners["i3d_rgb"].run(stacks[3])
            runners["i3d_flow"].run(stacks[2])
            work[name] = time.perf_counter() - begin
        return {"pair": work["pair"], "step": work["step"]}

    def close(self) -> None:
        """Close the engines. Safe to call twice."""
        self.engines.close()

    def __enter__(self) -> FeatureExtractor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _picture(
        self, path: str, report: ReadReport, timer: Timer, each: Callable[[int], None]
    ) -> tuple[Float32, Float32, int]:
        """Return rgb [n, 1024], flow [n, 1024] and the number of frames."""
        fps = Fraction(self.spec.time_base.fps)
        frames = read_frames(path, self.spec.side, fps, self.options, report)
        pictures = Ahead(frames, _DECODED_STEPS * self.spec.stride)
        schedule = Schedule(self.engines, self.spec, timer)
        try:
            for picture in timer.timed("decode", pictures):
                schedule.push(picture)
                each(schedule.count)
        finally:
            pictures.close()
        rgb, flow = (
            np.stack(rows) if rows else np.zeros((0, width), np.float32)
            for rows, width in ((schedule.rgb, self.spec.rgb_dim), (schedule.flow, self.spec.flow_dim))
        )
        return rgb, flow, schedule.count

    def _sound(self, path: str, seconds: float, report: ReadReport, timer: Timer) -> Float32:
        """Return the sound's features [m, 128]; with `missing_audio` silence, as many as the picture has time for."""
        blocks: Iterable[npt.NDArray[np.float64]]
        if self.options.missing_audio == "silence":
            blocks = _lasting(read_sound(path, self.options, report), round(seconds * RATE), report)
        else:
            blocks = read_sound(path, self.options, report)
        found: list[Float32] = []
        for examples in timer.timed("log_mel", stream_examples(blocks)):
            with timer("vggish"):
                most = BATCHES["vggish"]
                parts = (examples[start : start + most] for start in range(0, len(examples), most))
                found.extend(self.engines.runners["vggish"].run(part)[0] for part in parts)
        report.facts.setdefault("seconds", 0.0)
        return np.concatenate(found) if found else np.zeros((0, self.spec.audio_dim), np.float32)


@dataclass(frozen=True)
class Encoding:
    """A frame as the flow network sees it."""

    features: Float32
    context: Float32


@dataclass
class Schedule:
    """The windows of a stream of frames: a ring of 25 frames, of which nothing is computed twice, or for no step.

    Step k sees frames 8k to 8k + 23 and the flow of the pairs that begin at them, so it is due at frame 8k + 24.
    """

    engines: Engines
    spec: ExtractorSpec
    timer: Timer
    count: int = 0
    """Frames so far."""
    rgb: list[Float32] = field(default_factory=list)
    """[1024] of each step so far."""
    flow: list[Float32] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._crops: deque[Float32] = deque(maxlen=self.spec.window + 1)
        self._levels: deque[Float32] = deque(maxlen=self.spec.window)
        self._waiting: list[UInt8] = []
        self._newest: tuple[UInt8, Encoding] | None = None
        self._pair: tuple[Encoding, Encoding] | None = None
        self._still: Float32 | None = None
        self._pairs = BATCHES["flow"] if self.engines.on_gpu else 1  # one keeps a CPU busy

    def push(self, picture: UInt8) -> None:
        """Take the next frame, resized uint8 [h, w, 3]; the same array again where a frame is shown again."""
        self._waiting.append(picture)
        self.count += 1
        ready = self.count - self.spec.window - 1
        if ready >= 0 and ready % self.spec.stride == 0:
            for start in range(0, len(self._waiting), self._pairs):
                self._add(self._waiting[start : start + self._pairs])
            self._waiting = []
            self._step()

    def _add(self, pictures: list[UInt8]) -> None:
        """Encode new frames and compute the flow of the pairs that they end."""
        pairs: list[tuple[Encoding, Encoding]] = []
        for picture, encoding in zip(pictures, self._encode(pictures), strict=True):
            again = self._newest is not None and self._newest[0] is picture
            self._crops.append(self._crops[-1] if again else centre_crop(picture, self.spec.crop))
            if self._newest is not None:
                pairs.append((self._newest[1], encoding))
            self._newest = picture, encoding
        self._add_flow(pairs)

    def _encode(self, pictures: list[UInt8]) -> list[Encoding]:
        """Return the encoding of each frame; a frame that is shown again is encoded once."""
        known: dict[int, Encoding] = {} if self._newest is None else {id(self._newest[0]): self._newest[1]}
        new = list({id(picture): picture for picture in pictures if id(picture) not in known}.values())
        if new:
            with self.timer("encode"):
                features, context = self.engines.runners["encode"].run(np.stack([padded(p) for p in new]))
            for i, picture in enumerate(new):
                known[id(picture)] = Encoding(features[i : i + 1], context[i : i + 1])
        return [known[id(picture)] for picture in pictures]

    def _add_flow(self, pairs: list[tuple[Encoding, Encoding]]) -> None:
        """Compute the flow of pairs of frames; a pair like the one before it, of a still picture, has the same."""
        new: list[tuple[Encoding, Encoding]] = []
        places = []
        for pair in pairs:
            if self._pair is None or any(one is not other for one, other in zip(pair, self._pair, strict=True)):
                new.append(pair)
            places.append(len(new) - 1)  # -1: that of the pair before all of these
            self._pair = pair
        found: list[Float32] = []
        if new:
            with self.timer("flow"):
                (levels,) = self.engines.runners["flow"].run(
                    np.concatenate([first.features for first, _ in new]),
                    np.concatenate([second.features for _, second in new]),
                    np.concatenate([first.context for first, _ in new]),
                )
            found = list(levels)
        for place in places:
            self._levels.append(self._levels[-1] if place < 0 else found[place])

    def _step(self) -> None:
        """Compute the features of a window; one of the same still picture as the window before has the same."""
        crops = list(self._crops)[: self.spec.window]
        still = all(crop is crops[0] for crop in crops) and all(one is self._levels[0] for one in self._levels)
        if still and crops[0] is self._still:
            self.rgb.append(self.rgb[-1])
            self.flow.append(self.flow[-1])
            return
        self._still = crops[0] if still else None
        with self.timer("i3d"):
            rgb = self.engines.runners["i3d_rgb"].run(np.stack(crops)[None])[0]
            flow = self.engines.runners["i3d_flow"].run(np.stack(self._levels)[None])[0]
        self.rgb.append(rgb[0].copy())
        self.flow.append(flow[0].copy())


def _lasting(
    blocks: Iterable[npt.NDArray[np.float64]], samples: int, report: ReadReport
) -> Iterator[npt.NDArray[np.float64]]:
    """Yield the blocks and then silence up to so many samples; nothing but silence where there is no sound."""
    given = 0
    try:
        for block in blocks:
            given += len(block)
            yield block
    except VideoError as error:
        if given:
            raise
        report.warn(f"taken as silent ({error})")
    if 0 < given < samples:
        report.facts["added_silence_seconds"] = round((samples - given) / RATE, 3)
    for start in range(given, samples, RATE):
        yield np.zeros(min(RATE, samples - start))
