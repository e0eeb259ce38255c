"""Small video files, written by PyAV, in every state that a user's may be in."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from feature_cases import cases, frames, wave


def golden_mp4(folder: Path) -> Path:
    """Write the golden file: 33 frames of 128 x 96 at 25 a second with stereo AAC."""
    path = folder / "golden.mp4"
    path.write_bytes(cases()["video/file"].tobytes())
    return path


def write_video(
    path: Path,
    *,
    count: int = 40,
    size: tuple[int, int] = (96, 128),
    fps: int | Fraction = 25,
    pts: Sequence[int] | None = None,
    pixels: str = "yuv420p",
    codec: str = "libx264",
    rotation: int = 0,
    picture: bool = True,
    sound: float | None = 2.0,
    sound_start: float = 0.0,
    rate: int = 44100,
    layout: str = "stereo",
    sound_codec: str = "aac",
    seed: int = 1,
    options: dict[str, str] | None = None,
) -> Path:
    """Write `count` frames of moving texture and `sound` seconds of a chirp (None: no sound track).

    `pts`: times of the frames in 1 / (1000 fps) seconds, instead of evenly spaced ones.
    """
    with av.open(str(path), "w", options=options or {}) as container:
        video: Any = None
        if picture:
            video = container.add_stream(codec, rate=fps)
            video.height, video.width = size
            video.pix_fmt = pixels
            video.codec_context.time_base = 1 / Fraction(1000 * fps)
            video.codec_context.thread_count = 1
            if rotation:
                video.set_display_rotation(rotation)
        audio: Any = None
        if sound is not None:
            audio = container.add_stream(sound_codec, rate=rate, layout=layout)
        if video is not None:
            times = max(1, size[0] // 256)  # large pictures are quicker made of larger pixels
            small = frames(seed, min(count, 8), -(-size[0] // times), -(-size[1] // times))
            small = small.repeat(times, 1).repeat(times, 2)[:, : size[0], : size[1]]
            for index in range(count):
                frame = av.VideoFrame.from_ndarray(small[index % len(small)], format="rgb24")
                frame.pts = 1000 * index if pts is None else pts[index]
                frame.time_base = 1 / Fraction(1000 * fps)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if audio is not None and sound:
            channels = audio.codec_context.layout.nb_channels
            samples = wave(seed, sound, rate, channels).reshape(-1, channels)
            resampler = av.AudioResampler(
                audio.codec_context.format, layout, rate, audio.codec_context.frame_size or 1024
            )
            block = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples.reshape(1, -1)), format="s16", layout=layout
            )
            block.sample_rate, block.time_base = rate, Fraction(1, rate)
            block.pts = round(sound_start * rate)
            for frame in [*resampler.resample(block), *resampler.resample(None)]:
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path
