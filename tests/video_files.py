"""Small video files, written by PyAV, in every state that a user's may be in."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from feature_cases import cases, frames, wave

from runtime.backends.graphs import GraphRunner
from runtime.bundle import Engine
from runtime.video.container import ReadOptions
from runtime.video.engines import Engines
from runtime.video.extractor import GRAPHS, Extractor, ExtractorManifest, ExtractorSpec, GraphName
from runtime.video.features import FeatureExtractor


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


def simple_extractor(options: ReadOptions | None = None) -> FeatureExtractor:
    """Return an extractor whose networks are averages of what they see, for tests of all that is around them."""
    spec = ExtractorSpec(side=128, crop=64, iterations=1, encoding_dim=4, rgb_dim=6, flow_dim=4, audio_dim=5)
    manifest = ExtractorManifest(
        schema=1, spec=spec, weights={}, versions={}, created="", files=(), model_files=(), engines=()
    )

    def averages(array: np.ndarray, count: int) -> np.ndarray:
        """Return [B, count] averages of equal parts of each row."""
        return np.stack([part.mean(1) for part in np.array_split(array.reshape(len(array), -1), count, 1)], 1)

    def encode(inputs: Any) -> dict[str, np.ndarray]:
        cells = inputs["frames"][:, :, ::8, ::8]
        four = np.concatenate([cells, cells[:, :1]], 1)
        return {"features": four, "context": -four}

    def flow(inputs: Any) -> dict[str, np.ndarray]:
        change = averages(inputs["following"] - inputs["features"], 2)
        return {"levels": np.broadcast_to(128 + change[:, :, None, None], (len(change), 2, spec.crop, spec.crop))}

    runs: dict[GraphName, Any] = {
        "encode": encode,
        "flow": flow,
        "i3d_rgb": lambda inputs: {"seen": averages(inputs["stacks"], 6)},
        "i3d_flow": lambda inputs: {"seen": averages(inputs["stacks"], 4)},
        "vggish": lambda inputs: {"sound": averages(inputs["examples"], 5)},
    }
    engine = Engine(name="flow-test", backend="onnxruntime", precision="fp32", model_file="", status="unverified")
    runners = {graph: GraphRunner("test", "fp32", spec.tensors(graph), run, {}) for graph, run in runs.items()}
    return FeatureExtractor(Extractor(Path(), manifest), Engines(runners, dict.fromkeys(GRAPHS, engine)), options)
