"""Own features against published ones of the same videos: how alike, at which shift, and what may be the cause.

Shapes: n steps of own features   m steps of published ones
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import FeatureError
from runtime.spec import FeatureLayout

Float32 = npt.NDArray[np.float32]

LAGS = range(-2, 3)
ALIKE = 0.98
"""Cosine from which two features count as the same; re-encoding alone leaves 0.99999."""


@dataclass(frozen=True)
class PartCheck:
    """One part of one video's features."""

    video_id: str
    part: str
    """Suffix of the file, for example `_flow`."""
    own: int
    published: int
    """Steps."""
    cosine: float
    """Mean over the steps, at the best lag."""
    worst: float
    lag: int
    """Steps by which the published features are later."""
    likely: str
    """What may be the cause where it is off; empty where it is not."""


def check_features(
    own: str | Path, published: str | Path, video_ids: Sequence[str], layout: FeatureLayout
) -> list[PartCheck]:
    """Compare the features of videos in two folders, those that both have.

    Raises FeatureError where none of the videos has published features, or a file can't be read.
    """
    checks = []
    for video_id in video_ids:
        for suffix in (*layout.visual, *layout.audio):
            mine, theirs = (Path(folder) / f"{video_id}{suffix}.npy" for folder in (own, published))
            if theirs.is_file():
                checks.append(compare_part(video_id, suffix, _read(mine), _read(theirs)))
    if not checks:
        raise FeatureError(f"{published}: has no features of these videos; expected <video id>{layout.visual[0]}.npy")
    return checks


def compare_part(video_id: str, part: str, own: Float32, published: Float32) -> PartCheck:
    """Compare features [n, C] with published ones [m, C]."""
    if own.shape[1] != published.shape[1]:
        likely = f"{published.shape[1]} values a step, expected {own.shape[1]}: of another network"
        return PartCheck(video_id, part, len(own), len(published), 0.0, 0.0, 0, likely)
    found = {lag: _cosines(own, published, lag) for lag in LAGS}
    lag = max(LAGS, key=lambda each: (found[each].mean() if len(found[each]) else -1.0, -abs(each)))
    cosines = found[lag] if len(found[lag]) else np.zeros(1, np.float32)
    check = (len(own), len(published), float(cosines.mean()), float(cosines.min()), lag)
    return PartCheck(video_id, part, *check, _likely(part, own, published, *check[2:3], lag))


def report(checks: Sequence[PartCheck]) -> str:
    """Return the comparison for a person to read: a line for each part, and one for each video that is off."""
    lines = []
    for part in dict.fromkeys(check.part for check in checks):
        of_part = [check for check in checks if check.part == part]
        mean = float(np.mean([check.cosine for check in of_part]))
        worst = min(of_part, key=lambda check: check.cosine)
        alike = sum(check.cosine >= ALIKE and check.lag == 0 for check in of_part)
        least = f"least {worst.cosine:.4f} ({worst.video_id})"
        lines.append(f"{part}: cosine {mean:.4f}, {least}; {alike} of {len(of_part)} alike")
    for check in checks:
        if check.likely:
            steps = f"{check.own} steps, published {check.published}"
            lines.append(
                f"  {check.video_id}{check.part}: {check.cosine:.4f} at lag {check.lag} ({steps}): {check.likely}"
            )
    return "\n".join(lines)


def _likely(part: str, own: Float32, published: Float32, cosine: float, lag: int) -> str:
    """Return what is known to make features differ in the way these do."""
    ratio = len(own) / max(1, len(published))
    if 2.5 < ratio < 3.5:
        return "the published ones have a third of the steps: a hop of 0.96 s, not 0.32 s"
    if 2.5 < 1 / ratio < 3.5:
        return "the published ones have three times the steps: their hop is not 0.32 s"
    if part == "_vggish" and published.size and (published.min() < 0 or np.array_equal(published, published.round())):
        return "published VGGish features with negative or only whole numbers: with PCA, or without the last ReLU"
    if lag != 0 and cosine >= ALIKE:
        return f"the same, {abs(lag)} steps {'later' if lag > 0 else 'earlier'}: another start of the sound or picture"
    if cosine >= ALIKE:
        return ""
    return {
        "_flow": "another flow network (PWC instead of RAFT), weights, or frame rate",
        "_rgb": "another frame rate, colour conversion, resizing or weights",
        "_vggish": "another resampler, hop or weights",
    }.get(part, "other weights or settings")


def _cosines(own: Float32, published: Float32, lag: int) -> Float32:
    """Return the cosine of each own step with the published one `lag` steps later."""
    first, second = own[max(0, -lag) :], published[max(0, lag) :]
    steps = min(len(first), len(second))
    first, second = first[:steps], second[:steps]
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products = (first * second).sum(1)
    both_zero = (norms == 0) & ((first**2).sum(1) == (second**2).sum(1))
    return np.where(both_zero, 1, products / np.where(norms == 0, 1, norms)).astype(np.float32)


def _read(path: Path) -> Float32:
    try:
        array: Any = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FeatureError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    if array.ndim != 2 or array.dtype.kind != "f" or not len(array):
        raise FeatureError(f"{path}: got {array.dtype} {array.shape}, expected floats [steps, width]")
    return np.asarray(array, np.float32)
