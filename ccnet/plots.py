"""Pictures: a video on a timeline with its gates, and the bench report. They need matplotlib.

Shapes:  n steps of one video   Cv, Ca visual / audio feature width   T steps of the network   C classes   F frames
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.annotations import VideoAnnotation
from runtime.batches import pack
from runtime.detections import Detections
from runtime.errors import ConfigError
from runtime.features import VideoFeatures
from runtime.files import atomic_file
from runtime.packages import missing
from runtime.spec import ModelSpec

Floats = npt.NDArray[np.floating[Any]]
_COLORS = {"seen": "#7fb3d9", "heard": "#f4b183", "ground truth": "#2e7d32", "predicted": "#6a3d9a"}
"""Of the rows of a lane."""
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
    """Where each class of a synthetic video is seen and heard, in events or not."""

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

    from ccnet.network.model import released_inputs

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
            device = next(model.parameters()).device
            model(*released_inputs(*(torch.from_numpy(array).to(device) for array in pack([features], spec))))
    finally:
        for hook in hooks:
            hook.remove()
    steps = min(features.steps, spec.length)
    audio, visual = (values[name][0, :steps, 0].cpu().numpy() for name in ("audio", "visual"))
    return Gates(spec.time_base.to_seconds(np.arange(steps)), audio, visual)


def draw_timeline(
    path: str | Path,
    *,
    truth: VideoAnnotation,
    predictions: Detections,
    gates: Gates | None = None,
    shown: Shown | None = None,
    min_score: float = 0.2,
) -> None:
    """Write the picture of `timeline_figure` as PNG or SVG. Raises MissingDependency without matplotlib."""
    figure = timeline_figure(truth=truth, predictions=predictions, gates=gates, shown=shown, min_score=min_score)
    save_figure(figure, path)


def timeline_figure(
    *,
    truth: VideoAnnotation,
    predictions: Detections,
    gates: Gates | None = None,
    shown: Shown | None = None,
    min_score: float = 0.2,
) -> Any:
    """Draw a video as a matplotlib figure: a lane per class with ground truth and predictions, the gate curves below.

    Args:
        truth: the video's annotation.
        predictions: those with a score of at least `min_score` are drawn, more opaque the higher the score.
        gates: see `read_gates`; without them, the lanes alone are drawn.
        shown: for synthetic features, adds what is seen and what is heard to every lane.

    Raises MissingDependency without matplotlib.
    """
    drawn = predictions.scores >= min_score
    classes = sorted({*truth.labels.tolist(), *predictions.labels[drawn].tolist(), *(_classes(shown) if shown else ())})
    lanes_height = 0.75 * max(1, len(classes))
    figure = new_figure(11, (3.6 if gates else 1.4) + lanes_height)
    if gates:
        lanes, curves = figure.subplots(2, 1, sharex=True, height_ratios=[lanes_height + 0.6, 2.0])
    else:
        lanes = curves = figure.subplots()

    rows = ("seen", "heard", "ground truth", "predicted") if shown else ("ground truth", "predicted")
    for lane, label in enumerate(classes):
        heights = {row: lane + 0.5 + _BAR * (i - (len(rows) - 1) / 2) for i, row in enumerate(rows)}
        if shown:
            for row, presence in (("seen", shown.seen), ("heard", shown.heard)):
                for start, end in _runs(presence[label] > 0):
                    _bar(lanes, heights, row, start / shown.fps, end / shown.fps)
        for start, end in truth.segments[truth.labels == label]:
            _bar(lanes, heights, "ground truth", start, end)
        chosen = drawn & (predictions.labels == label)
        events = zip(predictions.segments[chosen], predictions.scores[chosen].tolist(), strict=True)
        for (start, end), score in reversed(list(events)):  # the best on top
            _bar(lanes, heights, "predicted", start, end, alpha=0.25 + 0.75 * score)
            if end - start > 0.03 * truth.duration:
                place = {"ha": "center", "va": "center"}
                lanes.text((start + end) / 2, heights["predicted"], f"{score:.2f}", color="white", fontsize=7, **place)
        if lane:
            lanes.axhline(lane, color="0.85", linewidth=0.8)
    lanes.set_ylim(max(1, len(classes)), 0)
    lanes.set_yticks([i + 0.5 for i in range(len(classes))], [predictions.label_names[label] for label in classes])
    lanes.tick_params(axis="y", length=0)
    names = {row: row if row != "predicted" else f"predicted (score >= {min_score:g})" for row in rows}
    handles = [_patch(_COLORS[row], names[row]) for row in rows]
    lanes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(rows), frameon=False)

    if gates:
        curves.plot(gates.seconds, gates.audio, color=_AUDIO_LINE, label="$g_a$: from audio, gates the visual stream")
        curves.plot(gates.seconds, gates.visual, color=_VISUAL_LINE, label="$g_v$: from video, gates the audio stream")
        for start, end in truth.segments:
            curves.axvspan(start, end, color=_COLORS["ground truth"], alpha=0.1, linewidth=0)
        curves.set(ylabel="gate, finest level", ylim=(-0.03, 1.03))
        curves.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2, frameon=False)
    curves.set(xlabel="seconds", xlim=(0, truth.duration))
    figure.suptitle(f"{truth.video_id}: {len(truth.labels)} events in {truth.duration:.1f} s")
    return figure


def plot_bench(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw engine and end-to-end latency per call (p50, shaded to p95) and stream throughput of every candidate.

    Raises MissingDependency without matplotlib.
    """
    figure = new_figure(11, 4.5)
    latency, throughput = figure.subplots(1, 2)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault(row["candidate"], []).append(row)
    for i, (name, rows) in enumerate(groups.items()):
        color = f"C{i % 10}"
        batches = [row["batch"] for row in rows]
        engine = [row["engine_ms"] for row in rows]
        latency.plot(batches, [e["p50"] for e in engine], "o-", color=color, label=name)
        latency.fill_between(batches, [e["p50"] for e in engine], [e["p95"] for e in engine], color=color, alpha=0.15)
        latency.plot(batches, [row["end_to_end_ms"]["p50"] for row in rows], "x:", color=color)
        rates = [row["stream_videos_per_second"]["per_second"] for row in rows]
        throughput.plot(batches, rates, "o-", color=color, label=name)
    latency.set(xlabel="batch", ylabel="ms per call", yscale="log", title="engine (solid, to p95), end to end (dotted)")
    throughput.set(xlabel="batch", ylabel="videos per second", title="stream: read, infer and decode overlapped")
    batches = sorted({row["batch"] for row in report["rows"]})
    for axes in (latency, throughput):
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
    throughput.margins(y=0.1)
    throughput.set_ylim(bottom=0)
    latency.legend(fontsize="small")
    machine = report["machine"]
    gpu = "".join(f", {g['name']}" for g in machine["gpus"] or ())
    figure.suptitle(f"{machine['cpu']}, {machine['cores']} cores{gpu}", fontsize="small")
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of a size in inches. Raises MissingDependency without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing("matplotlib", "drawing") from error
    return Figure(figsize=(width, height), layout="constrained")


def rendered(figure: Any) -> npt.NDArray[np.uint8]:
    """Return a matplotlib figure as an image [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(80)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure as SVG where `path` says so, else as PNG: atomically, without a date in it."""
    import matplotlib as mpl

    drawn = io.BytesIO()
    if Path(path).suffix.lower() == ".svg":
        with mpl.rc_context({"svg.hashsalt": "ccnet"}):  # the same ids in every run
            figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    else:
        figure.savefig(drawn, format="png", dpi=110, metadata={"Software": None})
    with atomic_file(path) as stream:
        stream.write(drawn.getvalue())


def _classes(shown: Shown) -> list[int]:
    return np.flatnonzero(shown.seen.any(axis=1) | shown.heard.any(axis=1)).tolist()


def _runs(present: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield first and end (exclusive) of every stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], present, [False]))))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _bar(axes: Any, heights: Mapping[str, float], row: str, start: float, end: float, alpha: float = 1.0) -> None:
    height, color = 0.85 * _BAR, _COLORS[row]
    axes.barh(heights[row], end - start, left=start, height=height, color=color, alpha=alpha, linewidth=0)


def _patch(color: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)
