"""Small synthetic videos with sound: coloured shapes that move, and tones, of which only some come together.

An event is a shape while its tone sounds. A shape without its tone, and a tone without its shape, are distractors: a
network that trusts its eyes or its ears alone reports them. Shape, colour, tone and tremolo follow from the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.files import atomic_file
from runtime.packages import import_package

LABELS = ("red disc", "green square", "blue cross", "yellow ring")
FPS, SIDE, RATE = 25, 128, 16000
"""Frames a second, pixels of a frame's side, samples a second."""

_COLOURS = ((230, 40, 40), (40, 210, 60), (60, 90, 250), (240, 220, 40))
_TONES = ((260.0, 0.0), (620.0, 3.0), (1500.0, 6.0), (3400.0, 11.0))
"""Hz of the tone and of its tremolo."""
_EVENT_SHARE = 0.6
_SHORTEST, _LONGEST = 1.5, 5.0
_RADIUS = 20


@dataclass(frozen=True)
class Appearance:
    """A class that is seen, heard, or both, from `start` to `end` (seconds)."""

    label: int
    start: float
    end: float
    seen: bool
    heard: bool


@dataclass(frozen=True)
class Scene:
    """What happens in one video; the classes of its appearances differ."""

    seed: int
    duration: float
    """Seconds."""
    appearances: tuple[Appearance, ...]

    @property
    def events(self) -> list[Appearance]:
        """The appearances that are seen and heard."""
        return [appearance for appearance in self.appearances if appearance.seen and appearance.heard]


def draw_scene(rng: np.random.Generator, seed: int) -> Scene:
    """Draw a scene of 8 to 11 seconds with two or three appearances, one of which at least is an event."""
    duration = int(rng.integers(8 * FPS, 11 * FPS)) / FPS
    appearances = []
    for number, label in enumerate(rng.permutation(len(LABELS))[: rng.integers(2, 4)]):
        length = rng.uniform(_SHORTEST, _LONGEST)
        start = rng.uniform(0, duration - length)
        event = number == 0 or bool(rng.random() < _EVENT_SHARE)
        seen = event or bool(rng.random() < 0.5)
        appearances.append(
            Appearance(int(label), round(start, 2), round(start + length, 2), seen, heard=event or not seen)
        )
    return Scene(seed, duration, tuple(sorted(appearances, key=lambda appearance: appearance.start)))


def draw_scenes(videos: dict[str, int], *, seed: int = 0) -> dict[str, Scene]:
    """Return the scenes of `{"train": 40, ...}` videos by video id, which begins with the subset."""
    rng = np.random.default_rng(seed)
    names = [f"{subset}_{number:03d}" for subset, count in videos.items() for number in range(count)]
    return {name: draw_scene(rng, number) for number, name in enumerate(names)}


def scene_annotations(scenes: dict[str, Scene]) -> dict[str, Any]:
    """Return the events of the scenes in the JSON layout of the published annotation file."""
    database = {
        name: {
            "duration": scene.duration,
            "subset": name.partition("_")[0],
            "annotations": [
                {"segment": [event.start, event.end], "label": LABELS[event.label], "label_id": event.label}
                for event in scene.events
            ],
        }
        for name, scene in scenes.items()
    }
    return {"version": "synthetic", "database": database}


def draw_frames(scene: Scene) -> npt.NDArray[np.uint8]:
    """Return the frames [F, 128, 128, 3] of a scene: shapes that circle around the middle of a noisy grey."""
    rng = np.random.default_rng(scene.seed)
    count = round(scene.duration * FPS)
    grey = rng.integers(60, 90, (1, SIDE, SIDE, 1)) + rng.integers(-6, 7, (count, SIDE, SIDE, 1))
    frames: npt.NDArray[np.uint8] = np.broadcast_to(grey, (count, SIDE, SIDE, 3)).astype(np.uint8)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    for appearance in scene.appearances:
        angle, speed = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1]) * rng.uniform(1.5, 3)
        if not appearance.seen:
            continue
        for index in range(round(appearance.start * FPS), min(count, round(appearance.end * FPS))):
            phase = angle + speed * index / FPS
            across = x - SIDE / 2 - 14 * np.cos(phase)
            down = y - SIDE / 2 - 14 * np.sin(phase)
            frames[index][_mask(appearance.label, across, down)] = _COLOURS[appearance.label]
    return frames


def draw_sound(scene: Scene) -> npt.NDArray[np.int16]:
    """Return the samples [n] of a scene at 16 kHz: the tones of its classes over faint noise."""
    rng = np.random.default_rng([scene.seed, 1])
    time = np.arange(round(scene.duration * RATE)) / RATE
    sound = rng.normal(0, 0.004, len(time))
    for appearance in scene.appearances:
        if appearance.heard:
            tone, tremolo = _TONES[appearance.label]
            now = (time >= appearance.start) & (time < appearance.end)
            wave = np.sin(2 * np.pi * tone * time) + 0.3 * np.sin(4 * np.pi * tone * time)
            sound += 0.2 * now * wave * (0.6 + 0.4 * np.cos(2 * np.pi * tremolo * time))
    return (sound.clip(-1, 1) * 32767).astype(np.int16)


def write_scene(path: Path, scene: Scene) -> None:
    """Write a scene as an mp4 file of H.264 and AAC. Raises MissingDependency without PyAV."""
    av = import_package("av", "Writing videos")
    frames, samples = draw_frames(scene), draw_sound(scene)
    with atomic_file(path) as stream, av.open(stream, "w", format="mp4") as container:
        picture = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "20"})
        picture.width = picture.height = SIDE
        picture.pix_fmt = "yuv420p"
        picture.codec_context.thread_count = 1
        track = container.add_stream("aac", rate=RATE, layout="mono")
        for pixels in frames:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(picture.encode(None))
        block = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        block.sample_rate, block.time_base, block.pts = RATE, Fraction(1, RATE), 0
        resampler = av.AudioResampler("fltp", "mono", RATE, 1024)
        for part in [*resampler.resample(block), *resampler.resample(None)]:
            container.mux(track.encode(part))
        container.mux(track.encode(None))


def _mask(label: int, across: npt.NDArray[Any], down: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return where a shape covers the picture; `across`, `down`: pixels from its middle."""
    distance = np.hypot(across, down)
    largest, smallest = np.maximum(abs(across), abs(down)), np.minimum(abs(across), abs(down))
    covered: npt.NDArray[np.bool_] = (
        distance < _RADIUS,
        largest < _RADIUS,
        (largest < _RADIUS) & (smallest < 7),
        (distance < _RADIUS) & (distance > 11),
    )[label]
    return covered
