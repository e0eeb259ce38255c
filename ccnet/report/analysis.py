"""The analysis of one model's predictions: the metric, precision and recall, calibration, errors.

Shapes:  N predictions   M ground-truth events   K tIoU thresholds   C classes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ccnet.report.errors import BACKGROUND, BOTH, BOUNDARY, DUPLICATE, KINDS, LABEL, MISSED, Cost, Judged, costs, judge
from ccnet.report.errors import working_score as best_working_score
from ccnet.report.tables import (
    Flags,
    Floats,
    Integers,
    Predicted,
    Truth,
    find_closest,
    match_tables,
    prediction_table,
    truth_table,
)
from ccnet.report.traits import counts, traits_of
from runtime.annotations import Annotations
from runtime.detections import Detections
from runtime.evaluation import TIOU, Evaluation, evaluate

AT = 0.5
"""tIoU threshold of everything that is shown for one threshold."""
BINS = 10
"""Bins of equal width of the calibration."""
_POINTS = 48
"""Points of a precision-recall curve at most."""


@dataclass(frozen=True)
class Bin:
    """Predictions of similar scores."""

    count: int
    score: float
    """Their mean score."""
    precision: float
    """Share of them that is right at `AT`."""


@dataclass(frozen=True)
class Analysis:
    """What is known of one model's predictions on one subset."""

    name: str
    evaluation: Evaluation
    predicted: Predicted
    judged: Judged
    """At `AT`."""
    score: float
    """The working score: of the best F1 at `AT`."""
    precision: float
    """Of predictions with at least the working score, at `AT`."""
    recall: float
    costs: list[Cost]
    """By kind of error."""
    cases: dict[str, int]
    """By kind of error: predictions with at least the working score, or events."""
    traits: dict[str, dict[str, list[int]]]
    """By kind of error, then by trait: how many of those cases are what; of an error about an annotated event, that."""
    curves: list[tuple[Floats, Floats]]
    """[C] recall and interpolated precision at `AT`, from the best score on; empty for a class without ground truth."""
    bins: list[Bin]
    """From low scores to high ones; empty ones have count 0."""
    calibration_error: float
    """Mean distance of score and precision over the predictions, by bin (ECE)."""


def analyse(name: str, predictions: Mapping[str, Detections], annotations: Annotations, subset: str) -> Analysis:
    """Analyse predictions, by video id, on one subset. Raises as `runtime.evaluation.evaluate`."""
    evaluation = evaluate(predictions, annotations, subset)
    videos = annotations.subset(subset)
    truth = truth_table(videos, len(annotations.labels))
    predicted = prediction_table(videos, predictions)
    matching = match_tables(predicted, truth, TIOU)
    at = TIOU.index(AT)
    hit, events = matching.hit[at], int(matching.counted.sum())
    score = best_working_score(predicted, hit, events)
    closest = find_closest(predicted, truth, matching.counted)
    judged = judge(predicted, truth, closest, matching, AT, at, score)
    strong = predicted.scores >= np.float32(score)
    cases, traits = _cases(predicted, truth, judged, strong)
    bins = _calibration(predicted, hit)
    return Analysis(
        name=name,
        evaluation=evaluation,
        predicted=predicted,
        judged=judged,
        score=score,
        precision=float(hit[strong].mean()) if strong.any() else 0.0,
        recall=float(hit[strong].sum() / events),
        costs=costs(predicted, truth, matching, TIOU, score),
        cases=cases,
        traits=traits,
        curves=[_curve(predicted, hit, label, count) for label, count in enumerate(_support(truth, matching.counted))],
        bins=bins,
        calibration_error=sum(b.count * abs(b.score - b.precision) for b in bins) / max(len(hit), 1),
    )


def truth_traits(truth: Truth) -> dict[str, list[int]]:
    """Return how many of all annotated events are what, by trait."""
    everything = np.arange(len(truth.labels))
    found = traits_of(truth.video, truth.segments, truth.labels, truth, everything)
    return counts(found, np.ones(len(everything), np.bool_))


def _support(truth: Truth, counted: Flags) -> list[int]:
    support: list[int] = np.bincount(truth.labels[counted], minlength=truth.num_classes).tolist()
    return support


def _cases(
    predicted: Predicted, truth: Truth, judged: Judged, strong: Flags
) -> tuple[dict[str, int], dict[str, dict[str, list[int]]]]:
    """Return the number of cases of each kind of error, and their traits."""
    everything = np.arange(len(truth.labels))
    of_events = traits_of(truth.video, truth.segments, truth.labels, truth, everything)
    cases, traits = {}, {}
    for kind in (DUPLICATE, BOUNDARY, LABEL, BOTH, BACKGROUND):
        wrong = strong & (judged.kinds == kind)
        cases[KINDS[kind]] = int(wrong.sum())
        if kind == BACKGROUND:
            some = predicted.take(wrong)
            nothing: Integers = np.full(len(some.labels), -1)
            found = traits_of(some.video, some.segments, some.labels, truth, nothing)
        else:
            found = {name: values[judged.targets[wrong]] for name, values in of_events.items()}
        traits[KINDS[kind]] = counts(found, np.ones(int(wrong.sum()), np.bool_))
    cases[MISSED] = int(judged.missed.sum())
    traits[MISSED] = counts(of_events, judged.missed)
    return cases, traits


def _curve(predicted: Predicted, hit: Flags, label: int, support: int) -> tuple[Floats, Floats]:
    """Return recall and interpolated precision of one class; the area under it, as steps, is its AP."""
    if support == 0:
        return np.empty(0), np.empty(0)
    numbers = np.flatnonzero(predicted.labels == label)
    hits = np.cumsum(hit[numbers[np.argsort(-predicted.scores[numbers], kind="stable")]])
    ranks = np.flatnonzero(np.diff(hits, prepend=0))
    recall = np.arange(1, len(ranks) + 1) / support
    precision = np.maximum.accumulate((hits[ranks] / (ranks + 1))[::-1])[::-1]
    if len(ranks) > _POINTS:
        few = np.unique(np.linspace(0, len(ranks) - 1, _POINTS).round().astype(np.int64))
        recall, precision = recall[few], precision[few]
    return recall, precision


def _calibration(predicted: Predicted, hit: Flags) -> list[Bin]:
    place = np.minimum((predicted.scores * BINS).astype(np.int64), BINS - 1)
    bins = []
    for number in range(BINS):
        here = place == number
        count = int(here.sum())
        mean, right = (float(predicted.scores[here].mean()), float(hit[here].mean())) if count else (0.0, 0.0)
        bins.append(Bin(count, mean, right))
    return bins
