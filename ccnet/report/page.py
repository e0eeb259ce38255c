"""The report as one HTML file: the analysis and the shown videos as JSON, and a page that draws them.

The page is plain HTML, CSS and JavaScript (the files of `page/`), put into one text; it asks for nothing from
elsewhere, and its content security policy forbids it to.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from math import isfinite
from typing import Any

import numpy as np

from ccnet.plots import Gates
from ccnet.report.analysis import AT, Analysis, truth_traits
from ccnet.report.errors import KINDS, MISSED, RIGHT
from ccnet.report.tables import truth_table
from ccnet.report.traits import TRAITS
from runtime.annotations import Annotations, VideoAnnotation
from runtime.evaluation import BUCKET_TIOU, REPORTED, TIOU

MODELS = 2
"""Models that a page compares at most."""
_STYLE = ("page.css",)
_SCRIPTS = ("base.js", "charts.js", "summary.js", "timeline.js", "videos.js")


@dataclass(frozen=True)
class Model:
    """One model's part of a page."""

    analysis: Analysis
    source: str
    """File or folder that the predictions are from."""
    gates: Mapping[str, Gates] = field(default_factory=dict)
    """By video id; of the shown videos, where there are any."""


def choose_videos(analyses: Sequence[Analysis], annotations: Annotations, subset: str, count: int) -> list[str]:
    """Return the ids of the `count` videos with the most errors, in file order.

    An error is a wrong prediction with at least the model's working score, or a missed event, of any model.
    """
    videos = annotations.subset(subset)
    truth = truth_table(videos, len(annotations.labels))
    errors = np.zeros(len(videos), np.int64)
    for analysis in analyses:
        predicted, judged = analysis.predicted, analysis.judged
        wrong = (predicted.scores >= np.float32(analysis.score)) & (judged.kinds != RIGHT)
        errors += np.bincount(predicted.video[wrong], minlength=len(videos))
        errors += np.bincount(truth.video[judged.missed], minlength=len(videos))
    worst = np.argsort(-errors, kind="stable")[:count]
    return [videos[i].video_id for i in sorted(worst.tolist())]


def render(
    title: str,
    models: Sequence[Model],
    annotations: Annotations,
    subset: str,
    *,
    shown: Sequence[str],
    media: Mapping[str, str] | None = None,
) -> str:
    """Return the page.

    Args:
        models: one or two.
        shown: ids of the videos whose timelines the page has.
        media: where the page finds the video of an id, as a URL relative to it.
    """
    data = _content(title, models, annotations, subset, shown, media or {})
    page = _asset("page.html")
    parts = {
        "@TITLE@": html.escape(title),
        "@STYLE@": "".join(map(_asset, _STYLE)),
        "@DATA@": script_json(data),
        "@SCRIPT@": "".join(map(_asset, _SCRIPTS)),
    }
    text = []
    for mark, part in parts.items():
        before, page = page.split(mark)
        text += [before, part]
    return "".join([*text, page])


def script_json(data: Any) -> str:
    """Return JSON that can stand in a `<script>`: no text in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return resources.files("ccnet.report").joinpath("page", name).read_text(encoding="utf-8")


def _content(
    title: str,
    models: Sequence[Model],
    annotations: Annotations,
    subset: str,
    shown: Sequence[str],
    media: Mapping[str, str],
) -> dict[str, Any]:
    """Return everything that the page shows. Times are in hundredths of seconds, shares in thousandths."""
    videos = annotations.subset(subset)
    truth = truth_table(videos, len(annotations.labels))
    number_of = {video.video_id: i for i, video in enumerate(videos)}
    first = models[0].analysis.evaluation
    return {
        "title": title,
        "subset": subset,
        "annotations": str(annotations.path),
        "tiou": TIOU,
        "reported": REPORTED,
        "at": AT,
        "bucketTiou": BUCKET_TIOU,
        "classes": annotations.labels,
        "support": first.class_events,
        "kinds": [*KINDS, MISSED],
        "traits": {name: {"values": values, "all": truth_traits(truth)[name]} for name, values in TRAITS.items()},
        "total": len(videos),
        "models": [_model(model) for model in models],
        "videos": [
            _video(videos[i], i, models, int(np.searchsorted(truth.video, i)), media)
            for i in (number_of[video_id] for video_id in shown)
        ],
    }


def _model(model: Model) -> dict[str, Any]:
    analysis = model.analysis
    evaluation = analysis.evaluation
    return {
        "name": analysis.name,
        "source": model.source,
        "map": [_round(value) for value in evaluation.map_at.values()],
        "average": _round(evaluation.average_map),
        "ap": [None if np.isnan(column[0]) else _mille(column) for column in evaluation.ap.T],
        "curves": [[_mille(recall), _mille(precision)] for recall, precision in analysis.curves],
        "buckets": [[b.above, b.up_to if isfinite(b.up_to) else None, b.events, b.found] for b in evaluation.buckets],
        "score": float(analysis.score),
        "precision": _round(analysis.precision),
        "recall": _round(analysis.recall),
        "errors": [
            {
                "kind": cost.kind,
                "cases": analysis.cases[cost.kind],
                "gains": [_round(gain) for gain in cost.gains],
                "traits": analysis.traits[cost.kind],
            }
            for cost in analysis.costs
        ],
        "bins": [[b.count, _round(b.score), _round(b.precision)] for b in analysis.bins],
        "calibration": _round(analysis.calibration_error),
        "missing": evaluation.missing,
        "predictions": evaluation.predictions,
    }


def _video(
    video: VideoAnnotation, number: int, models: Sequence[Model], offset: int, media: Mapping[str, str]
) -> dict[str, Any]:
    """Return one video; its events as flat lists of whole numbers."""
    times = np.rint(video.segments * 100).astype(np.int64)
    events = np.column_stack([times, video.labels])
    return {
        "id": video.video_id,
        "duration": round(video.duration * 100),
        "media": media.get(video.video_id),
        "truth": events.ravel().tolist(),
        "models": [_events(model, number, offset, len(video.labels)) for model in models],
        "gates": [_gates(model.gates.get(video.video_id)) for model in models],
    }


def _events(model: Model, number: int, offset: int, count: int) -> dict[str, Any]:
    """Return a model's events of one video: start, end, label, score, kind, number of the event that it is about."""
    predicted, judged = model.analysis.predicted, model.analysis.judged
    here = slice(*np.searchsorted(predicted.video, [number, number + 1]).tolist())
    targets = judged.targets[here]
    columns = [
        np.rint(predicted.segments[here] * 100).astype(np.int64),
        predicted.labels[here],
        np.rint(predicted.scores[here] * 1000).astype(np.int64),
        judged.kinds[here],
        np.where(targets >= 0, targets - offset, -1),
    ]
    return {
        "events": np.column_stack(columns).ravel().tolist(),
        "missed": np.flatnonzero(judged.missed[offset : offset + count]).tolist(),
    }


def _gates(gates: Gates | None) -> dict[str, Any] | None:
    if gates is None or len(gates.seconds) == 0:
        return None
    step = float(np.diff(gates.seconds).mean()) if len(gates.seconds) > 1 else 1.0
    return {
        "start": round(float(gates.seconds[0]), 4),
        "step": round(step, 6),
        "audio": _bytes(gates.audio),
        "visual": _bytes(gates.visual),
    }


def _bytes(curve: Any) -> str:
    """Return a curve in [0, 1] as one byte a step, in base64."""
    return base64.b64encode(np.rint(np.clip(curve, 0, 1) * 255).astype(np.uint8)).decode()


def _round(value: float) -> float:
    return round(float(value), 5)


def _mille(values: Any) -> list[int]:
    whole: list[int] = np.rint(np.asarray(values) * 1000).astype(np.int64).tolist()
    return whole
