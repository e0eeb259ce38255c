"""Seeded stand-ins for real features, to time a network with.

Shapes:  n steps of one video   Cv, Ca visual / audio feature width   B batch   T steps of the network
"""

from __future__ import annotations

import numpy as np

from runtime.features import VideoFeatures
from runtime.spec import ModelSpec

ROTATED_BYTES = 256 << 20
"""Inputs that a measurement goes through before it comes back to the first: more than processors keep in a cache."""
MOST_ROTATED = 8


def sample_videos(spec: ModelSpec, count: int, *, steps: int | None = None, seed: int = 0) -> list[VideoFeatures]:
    """Return `count` different videos of `steps` (default T, the longest that is not cropped) grid steps.

    Values are non-negative and of unit scale like those of I3D and VGGish features: rectified Gaussian noise.
    """
    random = np.random.default_rng(seed)
    n = spec.length if steps is None else steps
    videos = []
    for _ in range(count):
        visual = np.maximum(random.standard_normal((n, spec.visual_dim), np.float32), 0)
        audio = np.maximum(random.standard_normal((n, spec.audio_dim), np.float32), 0)
        videos.append(VideoFeatures(visual, audio))
    return videos


def sample_batches(spec: ModelSpec, batch: int) -> list[list[VideoFeatures]]:
    """Return 2 to `MOST_ROTATED` batches of different videos, large ones of about `ROTATED_BYTES` together."""
    size = 4 * batch * spec.length * (spec.visual_dim + spec.audio_dim)
    count = min(max(2, ROTATED_BYTES // size), MOST_ROTATED)
    return [sample_videos(spec, batch, seed=seed) for seed in range(count)]
