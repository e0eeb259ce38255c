"""What kinds of errors predictions hold, and how much mAP each kind costs.

A predicted event that the metric counts as wrong at a tIoU threshold t is of the first kind that fits:

1. duplicate: an event of its class has a tIoU of t or more with it, but a better prediction took that event;
2. bad boundary: an event of its class has a tIoU of at least 0.1;
3. wrong label: an event of another class has a tIoU of t or more;
4. wrong label and boundary: an event of another class has a tIoU of at least 0.1;
5. background: no event does.

An annotated event is missed when no right prediction with a score of at least the working score took it, and no
prediction of that score is a bad boundary or a wrong label of it.

The cost of a kind is the gain in mAP, by the metric itself, when an oracle mends that kind alone: duplicates,
background and what is wrong in label and boundary are removed; of the bad boundaries (wrong labels) of an event that
was not found the best one gets the event's segment (and label), the others are removed; missed events are added as
predictions with the working score. The kinds are TIDE's (Bolya et al., ECCV 2020), as DETAD (Alwassel et al., ECCV
2018) has them for segments; the oracle for missed events is ours: it leaves the ground truth as it is.

Shapes:  N predictions   M ground-truth events   K tIoU thresholds   C classes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ccnet.report.tables import Closest, Flags, Floats, Integers, Matching, Predicted, Truth, find_closest, match_tables

RIGHT, DUPLICATE, BOUNDARY, LABEL, BOTH, BACKGROUND = range(6)
KINDS = ("right", "duplicate", "bad boundary", "wrong label", "wrong label and boundary", "background")
"""Name of each kind of predicted event."""
MISSED = "missed"
NEAR = 0.1
"""tIoU from which on a prediction is of an event, however badly."""


class Judged(NamedTuple):
    """The predictions and events at one threshold."""

    kinds: Integers
    """[N] of `KINDS`."""
    targets: Integers
    """[N] the annotated event that a prediction is about: of a duplicate, a bad boundary, a wrong label; else -1."""
    missed: Flags
    """[M]"""


@dataclass(frozen=True)
class Cost:
    """What one kind of error costs."""

    kind: str
    gains: Floats
    """[K] mAP with the kind mended less mAP as it is, at each threshold."""


def working_score(predicted: Predicted, hit: Flags, events: int) -> float:
    """Return the score above which predictions have the best F1 over all classes, given what is right [N].

    1 where nothing is right.
    """
    order = np.argsort(-predicted.scores, kind="stable")
    hits = np.cumsum(hit[order])
    if len(hits) == 0 or hits[-1] == 0:
        return 1.0
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + events)
    last_of_score = np.append(np.diff(predicted.scores[order]) < 0, True)
    return float(predicted.scores[order][np.argmax(np.where(last_of_score, f1, 0))])


def judge(
    predicted: Predicted,
    truth: Truth,
    closest: Closest,
    matching: Matching,
    threshold: float,
    index: int,
    score: float,
) -> Judged:
    """Name the kind of every prediction, and the missed events.

    Args:
        matching: at several thresholds, of which `threshold` is number `index`.
        score: the working score.
    """
    same = closest.same_tiou >= NEAR
    kinds = np.select(
        [
            matching.hit[index],
            closest.same_tiou >= threshold,
            same,
            closest.other_tiou >= threshold,
            closest.other_tiou >= NEAR,
        ],
        [RIGHT, DUPLICATE, BOUNDARY, LABEL, BOTH],
        BACKGROUND,
    ).astype(np.int64)
    of_same, of_other = np.isin(kinds, (RIGHT, DUPLICATE, BOUNDARY)), np.isin(kinds, (LABEL, BOTH))
    targets = np.select([of_same, of_other], [closest.same, closest.other], -1)

    strong = predicted.scores >= np.float32(score)
    seen = np.zeros(len(truth.labels), np.bool_)
    seen[targets[strong & np.isin(kinds, (BOUNDARY, LABEL))]] = True
    seen |= match_tables(predicted.take(strong), truth, [threshold]).found[0]
    return Judged(kinds, targets, matching.counted & ~seen)


def costs(
    predicted: Predicted, truth: Truth, matching: Matching, thresholds: Sequence[float], score: float
) -> list[Cost]:
    """Return the cost of every kind of error at every threshold, in the order of `KINDS` and then missed events."""
    closest = find_closest(predicted, truth, matching.counted)
    gains = np.zeros((len(KINDS), len(thresholds)))
    for index, threshold in enumerate(thresholds):
        judged = judge(predicted, truth, closest, matching, threshold, index, score)
        before = np.nanmean(matching.ap[index])
        for row, kind in enumerate([*range(1, len(KINDS)), MISSED]):
            mended = _mend(kind, predicted, truth, judged, matching.found[index], score)
            gains[row, index] = np.nanmean(match_tables(mended, truth, [threshold]).ap[0]) - before
    return [Cost(name, gains[row]) for row, name in enumerate([*KINDS[1:], MISSED])]


def _mend(kind: int | str, predicted: Predicted, truth: Truth, judged: Judged, found: Flags, score: float) -> Predicted:
    """Return the predictions without one kind of error."""
    if kind == MISSED:
        events = np.flatnonzero(judged.missed)
        return Predicted(
            np.concatenate([predicted.video, truth.video[events]]),
            np.concatenate([predicted.segments, truth.segments[events]]),
            np.concatenate([predicted.labels, truth.labels[events]]),
            np.concatenate([predicted.scores, np.full(len(events), score, np.float32)]),
        )
    wrong = judged.kinds == kind
    if kind not in (BOUNDARY, LABEL):
        return predicted.take(~wrong)
    mended = _best_of_each(wrong & ~found[judged.targets], judged.targets, predicted)
    segments, labels = predicted.segments.copy(), predicted.labels.copy()
    segments[mended] = truth.segments[judged.targets[mended]]
    labels[mended] = truth.labels[judged.targets[mended]]
    kept = ~wrong
    kept[mended] = True
    return predicted.changed(segments, labels).take(kept)


def _best_of_each(candidates: Flags, targets: Integers, predicted: Predicted) -> Integers:
    """Return the number of the best candidate of each target."""
    numbers = np.flatnonzero(candidates)
    numbers = numbers[np.argsort(-predicted.scores[numbers], kind="stable")]
    _, first = np.unique(targets[numbers], return_index=True)
    best: Integers = numbers[first]
    return best
