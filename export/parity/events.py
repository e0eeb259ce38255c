"""Are these the same events? Matching of two backends' detections, and the mAP of each.

Shapes:  N events of one video   M annotated events   K thresholds
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.parity.inputs import ParityVideo
from export.parity.reference import Outputs
from export.parity.tolerances import EVENT_SCORE
from runtime.average_precision import average_precision
from runtime.detections import Detections
from runtime.postprocess import detect
from runtime.spec import ModelSpec

TIOU_THRESHOLDS = tuple(round(0.1 * k, 1) for k in range(1, 10))
"""Thresholds of mAP Avg."""
TIE_RUNS = 4
"""How often the reference is looked at with moved logits: a tie falls either way in half of them."""
SAME_SCORE = 0.2
"""Scores further apart are not of the same event, however well the segments agree."""
FEWEST_EVENTS = 20
"""With fewer events above `EVENT_SCORE` the best this many are judged: a check without events verifies nothing."""
_NORMAL = 1.96
"""Of a 95% interval."""
_JACKKNIFE_GROUPS = 24
KNOWING_MAP = 0.01
"""Below this mAP the reference does not know the annotated events, so their mAP says nothing about the candidate."""

_Events = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""Segments [M, 2] and labels [M] of one video."""


@dataclass(frozen=True, kw_only=True)
class EventAgreement:
    """How many of the reference's events the candidate finds too."""

    threshold: float
    """Events of the reference above this score are judged."""
    events: int
    matched: int
    max_score_drift: float
    mean_score_drift: float
    lost: tuple[str, ...]
    """The first unmatched events, in words."""

    @property
    def share(self) -> float:
        return self.matched / self.events if self.events else 1.0

    @property
    def uncertainty(self) -> float:
        """How far above `share` the true one may well lie: to the end of Wilson's 95% interval."""
        if self.matched == self.events:
            return 0.0
        n, z2 = self.events, _NORMAL * _NORMAL
        spread = _NORMAL * math.sqrt(self.share * (1 - self.share) / n + z2 / (4 * n * n))
        return (self.share + z2 / (2 * n) + spread) / (1 + z2 / n) - self.share


@dataclass(frozen=True, kw_only=True)
class MapAgreement:
    """mAP Avg of both sides on the same ground truth."""

    ground_truth: str
    """`annotations` (a person's), `synthetic events`, or `reference events` where the reference knows nothing about
    either."""
    events: int
    class_events: dict[int, int]
    """Events of each class that has some."""
    reference: float
    candidate: float
    uncertainty: float
    """Half the 95% interval of the difference, from leaving out groups of videos; not less than what one event of the
    rarest class is worth."""

    @property
    def difference(self) -> float:
        return abs(self.candidate - self.reference)


def detections(outputs: Outputs, videos: Sequence[ParityVideo], spec: ModelSpec, *, keep: int = 1) -> list[Detections]:
    """Post-process every video; `keep` times as many events as `spec.post.max_segments`."""
    post = dataclasses.replace(spec.post, max_segments=keep * spec.post.max_segments)
    return [
        detect(logits, offsets, valid_steps=video.features.steps, duration=video.duration, spec=spec, post=post)
        for video, logits, offsets in zip(videos, outputs.logits, outputs.offsets, strict=True)
    ]


def match_events(
    candidate: Sequence[Detections], reference: Sequence[Detections], videos: Sequence[ParityVideo], least_tiou: float
) -> EventAgreement:
    """Look for every event of the reference above the threshold among the candidate's of the same video and class.

    The same event has a tIoU above `least_tiou` and a score within `SAME_SCORE`. One to one, the reference's best
    first, each taking the free one with the highest tIoU. The candidate may list more events than are kept, so that a
    tie for the last place is no difference.
    """
    threshold = judged_above(reference)
    drifts: list[float] = []
    lost: list[str] = []
    for found, wanted, video in zip(candidate, reference, videos, strict=True):
        for event, (match, overlap) in enumerate(_matches(found, wanted, threshold, least_tiou)):
            if match is not None:
                drifts.append(abs(float(found.scores[match]) - float(wanted.scores[event])))
            else:
                segment, score, label = wanted.segments[event], wanted.scores[event], wanted.labels[event]
                nearest = f"best tIoU {overlap:.3f}" if overlap > 0 else "nothing near it"
                name = wanted.label_names[label]
                lost.append(f"{video.name}: {name} {segment[0]:.2f}-{segment[1]:.2f} s, score {score:.3f}: {nearest}")
    return EventAgreement(
        threshold=threshold,
        events=len(drifts) + len(lost),
        matched=len(drifts),
        max_score_drift=max(drifts, default=0.0),
        mean_score_drift=float(np.mean(drifts)) if drifts else 0.0,
        lost=tuple(lost[:5]),
    )


def _matches(
    found: Detections, wanted: Detections, threshold: float, least_tiou: float
) -> list[tuple[int | None, float]]:
    """Return for each wanted event above the threshold the index of the same one among those found, and their tIoU.

    Where there is none, None and the highest tIoU of those that were left.
    """
    matches: list[tuple[int | None, float]] = []
    free = np.ones(len(found), bool)
    for segment, score, label in zip(wanted.segments, wanted.scores, wanted.labels, strict=True):
        if score <= threshold:
            break
        alike = free & (found.labels == label) & (np.abs(found.scores - score) <= SAME_SCORE)
        overlap = np.where(alike, tiou(segment, found.segments), 0.0)
        best = int(np.argmax(overlap)) if len(overlap) else None
        if best is not None and overlap[best] > least_tiou:
            free[best] = False
            matches.append((best, float(overlap[best])))
        else:
            matches.append((None, float(overlap.max(initial=0.0))))
    return matches


def without_ties(
    outputs: Outputs, videos: Sequence[ParityVideo], spec: ModelSpec, amplitude: float, least_tiou: float
) -> list[Detections]:
    """Return the events of outputs that are found again when the logits move at random, by up to `amplitude`."""
    kept = detections(outputs, videos, spec)
    for seed in range(TIE_RUNS if amplitude else 0):
        noise = np.random.default_rng(seed).uniform(-amplitude, amplitude, outputs.logits.shape)
        moved = Outputs(outputs.logits + noise.astype(np.float32), outputs.offsets, outputs.source)
        for i, found in enumerate(detections(moved, videos, spec, keep=2)):
            matches = _matches(found, kept[i], -1.0, least_tiou)
            chosen = np.array([event for event, (match, _) in enumerate(matches) if match is not None], np.int64)
            all_of = kept[i]
            kept[i] = Detections(
                all_of.segments[chosen], all_of.scores[chosen], all_of.labels[chosen], all_of.label_names
            )
    return kept


def judged_above(reference: Sequence[Detections]) -> float:
    """Return `EVENT_SCORE`, or less where fewer than `FEWEST_EVENTS` events score above it."""
    scores = np.sort(np.concatenate([events.scores for events in reference]) if reference else np.zeros(0))[::-1]
    if np.count_nonzero(scores > EVENT_SCORE) >= FEWEST_EVENTS or not len(scores):
        return EVENT_SCORE
    return float(scores[FEWEST_EVENTS]) if len(scores) > FEWEST_EVENTS else 0.0


def compare_map(
    candidate: Sequence[Detections], reference: Sequence[Detections], videos: Sequence[ParityVideo], num_classes: int
) -> MapAgreement:
    """Compare mAP Avg on the annotated events, or on the reference's own where it knows nothing about those."""
    truth: list[_Events] = [(video.segments, video.labels) for video in videos]
    kind = "annotations" if all(video.annotated for video in videos if len(video.labels)) else "synthetic events"
    known = average_map(reference, truth, num_classes)
    if known < KNOWING_MAP:
        threshold = judged_above(reference)
        truth = [(d.segments[d.scores > threshold], d.labels[d.scores > threshold]) for d in reference]
        kind, known = "reference events", average_map(reference, truth, num_classes)
    labels, counts = np.unique(np.concatenate([labels for _, labels in truth]), return_counts=True)
    return MapAgreement(
        ground_truth=kind,
        events=int(counts.sum()),
        class_events={int(label): int(count) for label, count in zip(labels, counts, strict=True)},
        reference=known,
        candidate=average_map(candidate, truth, num_classes),
        uncertainty=_map_uncertainty(candidate, reference, truth, num_classes),
    )


def _map_uncertainty(
    candidate: Sequence[Detections], reference: Sequence[Detections], truth: Sequence[_Events], num_classes: int
) -> float:
    """Return half the 95% interval of the difference of both mAP by the jackknife, see `MapAgreement.uncertainty`."""
    counts = np.bincount(np.concatenate([labels for _, labels in truth]), minlength=num_classes)
    if not counts.any():
        return 0.0
    one_event = 1 / (np.count_nonzero(counts) * counts[counts > 0].min())
    groups = min(len(truth), _JACKKNIFE_GROUPS)
    if groups < 2:
        return float(one_event)
    differences = []
    for group in range(groups):
        rows = [i for i in range(len(truth)) if i % groups != group]
        both = (
            average_map([side[i] for i in rows], [truth[i] for i in rows], num_classes)
            for side in (candidate, reference)
        )
        ours, theirs = both
        differences.append(ours - theirs)
    error = math.sqrt((groups - 1) * float(np.var(differences)))
    # Student's quantile for one degree of freedom less than there are groups, as a series of the normal one.
    spare = groups - 1
    quantile = _NORMAL + 2.37 / spare + 2.82 / spare**2 + 2.56 / spare**3
    return max(float(one_event), quantile * error)


def average_map(found: Sequence[Detections], truth: Sequence[_Events], num_classes: int) -> float:
    """Return mAP Avg over 0.1:0.1:0.9 and the classes that occur; 0 where no event is annotated."""
    if not any(len(labels) for _, labels in truth):
        return 0.0
    precision = average_precision(
        np.repeat(np.arange(len(found)), [len(events) for events in found]),
        np.concatenate([events.segments for events in found]),
        np.concatenate([events.scores for events in found]),
        np.concatenate([events.labels for events in found]),
        np.repeat(np.arange(len(truth)), [len(labels) for _, labels in truth]),
        np.concatenate([segments for segments, _ in truth]),
        np.concatenate([labels for _, labels in truth]),
        num_classes,
        TIOU_THRESHOLDS,
    )
    return float(np.nanmean(precision))


def tiou(segment: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the temporal IoU of segment [2] with others [N, 2] -> [N]."""
    shared = np.minimum(segment[1], others[:, 1]) - np.maximum(segment[0], others[:, 0])
    together = np.maximum(segment[1], others[:, 1]) - np.minimum(segment[0], others[:, 0])
    overlap: npt.NDArray[np.float64] = np.maximum(shared, 0.0) / np.maximum(together, 1e-9)
    return overlap
