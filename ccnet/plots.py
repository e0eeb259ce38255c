"""One video on a timeline: what is there, what was found, and how far each modality opens the other's gate.

Shapes:  n steps of one video   Cv, Ca visual / audio feature width   T steps of the network   C classes   F frames
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.annotations import VideoAnnotation
from runtime.detections import Detections
from runtime.errors import ConfigError, MissingDependency
from runtime.features import VideoFeatures, pack
from runtime.spec import ModelSpec

Floats = npt.NDArray[np.floating[Any]]
_SEEN, _HEARD, _TRUTH, _FOUND = "#7fb3d9", "#f4b183", "#2e7d32", "#6a3d9a"
_VISUAL_LINE, _AUDIO_LINE = "#1f6fb2", "#c8641b"
_BAR = 0.19
"""Height of a bar; a class has a lane of height 1."""


class Gates(NamedTuple):
    """The temporal consistency gates of the finest level (paper Fig. 4)."""

    seconds: Floats
    """[n] the time of each step."""
    audio: Floats
    """[n] in (0, 1): computed from the audio, lets the visual stream through."""
    visual: Floats
    """[n] in (0, 1): computed from the video, lets the audio stream through."""


class Shown(NamedTuple):
    """What of a synthetic video is seen and heard at all, events or not."""

    fps: float
    seen: Floats
    """[C, F], above 0 where a class is seen."""
    heard: Floats
    """[C, F]"""


def read_gates(model: Any, spec: ModelSpec, features: VideoFeatures) -> Gates:
    """Run an eager `CCNet` on one video and read the gates of its first layer.

    Raises ConfigError for a network without gates (`model.tcg` off).
    """
    import torch

    layer = model.cmcc.layers[0]
    if not model.config.tcg:
        raise ConfigError("model.tcg: got false, expected a network with temporal consistency gates")
    values: dict[str, Any] = {}
    hooks = [
        gate.register_forward_hook(lambda _, __, output, name=name: values.update({name: output}))
        for name, gate in (("audio", layer.audio_gate), ("visual", layer.visual_gate))
    ]
    try:
        with torch.no_grad():
            model(*(torch.from_numpy(array) for array in pack([features], spec)))
    finally:
        for hook in hooks:
            hook.remove()
    steps = min(features.steps, spec.length)
    audio, visual = (values[name][0, :steps, 0].numpy() for name in ("audio", "visual"))
    return Gates(spec.time_base.to_seconds(np.arange(steps)), audio, visual)


def draw_timeline(
    path: str | Path,
    *,
    truth: VideoAnnotation,
    found: Detections,
    gates: Gates,
    shown: Shown | None = None,
    min_score: float = 0.2,
) -> None:
    """Draw one video as a PNG: a lane per class with ground truth and predictions, the gate curves below.

    Args:
        truth: the video's annotation.
        found: its predictions; those with a score of at least `min_score` are drawn, more opaque the surer.
        gates: see `read_gates`.
        shown: for synthetic features, adds what is seen and what is heard to every lane.

    Raises MissingDependency without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependency("matplotlib", "train", "drawing a video") from error
    from ccnet.bench_plot import save_figure

    drawn = found.scores >= min_score
    classes = sorted({*truth.labels.tolist(), *found.labels[drawn].tolist(), *(_classes(shown) if shown else ())})
    height = 1.6 + 0.75 * max(1, len(classes)) + 2.0
    figure = Figure(figsize=(11, height), layout="constrained")
    lanes, curves = figure.subplots(2, 1, sharex=True, height_ratios=[0.75 * max(1, len(classes)) + 0.6, 2.0])

    rows = ("seen", "heard", "ground truth", "predicted") if shown else ("ground truth", "predicted")
    for lane, label in enumerate(classes):
        slots = {row: lane + 0.5 + _BAR * (i - (len(rows) - 1) / 2) for i, row in enumerate(rows)}
        if shown:
            for row, presence, color in (("seen", shown.seen, _SEEN), ("heard", shown.heard, _HEARD)):
                for start, end in _runs(presence[label] > 0):
                    _bar(lanes, slots[row], start / shown.fps, end / shown.fps, color)
        for start, end in truth.segments[truth.labels == label]:
            _bar(lanes, slots["ground truth"], start, end, _TRUTH)
        chosen = drawn & (found.labels == label)
        for (start, end), score in zip(found.segments[chosen][::-1], found.scores[chosen][::-1], strict=True):
            _bar(lanes, slots["predicted"], start, end, _FOUND, alpha=0.25 + 0.75 * float(score))
            if end - start > 0.03 * truth.duration:
                middle = (start + end) / 2
                lanes.text(
                    middle, slots["predicted"], f"{score:.2f}", color="white", fontsize=7, ha="center", va="center"
                )
        if lane:
            lanes.axhline(lane, color="0.85", linewidth=0.8)
    lanes.set_ylim(max(1, len(classes)), 0)
    lanes.set_yticks([i + 0.5 for i in range(len(classes))], [found.label_names[label] for label in classes])
    lanes.tick_params(axis="y", length=0)
    colors = {"seen": _SEEN, "heard": _HEARD, "ground truth": _TRUTH, "predicted": _FOUND}
    lanes.legend(
        handles=[
            _patch(colors[row], row if row != "predicted" else f"predicted (score >= {min_score:g})") for row in rows
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(rows),
        frameon=False,
    )

    curves.plot(gates.seconds, gates.audio, color=_AUDIO_LINE, label="$g_a$: from audio, gates the visual stream")
    curves.plot(gates.seconds, gates.visual, color=_VISUAL_LINE, label="$g_v$: from video, gates the audio stream")
    for start, end in truth.segments:
        curves.axvspan(start, end, color=_TRUTH, alpha=0.1, linewidth=0)
    curves.set(xlabel="seconds", ylabel="gate, finest level", xlim=(0, truth.duration), ylim=(-0.03, 1.03))
    curves.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2, frameon=False)
    figure.suptitle(f"{truth.video_id}: {len(truth.labels)} events in {truth.duration:.1f} s")
    save_figure(figure, path)


def _classes(shown: Shown) -> list[int]:
    return np.flatnonzero(shown.seen.any(axis=1) | shown.heard.any(axis=1)).tolist()


def _runs(present: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of every stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], present, [False]))))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _bar(axes: Any, center: float, start: float, end: float, color: str, alpha: float = 1.0) -> None:
    axes.barh(center, end - start, left=start, height=_BAR * 0.85, color=color, alpha=alpha, linewidth=0)


def _patch(color: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)
